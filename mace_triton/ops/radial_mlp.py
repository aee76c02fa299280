"""The hidden layers of the radial network as torch custom ops: forward, and gradients of x and of the weights.

GPU tensors (and, under Triton's interpreter, CPU tensors) run `kernels/radial_mlp.py`, others and the derivatives that
force training does not need `reference_radial_mlp.py`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .. import reference_radial_mlp as reference
from ..linear_problem import LinearProblem
from ..precision import LINEAR_MODES
from . import dispatch

WIDTHS = (16, 32, 64)
"""Widths of the hidden layers that the kernels hold in registers."""
MAX_IN = 64


def _kernels():
    from ..kernels import radial_mlp

    return radial_mlp


@torch.library.custom_op("mace_triton::radial_mlp", mutates_args=())
def _fwd(x: Tensor, first: Tensor, hidden: Tensor, norm: float, mode: str, keep_first: bool) -> tuple[Tensor, Tensor]:
    which = dispatch.backend(x)
    dispatch.count("radial_mlp_fwd", which)
    if which == "reference":
        h, z = reference.radial_mlp(x, first, hidden, norm, mode)
        return h, z if keep_first else z[1:].clone()
    return _kernels().forward(x.contiguous(), first.contiguous(), hidden.contiguous(), norm, mode, keep_first)


@_fwd.register_fake
def _(x, first, hidden, norm, mode, keep_first):
    edges, width = x.shape[0], first.shape[1]
    return x.new_empty(edges, width), x.new_empty(hidden.shape[0] + keep_first, edges, width)


@torch.library.custom_op("mace_triton::radial_mlp_bwd", mutates_args=())
def _bwd(g: Tensor, x: Tensor, z: Tensor, first: Tensor, hidden: Tensor, norm: float, mode: str) -> Tensor:
    which = dispatch.backend(g)
    dispatch.count("radial_mlp_bwd", which)
    if which == "reference":
        if z.shape[0] == hidden.shape[0]:  # without z_0
            z = reference.radial_mlp(x, first, hidden, norm, mode)[1]
        return reference.radial_mlp_grad_x(g, z, first, hidden, norm, mode)
    return _kernels().grad_x(*(t.contiguous() for t in (g, x, z, first, hidden)), norm, mode)


@_bwd.register_fake
def _(g, x, z, first, hidden, norm, mode):
    return x.new_empty(x.shape)


@lru_cache(maxsize=8)
def _map(width_in: int, width: int) -> LinearProblem:
    return LinearProblem(f"{width_in}x0e", f"{width}x0e", layout_in="ir_mul", layout_out="ir_mul")


def _wgrad(h: Tensor, gz: Tensor, factor: float, mode: str) -> Tensor:
    """factor h^T gz [width_in, H]: the linear map's gradient of its weights, less the fan-in that it divides by."""
    from ..kernels import linear

    problem, scale = _map(h.shape[1], gz.shape[1]), factor * h.shape[1] ** 0.5
    return linear.grad_w(problem, h, gz, mode, scale).view(h.shape[1], gz.shape[1])


def _weights(x: Tensor, z: Tensor, pairs: list[tuple[Tensor, Tensor | None, Tensor]], norm: float, mode: str):
    """h_i^T gz_i (+ t_i^T us_i) of every layer, packed; h_0 = x, h_i = norm silu(z_{i-1})."""
    found = []
    for number, (gz, t, us) in enumerate(pairs):
        h, factor = (torch.nn.functional.silu(z[number - 1]), norm) if number else (x, 1.0)
        gw = _wgrad(h, gz, factor, mode)
        found.append(gw if t is None else gw + _wgrad(t, us, 1.0, mode))
    first, *rest = found
    return first, torch.stack(rest) if rest else first.new_empty(0, first.shape[1], first.shape[1])


