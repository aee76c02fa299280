"""The radial features of the length of every edge: basis, distance transform and cutoff, with both derivatives.

f_k(r) = B_k(T(r)) c(r), with a basis B, a transform T of the distance (none, Agnesi, Soft) and the polynomial cutoff c,
which always takes r itself:

    backward  gr = sum_k g_k f_k',   double backward  dg_k = a f_k',  dr = a sum_k g_k f_k''

T and its derivatives, a few numbers of an edge, run in FP64, all else in the dtype of the features.

An edge of length zero has the limit of its radial features and zero gradients; MACE gives NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import tiles
from .edge_harmonics import edges_of, places, run
from .products import exp, sum_products


@triton.jit
def _envelope(r, r_max, p):
    """The polynomial cutoff c, c' and c'' at r: 1 - (p+1)(p+2)/2 u^p + p(p+2) u^(p+1) - p(p+1)/2 u^(p+2), u = r/r_max.

    c' = -p(p+1)(p+2)/2 u^(p-1) (1-u)^2 / r_max, hence c = (1-u)^3 sum over k < p of (k+1)(k+2)/2 u^k: all terms are
    positive, so that nothing cancels near r_max.
    """
    u = r / r_max
    rest = 1 - u
    total, power = tl.zeros_like(u) + 0.5 * p * (p + 1), tl.full(u.shape, 1.0, u.dtype)
    for back in range(2, p):
        k = p - back
        total = total * u + 0.5 * (k + 1) * (k + 2)
        power *= u
    slope = -0.5 * p * (p + 1) * (p + 2) * power * rest  # power is u^(p-2)
    inside = r < r_max
    value = rest * rest * rest * (total * u + 1)
    first, second = slope * u * rest / r_max, slope * (p - 1 - (p + 1) * u) / (r_max * r_max)
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
    one, zero = tl.full(t.shape, 1.0, t.dtype), tl.zeros_like(t)
    before, before1, before2, now, now1, now2 = one, zero, zero, t, one, zero
    value, first, second = tl.where(column == 0, t, 0.0), tl.where(column == 0, one, 0.0), tl.where(column < 0, t, 0.0)
    for k in tl.static_range(1, WIDTH):  # unrolled: a real loop would lose before2, which begins as now2 does
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
        wide, first = r.to(tl.float64), tl.load(constants_ptr + 3)
        if TRANSFORM == "soft":
            return _soft(wide, total, first)
        else:
            return _agnesi(wide, 0.5 * total, first, tl.load(constants_ptr + 4), tl.load(constants_ptr + 5))


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
    r = tl.load(r_ptr + edge, mask=inside, other=1.0)
    dtype: tl.constexpr = r.dtype
    c, c1, c2 = _envelope(r, tl.load(constants_ptr).to(dtype), tl.load(constants_ptr + 1).to(tl.int32))
    t, t1, t2 = _transformed(r, edge, inside, n_edges, radius_ptr, index_ptr, constants_ptr, TRANSFORM)
    t, t1, t2 = t.to(dtype), t1.to(dtype), t2.to(dtype)
    k, k1, k2 = c, c1, c2
    if not CUT:
        k, k1, k2 = tl.full(c.shape, 1.0, dtype), tl.zeros_like(c), tl.zeros_like(c)
    moves = (r > 0).to(dtype)  # an edge of length zero has no direction to move in
    t1, t2, k1, k2 = t1 * moves, t2 * moves, k1 * moves, k2 * moves
    f, f1, f2 = _features(t[:, None], t1[:, None], t2[:, None], k[:, None], k1[:, None], k2[:, None], basis_ptr,
                          constants_ptr, width, BASIS, BLOCK_K)  # fmt: skip
    return f, f1, f2, c, c1 * moves, c2 * moves


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
    edge, inside = edges_of(n_edges, BLOCK_E)
    f, _, _, c, _, _ = _radial(r_ptr, radius_ptr, index_ptr, basis_ptr, constants_ptr, edge, inside, n_edges, width,
                               BASIS, TRANSFORM, CUT, BLOCK_K)  # fmt: skip
    place, mask = places(edge, inside, width, BLOCK_K)
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
    edge, inside = edges_of(n_edges, BLOCK_E)
    _, f1, _, _, c1, _ = _radial(r_ptr, radius_ptr, index_ptr, basis_ptr, constants_ptr, edge, inside, n_edges, width,
                                 BASIS, TRANSFORM, CUT, BLOCK_K)  # fmt: skip
    place, mask = places(edge, inside, width, BLOCK_K)
    gr = sum_products(f1 * tl.load(g_ptr + place, mask=mask, other=0.0), mask, axis=1)
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
    edge, inside = edges_of(n_edges, BLOCK_E)
    _, f1, f2, _, c1, c2 = _radial(r_ptr, radius_ptr, index_ptr, basis_ptr, constants_ptr, edge, inside, n_edges,
                                   width, BASIS, TRANSFORM, CUT, BLOCK_K)  # fmt: skip
    place, mask = places(edge, inside, width, BLOCK_K)
    a = tl.load(a_ptr + edge, mask=inside, other=0.0)
    tl.store(dg_ptr + place, a[:, None] * f1, mask=mask)
    dr = sum_products(f2 * tl.load(g_ptr + place, mask=mask, other=0.0), mask, axis=1)
    if not CUT:
        tl.store(dgc_ptr + edge, a * c1, mask=inside)
        dr += c2 * tl.load(gc_ptr + edge, mask=inside, other=0.0)
    tl.store(dr_ptr + edge, a * dr, mask=inside)


def radial(r: torch.Tensor, edge: tuple, kinds: tuple[str, str, bool]) -> tuple[torch.Tensor, torch.Tensor]:
    """r [E, 1] -> features [E, K] and cutoff [E, 1] (empty where the features hold it).

    edge: (radius [N], edge_index [2, E], basis [K], constants [6] float64). kinds: (basis, transform, cut).
    """
    f, c = r.new_empty(r.shape[0], edge[2].shape[0]), _cutoff_like(r, kinds)
    _run_radial(edge_radial_fwd_kernel, "edge_radial", r, (r, *edge, f, c), edge, kinds)
    return f, c


def radial_grad(g: torch.Tensor, gc: torch.Tensor, r: torch.Tensor, edge: tuple, kinds: tuple) -> torch.Tensor:
    """The gradient [E, 1] of r for the cotangents g [E, K] and gc [E, 1] of the features and the cutoff."""
    gr = torch.empty_like(r)
    _run_radial(edge_radial_bwd_kernel, "edge_radial", r, (g, gc, r, *edge, gr), edge, kinds)
    return gr


def radial_grad_grad(a, g, gc, r, edge: tuple, kinds: tuple) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dg, dgc, dr): the derivatives of <a, gr>, a [E, 1]."""
    dg, dgc, dr = torch.empty_like(g), torch.empty_like(gc), torch.empty_like(r)
    tensors = (a, g, gc, r, *edge, dg, dgc, dr)
    _run_radial(edge_radial_bwd_bwd_kernel, "edge_radial_bwd_bwd", r, tensors, edge, kinds)
    return dg, dgc, dr


