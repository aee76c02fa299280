"""The equivariant linear map in plain PyTorch: the CPU path and what the kernels are tested against.

Any device, dtype and layout. Formulas as in e3nn 0.4.4 `o3.Linear`.
"""

from __future__ import annotations

import torch

from .linear_problem import LinearProblem
from .problem import Slot
from .reference import slot_view

ROUNDED = {"bf16": torch.bfloat16, "fp16": torch.float16}


def operand(tensor: torch.Tensor, mode: str) -> torch.Tensor:
    """`tensor` rounded to the operand precision of `mode`, in its own dtype. 3xTF32 is taken as exact FP32."""
    if mode == "tf32":  # to nearest in 10 mantissa bits
        rounded = ((tensor.view(torch.int32) + 0x1000) & -0x2000).view(tensor.dtype)
        return torch.where(tensor.isnan(), tensor, rounded)  # the carry would turn the NaN 0x7fffffff into zero
    return tensor.to(ROUNDED[mode]).to(tensor.dtype) if mode in ROUNDED else tensor


def slot_flat(values: torch.Tensor, slot: Slot) -> torch.Tensor:
    """Values [N, 2l+1, mul] as the slot's storage [N, mul (2l+1)]."""
    values = values if slot.layout == "ir_mul" else values.transpose(1, 2)
    return values.reshape(values.shape[0], slot.mul * slot.dim)


def _sum_into(slots: tuple[Slot, ...], terms: dict[int, list[torch.Tensor]], x: torch.Tensor) -> torch.Tensor:
    """Storage [N, sum mul (2l+1)] from lists of terms [N, 2l+1, mul] by slot offset; a slot without terms is zero."""
    parts = [
        slot_flat(sum(terms[s.offset]), s) if s.mul and terms.get(s.offset) else x.new_zeros(x.shape[0], s.mul * s.dim)
        for s in slots
    ]
    return torch.cat(parts, dim=1) if parts else x.new_zeros(x.shape[0], 0)


def _weights(problem: LinearProblem, weight: torch.Tensor) -> list[torch.Tensor]:
    """The blocks [mul_in, mul_out] of the packed weights."""
    sizes = [(b.weight, b.slot_in.mul, b.slot_out.mul) for b in problem.blocks]
    return [weight[start : start + rows * cols].reshape(rows, cols) for start, rows, cols in sizes]


def linear(
    problem: LinearProblem,
    x: torch.Tensor,
    weight: torch.Tensor,
    mode: str = "ieee",
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """out = scale (alpha x W) + bias + residual.  x [N, dim_in], weight [weight_numel] -> [N, dim_out]."""
    x_op, w_op = operand(x, mode), operand(weight, mode)
    terms: dict[int, list[torch.Tensor]] = {}
    for block, w in zip(problem.blocks, _weights(problem, w_op), strict=True):
        product = (scale * block.alpha) * (slot_view(x_op, block.slot_in) @ w)  # [N, 2l+1, mul_out]
        terms.setdefault(block.slot_out.offset, []).append(product)
    out = _sum_into(problem.slots_out, terms, x)
    if bias is not None:
        out = out + bias_row(problem, bias)
    return out if residual is None else out + residual


def linear_grad_x(problem: LinearProblem, grad: torch.Tensor, weight: torch.Tensor, mode: str, scale: float):
    """d loss / d x [N, dim_in] = scale (alpha grad W^T), grad [N, dim_out]."""
    g_op, w_op = operand(grad, mode), operand(weight, mode)
    terms: dict[int, list[torch.Tensor]] = {}
    for block, w in zip(problem.blocks, _weights(problem, w_op), strict=True):
        product = (scale * block.alpha) * (slot_view(g_op, block.slot_out) @ w.T)  # [N, 2l+1, mul_in]
        terms.setdefault(block.slot_in.offset, []).append(product)
    return _sum_into(problem.slots_in, terms, grad)


def linear_grad_w(problem: LinearProblem, x: torch.Tensor, grad: torch.Tensor, mode: str, scale: float):
    """d loss / d weight [weight_numel] = scale alpha sum over (n, m) of x[n, m, u] grad[n, m, w]."""
    x_op, g_op = operand(x, mode), operand(grad, mode)
    parts = [
        (scale * b.alpha) * torch.einsum("nmu,nmw->uw", slot_view(x_op, b.slot_in), slot_view(g_op, b.slot_out))
        for b in problem.blocks
    ]
    return torch.cat([part.reshape(-1) for part in parts]) if parts else x.new_zeros(0)


def bias_row(problem: LinearProblem, bias: torch.Tensor) -> torch.Tensor:
    """The packed bias [bias_numel] spread over a row [dim_out]; zero where no slot has a bias."""
    parts = [
        bias[start : start + slot.mul] if start >= 0 else bias.new_zeros(slot.mul * slot.dim)
        for start, slot in zip(problem.bias_offsets, problem.slots_out, strict=True)
    ]
    return torch.cat(parts) if parts else bias.new_zeros(0)


def bias_grad(problem: LinearProblem, grad: torch.Tensor) -> torch.Tensor:
    """d loss / d bias [bias_numel] from grad [N, dim_out]."""
    parts = [
        grad[:, slot.offset : slot.offset + slot.mul].sum(0)
        for start, slot in zip(problem.bias_offsets, problem.slots_out, strict=True)
        if start >= 0
    ]
    return torch.cat(parts) if parts else grad.new_zeros(0)


def species_linear(
    problem: LinearProblem, x: torch.Tensor, weight: torch.Tensor, species: torch.Tensor, mode: str, scale: float
) -> torch.Tensor:
    """`linear` with the weights of each node's species: weight [Z, weight_numel], species [N] -> [N, dim_out]."""
    out = x.new_zeros(x.shape[0], problem.dim_out)
    for z in species.unique().tolist():
        out[species == z] = linear(problem, x[species == z], weight[z], mode, scale=scale)
    return out


def species_linear_grad_x(
    problem: LinearProblem, grad: torch.Tensor, weight: torch.Tensor, species: torch.Tensor, mode: str, scale: float
) -> torch.Tensor:
    """d loss / d x [N, dim_in] of `species_linear`."""
    gx = grad.new_zeros(grad.shape[0], problem.dim_in)
    for z in species.unique().tolist():
        gx[species == z] = linear_grad_x(problem, grad[species == z], weight[z], mode, scale)
    return gx


def species_linear_grad_w(
    problem: LinearProblem,
    x: torch.Tensor,
    grad: torch.Tensor,
    species: torch.Tensor,
    count: int,
    mode: str,
    scale: float,
) -> torch.Tensor:
    """d loss / d weight [count, weight_numel] of `species_linear`; zero for species that do not occur."""
    gw = x.new_zeros(count, problem.weight_numel)
    for z in species.unique().tolist():
        gw[z] = linear_grad_w(problem, x[species == z], grad[species == z], mode, scale)
    return gw