@torch.library.custom_op("mace_triton::radial_mlp_grads", mutates_args=())
def _grads(
    g: Tensor, x: Tensor, z: Tensor, first: Tensor, hidden: Tensor, norm: float, mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    which = dispatch.backend(g)
    dispatch.count("radial_mlp_grads", which)
    if which == "reference":
        return reference.radial_mlp_grads(g, x, z, first, hidden, norm, mode)
    g, x, z, first, hidden = (t.contiguous() for t in (g, x, z, first, hidden))
    gx, gz = _kernels().grads(g, x, z, first, hidden, norm, mode)
    return gx, *_weights(x, z, [(own, None, None) for own in gz], norm, mode)


@_grads.register_fake
def _(g, x, z, first, hidden, norm, mode):
    return x.new_empty(x.shape), first.new_empty(first.shape), hidden.new_empty(hidden.shape)


@torch.library.custom_op("mace_triton::radial_mlp_bwd_bwd", mutates_args=())
def _bwd_bwd(
    a: Tensor, g: Tensor, x: Tensor, z: Tensor, first: Tensor, hidden: Tensor, norm: float, mode: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    which = dispatch.backend(g)
    dispatch.count("radial_mlp_bwd_bwd", which)
    if which == "reference":
        return reference.radial_mlp_grad_grads(a, g, x, first, hidden, norm, mode)
    a, g, x, z, first, hidden = (t.contiguous() for t in (a, g, x, z, first, hidden))
    dg, dx, t, us, wz = _kernels().grad_grads(a, g, z, first, hidden, norm, mode)
    return dg, dx, *_weights(x, z, list(zip(wz, (a, *t), us, strict=True)), norm, mode)


@_bwd_bwd.register_fake
def _(a, g, x, z, first, hidden, norm, mode):
    return tuple(t.new_empty(t.shape) for t in (g, x, first, hidden))


def _setup_fwd(ctx, inputs, output):
    x, first, hidden, ctx.norm, ctx.mode, _ = inputs
    ctx.save_for_backward(x, output[1], first, hidden)
    ctx.set_materialize_grads(False)


def _fwd_backward(ctx, g, _):
    # z is handed out for this function only: `radial_mlp` drops it, so that its cotangent is always None.
    if g is None:
        return (None,) * 6
    if any(dispatch.wanted(ctx, number) for number in (1, 2)):
        return *_grads(g, *ctx.saved_tensors, ctx.norm, ctx.mode), None, None, None
    return _bwd(g, *ctx.saved_tensors, ctx.norm, ctx.mode), *(None,) * 5


def _setup_bwd(ctx, inputs, output):
    g, x, z, first, hidden, ctx.norm, ctx.mode = inputs
    ctx.save_for_backward(g, x, z, first, hidden)


def _bwd_backward(ctx, a):
    g, x, z, first, hidden = ctx.saved_tensors
    if any(dispatch.wanted(ctx, number) for number in (3, 4)):
        dg, dx, dfirst, dhidden = _bwd_bwd(a, g, x, z, first, hidden, ctx.norm, ctx.mode)
        return dg, dx, None, dfirst, dhidden, None, None
    # Formulas of torch operations: they can be differentiated further, and by vmap, as hessians are.
    dg, dx = reference.radial_mlp_grad_grad_x(a, g, x, first, hidden, ctx.norm, ctx.mode)
    return dg, dx, *(None,) * 5


def _by_formula(formula):
    """A backward that differentiates `formula(*tensors)` of torch operations, so that it has one itself."""

    def backward(ctx, *cotangents):
        tensors, higher = ctx.saved_tensors, torch.is_grad_enabled()
        with torch.enable_grad():
            tensors = [t.view_as(t) for t in tensors]  # partial derivatives: no path leads from one to another
            wanted = [t for t in tensors if t.requires_grad]
            pairs = zip(formula(*tensors, ctx.norm, ctx.mode), cotangents, strict=True)
            results, given = zip(*((r, c) for r, c in pairs if r.requires_grad), strict=True)
            found = iter(torch.autograd.grad(results, wanted, given, create_graph=higher, allow_unused=True))
        return *(next(found) if t.requires_grad else None for t in tensors), None, None

    return backward


def _grads_of(g, x, z, first, hidden, norm, mode):
    # z is a result of x and the weights, which the formula makes anew.
    _, own = reference.radial_mlp(x, first, hidden, norm, mode)
    return reference.radial_mlp_grads(g, x, own, first, hidden, norm, mode)


def _bwd_bwd_of(a, g, x, z, first, hidden, norm, mode):
    return reference.radial_mlp_grad_grads(a, g, x, first, hidden, norm, mode)


def _setup_tensors(ctx, inputs, output):
    *tensors, ctx.norm, ctx.mode = inputs
    ctx.save_for_backward(*tensors)


_fwd.register_autograd(_fwd_backward, setup_context=_setup_fwd)
_bwd.register_autograd(_bwd_backward, setup_context=_setup_bwd)
_grads.register_autograd(_by_formula(_grads_of), setup_context=_setup_tensors)
_bwd_bwd.register_autograd(_by_formula(_bwd_bwd_of), setup_context=_setup_tensors)


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


def radial_mlp(x: Tensor, first: Tensor, hidden: Tensor, *, norm: float, mode: str) -> Tensor:
    """h_L [E, H] of h_0 = x, h_{i+1} = norm silu(h_i V_i): the hidden layers of e3nn 0.4.4 `nn.FullyConnectedNet`.

    x [E, width_in], first = V_0 [width_in, H], hidden = V_1 .. V_{L-1} [L - 1, H, H]: float64 for mode "fp64", float32
    for the others. The weights are e3nn's over the square root of their fan-in. mode: operand precision of the
    products ("ieee", "tf32", ...; "tf32x3" runs as "ieee" forward). Differentiable in x and the weights, to any order.

    Raises ValueError for a wrong shape, device or mode; TypeError for a dtype.
    """
    _check(x, first, hidden, mode)
    trained = torch.is_grad_enabled() and (first.requires_grad or hidden.requires_grad)
    return _fwd(x, first, hidden, norm, mode, trained)[0]