def _cutoff_like(r: torch.Tensor, kinds: tuple) -> torch.Tensor:
    return r.new_empty(0 if kinds[2] else r.shape[0], 1)


def _run_radial(kernel, op: str, r: torch.Tensor, tensors: tuple, edge: tuple, kinds: tuple) -> None:
    width = edge[2].shape[0]
    basis, transform, cut = kinds
    block = max(2, triton.next_power_of_2(width))
    run(kernel, op, r, tensors, width, BASIS=basis, TRANSFORM=transform, CUT=cut, BLOCK_K=block)


def offline_cases(target: str = "sm_90", dtypes: tuple[str, ...] = ("fp64", "fp32")) -> list:
    """Specialisations for `offline.compile_cases`: every basis and transform, the tiles in use."""
    from .offline import Case

    edge = ("r_ptr", "radius_ptr", "index_ptr", "basis_ptr", "constants_ptr")
    own = {
        "edge_radial_fwd": (*edge, "f_ptr", "c_ptr"),
        "edge_radial_bwd": ("g_ptr", "gc_ptr", *edge, "gr_ptr"),
        "edge_radial_bwd_bwd": ("a_ptr", "g_ptr", "gc_ptr", *edge, "dg_ptr", "dgc_ptr", "dr_ptr"),
    }
    kinds = (("bessel", "none", True), ("bessel", "agnesi", False), ("gaussian", "soft", True))
    kinds += (("chebyshev", "agnesi", True),)
    words, cases = {"index_ptr": "*i64", "constants_ptr": "*fp64"}, []
    for dtype in dtypes:
        for name, pointers in own.items():
            table = name if name == "edge_radial_bwd_bwd" else "edge_radial"
            tile = tiles.choose(table, arch=target, dtype=dtype, edges=129470, width=16)
            signature = {pointer: words.get(pointer, f"*{dtype}") for pointer in pointers}
            signature |= {"n_edges": "i32", "width": "i32"}
            for basis, transform, cut in kinds:
                constants = dict(tile.block) | {"BASIS": basis, "TRANSFORM": transform, "CUT": cut, "BLOCK_K": 16}
                launch = (constants, tile.num_warps, tile.num_stages, pointers)
                title = f"{name} {dtype} {basis} {transform}"
                cases.append(Case(title, "edge_radial", f"{name}_kernel", signature, *launch))
    return cases
