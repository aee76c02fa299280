"""The two storage orders of an irreps vector, converted explicitly.

mul_ir (e3nn): each slot is [mul, 2l+1]. ir_mul (the kernels' order, contiguous in channels): each slot is [2l+1, mul].
"""

from __future__ import annotations

import torch
from e3nn import o3

from .problem import check_layout, parse_irreps


def convert_layout(x: torch.Tensor, irreps: o3.Irreps | str, source: str, target: str) -> torch.Tensor:
    """x [..., irreps.dim] stored as `source` ("mul_ir" or "ir_mul"), returned as `target`. Differentiable; any dtype.

    Raises ValueError for an unknown layout, irreps that do not parse, or a width other than irreps.dim.
    """
    irreps = parse_irreps(irreps, "irreps")
    check_layout(source, "source")
    check_layout(target, "target")
    if x.dim() == 0 or x.shape[-1] != irreps.dim:
        raise ValueError(f"x: the last dimension must be {irreps.dim} ({irreps}), got shape {tuple(x.shape)}")
    if source == target or all(ir.l == 0 for _, ir in irreps):
        return x
    parts = []
    for (mul, ir), place in zip(irreps, irreps.slices(), strict=True):
        shape = (mul, ir.dim) if source == "mul_ir" else (ir.dim, mul)
        block = x[..., place].reshape(*x.shape[:-1], *shape)
        parts.append(block.transpose(-1, -2).reshape(*x.shape[:-1], mul * ir.dim))
    return torch.cat(parts, dim=-1)


def to_ir_mul(x: torch.Tensor, irreps: o3.Irreps | str) -> torch.Tensor:
    """x [..., irreps.dim] from mul_ir (e3nn's order) to ir_mul."""
    return convert_layout(x, irreps, "mul_ir", "ir_mul")


def to_mul_ir(x: torch.Tensor, irreps: o3.Irreps | str) -> torch.Tensor:
    """x [..., irreps.dim] from ir_mul to mul_ir (e3nn's order)."""
    return convert_layout(x, irreps, "ir_mul", "mul_ir")
