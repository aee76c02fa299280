"""The edges within the cutoff, out of candidates that stay valid while the atoms move a little.

No derivative goes through it: what it gives are indices and lattice translations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import reference_edge_filter as reference
from ..kernels import edge_filter as kernels
from . import dispatch
from .graph import GraphPlan, row_ptr


class Candidates(NamedTuple):
    """Pairs that may come within the cutoff, in rows by receiver; places behind the last row are not read.

    ptr [N + 1] int32; sender [K] int32; shift [K, 3], angstrom, and unit_shift [K, 3], in cell vectors, of the sender's
    image: the vector is x[receiver] - x[sender] + shift. twin [K] int32: the place of the pair with the opposite
    vector, or the place itself where there is none.
    """

    ptr: torch.Tensor
    sender: torch.Tensor
    shift: torch.Tensor
    unit_shift: torch.Tensor
    twin: torch.Tensor


class Edges(NamedTuple):
    """`capacity` edges sorted by receiver; those behind `count` are idle, from idle nodes to themselves.

    edge_index [2, capacity] int64 (sender, receiver); shifts [capacity, 3], angstrom; unit_shifts [capacity, 3];
    row_ptr [N + idle + 1] int32: where each receiver's edges begin, without the idle ones, which are in no row; sender
    [capacity] int32; pair [capacity] int32: an edge and its twin share one, idle edges the last; edge_of [pairs] int32:
    one of a pair's edges, for pairs without edges an idle one if there is any; count [1] int32, how many are near,
    which may be more than there is room for; moved [1] float32, the largest square of how far an atom has gone, in
    units of `reach`: zero below a half, 2 beyond 1 (and for NaN), where the candidates are out of date.
    """

    edge_index: torch.Tensor
    shifts: torch.Tensor
    unit_shifts: torch.Tensor
    row_ptr: torch.Tensor
    sender: torch.Tensor
    pair: torch.Tensor
    edge_of: torch.Tensor
    count: torch.Tensor
    moved: torch.Tensor

    def plan(self, perm: torch.Tensor) -> GraphPlan:
        """The plan of these edges, the idle ones too, for `ops.graph.given`; perm: 0 .. capacity - 1, int32."""
        nothing, nodes = perm[:0], self.row_ptr.shape[0] - 1
        rows = row_ptr(self.edge_index[1], nodes)
        return GraphPlan(self.edge_index, rows, perm, self.sender, nothing, nothing, nodes)


def edge_filter(
    x: torch.Tensor,
    was: torch.Tensor,
    candidates: Candidates,
    reach: torch.Tensor,
    *,
    cutoff: float,
    capacity: int,
    pairs: int,
    idle: int,
    far: float,
) -> Edges:
    """The candidates nearer than `cutoff`, in their order, and idle edges up to `capacity`.

    x, was: [N + idle, 3] float32 or float64, angstrom, positions now and when the candidates were found. reach: [1],
    how far an atom may have gone since, angstrom. pairs: places for pairs, one more than there can be. idle: how many
    nodes behind the N real ones share the idle edges. far: the length of these, angstrom.

    Raises ValueError for shapes, dtypes or devices that do not fit, and for capacity, pairs or idle below 1.
    """
    _check(x, was, candidates, reach, (capacity, pairs, idle))
    which = dispatch.backend(x)
    dispatch.count("edge_filter", which)
    run = kernels.edge_filter if which == "triton" else reference.edge_filter
    with torch.no_grad():
        return Edges(*run(x.detach(), was, tuple(candidates), reach, cutoff, capacity, pairs, idle, far))


def _check(x, was, candidates: Candidates, reach: torch.Tensor, places: tuple[int, ...]) -> None:
    nodes, listed = candidates.ptr.shape[0] - 1, candidates.sender.shape[0]
    if min(places) < 1:
        raise ValueError(f"capacity, pairs and idle must be at least 1, got {places}")
    if x.ndim != 2 or x.shape[1] != 3 or x.shape[0] < nodes or was.shape != x.shape or nodes < 1:
        raise ValueError(f"x and was must be [{nodes} or more, 3], got {list(x.shape)} and {list(was.shape)}")
    if candidates.shift.shape != (listed, 3) or candidates.unit_shift.shape != (listed, 3):
        raise ValueError(f"candidates: shift and unit_shift must be [{listed}, 3]")
    if candidates.twin.shape != (listed,):
        raise ValueError(f"candidates: twin must be [{listed}], got {list(candidates.twin.shape)}")
    if reach.shape != (1,):
        raise ValueError(f"reach must have shape [1], got {list(reach.shape)}")
    floats = {t.dtype for t in (x, was, candidates.shift, candidates.unit_shift, reach)}
    if len(floats) != 1 or not floats <= {torch.float32, torch.float64}:
        raise ValueError(f"x, was, reach, shift and unit_shift must all be float32 or all float64, got {floats}")
    if {candidates.ptr.dtype, candidates.sender.dtype, candidates.twin.dtype} != {torch.int32}:
        raise ValueError("candidates: ptr, sender and twin must be int32")
    tensors = (x, was, reach, *candidates)
    if len({t.device for t in tensors}) != 1:
        raise ValueError("x, was, reach and candidates must be on one device")
    if not all(t.is_contiguous() for t in tensors):
        raise ValueError("x, was, reach and candidates must be contiguous")
