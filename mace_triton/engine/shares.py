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
from .buckets import bucket

ALIGNED = 4
"""Shares begin at multiples of so many receivers, so that their row pointers are aligned to 16 bytes."""


@dataclass(frozen=True)
class Share:
    """Receivers `first` to `last` - 1, with room for their edges, which is the same in all shares."""

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


def shares(ptr: torch.Tensor, near: torch.Tensor, number: int) -> tuple[Share, ...]:
    """About `number` shares of the receivers with candidates ptr [N + 1], of about as many edges, near [K], each."""
    before = _edges_before(ptr, near)
    nodes, total = before.shape[0] - 1, int(before[-1])
    wanted = torch.arange(1, number) * total // number
    cuts = torch.searchsorted(before, wanted) // ALIGNED * ALIGNED
    bounds = torch.cat((cuts.new_tensor([0, nodes]), cuts)).unique().tolist()
    pairs = list(itertools.pairwise(bounds))
    room = bucket(max(int(before[last] - before[first]) for first, last in pairs))
    return tuple(Share(first, last, room) for first, last in pairs)


def hold(parts: tuple[Share, ...], ptr: torch.Tensor, near: torch.Tensor) -> bool:
    """Whether the edges, those of the candidates ptr [N + 1] that are near [K], fit into the shares."""
    before = _edges_before(ptr, near) if parts else None
    return all(int(before[part.last] - before[part.first]) <= part.room for part in parts)


def overrun(parts: tuple[Share, ...], bounds: torch.Tensor, edges: Edges) -> torch.Tensor:
    """Whether a share has more edges than room. bounds [len(parts) + 1]: where they begin and the last one ends."""
    return edges.row_ptr.index_select(0, bounds).diff().max() > parts[0].room


def _edges_before(ptr: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """[N + 1], on the CPU: how many edges the receivers before each one have."""
    return torch.nn.functional.pad(near.cumsum(0), (1, 0))[ptr.long()].cpu()
