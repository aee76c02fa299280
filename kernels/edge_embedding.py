"""What MACE knows of an edge: the spherical harmonics of its direction and the radial features of its length.

Harmonics, with n = v / r, "component" normalisation and the products q = (xx, yy, zz, xy, xz, yz) of n:

    Y_1 = sqrt3 n,   Y_2 = linear in q,   Y_3 = bilinear in n and q

The gradient by n, for a cotangent g of Y, is G = G_1(g) + G_2(g, n) + G_3(g, q), linear in n and in q. Then

    gv = (G - n (n.G)) / r
    double backward, for a cotangent a of gv, along dn = (a - n (n.a)) / r:
        dg = the derivative of Y,   dv = the derivative of gv; both take dn for n and dq for q in one factor

Radial features. f_k(r) = B_k(T(r)) c(r), with a basis B, a transform T of the distance (none, Agnesi, Soft) and the
polynomial cutoff c, which always takes r itself:

    backward  gr = sum_k g_k f_k',   double backward  dg_k = a f_k',  dr = a sum_k g_k f_k''

T and c and their derivatives are numbers of an edge and run in FP64, the basis in the dtype of the features.

An edge of length zero has Y_l = 0 beyond l = 0, the limit of its radial features, and zero gradients; MACE gives NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import tiles
from .products import exp


@triton.jit
def _products(n):
    x, y, z = n
    return x * x, y * y, z * z, x * y, x * z, y * z


@triton.jit
def _d_products(n, d):
    """The derivatives of the products along d."""
    x, y, z = n
    dx, dy, dz = d
    return 2 * x * dx, 2 * y * dy, 2 * z * dz, x * dy + y * dx, x * dz + z * dx, y * dz + z * dy


@triton.jit
def _second(q):
    """Y_2, linear in the products."""
    SQRT5: tl.constexpr = 5.0**0.5
    SQRT15: tl.constexpr = 15.0**0.5
    xx, yy, zz, xy, xz, yz = q
    return SQRT15 * xz, SQRT15 * xy, SQRT5 * (yy - 0.5 * (xx + zz)), SQRT15 * yz, 0.5 * SQRT15 * (zz - xx)


@triton.jit
def _third(n, q):
    """Y_3, bilinear in the vector and the products."""
    SQRT105: tl.constexpr = 105.0**0.5
    SQRT35_8: tl.constexpr = (35.0 / 8.0) ** 0.5
    SQRT21_8: tl.constexpr = (21.0 / 8.0) ** 0.5
    HALF_SQRT7: tl.constexpr = 0.5 * 7.0**0.5
    x, y, z = n
    xx, yy, zz, _, _, yz = q
    ring = 4 * yy - xx - zz
    y0, y1, y2 = SQRT35_8 * x * (3 * zz - xx), SQRT105 * x * yz, SQRT21_8 * x * ring
    y3, y4, y5 = HALF_SQRT7 * y * (2 * yy - 3 * (xx + zz)), SQRT21_8 * z * ring, 0.5 * SQRT105 * y * (zz - xx)
    return y0, y1, y2, y3, y4, y5, SQRT35_8 * z * (zz - 3 * xx)


@triton.jit
def _pull_second(g, n):
    """The gradient of <g, Y_2> by n, linear in n."""
    SQRT5: tl.constexpr = 5.0**0.5
    SQRT15: tl.constexpr = 15.0**0.5
    _, _, _, _, g0, g1, g2, g3, g4, _, _, _, _, _, _, _ = g
    x, y, z = n
    gx = SQRT15 * (g0 * z + g1 * y - g4 * x) - SQRT5 * g2 * x
    gy = SQRT15 * (g1 * x + g3 * z) + 2 * SQRT5 * g2 * y
    return gx, gy, SQRT15 * (g0 * x + g3 * y + g4 * z) - SQRT5 * g2 * z


@triton.jit
def _pull_third(g, q):
    """The gradient of <g, Y_3> by n, linear in the products."""
    SQRT105: tl.constexpr = 105.0**0.5
    SQRT35_8: tl.constexpr = (35.0 / 8.0) ** 0.5
    SQRT21_8: tl.constexpr = (21.0 / 8.0) ** 0.5
    HALF_SQRT7: tl.constexpr = 0.5 * 7.0**0.5
    _, _, _, _, _, _, _, _, _, g0, g1, g2, g3, g4, g5, g6 = g
    xx, yy, zz, xy, xz, yz = q
    gx = 3 * SQRT35_8 * g0 * (zz - xx) + SQRT105 * g1 * yz + SQRT21_8 * g2 * (4 * yy - 3 * xx - zz)
    gx -= 6 * HALF_SQRT7 * g3 * xy + 2 * SQRT21_8 * g4 * xz + SQRT105 * g5 * xy + 6 * SQRT35_8 * g6 * xz
    gy = SQRT105 * (g1 * xz + 0.5 * g5 * (zz - xx)) + 8 * SQRT21_8 * (g2 * xy + g4 * yz)
    gy += HALF_SQRT7 * g3 * (6 * yy - 3 * (xx + zz))
    gz = 6 * SQRT35_8 * g0 * xz + SQRT105 * (g1 * xy + g5 * yz) - 2 * SQRT21_8 * g2 * xz - 6 * HALF_SQRT7 * g3 * yz
    return gx, gy, gz + SQRT21_8 * g4 * (4 * yy - xx - 3 * zz) + 3 * SQRT35_8 * g6 * (zz - xx)


@triton.jit
def _add(a, b):
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


@triton.jit
def _dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@triton.jit
def _scaled(a, factor):
    return a[0] * factor, a[1] * factor, a[2] * factor


@triton.jit
def _tangential(a, n):
    """a without its part along n."""
    along = _dot(a, n)
    return a[0] - n[0] * along, a[1] - n[1] * along, a[2] - n[2] * along


@triton.jit
def _load_vector(ptr, edge, inside):
    """The components of each edge's vector, zero outside."""
    at = ptr + edge.to(tl.int64) * 3
    x, y = tl.load(at, mask=inside, other=0.0), tl.load(at + 1, mask=inside, other=0.0)
    return x, y, tl.load(at + 2, mask=inside, other=0.0)


