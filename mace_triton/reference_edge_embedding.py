"""Harmonics and radial features of edges in plain PyTorch: the CPU path, with the formulas of the kernel's file.

The formulas are those of e3nn 0.4.4 `o3.SphericalHarmonics` (normalised vectors, "component") and of MACE's
`modules.radial`. An edge of length zero has the limit of its radial features and zero gradients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def vectors(x: Tensor, edge_index: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, 3], edge_index [2, E] (sender, receiver), shifts [E, 3] -> (v [E, 3], r [E, 1])."""
    sender, receiver = edge_index
    v = x[receiver] - x[sender] + shifts
    return v, torch.linalg.vector_norm(v, dim=1, keepdim=True)


def vectors_grad(gv: Tensor, gr: Tensor, v: Tensor, r: Tensor, edge_index: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """(gx [nodes, 3], e [E, 3]), the gradients of the positions and of the shifts."""
    e = gv + torch.where(r > 0, gr / torch.where(r > 0, r, 1.0), 0.0) * v
    sender, receiver = edge_index
    return v.new_zeros(nodes, 3).index_add(0, receiver, e).index_add(0, sender, -e), e


SQRT3, SQRT5, SQRT15, SQRT105 = (math.sqrt(n) for n in (3, 5, 15, 105))
SQRT35_8, SQRT21_8, HALF_SQRT7 = math.sqrt(35 / 8), math.sqrt(21 / 8), 0.5 * math.sqrt(7)


def _products(n: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    """The symmetric products of two vectors [E, 3]: xx, yy, zz, xy, xz, yz; n with itself gives the squares."""
    (x, y, z), (a, b, c) = n.unbind(1), d.unbind(1)
    return x * a, y * b, z * c, 0.5 * (x * b + y * a), 0.5 * (x * c + z * a), 0.5 * (y * c + z * b)


def _harmonics(n: Tensor, first: Tensor, q: tuple[Tensor, ...], third: tuple[Tensor, ...], dim: int) -> Tensor:
    xx, yy, zz, xy, xz, yz = q
    second = (SQRT15 * xz, SQRT15 * xy, SQRT5 * (yy - 0.5 * (xx + zz)), SQRT15 * yz, 0.5 * SQRT15 * (zz - xx))
    return torch.stack((first, *(SQRT3 * n).unbind(1), *second, *third)[:dim], dim=1)


def _third(n: Tensor, q: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    (x, y, z), (xx, yy, zz, _, _, yz) = n.unbind(1), q
    ring = 4 * yy - xx - zz
    return (
        SQRT35_8 * x * (3 * zz - xx),
        SQRT105 * x * yz,
        SQRT21_8 * x * ring,
        HALF_SQRT7 * y * (2 * yy - 3 * (xx + zz)),
        SQRT21_8 * z * ring,
        0.5 * SQRT105 * y * (zz - xx),
        SQRT35_8 * z * (zz - 3 * xx),
    )


def _pull_second(g: tuple[Tensor, ...], n: Tensor) -> Tensor:
    """The gradient [E, 3] of <g, Y_2> by n."""
    (g0, g1, g2, g3, g4), (x, y, z) = g[4:9], n.unbind(1)
    gx = SQRT15 * (g0 * z + g1 * y - g4 * x) - SQRT5 * g2 * x
    gy = SQRT15 * (g1 * x + g3 * z) + 2 * SQRT5 * g2 * y
    return torch.stack((gx, gy, SQRT15 * (g0 * x + g3 * y + g4 * z) - SQRT5 * g2 * z), dim=1)


def _pull_third(g: tuple[Tensor, ...], q: tuple[Tensor, ...]) -> Tensor:
    """The gradient [E, 3] of <g, Y_3> by n."""
    (g0, g1, g2, g3, g4, g5, g6), (xx, yy, zz, xy, xz, yz) = g[9:], q
    gx = 3 * SQRT35_8 * g0 * (zz - xx) + SQRT105 * (g1 * yz - g5 * xy) + SQRT21_8 * g2 * (4 * yy - 3 * xx - zz)
    gx = gx - 6 * HALF_SQRT7 * g3 * xy - 2 * SQRT21_8 * g4 * xz - 6 * SQRT35_8 * g6 * xz
    gy = SQRT105 * (g1 * xz + 0.5 * g5 * (zz - xx)) + 8 * SQRT21_8 * (g2 * xy + g4 * yz)
    gy = gy + HALF_SQRT7 * g3 * (6 * yy - 3 * (xx + zz))
    gz = 6 * SQRT35_8 * g0 * xz + SQRT105 * (g1 * xy + g5 * yz) - 2 * SQRT21_8 * g2 * xz - 6 * HALF_SQRT7 * g3 * yz
    gz = gz + SQRT21_8 * g4 * (4 * yy - xx - 3 * zz) + 3 * SQRT35_8 * g6 * (zz - xx)
    return torch.stack((gx, gy, gz), dim=1)


def _padded(g: Tensor) -> tuple[Tensor, ...]:
    return torch.nn.functional.pad(g, (0, 16 - g.shape[1])).unbind(1)


def _unit(v: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors and inverse lengths [E, 1]; both are zero for a vector of length zero."""
    square = v.square().sum(dim=1, keepdim=True)
    inverse = torch.where(square > 0, square, 1.0).rsqrt() * (square > 0)
    return v * inverse, inverse


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=1, keepdim=True)


def harmonics(v: Tensor, dim: int) -> Tensor:
    """v [E, 3] -> Y [E, dim], dim = (l + 1)^2 with l up to 3."""
    n, _ = _unit(v)
    q = _products(n, n)
    return _harmonics(n, torch.ones_like(v[:, 0]), q, _third(n, q), dim)


def _gradient(g: tuple[Tensor, ...], n: Tensor, q: tuple[Tensor, ...]) -> Tensor:
    return SQRT3 * torch.stack(g[1:4], dim=1) + _pull_second(g, n) + _pull_third(g, q)


def harmonics_grad(g: Tensor, v: Tensor) -> Tensor:
    """The gradient [E, 3] of v for the cotangent g [E, dim] of Y."""
    n, inverse = _unit(v)
    by_n = _gradient(_padded(g), n, _products(n, n))
    return (by_n - n * _dot(n, by_n)) * inverse


def harmonics_grad_grad(a: Tensor, g: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(dg [E, dim], dv [E, 3]): the derivatives of <a, gv>, for a cotangent a [E, 3] of gv."""
    (n, inverse), parts = _unit(v), _padded(g)
    d = (a - n * _dot(n, a)) * inverse
    q, dq = _products(n, n), tuple(2 * p for p in _products(n, d))
    third = tuple(s + t for s, t in zip(_third(d, q), _third(n, dq), strict=True))
    dg = _harmonics(d, torch.zeros_like(v[:, 0]), dq, third, g.shape[1])
    by_n, d_by_n = _gradient(parts, n, q), _pull_second(parts, d) + _pull_third(parts, dq)
    along, d_along = _dot(n, by_n), _dot(d, by_n) + _dot(n, d_by_n)
    gv = (by_n - n * along) * inverse
    return dg, (d_by_n - d * along - n * d_along - gv * _dot(n, a)) * inverse


Derivatives = tuple[Tensor, Tensor, Tensor]
"""A value and its first two derivatives."""


def _envelope(r: Tensor, r_max: Tensor, p: int) -> Derivatives:
    """The polynomial cutoff, as (1-u)^3 times a sum of positive terms: see the kernel's file."""
    u = r / r_max
    rest, power, total = 1 - u, u ** (p - 2), torch.full_like(u, 0.5 * p * (p + 1))
    for k in range(p - 2, -1, -1):
        total = total * u + 0.5 * (k + 1) * (k + 2)
    slope = -0.5 * p * (p + 1) * (p + 2) * power * rest
    inside = r < r_max
    value, second = rest**3 * total, slope * (p - 1 - (p + 1) * u) / r_max**2
    return value * inside, slope * u * rest / r_max * inside, second * inside


def _agnesi(r: Tensor, r0: Tensor, a: Tensor, q: Tensor, p: Tensor) -> Derivatives:
    far = r > 0
    log = torch.where(far, r / r0, 1.0).log()
    part = torch.sigmoid((q - p) * log)
    bump = a * (q * log).exp() * (1 - part)
    rate = q - (q - p) * part
    d_bump = bump * rate
    dd_bump = d_bump * rate - bump * (q - p) ** 2 * part * (1 - part)
    t, inverse = 1 / (1 + bump), 1 / torch.where(far, r, 1.0)
    by_log, by_log2 = -t * t * d_bump, t * t * (2 * t * d_bump * d_bump - dd_bump)
    return torch.where(far, t, 1.0), by_log * inverse * far, (by_log2 - by_log) * inverse**2 * far


def _soft(r: Tensor, r0: Tensor, alpha: Tensor) -> Derivatives:
    start, width = 0.75 * r0, (4 / 3 - 0.75) * r0
    steep = 2 * alpha / width
    s = torch.sigmoid(steep * (r - start - 0.5 * width))
    s1 = steep * s * (1 - s)
    return start + (r - start) * s, s + (r - start) * s1, 2 * s1 + (r - start) * steep * s1 * (1 - 2 * s)


def _bessel(t: Tensor, w: Tensor, factor: Tensor) -> Derivatives:
    near = t <= 0
    inverse = 1 / torch.where(near, 1.0, t)
    value = factor * (w * t).sin() * inverse
    first = (factor * w * (w * t).cos() - value) * inverse
    second = -w * w * value - 2 * first * inverse
    return torch.where(near, factor * w, value), torch.where(near, 0.0, first), torch.where(near, 0.0, second)


def _gaussian(t: Tensor, w: Tensor, factor: Tensor) -> Derivatives:
    value, slope = (factor * (t - w).square()).exp(), 2 * factor * (t - w)
    return value, slope * value, (2 * factor + slope * slope) * value


def _chebyshev(t: Tensor, width: int) -> Derivatives:
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    rows = [(one, zero, zero), (t, one, zero)]
    for _ in range(1, width):
        (b, b1, b2), (n, n1, n2) = rows[-2:]
        rows.append((2 * t * n - b, 2 * n + 2 * t * n1 - b1, 4 * n1 + 2 * t * n2 - b2))
    return tuple(torch.cat(column, dim=1) for column in zip(*rows[1:], strict=True))


def _radial(r: Tensor, edge: tuple[Tensor, ...], kinds: tuple[str, str, bool]) -> tuple[Derivatives, Derivatives]:
    """The features [E, K] and the cutoff [E, 1] with their derivatives, in r's dtype."""
    radius, index, basis, constants = edge
    (name, transform, cut), (r_max, p, factor, *rest) = kinds, constants.unbind(0)
    wide, moves = r.double(), r > 0
    one, zero = torch.ones_like(wide), torch.zeros_like(wide)
    t = wide, one, zero
    if transform != "none":
        total = (radius[index[0]].double() + radius[index[1]].double()).unsqueeze(1)
        t = _soft(wide, total, rest[0]) if transform == "soft" else _agnesi(wide, 0.5 * total, *rest)
    t, t1, t2 = (x.to(r.dtype) for x in t)
    c, c1, c2 = _envelope(r, r_max.to(r.dtype), int(p))
    t1, t2, c1, c2 = (x * moves for x in (t1, t2, c1, c2))  # an edge of length zero has no direction to move in
    k, k1, k2 = (c, c1, c2) if cut else (torch.ones_like(c), torch.zeros_like(c), torch.zeros_like(c))
    factor = factor.to(r.dtype)
    if name == "chebyshev":
        b, b1, b2 = _chebyshev(t, basis.shape[0])
    else:
        b, b1, b2 = (_bessel if name == "bessel" else _gaussian)(t, basis, factor)
    b2, b1 = b2 * t1 * t1 + b1 * t2, b1 * t1
    return (b * k, b1 * k + b * k1, b2 * k + 2 * b1 * k1 + b * k2), (c, c1, c2)


def radial(r: Tensor, edge: tuple[Tensor, ...], kinds: tuple[str, str, bool]) -> tuple[Tensor, Tensor]:
    """r [E, 1] -> features [E, K] and cutoff [E, 1], which is empty where the features hold it.

    edge: (radius [N], edge_index [2, E], basis [K], constants [6] float64); kinds: (basis, transform, cut), as in
    `ops.edge_embedding.edge_radial`.
    """
    (f, _, _), (c, _, _) = _radial(r, edge, kinds)
    return f, c[:0] if kinds[2] else c


def radial_grad(g: Tensor, gc: Tensor, r: Tensor, edge: tuple[Tensor, ...], kinds: tuple[str, str, bool]) -> Tensor:
    """The gradient [E, 1] of r for the cotangents g [E, K] and gc [E, 1] of the features and the cutoff."""
    (_, f1, _), (_, c1, _) = _radial(r, edge, kinds)
    gr = (g * f1).sum(dim=1, keepdim=True)
    return gr if kinds[2] else gr + gc * c1


def radial_grad_grad(
    a: Tensor, g: Tensor, gc: Tensor, r: Tensor, edge: tuple[Tensor, ...], kinds: tuple[str, str, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """(dg, dgc, dr): the derivatives of <a, gr>, for a cotangent a [E, 1] of gr."""
    (_, f1, f2), (_, c1, c2) = _radial(r, edge, kinds)
    dr = (g * f2).sum(dim=1, keepdim=True)
    return (a * f1, torch.zeros_like(gc), a * dr) if kinds[2] else (a * f1, a * c1, a * (dr + gc * c2))
