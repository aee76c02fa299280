"""Where memory is short the edges' weights are made for some receivers at a time.

Weights take most of a step's memory, and a receiver's edges lie side by side: so its message, and the way back, need
only the weights of a stretch of edges. An edge and its way back then have rows of their own, which is twice the work
of making them; so a step is shared out only if it must be.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from ..ops.edge_filter import Edges
from .buckets import bucket

ALIGNED = 4
"""Shares begin at multiples of so many receivers, so that their row pointers are aligned to 16 bytes."""


class Share(NamedTuple):
    """Receivers `first` to `last` - 1 and their edges in a step, all int32.

    row_ptr [last - first + 1]: their rows; pair [capacity]: for their edges the row of weights among the share's own;
    place [room]: for each of these rows the pair of edges it belongs to.
    """

    first: int
    last: int
    row_ptr: torch.Tensor
    pair: torch.Tensor
    place: torch.Tensor


class Shares:
    """All receivers, cut at `bounds` (from 0 to their number), with room for the edges of each share."""

    def __init__(self, bounds: list[int], room: int, device: torch.device):
        self.bounds, self.room = bounds, room
        self._bounds = torch.tensor(bounds, device=device)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def hold(self, ptr: torch.Tensor, near: torch.Tensor) -> bool:
        """Whether the edges, those of the candidates ptr [N + 1] that are near [K], fit into the shares."""
        return int(_edges_before(ptr, near)[self.bounds].diff().max()) <= self.room

    def overrun(self, edges: Edges) -> torch.Tensor:
        """Whether a share has more edges than room."""
        return edges.row_ptr.index_select(0, self._bounds).diff().max() > self.room

    def of(self, edges: Edges) -> list[Share]:
        """What a step needs to know of them, made once."""
        starts, count = edges.row_ptr.index_select(0, self._bounds[:-1]), edges.pair.shape[0]
        number, room = torch.arange(count, dtype=torch.int32, device=starts.device), min(self.room, count)
        share = torch.bucketize(number, starts, out_int32=True, right=True).sub_(1)  # the first one starts at 0
        pair = (number - starts.index_select(0, share)).clamp_(max=room - 1)  # those behind the last row are not read
        cuts = zip(itertools.pairwise(self.bounds), starts.split(1), strict=True)
        return [
            Share(
                first,
                last,
                edges.row_ptr[first : last + 1],
                pair,
                edges.pair.index_select(0, (number[:room] + start).clamp_(max=count - 1)),
            )
            for (first, last), start in cuts
        ]


def shares(ptr: torch.Tensor, near: torch.Tensor, number: int) -> Shares:
    """About `number` shares of the receivers with candidates ptr [N + 1], of about as many edges, near [K], each."""
    before = _edges_before(ptr, near)
    nodes, total = before.shape[0] - 1, int(before[-1])
    wanted = torch.arange(1, number) * total // number
    cuts = torch.searchsorted(before, wanted) // ALIGNED * ALIGNED
    bounds = torch.cat((cuts.new_tensor([0, nodes]), cuts)).unique()
    return Shares(bounds.tolist(), bucket(int(before[bounds].diff().max())), ptr.device)


def _edges_before(ptr: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """[N + 1], on the CPU: how many edges the receivers before each one have."""
    return torch.nn.functional.pad(near.cumsum(0), (1, 0))[ptr.long()].cpu()