@triton.jit
def _store_vector(ptr, edge, inside, v):
    at = ptr + edge.to(tl.int64) * 3
    tl.store(at, v[0], mask=inside)
    tl.store(at + 1, v[1], mask=inside)
    tl.store(at + 2, v[2], mask=inside)


@triton.jit
def _unit(v):
    """Unit vectors and inverse lengths; both are zero for a vector of length zero."""
    square = _dot(v, v)
    if square.dtype == tl.float64:
        inverse = 1.0 / tl.sqrt(tl.where(square > 0, square, 1.0))
    else:
        inverse = tl.div_rn(tl.full(square.shape, 1.0, tl.float32), tl.sqrt_rn(tl.where(square > 0, square, 1.0)))
    inverse = tl.where(square > 0, inverse, 0.0)
    return _scaled(v, inverse), inverse


@triton.jit
def _rows_of(edge, inside, DIM: tl.constexpr):
    """Places [BLOCK_E, 16] of each edge's DIM harmonics, and whether they exist."""
    column = tl.arange(0, 16)[None, :]
    return edge.to(tl.int64)[:, None] * DIM + column, inside[:, None] & (column < DIM)


@triton.jit
def _store_harmonics(ptr, edge, inside, y, DIM: tl.constexpr):
    """Each edge's numbers lie side by side in one thread, so that they leave in long words."""
    y0, y1, y2, y3, y4, y5, y6, y7, y8, y9, y10, y11, y12, y13, y14, y15 = y
    even = tl.join(tl.join(tl.join(y0, y8), tl.join(y4, y12)), tl.join(tl.join(y2, y10), tl.join(y6, y14)))
    odd = tl.join(tl.join(tl.join(y1, y9), tl.join(y5, y13)), tl.join(tl.join(y3, y11), tl.join(y7, y15)))
    place, mask = _rows_of(edge, inside, DIM)
    tl.store(ptr + place, tl.reshape(tl.join(even, odd), place.shape), mask=mask)


