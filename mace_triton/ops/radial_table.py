"""Functions of a length, and their slopes, from a table of cubic polynomials, as a torch custom op.

The slopes come with the values, so the op has no derivative. GPU tensors (and, under Triton's interpreter, CPU tensors)
run `kernels/radial_table.py`, others `reference_radial_table.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference_radial_table as reference
from . import dispatch

MAX_WIDTH = 256


@torch.library.custom_op("mace_triton::radial_table", mutates_args=())
def _radial_table(
    r: Tensor, table: Tensor, edge_index: Tensor, kind: Tensor, per_angstrom: float
) -> tuple[Tensor, Tensor]:
    which = dispatch.backend(r)
    dispatch.count("radial_table", which)
    if which == "reference":
        return reference.radial_table(r, table, edge_index, kind, per_angstrom)
    from ..kernels import radial_table as kernels

    return kernels.radial_table(*(t.contiguous() for t in (r, table, edge_index, kind)), per_angstrom)


@_radial_table.register_fake
def _(r, table, edge_index, kind, per_angstrom):
    return r.new_empty(r.shape[0], table.shape[-1]), r.new_empty(r.shape[0], table.shape[-1])


def radial_table(
    r: Tensor, table: Tensor, edge_index: Tensor, kind: Tensor, *, per_angstrom: float
) -> tuple[Tensor, Tensor]:
    """(h, dh/dr) [E, H]: the H functions of `table` at lengths r [E, 1] (angstrom).

    table [S, S, K, 4, H], r's dtype (float64 or float32): coefficients a_0 .. a_3 of K intervals of 1 / per_angstrom
    each, a power of two, for every pair of kinds (of the sender, of the receiver); a length behind the last takes the
    values at its end. edge_index [2, E] int64 (sender, receiver) and kind [N] int32, 0 .. S - 1, whose range is not
    checked, are read where S > 1.

    Raises ValueError for another shape, device or width above 256, TypeError for another dtype.
    """
    if r.ndim != 2 or r.shape[1] != 1:
        raise ValueError(f"r must have shape [E, 1], got {list(r.shape)}")
    if table.ndim != 5 or table.shape[0] != table.shape[1] or table.shape[3] != 4 or 0 in table.shape:
        raise ValueError(f"table must have shape [S, S, K, 4, H], got {list(table.shape)}")
    if table.shape[4] > MAX_WIDTH:
        raise ValueError(f"table: at most {MAX_WIDTH} functions, got {table.shape[4]}")
    if r.dtype not in (torch.float64, torch.float32) or table.dtype != r.dtype:
        raise TypeError(f"r and table must both be float64 or both float32, got {r.dtype} and {table.dtype}")
    if table.shape[0] > 1 and edge_index.shape != (2, r.shape[0]):
        raise ValueError(f"edge_index must have shape [2, {r.shape[0]}], as r has rows, got {list(edge_index.shape)}")
    if edge_index.dtype != torch.int64 or kind.dtype != torch.int32:
        raise TypeError(f"edge_index must be int64 and kind int32, got {edge_index.dtype} and {kind.dtype}")
    for name, tensor in (("table", table), ("edge_index", edge_index), ("kind", kind)):
        if tensor.device != r.device:
            raise ValueError(f"{name} is on {tensor.device}, r on {r.device}: move them together")
    return _radial_table(r, table, edge_index, kind, per_angstrom)
