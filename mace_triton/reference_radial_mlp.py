"""The hidden layers of the radial network in plain PyTorch: the CPU path, and what the kernels are tested against.

    h_0 = x,   z_i = h_i V_i,   h_{i+1} = norm silu(z_i)

All functions are made of torch operations, so they can be differentiated further.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference_linear import operand


def _weights(first: Tensor, hidden: Tensor) -> list[Tensor]:
    return [first, *hidden.unbind(0)]


def _product(h: Tensor, v: Tensor, mode: str) -> Tensor:
    return operand(h, mode) @ operand(v, mode)


def first_derivative(z: Tensor) -> Tensor:
    """silu'(z)."""
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def second_derivative(z: Tensor) -> Tensor:
    """silu''(z)."""
    s = torch.sigmoid(z)
    return s * (1 - s) * (2 + z * (1 - 2 * s))


def radial_mlp(x: Tensor, first: Tensor, hidden: Tensor, norm: float, mode: str = "ieee") -> tuple[Tensor, Tensor]:
    """x [E, width_in], first [width_in, H], hidden [L - 1, H, H] -> (h_L [E, H], z [L, E, H])."""
    h, zs = x, []
    for v in _weights(first, hidden):
        zs.append(_product(h, v, mode))
        h = norm * torch.nn.functional.silu(zs[-1])
    return h, torch.stack(zs)


def radial_mlp_grad_x(g: Tensor, z: Tensor, first: Tensor, hidden: Tensor, norm: float, mode: str = "ieee") -> Tensor:
    """The gradient [E, width_in] of x for the cotangent g [E, H] of h_L."""
    for v, own in zip(reversed(_weights(first, hidden)), reversed(z.unbind(0)), strict=True):
        g = _product(g * norm * first_derivative(own), v.T, mode)
    return g


def radial_mlp_grads(
    g: Tensor, x: Tensor, z: Tensor, first: Tensor, hidden: Tensor, norm: float, mode: str = "ieee"
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x [E, width_in], first and hidden for the cotangent g [E, H] of h_L."""
    inputs, found = _inputs(x, z, norm), []
    for v, own, h in zip(reversed(_weights(first, hidden)), reversed(z.unbind(0)), reversed(inputs), strict=True):
        gz = g * norm * first_derivative(own)
        found.append(_product(h.T, gz, mode))
        g = _product(gz, v.T, mode)
    return g, *_packed(found[::-1], hidden)


def _inputs(x: Tensor, z: Tensor, norm: float) -> list[Tensor]:
    """h_0 .. h_{L-1}."""
    return [x, *(norm * torch.nn.functional.silu(own) for own in z.unbind(0)[:-1])]


def _packed(weights: list[Tensor], hidden: Tensor) -> tuple[Tensor, Tensor]:
    return weights[0], torch.stack(weights[1:]) if len(weights) > 1 else torch.zeros_like(hidden)


def _second_sweep(a, g, x, first, hidden, norm: float, mode: str) -> tuple[Tensor, Tensor, list[tuple[Tensor, ...]]]:
    """t_L, the gradient of x, and (h, t, to_z, to_tz) of every layer: see `radial_mlp_grad_grads`."""
    weights, h, t, kept = _weights(first, hidden), x, a, []
    for v in weights:
        z, tz = _product(h, v, mode), _product(t, v, mode)
        kept.append((v, z, tz, h, t))
        h, t = norm * torch.nn.functional.silu(z), norm * first_derivative(z) * tz
    to_t, to_h, layers = g, torch.zeros_like(g), []
    for v, z, tz, h, before in reversed(kept):
        slope = norm * first_derivative(z)
        to_tz, to_z = to_t * slope, to_h * slope + to_t * tz * norm * second_derivative(z)
        layers.append((h, before, to_z, to_tz))
        to_h, to_t = _product(to_z, v.T, mode), _product(to_tz, v.T, mode)
    return t, to_h, layers[::-1]


def radial_mlp_grad_grads(
    a: Tensor, g: Tensor, x: Tensor, first: Tensor, hidden: Tensor, norm: float, mode: str = "ieee"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dg, dx, dfirst, dhidden): the derivatives of <a, gx>, for a cotangent a of gx [E, width_in].

    <a, gx> is <t_L, g> with t the derivative of h along a: t_0 = a, tz_i = t_i V_i, t_{i+1} = norm silu'(z_i) tz_i. dg
    is t_L, the others are the reverse sweep through both recursions; to_z is the cotangent of z.
    """
    dg, dx, layers = _second_sweep(a, g, x, first, hidden, norm, mode)
    found = [_product(h.T, to_z, mode) + _product(t.T, to_tz, mode) for h, t, to_z, to_tz in layers]
    return dg, dx, *_packed(found, hidden)


def radial_mlp_grad_grad_x(
    a: Tensor, g: Tensor, x: Tensor, first: Tensor, hidden: Tensor, norm: float, mode: str = "ieee"
) -> tuple[Tensor, Tensor]:
    """(dg, dx) of `radial_mlp_grad_grads`."""
    return _second_sweep(a, g, x, first, hidden, norm, mode)[:2]
