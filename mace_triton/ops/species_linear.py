"""The linear map with weights of each species as torch custom ops: forward, gradient of x, gradient of the weights.

Linear in x and in the weights, so each derivative's backward is made of the other two (see `ops/linear.py`). GPU
tensors (and, under Triton's interpreter, CPU tensors) run `kernels/species_linear.py`, others `reference_linear.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference_linear as reference
from ..linear_problem import LinearProblem
from ..precision import LINEAR_MODES
from . import dispatch
from .linear import _kernel_weight, check_lowp
from .species import SpeciesPlan, check_plan


def _kernels():
    from ..kernels import species_linear

    return species_linear


@torch.library.custom_op("mace_triton::species_linear", mutates_args=())
def _linear(
    x: Tensor,
    weight: Tensor,
    weight_lowp: Tensor | None,
    species: Tensor,
    perm: Tensor,
    ptr: Tensor,
    problem: str,
    mode: str,
    scale: float,
) -> Tensor:
    spec, which = LinearProblem.from_key(problem), dispatch.backend(x)
    dispatch.count("species_linear_fwd", which)
    if which == "reference":
        return reference.species_linear(spec, x, weight, species, mode, scale)
    weight, plan = _kernel_weight(spec, weight, weight_lowp, mode), SpeciesPlan(species, perm, ptr)
    return _kernels().forward(spec, x.contiguous(), weight, plan, mode, scale)


@_linear.register_fake
def _(x, weight, weight_lowp, species, perm, ptr, problem, mode, scale):
    return x.new_empty(x.shape[0], LinearProblem.from_key(problem).dim_out)


@torch.library.custom_op("mace_triton::species_linear_grad_x", mutates_args=())
def _grad_x(
    grad: Tensor,
    weight: Tensor,
    weight_lowp: Tensor | None,
    species: Tensor,
    perm: Tensor,
    ptr: Tensor,
    problem: str,
    mode: str,
    scale: float,
) -> Tensor:
    spec, which = LinearProblem.from_key(problem), dispatch.backend(grad)
    dispatch.count("species_linear_grad_x", which)
    if which == "reference":
        return reference.species_linear_grad_x(spec, grad, weight, species, mode, scale)
    weight, plan = _kernel_weight(spec, weight, weight_lowp, mode), SpeciesPlan(species, perm, ptr)
    return _kernels().grad_x(spec, grad.contiguous(), weight, plan, mode, scale)


@_grad_x.register_fake
def _(grad, weight, weight_lowp, species, perm, ptr, problem, mode, scale):
    return grad.new_empty(grad.shape[0], LinearProblem.from_key(problem).dim_in)


@torch.library.custom_op("mace_triton::species_linear_grad_w", mutates_args=())
def _grad_w(
    x: Tensor, grad: Tensor, species: Tensor, perm: Tensor, ptr: Tensor, problem: str, mode: str, scale: float
) -> Tensor:
    spec, which = LinearProblem.from_key(problem), dispatch.backend(x)
    dispatch.count("species_linear_grad_w", which)
    if which == "reference":
        return reference.species_linear_grad_w(spec, x, grad, species, ptr.shape[0] - 1, mode, scale)
    return _kernels().grad_w(spec, x.contiguous(), grad.contiguous(), SpeciesPlan(species, perm, ptr), mode, scale)


@_grad_w.register_fake
def _(x, grad, species, perm, ptr, problem, mode, scale):
    return x.new_empty(ptr.shape[0] - 1, LinearProblem.from_key(problem).weight_numel)


def _setup_linear(ctx, inputs, output):
    x, weight, weight_lowp, *plan, problem, mode, scale = inputs
    ctx.rest = (problem, mode, scale)
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, weight_lowp, *plan)


def _linear_backward(ctx, g):
    x, weight, weight_lowp, *plan = ctx.saved_tensors
    need_x, need_weight = ctx.needs_input_grad[0], dispatch.wanted(ctx, 1)
    return (
        _grad_x(g, weight, weight_lowp, *plan, *ctx.rest) if need_x else None,
        _grad_w(x, g, *plan, *ctx.rest) if need_weight else None,
        *(None,) * 7,
    )


def _grad_x_backward(ctx, a):
    grad, weight, weight_lowp, *plan = ctx.saved_tensors
    need_grad, need_weight = ctx.needs_input_grad[0], dispatch.wanted(ctx, 1)
    return (
        _linear(a, weight, weight_lowp, *plan, *ctx.rest) if need_grad else None,
        _grad_w(a, grad, *plan, *ctx.rest) if need_weight else None,
        *(None,) * 7,
    )


def _setup_grad_w(ctx, inputs, output):
    *tensors, problem, mode, scale = inputs
    ctx.rest = (problem, mode, scale)
    ctx.save_for_backward(*tensors)


def _grad_w_backward(ctx, q):
    x, grad, *plan = ctx.saved_tensors
    need_x, need_grad = ctx.needs_input_grad[:2]
    return (
        _grad_x(grad, q, None, *plan, *ctx.rest) if need_x else None,
        _linear(x, q, None, *plan, *ctx.rest) if need_grad else None,
        *(None,) * 6,
    )


_linear.register_autograd(_linear_backward, setup_context=_setup_linear)
_grad_x.register_autograd(_grad_x_backward, setup_context=_setup_linear)
_grad_w.register_autograd(_grad_w_backward, setup_context=_setup_grad_w)


def _check(problem: LinearProblem, x: Tensor, weight: Tensor, plan: SpeciesPlan, mode: str) -> None:
    if mode not in LINEAR_MODES:
        raise ValueError(f"mode must be one of {LINEAR_MODES}, got {mode!r}")
    if problem.bias_numel:
        raise ValueError("problem: a map with weights of each species has no biases")
    expected = torch.float64 if mode == "fp64" else torch.float32
    if x.dtype != expected:
        raise TypeError(f"x must be {expected} for mode {mode!r}, got {x.dtype}: convert x or choose another mode")
    if x.ndim != 2 or x.shape[1] != problem.dim_in:
        raise ValueError(f"x must have shape [N, {problem.dim_in}] ({problem.irreps_in}), got {list(x.shape)}")
    wanted = [plan.count, problem.weight_numel]
    if list(weight.shape) != wanted:
        raise ValueError(f"weight must have shape {wanted} for this problem and plan, got {list(weight.shape)}")
    if weight.dtype != x.dtype:
        raise TypeError(f"weight must have x's dtype {x.dtype}, got {weight.dtype}")
    if weight.device != x.device:
        raise ValueError(f"weight is on {weight.device}, x on {x.device}: move them together")
    check_plan(plan, x)


def species_linear(
    problem: LinearProblem,
    x: Tensor,
    weight: Tensor,
    plan: SpeciesPlan,
    *,
    mode: str,
    scale: float = 1.0,
    weight_lowp: Tensor | None = None,
) -> Tensor:
    """out[n] = scale alpha x[n] W[species of n], the map of `LinearProblem`; differentiable to any order.

    x [N, dim_in] and weight [Z, weight_numel] are float64 for mode "fp64" and float32 for the others ("ieee",
    "tf32x3", "tf32", "bf16", "fp16", the operand precision of the products); sums are FP32 (FP64). plan: from
    `species_plan`. weight_lowp: `lowp_weight(weight, mode)`, if the caller keeps such a copy. The formula is that of
    e3nn 0.4.4 `o3.FullyConnectedTensorProduct` with one-hot second operand, which MACE calls `skip_tp`.

    Raises ValueError for a wrong shape, device or mode, or biases; TypeError for a wrong dtype.
    """
    _check(problem, x, weight, plan, mode)
    check_lowp(weight, weight_lowp, mode)
    return _linear(x, weight, weight_lowp, *plan, problem.key, mode, scale)
