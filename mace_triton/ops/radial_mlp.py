"""The hidden layers of the radial network as torch custom ops: forward, and the gradient of x.

Weights are constants here: where they are trained, MACE's own layers run. GPU tensors (and, under Triton's interpreter,
CPU tensors) run `kernels/radial_mlp.py`, others and all higher derivatives `reference_radial_mlp.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference_radial_mlp as reference
from ..precision import LINEAR_MODES
from . import dispatch

WIDTHS = (16, 32, 64)
"""Widths of the hidden layers that the kernels hold in registers."""
MAX_IN = 64


def _kernels():
    from ..kernels import radial_mlp

    return radial_mlp


@torch.library.custom_op("mace_triton::radial_mlp", mutates_args=())
def _fwd(x: Tensor, first: Tensor, hidden: Tensor, norm: float, mode: str) -> tuple[Tensor, Tensor]:
    which = dispatch.backend(x)
    dispatch.count("radial_mlp_fwd", which)
    if which == "reference":
        return reference.radial_mlp(x, first, hidden, norm, mode)
    return _kernels().forward(x.contiguous(), first.contiguous(), hidden.contiguous(), norm, mode)


@_fwd.register_fake
def _(x, first, hidden, norm, mode):
    edges, width = x.shape[0], first.shape[1]
    return x.new_empty(edges, width), x.new_empty(hidden.shape[0] + 1, edges, width)


@torch.library.custom_op("mace_triton::radial_mlp_bwd", mutates_args=())
def _bwd(g: Tensor, x: Tensor, z: Tensor, first: Tensor, hidden: Tensor, norm: float, mode: str) -> Tensor:
    which = dispatch.backend(g)
    dispatch.count("radial_mlp_bwd", which)
    if which == "reference":
        return reference.radial_mlp_grad_x(g, z, first, hidden, norm, mode)
    return _kernels().grad_x(g.contiguous(), z.contiguous(), first.contiguous(), hidden.contiguous(), norm, mode)


@_bwd.register_fake
def _(g, x, z, first, hidden, norm, mode):
    return x.new_empty(x.shape)


def _setup_fwd(ctx, inputs, output):
    x, first, hidden, ctx.norm, ctx.mode = inputs
    ctx.save_for_backward(x, output[1], first, hidden)
    ctx.set_materialize_grads(False)


def _fwd_backward(ctx, g, _):
    # z is handed out for this function only: `radial_mlp` drops it, so that its cotangent is always None.
    gx = None if g is None else _bwd(g, *ctx.saved_tensors, ctx.norm, ctx.mode)
    return gx, *(None,) * 4


def _setup_bwd(ctx, inputs, output):
    g, x, _, first, hidden, ctx.norm, ctx.mode = inputs
    ctx.save_for_backward(g, x, first, hidden)


def _bwd_backward(ctx, a):
    return _both(*reference.radial_mlp_grad_grad_x(a, *ctx.saved_tensors, ctx.norm, ctx.mode))


def _both(dg: Tensor, dx: Tensor) -> tuple:
    return dg, dx, *(None,) * 5


_fwd.register_autograd(_fwd_backward, setup_context=_setup_fwd)
_bwd.register_autograd(_bwd_backward, setup_context=_setup_bwd)


def _check(x: Tensor, first: Tensor, hidden: Tensor, mode: str) -> None:
    if mode not in LINEAR_MODES:
        raise ValueError(f"mode must be one of {LINEAR_MODES}, got {mode!r}")
    if first.ndim != 2 or first.shape[1] not in WIDTHS or not 0 < first.shape[0] <= MAX_IN:
        raise ValueError(f"first must have shape [1 .. {MAX_IN}, one of {WIDTHS}], got {list(first.shape)}")
    if hidden.ndim != 3 or hidden.shape[1:] != (first.shape[1],) * 2:
        raise ValueError(f"hidden must have shape [layers - 1, {first.shape[1]}, same], got {list(hidden.shape)}")
    if x.ndim != 2 or x.shape[1] != first.shape[0]:
        raise ValueError(f"x must have shape [E, {first.shape[0]}], got {list(x.shape)}")
    expected = torch.float64 if mode == "fp64" else torch.float32
    for name, tensor in (("x", x), ("first", first), ("hidden", hidden)):
        if tensor.dtype != expected:
            raise TypeError(f"{name} must be {expected} for mode {mode!r}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: move them together")
    if torch.is_grad_enabled() and (first.requires_grad or hidden.requires_grad):
        raise ValueError("first, hidden: this op gives no gradient of its weights; detach them, or use e3nn's layers")


def radial_mlp(x: Tensor, first: Tensor, hidden: Tensor, *, norm: float, mode: str) -> Tensor:
    """h_L [E, H] of h_0 = x, h_{i+1} = norm silu(h_i V_i): the hidden layers of e3nn 0.4.4 `nn.FullyConnectedNet`.

    x [E, width_in], first = V_0 [width_in, H], hidden = V_1 .. V_{L-1} [L - 1, H, H]: float64 for mode "fp64", float32
    for the others. The weights are e3nn's over the square root of their fan-in. mode: operand precision of the
    products ("ieee", "tf32", ...; "tf32x3" runs as "ieee"). Differentiable in x, to any order; not in the weights.

    Raises ValueError for a wrong shape, device or mode, and for weights that require gradients; TypeError for a dtype.
    """
    _check(x, first, hidden, mode)
    return _fwd(x, first, hidden, norm, mode)[0]
