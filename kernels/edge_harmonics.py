"""The spherical harmonics of the direction of every edge, with both derivatives.

With n = v / r, "component" normalisation and the products q = (xx, yy, zz, xy, xz, yz) of n:

    Y_1 = sqrt3 n,   Y_2 = linear in q,   Y_3 = bilinear in n and q

The gradient by n, for a cotangent g of Y, is G = G_1(g) + G_2(g, n) + G_3(g, q), linear in n and in q. Then

    gv = (G - n (n.G)) / r
    double backward, for a cotangent a of gv, along dn = (a - n (n.a)) / r:
        dg = the derivative of Y,   dv = the derivative of gv; both take dn for n and dq for q in one factor

An edge of length zero has Y_l = 0 beyond l = 0 and zero gradients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import tiles


@triton.jit
def products(n):
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
def scaled(a, factor):
    return a[0] * factor, a[1] * factor, a[2] * factor


@triton.jit
def tangential(a, n):
    """a without its part along n."""
    along = _dot(a, n)
    return a[0] - n[0] * along, a[1] - n[1] * along, a[2] - n[2] * along


@triton.jit
def load_vector(ptr, edge, inside):
    """The components of each edge's vector, zero outside."""
    at = ptr + edge.to(tl.int64) * 3
    x, y = tl.load(at, mask=inside, other=0.0), tl.load(at + 1, mask=inside, other=0.0)
    return x, y, tl.load(at + 2, mask=inside, other=0.0)


@triton.jit
def store_vector(ptr, edge, inside, v):
    at = ptr + edge.to(tl.int64) * 3
    tl.store(at, v[0], mask=inside)
    tl.store(at + 1, v[1], mask=inside)
    tl.store(at + 2, v[2], mask=inside)


@triton.jit
def unit(v):
    """Unit vectors and inverse lengths; both are zero for a vector of length zero."""
    square = _dot(v, v)
    if square.dtype == tl.float64:
        inverse = 1.0 / tl.sqrt(tl.where(square > 0, square, 1.0))
    else:
        inverse = tl.div_rn(tl.full(square.shape, 1.0, tl.float32), tl.sqrt_rn(tl.where(square > 0, square, 1.0)))
    inverse = tl.where(square > 0, inverse, 0.0)
    return scaled(v, inverse), inverse


@triton.jit
def places(edge, inside, width, BLOCK: tl.constexpr):
    """Places [BLOCK_E, BLOCK] of each edge's `width` numbers, and whether they exist."""
    column = tl.arange(0, BLOCK)[None, :]
    return edge.to(tl.int64)[:, None] * width + column, inside[:, None] & (column < width)


@triton.jit
def _store_harmonics(ptr, edge, inside, y, DIM: tl.constexpr):
    """Each edge's numbers lie side by side in one thread, so that they leave in long words."""
    y0, y1, y2, y3, y4, y5, y6, y7, y8, y9, y10, y11, y12, y13, y14, y15 = y
    even = tl.join(tl.join(tl.join(y0, y8), tl.join(y4, y12)), tl.join(tl.join(y2, y10), tl.join(y6, y14)))
    odd = tl.join(tl.join(tl.join(y1, y9), tl.join(y5, y13)), tl.join(tl.join(y3, y11), tl.join(y7, y15)))
    place, mask = places(edge, inside, DIM, 16)
    tl.store(ptr + place, tl.reshape(tl.join(even, odd), place.shape), mask=mask)


@triton.jit
def _split4(tile):
    """[E, 2, 2] -> the four columns in row-major order."""
    even, odd = tl.split(tile)
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def load_harmonics(ptr, edge, inside, DIM: tl.constexpr):
    """The 16 numbers of each edge's row, zero beyond DIM."""
    place, mask = places(edge, inside, DIM, 16)
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
def edges_of(n_edges, BLOCK_E: tl.constexpr):
    """The edges of this program, and which of them exist."""
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
    edge, inside = edges_of(n_edges, BLOCK_E)
    n, _ = unit(load_vector(v_ptr, edge, inside))
    q = products(n)
    one = tl.full(n[0].shape, 1.0, n[0].dtype)
    first = scaled(n, SQRT3)
    _store_harmonics(y_ptr, edge, inside, (one,) + first + _second(q) + _third(n, q), DIM)  # noqa: RUF005  no stars in Triton


@triton.jit
def gradient(g, n, q):
    """G, the gradient of <g, Y> by n."""
    SQRT3: tl.constexpr = 3.0**0.5
    _, g1, g2, g3, _, _, _, _, _, _, _, _, _, _, _, _ = g
    return _add(scaled((g1, g2, g3), SQRT3), _add(_pull_second(g, n), _pull_third(g, q)))