@triton.jit
def _split4(tile):
    """[E, 2, 2] -> the four columns in row-major order."""
    even, odd = tl.split(tile)
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _load_harmonics(ptr, edge, inside, DIM: tl.constexpr):
    """The 16 numbers of each edge's row, zero beyond DIM."""
    place, mask = _rows_of(edge, inside, DIM)
    tile = tl.reshape(tl.load(ptr + place, mask=mask, other=0.0), (place.shape[0], 2, 2, 2, 2))
    even, odd = tl.split(tile)
    even0, even1 = tl.split(even)  # columns 0, 4, 8, 12 and 2, 6, 10, 14
    odd0, odd1 = tl.split(odd)
    y0, y4, y8, y12 = _split4(even0)
    y2, y6, y10, y14 = _split4(even1)
    y1, y5, y9, y13 = _split4(odd0)
    y3, y7, y11, y15 = _split4(odd1)
    return y0, y1, y2, y3, y4, y5, y6, y7, y8, y9, y10, y11, y12, y13, y14, y15


@triton.jit
def _edges(n_edges, BLOCK_E: tl.constexpr):
    edge = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    return edge, edge < n_edges


@triton.jit(do_not_specialize=["n_edges"])
def edge_harmonics_fwd_kernel(
    v_ptr,  # [n_edges, 3]
    y_ptr,  # [n_edges, DIM]
    n_edges,
    DIM: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    SQRT3: tl.constexpr = 3.0**0.5
    edge, inside = _edges(n_edges, BLOCK_E)
    n, _ = _unit(_load_vector(v_ptr, edge, inside))
    q = _products(n)
    one = tl.full(n[0].shape, 1.0, n[0].dtype)
    first = _scaled(n, SQRT3)
    _store_harmonics(y_ptr, edge, inside, (one,) + first + _second(q) + _third(n, q), DIM)  # noqa: RUF005  no stars in Triton


@triton.jit
def _gradient(g, n, q):
    """G, the gradient of <g, Y> by n."""
    SQRT3: tl.constexpr = 3.0**0.5
    _, g1, g2, g3, _, _, _, _, _, _, _, _, _, _, _, _ = g
    return _add(_scaled((g1, g2, g3), SQRT3), _add(_pull_second(g, n), _pull_third(g, q)))


@triton.jit(do_not_specialize=["n_edges"])
def edge_harmonics_bwd_kernel(
    g_ptr,  # [n_edges, DIM]
    v_ptr,  # [n_edges, 3]
    gv_ptr,  # [n_edges, 3]
    n_edges,
    DIM: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    edge, inside = _edges(n_edges, BLOCK_E)
    n, inverse = _unit(_load_vector(v_ptr, edge, inside))
    by_n = _gradient(_load_harmonics(g_ptr, edge, inside, DIM), n, _products(n))
    _store_vector(gv_ptr, edge, inside, _scaled(_tangential(by_n, n), inverse))


@triton.jit(do_not_specialize=["n_edges"])
def edge_harmonics_bwd_bwd_kernel(
    a_ptr,  # [n_edges, 3]
    g_ptr,  # [n_edges, DIM]
    v_ptr,  # [n_edges, 3]
    dg_ptr,  # [n_edges, DIM]
    dv_ptr,  # [n_edges, 3]
    n_edges,
    DIM: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    SQRT3: tl.constexpr = 3.0**0.5
    edge, inside = _edges(n_edges, BLOCK_E)
    n, inverse = _unit(_load_vector(v_ptr, edge, inside))
    a = _load_vector(a_ptr, edge, inside)
    d = _scaled(_tangential(a, n), inverse)
    q, dq = _products(n), _d_products(n, d)
    s0, s1, s2, s3, s4, s5, s6 = _third(d, q)
    t0, t1, t2, t3, t4, t5, t6 = _third(n, dq)
    third = s0 + t0, s1 + t1, s2 + t2, s3 + t3, s4 + t4, s5 + t5, s6 + t6
    zero = tl.zeros_like(inverse)
    first = _scaled(d, SQRT3)
    _store_harmonics(dg_ptr, edge, inside, (zero,) + first + _second(dq) + third, DIM)  # noqa: RUF005
    g = _load_harmonics(g_ptr, edge, inside, DIM)
    by_n, d_by_n = _gradient(g, n, q), _add(_pull_second(g, d), _pull_third(g, dq))
    # gv = (G - n (n.G)) / r, and 1 / r falls by (n.a) / r of itself.
    along, d_along = _dot(n, by_n), _dot(d, by_n) + _dot(n, d_by_n)
    gv = _scaled(_tangential(by_n, n), inverse * _dot(n, a))
    dv = _add(d_by_n, _scaled(_add(_add(_scaled(d, along), _scaled(n, d_along)), gv), -1.0))
    _store_vector(dv_ptr, edge, inside, _scaled(dv, inverse))


@triton.jit
def _envelope(r, r_max, p):
    """The polynomial cutoff c, c' and c'' at r: 1 - (p+1)(p+2)/2 u^p + p(p+2) u^(p+1) - p(p+1)/2 u^(p+2), u = r/r_max.

    Its first derivative is -p(p+1)(p+2)/2 u^(p-1) (1 - u)^2 / r_max.
    """
    u = r / r_max
    power = tl.where(u > 0, tl.exp((p - 2) * tl.log(tl.where(u > 0, u, 1.0))), 0.0)  # u^(p-2)
    value = 1 - power * u * u * (0.5 * (p + 1) * (p + 2) - u * (p * (p + 2) - u * (0.5 * p * (p + 1))))
    slope = -0.5 * p * (p + 1) * (p + 2) * power * (1 - u)
    inside = r < r_max
    first = slope * u * (1 - u) / r_max
    second = slope * (p - 1 - (p + 1) * u) / (r_max * r_max)
    return tl.where(inside, value, 0.0), tl.where(inside, first, 0.0), tl.where(inside, second, 0.0)


@triton.jit
def _agnesi(r, r0, a, q, p):
    """T = 1 / (1 + a u^q / (1 + u^(q-p))), u = r / r0, and its derivatives, by way of those in log u."""
    far = r > 0
    log = tl.log(tl.where(far, r / r0, 1.0))
    part = 1 / (1 + tl.exp((p - q) * log))  # u^(q-p) / (1 + u^(q-p))
    bump = a * tl.exp(q * log) * (1 - part)
    rate = q - (q - p) * part
    d_bump = bump * rate
    dd_bump = d_bump * rate - bump * (q - p) * (q - p) * part * (1 - part)
    t = 1 / (1 + bump)
    by_log, by_log2 = -t * t * d_bump, t * t * (2 * t * d_bump * d_bump - dd_bump)
    inverse = 1 / tl.where(far, r, 1.0)
    first, second = by_log * inverse, (by_log2 - by_log) * inverse * inverse
    return tl.where(far, t, 1.0), tl.where(far, first, 0.0), tl.where(far, second, 0.0)


@triton.jit
def _soft(r, r0, alpha):
    """T = p0 + (r - p0) (1 + tanh(k (r - m))) / 2, p0 = 3/4 r0, p1 = 4/3 r0, m = (p0 + p1)/2, k = alpha / (p1 - p0)."""
    start, width = 0.75 * r0, (4.0 / 3.0 - 0.75) * r0
    steep = 2 * alpha / width
    s = 1 / (1 + tl.exp(steep * (start + 0.5 * width - r)))
    s1 = steep * s * (1 - s)
    return start + (r - start) * s, s + (r - start) * s1, 2 * s1 + (r - start) * steep * s1 * (1 - 2 * s)


@triton.jit
def _sin_cos(y):
    """sin(y) and cos(y) for |y| up to a few thousand: Taylor's series of what the nearest multiple of pi leaves."""
    LAST: tl.constexpr = 12 if y.dtype == tl.float64 else 6
    n = tl.floor(y * 0.3183098861837907 + 0.5)
    if y.dtype == tl.float64:
        high, low = tl.full(y.shape, 3.141592653589793, y.dtype), tl.full(y.shape, 1.2246467991473532e-16, y.dtype)
    else:
        high, low = tl.full(y.shape, 3.1415927410125732, y.dtype), tl.full(y.shape, -8.742277657347586e-08, y.dtype)
    f = tl.fma(-n, low, tl.fma(-n, high, y))
    square, sine, cosine = f * f, tl.full(y.shape, 1.0, y.dtype), tl.full(y.shape, 1.0, y.dtype)
    for k in tl.static_range(LAST, 0, -1):  # a variable for the factor would be an FP32 number
        sine = 1 - square * (1.0 / (2 * k * (2 * k + 1))) * sine
        cosine = 1 - square * (1.0 / (2 * k * (2 * k - 1))) * cosine
    sign = 1 - 2 * (n - 2 * tl.floor(0.5 * n))
    return sign * f * sine, sign * cosine


@triton.jit
def _bessel(t, w, factor):
    """B_k = factor sin(w_k t) / t, B_k' and B_k''; at t = 0 the limit factor w_k and no slope."""
    near = t <= 0
    inverse = 1 / tl.where(near, 1.0, t)
    sine, cosine = _sin_cos(w * t)
    value = factor * sine * inverse
    first = (factor * w * cosine - value) * inverse
    second = -w * w * value - 2 * first * inverse
    return tl.where(near, factor * w, value), tl.where(near, 0.0, first), tl.where(near, 0.0, second)


@triton.jit
def _gaussian(t, w, factor):
    """B_k = exp(factor (t - w_k)^2), B_k' and B_k''."""
    value, slope = exp(factor * (t - w) * (t - w)), 2 * factor * (t - w)
    return value, slope * value, (2 * factor + slope * slope) * value


@triton.jit
def _chebyshev(t, column, WIDTH: tl.constexpr):
    """Chebyshev polynomials of the first kind, degree k + 1 in column k, and two derivatives, by their recurrence."""
    one = tl.full(t.shape, 1.0, t.dtype)
    # Triton would take `before2 = now2` for no change of before2 if both began as the same tensor.
    before, before1, before2 = one, tl.zeros_like(t), tl.zeros_like(t)
    now, now1, now2 = t, tl.full(t.shape, 1.0, t.dtype), tl.zeros_like(t)
    value, first, second = tl.where(column == 0, t, 0.0), tl.where(column == 0, one, 0.0), tl.where(column < 0, t, 0.0)
    for k in range(1, WIDTH):
        after, after1 = 2 * t * now - before, 2 * now + 2 * t * now1 - before1
        after2 = 4 * now1 + 2 * t * now2 - before2
        before, before1, before2, now, now1, now2 = now, now1, now2, after, after1, after2
        own = column == k
        value, first, second = tl.where(own, now, value), tl.where(own, now1, first), tl.where(own, now2, second)
    return value, first, second


@triton.jit
def _transformed(r, edge, inside, n_edges, radius_ptr, index_ptr, constants_ptr, TRANSFORM: tl.constexpr):
    """T, T' and T''. The atoms of an edge set its length scale by their covalent radii."""
    if TRANSFORM == "none":
        return r, tl.full(r.shape, 1.0, r.dtype), tl.zeros_like(r)
    else:
        sender = tl.load(index_ptr + edge, mask=inside, other=0)
        receiver = tl.load(index_ptr + n_edges.to(tl.int64) + edge, mask=inside, other=0)
        total = tl.load(radius_ptr + sender, mask=inside, other=1.0).to(tl.float64)
        total += tl.load(radius_ptr + receiver, mask=inside, other=1.0).to(tl.float64)
        first = tl.load(constants_ptr + 3)
        if TRANSFORM == "soft":
            return _soft(r, total, first)
        else:
            return _agnesi(r, 0.5 * total, first, tl.load(constants_ptr + 4), tl.load(constants_ptr + 5))


@triton.jit
def _features(t, t1, t2, c, c1, c2, basis_ptr, constants_ptr, width, BASIS: tl.constexpr, BLOCK_K: tl.constexpr):
    """f, f' and f'' [BLOCK_E, BLOCK_K] from the transformed distances and the cutoffs, all [BLOCK_E, 1]."""
    column = tl.arange(0, BLOCK_K)[None, :]
    if BASIS == "chebyshev":
        b, b1, b2 = _chebyshev(t, column, BLOCK_K)
    else:
        w = tl.load(basis_ptr + column, mask=column < width, other=0.0)
        factor = tl.load(constants_ptr + 2).to(t.dtype)
        if BASIS == "bessel":
            b, b1, b2 = _bessel(t, w, factor)
        else:
            b, b1, b2 = _gaussian(t, w, factor)
    b2, b1 = b2 * t1 * t1 + b1 * t2, b1 * t1  # by r
    return b * c, b1 * c + b * c1, b2 * c + 2 * b1 * c1 + b * c2


@triton.jit
def _radial(r_ptr, radius_ptr, index_ptr, basis_ptr, constants_ptr, edge, inside, n_edges, width, BASIS: tl.constexpr,
            TRANSFORM: tl.constexpr, CUT: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """The features and the cutoff of each edge with two derivatives, in the dtype of the lengths."""
    given = tl.load(r_ptr + edge, mask=inside, other=1.0)
    dtype: tl.constexpr = given.dtype
    r = given.to(tl.float64)
    c, c1, c2 = _envelope(r, tl.load(constants_ptr), tl.load(constants_ptr + 1))
    t, t1, t2 = _transformed(r, edge, inside, n_edges, radius_ptr, index_ptr, constants_ptr, TRANSFORM)
    c, c1, c2, t, t1, t2 = c.to(dtype), c1.to(dtype), c2.to(dtype), t.to(dtype), t1.to(dtype), t2.to(dtype)
    k, k1, k2 = c, c1, c2
    if not CUT:
        k, k1, k2 = tl.full(c.shape, 1.0, dtype), tl.zeros_like(c), tl.zeros_like(c)
    moves = (given > 0).to(dtype)  # an edge of length zero has no direction to move in
    t1, t2, k1, k2 = t1 * moves, t2 * moves, k1 * moves, k2 * moves
    f, f1, f2 = _features(t[:, None], t1[:, None], t2[:, None], k[:, None], k1[:, None], k2[:, None], basis_ptr,
                          constants_ptr, width, BASIS, BLOCK_K)  # fmt: skip
    return f, f1, f2, c, c1 * moves, c2 * moves


@triton.jit
def _places(edge, inside, width, BLOCK_K: tl.constexpr):
    """Places [BLOCK_E, BLOCK_K] of each edge's features, and whether they exist."""
    column = tl.arange(0, BLOCK_K)[None, :]
    return edge.to(tl.int64)[:, None] * width + column, inside[:, None] & (column < width)


@triton.jit(do_not_specialize=["n_edges"])
def edge_radial_fwd_kernel(
    r_ptr,  # [n_edges]
    radius_ptr,  # [nodes], of transforms alone
    index_ptr,  # [2, n_edges], of transforms alone
    basis_ptr,  # [width]
    constants_ptr,  # [6]: r_max, p; the basis' factor; a, q, p of Agnesi or alpha of Soft
    f_ptr,  # [n_edges, width]
    c_ptr,  # [n_edges], not written where CUT multiplies the features with it
    n_edges,
    width,
    BASIS: tl.constexpr,
    TRANSFORM: tl.constexpr,
    CUT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    edge, inside = _edges(n_edges, BLOCK_E)
    f, _, _, c, _, _ = _radial(r_ptr, radius_ptr, index_ptr, basis_ptr, constants_ptr, edge, inside, n_edges, width,
                               BASIS, TRANSFORM, CUT, BLOCK_K)  # fmt: skip
    place, mask = _places(edge, inside, width, BLOCK_K)
    tl.store(f_ptr + place, f, mask=mask)
    if not CUT:
        tl.store(c_ptr + edge, c, mask=inside)


@triton.jit(do_not_specialize=["n_edges"])
def edge_radial_bwd_kernel(
    g_ptr,  # [n_edges, width]
    gc_ptr,  # [n_edges], read where the cutoff is a result of its own
    r_ptr,
    radius_ptr,
    index_ptr,
    basis_ptr,
    constants_ptr,
    gr_ptr,  # [n_edges]
    n_edges,
    width,
    BASIS: tl.constexpr,
    TRANSFORM: tl.constexpr,
    CUT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    edge, inside = _edges(n_edges, BLOCK_E)
    _, f1, _, _, c1, _ = _radial(r_ptr, radius_ptr, index_ptr, basis_ptr, constants_ptr, edge, inside, n_edges, width,
                                 BASIS, TRANSFORM, CUT, BLOCK_K)  # fmt: skip
    place, mask = _places(edge, inside, width, BLOCK_K)
    gr = tl.sum(tl.where(mask, f1, 0.0) * tl.load(g_ptr + place, mask=mask, other=0.0), axis=1)
    if not CUT:
        gr += c1 * tl.load(gc_ptr + edge, mask=inside, other=0.0)
    tl.store(gr_ptr + edge, gr, mask=inside)


@triton.jit(do_not_specialize=["n_edges"])
def edge_radial_bwd_bwd_kernel(
    a_ptr,  # [n_edges]
    g_ptr,
    gc_ptr,
    r_ptr,
    radius_ptr,
    index_ptr,
    basis_ptr,
    constants_ptr,
    dg_ptr,  # [n_edges, width]
    dgc_ptr,  # [n_edges]
    dr_ptr,  # [n_edges]
    n_edges,
    width,
    BASIS: tl.constexpr,
    TRANSFORM: tl.constexpr,
    CUT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    edge, inside = _edges(n_edges, BLOCK_E)
    _, f1, f2, _, c1, c2 = _radial(r_ptr, radius_ptr, index_ptr, basis_ptr, constants_ptr, edge, inside, n_edges,
                                   width, BASIS, TRANSFORM, CUT, BLOCK_K)  # fmt: skip
    place, mask = _places(edge, inside, width, BLOCK_K)
    a = tl.load(a_ptr + edge, mask=inside, other=0.0)
    tl.store(dg_ptr + place, a[:, None] * f1, mask=mask)
    dr = tl.sum(tl.where(mask, f2, 0.0) * tl.load(g_ptr + place, mask=mask, other=0.0), axis=1)
    if not CUT:
        tl.store(dgc_ptr + edge, a * c1, mask=inside)
        dr += c2 * tl.load(gc_ptr + edge, mask=inside, other=0.0)
    tl.store(dr_ptr + edge, a * dr, mask=inside)


def harmonics(v: torch.Tensor, dim: int) -> torch.Tensor:
    """v [E, 3] -> Y [E, dim]; dim is 4, 9 or 16. All arguments of this file's functions are contiguous."""
    y = v.new_empty(v.shape[0], dim)
    _run(edge_harmonics_fwd_kernel, "edge_harmonics", v, (v, y), DIM=dim)
    return y


def harmonics_grad(g: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The gradient [E, 3] of v for the cotangent g [E, dim] of Y."""
    gv = torch.empty_like(v)
    _run(edge_harmonics_bwd_kernel, "edge_harmonics", v, (g, v, gv), DIM=g.shape[1])
    return gv


def harmonics_grad_grad(a: torch.Tensor, g: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(dg [E, dim], dv [E, 3]): the derivatives of <a, gv>."""
    dg, dv = torch.empty_like(g), torch.empty_like(v)
    _run(edge_harmonics_bwd_bwd_kernel, "edge_harmonics", v, (a, g, v, dg, dv), DIM=g.shape[1])
    return dg, dv


def radial(r: torch.Tensor, edge: tuple, kinds: tuple[str, str, bool]) -> tuple[torch.Tensor, torch.Tensor]:
    """r [E, 1] -> features [E, K] and cutoff [E, 1] (empty where the features hold it).

    edge: (radius [N], edge_index [2, E], basis [K], constants [6] float64). kinds: (basis, transform, cut).
    """
    f, c = r.new_empty(r.shape[0], edge[2].shape[0]), _cutoff_like(r, kinds)
    _run_radial(edge_radial_fwd_kernel, r, (r, *edge, f, c), edge, kinds)
    return f, c


def radial_grad(g: torch.Tensor, gc: torch.Tensor, r: torch.Tensor, edge: tuple, kinds: tuple) -> torch.Tensor:
    """The gradient [E, 1] of r for the cotangents g [E, K] and gc [E, 1] of the features and the cutoff."""
    gr = torch.empty_like(r)
    _run_radial(edge_radial_bwd_kernel, r, (g, gc, r, *edge, gr), edge, kinds)
    return gr


def radial_grad_grad(a, g, gc, r, edge: tuple, kinds: tuple) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dg, dgc, dr): the derivatives of <a, gr>, a [E, 1]."""
    dg, dgc, dr = torch.empty_like(g), torch.empty_like(gc), torch.empty_like(r)
    _run_radial(edge_radial_bwd_bwd_kernel, r, (a, g, gc, r, *edge, dg, dgc, dr), edge, kinds)
    return dg, dgc, dr


def _cutoff_like(r: torch.Tensor, kinds: tuple) -> torch.Tensor:
    return r.new_empty(0 if kinds[2] else r.shape[0], 1)


def _run_radial(kernel, r: torch.Tensor, tensors: tuple, edge: tuple, kinds: tuple) -> None:
    width = edge[2].shape[0]
    basis, transform, cut = kinds
    block = max(2, triton.next_power_of_2(width))
    _run(kernel, "edge_radial", r, tensors, width, BASIS=basis, TRANSFORM=transform, CUT=cut, BLOCK_K=block)


def _run(kernel, op: str, like: torch.Tensor, tensors: tuple, *sizes: int, **constants) -> None:
    edges, width = like.shape[0], constants.get("BLOCK_K", 16)
    if edges == 0:
        return
    tile = tiles.choose(op, dtype=tiles.TAGS[like.dtype], edges=edges, width=width)
    with torch.cuda.device_of(like):  # Triton launches on the current device
        kernel[(triton.cdiv(edges, tile["BLOCK_E"]),)](
            *tensors, edges, *sizes, **constants, BLOCK_E=tile["BLOCK_E"], num_warps=tile.num_warps
        )


def offline_cases(target: str = "sm_90", dtypes: tuple[str, ...] = ("fp64", "fp32")) -> list:
    """Specialisations for `offline.compile_cases`: harmonics to l = 3, every basis and transform, the tiles in use."""
    from .offline import Case

    cases = []
    edge, vector = ("r_ptr", "radius_ptr", "index_ptr", "basis_ptr", "constants_ptr"), ("v_ptr",)
    own = {
        "edge_harmonics_fwd": (*vector, "y_ptr"),
        "edge_harmonics_bwd": ("g_ptr", *vector, "gv_ptr"),
        "edge_harmonics_bwd_bwd": ("a_ptr", "g_ptr", *vector, "dg_ptr", "dv_ptr"),
        "edge_radial_fwd": (*edge, "f_ptr", "c_ptr"),
        "edge_radial_bwd": ("g_ptr", "gc_ptr", *edge, "gr_ptr"),
        "edge_radial_bwd_bwd": ("a_ptr", "g_ptr", "gc_ptr", *edge, "dg_ptr", "dgc_ptr", "dr_ptr"),
    }
    shapes = (("bessel", "none", True), ("bessel", "agnesi", False), ("gaussian", "soft", True))
    shapes += (("chebyshev", "agnesi", True),)
    for dtype in dtypes:
        for name, pointers in own.items():
            op = name.split("_fwd")[0].split("_bwd")[0]
            tile = tiles.choose(op, arch=target, dtype=dtype, edges=129470, width=16)
            words = {"index_ptr": "*i64", "constants_ptr": "*fp64"}
            signature = {pointer: words.get(pointer, f"*{dtype}") for pointer in pointers} | {"n_edges": "i32"}
            for kinds in shapes if op == "edge_radial" else (None,):
                constants, title = dict(tile.block) | {"DIM": 16}, f"{name} {dtype}"
                if kinds:
                    constants = dict(tile.block) | dict(zip(("BASIS", "TRANSFORM", "CUT"), kinds, strict=True))
                    constants["BLOCK_K"], title = 16, f"{title} {kinds[0]} {kinds[1]}"
                full = signature | ({"width": "i32"} if kinds else {})
                launch = (constants, tile.num_warps, tile.num_stages, pointers)
                cases.append(Case(title, "edge_embedding", f"{name}_kernel", full, *launch))
    return cases
