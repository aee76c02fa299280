"""Where memory is short the edges' weights are made for some receivers at a time.

Weights take most of a step's memory, and a receiver's edges lie side by side: so its message, and the way back, need
only the weights of a stretch of edges. An edge and its way back then have rows of their own, which is twice the work
of making them; so a step is shared out only if it must be.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from ..ops.edge_filter import Edges

ROOM = 1.02
"""How much longer than its longest stretch the room for a share's edges is made."""
ALIGNED = 4
"""Shares begin at multiples of so many receivers, so that their row pointers are aligned to 16 bytes."""


@dataclass(frozen=True)
class Share:
    """Receivers `first` to `last` - 1, with room for their edges: as many as they have candidates."""

    first: int
    last: int
    room: int

    def of(self, edges: Edges) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(row_ptr [last - first + 1], pair [E], place [room]): the rows of these receivers; for their edges the row of
        weights among those of the share; for each of these rows the pair it belongs to. All int32.
        """
        row_ptr, count = edges.row_ptr[self.first : self.last + 1], edges.pair.shape[0]
        number, room = torch.arange(count, dtype=torch.int32, device=row_ptr.device), min(self.room, count)
        places = (number[:room] + row_ptr[0]).clamp(max=count - 1)
        own = (number - row_ptr[0]).clamp(0, room - 1)  # kernels look, in vain, at the edge before an empty row
        return row_ptr, own, edges.pair.index_select(0, places)


def shares(ptr: torch.Tensor, number: int) -> tuple[Share, ...]:
    """About `number` shares of the receivers with candidates ptr [N + 1], of about as many candidates each."""
    ptr = ptr.long().cpu()
    nodes, total = ptr.shape[0] - 1, int(ptr[-1])
    wanted = torch.arange(1, number) * total // number
    cuts = torch.searchsorted(ptr, wanted) // ALIGNED * ALIGNED
    bounds = torch.cat((cuts.new_tensor([0, nodes]), cuts)).unique().tolist()
    pairs = list(itertools.pairwise(bounds))
    longest = max(int(ptr[last] - ptr[first]) for first, last in pairs)
    return tuple(Share(first, last, int(ROOM * longest) + 1) for first, last in pairs)


def hold(parts: tuple[Share, ...], ptr: torch.Tensor) -> bool:
    """Whether the receivers' candidates ptr [N + 1] fit into the shares."""
    ptr = ptr.cpu()
    return all(int(ptr[part.last] - ptr[part.first]) <= part.room for part in parts)
