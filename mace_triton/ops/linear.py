"""The equivariant linear map as torch custom ops: forward, gradient of x, gradient of the weights.

The map is linear in x and in the weights, so each derivative's backward is made of the other two and gradients of any
order exist. GPU tensors (and, under Triton's interpreter, CPU tensors) run `kernels/linear.py`, others
`reference_linear.py`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .. import reference_linear as reference
from ..linear_problem import LinearProblem
from ..precision import LINEAR_MODES, TORCH_DTYPES
from . import dispatch

# x's dtype and another one that the result may be stored in.
_STORED = ((torch.float32, torch.bfloat16), (torch.float32, torch.float16))


def _kernels():
    from ..kernels import linear

    return linear


@lru_cache(maxsize=64)
def _alphas(problem: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The fan-in factor of every weight [weight_numel]."""
    blocks = LinearProblem.from_key(problem).blocks
    values = [torch.full((b.slot_in.mul * b.slot_out.mul,), b.alpha, dtype=dtype, device=device) for b in blocks]
    return torch.cat(values)


def _kernel_weight(spec: LinearProblem, weight: Tensor, weight_lowp: Tensor | None, mode: str) -> Tensor:
    """The weights as the kernel reads them: in the operand dtype, times alpha where the kernel cannot apply it."""
    if not spec.uniform:
        weight, weight_lowp = weight * _alphas(spec.key, weight.device, weight.dtype), None
    return lowp_weight(weight, mode) if weight_lowp is None else weight_lowp


def lowp_weight(weight: Tensor, mode: str, problem: LinearProblem | None = None) -> Tensor:
    """The contiguous copy of the weights that `mode` reads: 16 bits for "bf16" and "fp16", else the weights.

    With the problem of a map whose kernels read the weights in two parts ("tf32x3", few scalars to many): the parts.
    """
    if problem is not None and _in_parts(problem, weight, mode):
        return _kernels().linear_scalars.split(weight.detach().contiguous())
    return weight.to(TORCH_DTYPES.get(mode, weight.dtype)).contiguous()


def _in_parts(problem: LinearProblem, weight: Tensor, mode: str) -> bool:
    if mode != "tf32x3" or dispatch.backend(weight) == "reference":
        return False
    return _kernels().linear_scalars.fits(problem, mode)


@torch.library.custom_op("mace_triton::linear", mutates_args=())
def _linear(
    x: Tensor,
    weight: Tensor,
    weight_lowp: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    problem: str,
    mode: str,
    scale: float,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    spec, which, out_dtype = LinearProblem.from_key(problem), dispatch.backend(x), out_dtype or weight.dtype
    dispatch.count("linear_fwd", which)
    if which == "reference":
        return reference.linear(spec, x, weight, mode, bias, residual, scale).to(out_dtype)
    weight = _kernel_weight(spec, weight, weight_lowp, mode)
    bias, residual = (t if t is None else t.contiguous() for t in (bias, residual))
    return _kernels().forward(spec, x.contiguous(), weight, bias, residual, mode, scale, out_dtype)


@_linear.register_fake
def _(x, weight, weight_lowp, bias, residual, problem, mode, scale, out_dtype=None):
    width = LinearProblem.from_key(problem).dim_out
    return x.new_empty(x.shape[0], width, dtype=out_dtype or weight.dtype)


@torch.library.custom_op("mace_triton::linear_grad_x", mutates_args=())
def _grad_x(grad: Tensor, weight: Tensor, weight_lowp: Tensor | None, problem: str, mode: str, scale: float) -> Tensor:
    spec, which = LinearProblem.from_key(problem), dispatch.backend(grad)
    dispatch.count("linear_grad_x", which)
    if which == "reference":
        return reference.linear_grad_x(spec, grad.to(weight.dtype), weight, mode, scale)
    weight = _kernel_weight(spec, weight, weight_lowp, mode)
    return _kernels().grad_x(spec, grad.contiguous(), weight, mode, scale)


@_grad_x.register_fake
def _(grad, weight, weight_lowp, problem, mode, scale):
    return weight.new_empty(grad.shape[0], LinearProblem.from_key(problem).dim_in)


@torch.library.custom_op("mace_triton::linear_grad_w", mutates_args=())
def _grad_w(x: Tensor, grad: Tensor, problem: str, mode: str, scale: float) -> Tensor:
    spec, which = LinearProblem.from_key(problem), dispatch.backend(x)
    dispatch.count("linear_grad_w", which)
    if which == "reference":
        return reference.linear_grad_w(spec, x, grad.to(x.dtype), mode, scale)
    return _kernels().grad_w(spec, x.contiguous(), grad.contiguous(), mode, scale)


@_grad_w.register_fake
def _(x, grad, problem, mode, scale):
    return x.new_empty(LinearProblem.from_key(problem).weight_numel)


def _setup_linear(ctx, inputs, output):
    x, weight, weight_lowp, _, _, *ctx.rest, _ = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, weight_lowp)


