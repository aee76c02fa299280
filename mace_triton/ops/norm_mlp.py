"""The hidden layers of MACE's RadialMLP as torch custom ops: forward, and the gradient of what the first layer gives.

Weights are constants here: where they are trained, MACE's own layers run. GPU tensors (and, under Triton's interpreter,
CPU tensors) run `kernels/norm_mlp.py`, others and all higher derivatives `reference_norm_mlp.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference_norm_mlp as reference
from ..precision import LINEAR_MODES
from . import dispatch
from .radial_mlp import WIDTHS


def _kernels():
    from ..kernels import norm_mlp

    return norm_mlp


@torch.library.custom_op("mace_triton::norm_mlp", mutates_args=())
def _fwd(
    first: Tensor, hidden: Tensor, bias: Tensor, gain: Tensor, shift: Tensor, eps: float, mode: str
) -> tuple[Tensor, Tensor]:
    which = dispatch.backend(first)
    dispatch.count("norm_mlp_fwd", which)
    tensors = (first, hidden, bias, gain, shift)
    if which == "reference":
        return reference.norm_mlp(*tensors, eps, mode)
    return _kernels().forward(*(t.contiguous() for t in tensors), eps, mode)


@_fwd.register_fake
def _(first, hidden, bias, gain, shift, eps, mode):
    return first.new_empty(first.shape), first.new_empty(hidden.shape[0], *first.shape)


@torch.library.custom_op("mace_triton::norm_mlp_bwd", mutates_args=())
def _bwd(
    g: Tensor,
    z: Tensor,
    first: Tensor,
    hidden: Tensor,
    bias: Tensor,
    gain: Tensor,
    shift: Tensor,
    eps: float,
    mode: str,
) -> Tensor:
    which = dispatch.backend(g)
    dispatch.count("norm_mlp_bwd", which)
    tensors = (g, first, z, hidden, gain, shift)
    if which == "reference":
        return reference.norm_mlp_grad(*tensors, eps, mode)
    return _kernels().grad_first(*(t.contiguous() for t in tensors), eps, mode)


@_bwd.register_fake
def _(g, z, first, hidden, bias, gain, shift, eps, mode):
    return first.new_empty(first.shape)


def _setup_fwd(ctx, inputs, output):
    *tensors, ctx.eps, ctx.mode = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.set_materialize_grads(False)


def _fwd_backward(ctx, g, _):
    # z is handed out for this function only: `norm_mlp` drops it, so that its cotangent is always None.
    gz = None if g is None else _bwd(g, *ctx.saved_tensors, ctx.eps, ctx.mode)
    return gz, *(None,) * 6


def _setup_bwd(ctx, inputs, output):
    g, _, *tensors, ctx.eps, ctx.mode = inputs
    ctx.save_for_backward(g, *tensors)


def _bwd_backward(ctx, a):
    dg, dfirst = reference.norm_mlp_grad_grad(a, *ctx.saved_tensors, ctx.eps, ctx.mode)
    return dg, None, dfirst, *(None,) * 6


_fwd.register_autograd(_fwd_backward, setup_context=_setup_fwd)
_bwd.register_autograd(_bwd_backward, setup_context=_setup_bwd)


def _check(tensors: dict[str, Tensor], mode: str) -> None:
    if mode not in LINEAR_MODES:
        raise ValueError(f"mode must be one of {LINEAR_MODES}, got {mode!r}")
    first, gain = tensors["first"], tensors["gain"]
    if gain.ndim != 2 or gain.shape[1] not in WIDTHS or not len(gain):
        raise ValueError(f"gain must have shape [layers, one of {WIDTHS}], got {list(gain.shape)}")
    layers, width = gain.shape
    rows = first.shape[0] if first.ndim else 0
    shapes = {"first": (rows, width), "hidden": (layers - 1, width, width), "bias": (layers - 1, width)}
    for name, tensor in tensors.items():
        shape = shapes.get(name, (layers, width))
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
        expected = torch.float64 if mode == "fp64" else torch.float32
        if tensor.dtype != expected:
            raise TypeError(f"{name} must be {expected} for mode {mode!r}, got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}, first on {first.device}: move them together")
        if name != "first" and torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError(f"{name}: this op gives no gradient of its weights; detach them, or use MACE's layers")


def norm_mlp(
    first: Tensor, hidden: Tensor, bias: Tensor, gain: Tensor, shift: Tensor, *, eps: float, mode: str
) -> Tensor:
    """h_{L-1} [E, H] of h_i = silu(gain_i y_i + shift_i) with y_i the layer norm of z_i, z_{i+1} = h_i V_i + b_i.

    The layers between the first and the last linear of MACE 0.3.16 `modules.radial.RadialMLP`. first = z_0 [E, H],
    hidden = V [L - 1, H, H] (input, output), bias [L - 1, H], gain and shift [L, H]: float64 for mode "fp64", float32
    for the others. mode: operand precision of the products ("tf32x3" runs as "ieee"). Differentiable in `first`, to any
    order; not in the weights.

    Raises ValueError for a wrong shape, device or mode, and for weights that require gradients; TypeError for a dtype.
    """
    _check({"first": first, "hidden": hidden, "bias": bias, "gain": gain, "shift": shift}, mode)
    return _fwd(first, hidden, bias, gain, shift, eps, mode)[0]