@triton.jit(do_not_specialize=["n_edges"])
def edge_harmonics_bwd_kernel(
    g_ptr,  # [n_edges, DIM]
    v_ptr,  # [n_edges, 3]
    gv_ptr,  # [n_edges, 3]
    n_edges,
    DIM: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    edge, inside = edges_of(n_edges, BLOCK_E)
    n, inverse = unit(load_vector(v_ptr, edge, inside))
    by_n = gradient(load_harmonics(g_ptr, edge, inside, DIM), n, products(n))
    store_vector(gv_ptr, edge, inside, scaled(tangential(by_n, n), inverse))


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
    edge, inside = edges_of(n_edges, BLOCK_E)
    n, inverse = unit(load_vector(v_ptr, edge, inside))
    a = load_vector(a_ptr, edge, inside)
    d = scaled(tangential(a, n), inverse)
    q, dq = products(n), _d_products(n, d)
    s0, s1, s2, s3, s4, s5, s6 = _third(d, q)
    t0, t1, t2, t3, t4, t5, t6 = _third(n, dq)
    third = s0 + t0, s1 + t1, s2 + t2, s3 + t3, s4 + t4, s5 + t5, s6 + t6
    zero = tl.zeros_like(inverse)
    first = scaled(d, SQRT3)
    _store_harmonics(dg_ptr, edge, inside, (zero,) + first + _second(dq) + third, DIM)  # noqa: RUF005
    g = load_harmonics(g_ptr, edge, inside, DIM)
    by_n, d_by_n = gradient(g, n, q), _add(_pull_second(g, d), _pull_third(g, dq))
    # gv = (G - n (n.G)) / r, and 1 / r falls by (n.a) / r of itself.
    along, d_along = _dot(n, by_n), _dot(d, by_n) + _dot(n, d_by_n)
    gv = scaled(tangential(by_n, n), inverse * _dot(n, a))
    dv = _add(d_by_n, scaled(_add(_add(scaled(d, along), scaled(n, d_along)), gv), -1.0))
    store_vector(dv_ptr, edge, inside, scaled(dv, inverse))


def harmonics(v: torch.Tensor, dim: int) -> torch.Tensor:
    """v [E, 3] -> Y [E, dim]; dim is 4, 9 or 16. All arguments of these functions are contiguous."""
    y = v.new_empty(v.shape[0], dim)
    run(edge_harmonics_fwd_kernel, "edge_harmonics", v, (v, y), DIM=dim)
    return y


def harmonics_grad(g: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The gradient [E, 3] of v for the cotangent g [E, dim] of Y."""
    gv = torch.empty_like(v)
    run(edge_harmonics_bwd_kernel, "edge_harmonics", v, (g, v, gv), DIM=g.shape[1])
    return gv


def harmonics_grad_grad(a: torch.Tensor, g: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(dg [E, dim], dv [E, 3]): the derivatives of <a, gv>."""
    dg, dv = torch.empty_like(g), torch.empty_like(v)
    run(edge_harmonics_bwd_bwd_kernel, "edge_harmonics", v, (a, g, v, dg, dv), DIM=g.shape[1])
    return dg, dv


def run(kernel, op: str, like: torch.Tensor, tensors: tuple, *sizes: int, **constants) -> None:
    """Launch a kernel with a thread or a row of a tile for each edge of `like` [E, ...], and the tile of `op`."""
    edges, width = like.shape[0], constants.get("BLOCK_K", 16)
    if edges == 0:
        return
    tile = tiles.choose(op, dtype=tiles.TAGS[like.dtype], edges=edges, width=width)
    with torch.cuda.device_of(like):  # Triton launches on the current device
        kernel[(triton.cdiv(edges, tile["BLOCK_E"]),)](
            *tensors, edges, *sizes, **constants, BLOCK_E=tile["BLOCK_E"], num_warps=tile.num_warps
        )


def offline_cases(target: str = "sm_90", dtypes: tuple[str, ...] = ("fp64", "fp32")) -> list:
    """Specialisations for `offline.compile_cases`: l up to 3, the tile in use."""
    from .offline import Case

    own = {
        "edge_harmonics_fwd": ("v_ptr", "y_ptr"),
        "edge_harmonics_bwd": ("g_ptr", "v_ptr", "gv_ptr"),
        "edge_harmonics_bwd_bwd": ("a_ptr", "g_ptr", "v_ptr", "dg_ptr", "dv_ptr"),
    }
    cases = []
    for dtype in dtypes:
        tile = tiles.choose("edge_harmonics", arch=target, dtype=dtype, edges=129470, width=16)
        launch = (dict(tile.block) | {"DIM": 16}, tile.num_warps, tile.num_stages)
        for name, pointers in own.items():
            signature = dict.fromkeys(pointers, f"*{dtype}") | {"n_edges": "i32"}
            cases.append(Case(f"{name} {dtype}", "edge_harmonics", f"{name}_kernel", signature, *launch, pointers))
    return cases
