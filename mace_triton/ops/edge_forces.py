"""The gradients of atoms from those of their edges' harmonics and lengths, as a torch custom op.

It ends a backward pass and has no derivative of its own. GPU tensors (and, under Triton's interpreter, CPU tensors) run
`kernels/edge_forces.py`, others `reference_edge_forces.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference_edge_forces as reference
from . import dispatch


@torch.library.custom_op("mace_triton::edge_forces", mutates_args=())
def _edge_forces(gy: Tensor, gr: Tensor, v: Tensor, row_ptr: Tensor, sender: Tensor) -> tuple[Tensor, Tensor]:
    which = dispatch.backend(v)
    dispatch.count("edge_forces", which)
    if which == "reference":
        return reference.edge_forces(gy, gr, v, row_ptr, sender)
    from ..kernels import edge_forces as kernels

    return kernels.edge_forces(*(t.contiguous() for t in (gy, gr, v, row_ptr, sender)))


@_edge_forces.register_fake
def _(gy, gr, v, row_ptr, sender):
    nodes = row_ptr.shape[0] - 1
    return v.new_empty(nodes, 3), v.new_empty(nodes, 3, 3)


def edge_forces(gy: Tensor, gr: Tensor, v: Tensor, row_ptr: Tensor, sender: Tensor) -> tuple[Tensor, Tensor]:
    """(gx [N, 3], the gradient of the positions; virial [N, 3, 3], the sum of v (x) dE/dv over a receiver's edges).

    gy [E, 4, 9 or 16], gr [E, 1], the gradients of the harmonics (`edge_harmonics`) and lengths of edges v [E, 3] =
    x[receiver] - x[sender] + shift, float64 or float32 alike, sorted by receiver: row_ptr [N + 1] and sender [E]
    int32, as in `GraphPlan`. An edge of length zero moves nothing. Sums over a sender's edges run in any order.

    Raises ValueError for another shape or device, TypeError for another dtype.
    """
    if v.ndim != 2 or v.shape[1] != 3:
        raise ValueError(f"v must have shape [E, 3], got {list(v.shape)}")
    edges = v.shape[0]
    if gy.ndim != 2 or gy.shape[0] != edges or gy.shape[1] not in (4, 9, 16):
        raise ValueError(f"gy must have shape [{edges}, 4, 9 or 16], got {list(gy.shape)}")
    if gr.shape != (edges, 1) or sender.shape != (edges,) or row_ptr.ndim != 1 or row_ptr.shape[0] == 0:
        shapes = [list(t.shape) for t in (gr, sender, row_ptr)]
        raise ValueError(f"gr, sender and row_ptr must be [{edges}, 1], [{edges}] and [N + 1], got {shapes}")
    if v.dtype not in (torch.float64, torch.float32) or {gy.dtype, gr.dtype} != {v.dtype}:
        raise TypeError(f"gy, gr and v must all be float64 or all float32, got {gy.dtype}, {gr.dtype}, {v.dtype}")
    if {row_ptr.dtype, sender.dtype} != {torch.int32}:
        raise TypeError(f"row_ptr and sender must be int32, got {row_ptr.dtype} and {sender.dtype}")
    if len({t.device for t in (gy, gr, v, row_ptr, sender)}) != 1:
        raise ValueError("gy, gr, v, row_ptr and sender must be on one device")
    return _edge_forces(gy, gr, v, row_ptr, sender)
