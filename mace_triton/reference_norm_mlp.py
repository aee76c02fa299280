"""The hidden layers of MACE's RadialMLP in plain PyTorch: the CPU path, and what the kernels are tested against.

    y_i = (z_i - mean z_i) / sqrt(var z_i + eps),   h_i = silu(gain_i y_i + shift_i),   z_{i+1} = h_i V_i + b_i

All functions are made of torch operations, so they can be differentiated further.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference_radial_mlp import _product, first_derivative, second_derivative


def _mean(v: Tensor) -> Tensor:
    return v.mean(-1, keepdim=True)


def _normalize(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, 1 / sqrt(var + eps))."""
    centred = z - _mean(z)
    inverse = (_mean(centred.square()) + eps).rsqrt()
    return centred * inverse, inverse


def _project(v: Tensor, y: Tensor) -> Tensor:
    """v - mean v - y mean(y v): the derivative of y along v (or its transpose, they are the same), times sqrt(var)."""
    return v - _mean(v) - y * _mean(y * v)


def norm_mlp(
    first: Tensor, hidden: Tensor, bias: Tensor, gain: Tensor, shift: Tensor, eps: float, mode: str = "ieee"
) -> tuple[Tensor, Tensor]:
    """first = z_0 [E, H], hidden [L - 1, H, H], bias [L - 1, H], gain, shift [L, H]
    -> (h_{L-1} [E, H], z_1 .. z_{L-1} [L - 1, E, H])."""
    z, zs = first, []
    for number in range(len(gain)):
        y, _ = _normalize(z, eps)
        h = torch.nn.functional.silu(gain[number] * y + shift[number])
        if number < len(hidden):
            z = _product(h, hidden[number], mode) + bias[number]
            zs.append(z)
    return h, torch.stack(zs) if zs else first.new_empty(0, *first.shape)


def norm_mlp_grad(
    g: Tensor, first: Tensor, z: Tensor, hidden: Tensor, gain: Tensor, shift: Tensor, eps: float, mode: str = "ieee"
) -> Tensor:
    """The gradient [E, H] of z_0 for the cotangent g [E, H] of h_{L-1}; z from `norm_mlp`."""
    zs = [first, *z.unbind(0)]
    for number in reversed(range(len(gain))):
        y, inverse = _normalize(zs[number], eps)
        g = inverse * _project(g * first_derivative(gain[number] * y + shift[number]) * gain[number], y)
        if number:
            g = _product(g, hidden[number - 1].T, mode)
    return g


def norm_mlp_grad_grad(
    a: Tensor,
    g: Tensor,
    first: Tensor,
    hidden: Tensor,
    bias: Tensor,
    gain: Tensor,
    shift: Tensor,
    eps: float,
    mode: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """(dg, dfirst): the derivatives of <a, gz_0> by g and by z_0, for a cotangent a of gz_0 [E, H].

    <a, gz_0> is <th_{L-1}, g> with th the derivative of h along a. dg is th_{L-1}; dfirst is the reverse sweep through
    both recursions, of h and of th.
    """
    z, tz, kept = first, a, []
    for number in range(len(gain)):
        y, inverse = _normalize(z, eps)
        u, ty = gain[number] * y + shift[number], inverse * _project(tz, y)
        tu = gain[number] * ty
        kept.append((y, inverse, u, tz, ty, tu))
        th = first_derivative(u) * tu
        if number < len(hidden):
            z = _product(torch.nn.functional.silu(u), hidden[number], mode) + bias[number]
            tz = _product(th, hidden[number], mode)
    to_h, to_th = torch.zeros_like(g), g
    for number in reversed(range(len(gain))):
        y, inverse, u, tz, ty, tu = kept[number]
        slope = first_derivative(u)
        to_ty = gain[number] * to_th * slope
        to_y = gain[number] * (to_h * slope + to_th * tu * second_derivative(u))
        # ty = (tz - mean tz - y mean(y tz)) / sqrt(var + eps) holds y twice, and z in the root.
        to_y = to_y - inverse * (to_ty * _mean(y * tz) + tz * _mean(y * to_ty))
        to_z = inverse * (_project(to_y, y) - y * _mean(to_ty * ty))
        to_tz = inverse * _project(to_ty, y)
        if number:
            to_h, to_th = (_product(v, hidden[number - 1].T, mode) for v in (to_z, to_tz))
    return th, to_z