def _linear_backward(ctx, g):
    x, weight, weight_lowp = ctx.saved_tensors
    need_x, _, _, need_bias, need_residual = ctx.needs_input_grad[:5]
    need_weight = dispatch.wanted(ctx, 1)
    wide = g.to(weight.dtype) if need_bias or need_residual else g
    return (
        _grad_x(g, weight, weight_lowp, *ctx.rest) if need_x else None,
        _grad_w(x, g, *ctx.rest) if need_weight else None,
        None,
        reference.bias_grad(LinearProblem.from_key(ctx.rest[0]), wide) if need_bias else None,
        wide if need_residual else None,
        *(None,) * 4,
    )


def _setup_grad_x(ctx, inputs, output):
    grad, weight, weight_lowp, *ctx.rest = inputs
    ctx.stored = grad.dtype
    ctx.save_for_backward(grad if ctx.needs_input_grad[1] else None, weight, weight_lowp)


def _grad_x_backward(ctx, a):
    grad, weight, weight_lowp = ctx.saved_tensors
    need_grad, need_weight = ctx.needs_input_grad[0], dispatch.wanted(ctx, 1)
    return (
        _linear(a, weight, weight_lowp, None, None, *ctx.rest, ctx.stored) if need_grad else None,
        _grad_w(a, grad, *ctx.rest) if need_weight else None,
        *(None,) * 4,
    )


def _setup_grad_w(ctx, inputs, output):
    x, grad, *ctx.rest = inputs
    ctx.save_for_backward(x, grad)


def _grad_w_backward(ctx, q):
    x, grad = ctx.saved_tensors
    need_x, need_grad = ctx.needs_input_grad[:2]
    return (
        _grad_x(grad, q, None, *ctx.rest) if need_x else None,
        _linear(x, q, None, None, None, *ctx.rest, grad.dtype) if need_grad else None,
        *(None,) * 3,
    )


_linear.register_autograd(_linear_backward, setup_context=_setup_linear)
_grad_x.register_autograd(_grad_x_backward, setup_context=_setup_grad_x)
_grad_w.register_autograd(_grad_w_backward, setup_context=_setup_grad_w)


def _check(problem: LinearProblem, x: Tensor, weight: Tensor, mode: str) -> None:
    if mode not in LINEAR_MODES:
        raise ValueError(f"mode must be one of {LINEAR_MODES}, got {mode!r}")
    expected = torch.float64 if mode == "fp64" else torch.float32
    if x.dtype != expected:
        raise TypeError(f"x must be {expected} for mode {mode!r}, got {x.dtype}: convert x or choose another mode")
    if x.dim() != 2 or x.shape[1] != problem.dim_in:
        raise ValueError(f"x must have shape [N, {problem.dim_in}] ({problem.irreps_in}), got {tuple(x.shape)}")
    _check_like(x, weight, "weight", (problem.weight_numel,))


def _check_like(x: Tensor, tensor: Tensor, name: str, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: move them to one device")
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name} must have x's dtype {x.dtype}, got {tensor.dtype}")


def check_lowp(weight: Tensor, weight_lowp: Tensor | None, mode: str) -> None:
    """Raise ValueError unless `weight_lowp` looks like `lowp_weight(weight, mode)`, or is None."""
    if weight_lowp is not None and (
        weight_lowp.shape != weight.shape or weight_lowp.dtype != TORCH_DTYPES.get(mode, weight.dtype)
    ):
        raise ValueError(f"weight_lowp is no copy of weight for mode {mode!r}: make it with lowp_weight(weight, mode)")


def linear(
    problem: LinearProblem,
    x: Tensor,
    weight: Tensor,
    *,
    mode: str,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    scale: float = 1.0,
    weight_lowp: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """out[N, dim_out] = scale (alpha x W) + bias + residual, the map of `LinearProblem`; differentiable to any order.

    x [N, dim_in], weight [weight_numel], bias [bias_numel] (zero where None), residual [N, dim_out] have one dtype:
    float64 for mode "fp64", float32 for the others. The output has it too, or is rounded to out_dtype (bfloat16 or
    float16 beside float32), in which its gradient then comes back. `scale` leaves bias and residual alone.
    mode: operand precision of the products, one of "fp64", "ieee", "tf32x3", "tf32", "bf16", "fp16"; sums are FP32
    (FP64 for "fp64"). weight_lowp: `lowp_weight(weight, mode, problem)`, if the caller keeps such a copy.
    Weights and fan-in as in e3nn 0.4.4 `o3.Linear`.

    Raises ValueError for a wrong shape, device or mode, TypeError for a wrong dtype.
    """
    _check(problem, x, weight, mode)
    if bias is not None:
        _check_like(x, bias, "bias", (problem.bias_numel,))
    if residual is not None:
        _check_like(x, residual, "residual", (x.shape[0], problem.dim_out))
    in_parts = weight_lowp is not None and weight_lowp.ndim == 2 and _in_parts(problem, weight, mode)
    check_lowp(weight, weight_lowp[0] if in_parts else weight_lowp, mode)
    if out_dtype not in (None, x.dtype) and (x.dtype, out_dtype) not in _STORED:
        raise TypeError(f"out_dtype must be x's dtype, or 16 bits where that is float32, got {out_dtype} for {x.dtype}")
    return _linear(x, weight, weight_lowp, bias, residual, problem.key, mode, scale, out_dtype)
