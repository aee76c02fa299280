"""Functions of a length, H of them, from a table of cubic polynomials: the radial network without the network.

The interval k of a length r has the width 2^-n, so that u = r 2^n - k is exact, and four rows of coefficients

    h(r) = a_0 + u (a_1 + u (a_2 + u a_3)),        dh/dr = 2^n (a_1 + u (2 a_2 + 3 u a_3))

A length behind the last interval takes the values at its end. Pairs of kinds of atoms may have tables of their own.
A program reads the rows of BLOCK_E edges; the tables are small enough for the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import tiles
from .edge_harmonics import edges_of, run


@triton.jit
def _interval(r_ptr, edge_ptr, kind_ptr, edge, inside, n_edges, intervals, kinds, per_angstrom):
    """Number of the interval of each edge among those of all tables, and the place u in it."""
    t = tl.load(r_ptr + edge, mask=inside, other=0.0) * per_angstrom
    k = tl.maximum(tl.minimum(t, intervals - 1.0), 0.0).to(tl.int32)
    u = t - k
    u = tl.where(u > 1.0, 1.0, u)  # a NaN stays one
    if kinds > 1:
        sender = tl.load(edge_ptr + edge, mask=inside, other=0)
        receiver = tl.load(edge_ptr + n_edges.to(tl.int64) + edge, mask=inside, other=0)
        first = tl.load(kind_ptr + sender, mask=inside, other=0) * kinds
        k += (first + tl.load(kind_ptr + receiver, mask=inside, other=0)) * intervals
    return k, u


@triton.jit(do_not_specialize=["n_edges", "intervals"])
def radial_table_kernel(
    r_ptr,  # [n_edges]
    table_ptr,  # [kinds, kinds, intervals, 4, width]
    edge_ptr,  # [2, n_edges]
    kind_ptr,  # [nodes]
    h_ptr,  # [n_edges, width]
    slope_ptr,  # [n_edges, width]
    n_edges,
    intervals,
    kinds,
    width,
    per_angstrom,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    edge, inside = edges_of(n_edges, BLOCK_E)
    k, u = _interval(r_ptr, edge_ptr, kind_ptr, edge, inside, n_edges, intervals, kinds, per_angstrom)
    u = u[:, None]
    column = tl.arange(0, BLOCK_H)[None, :]
    mask = inside[:, None] & (column < width)
    at = table_ptr + k.to(tl.int64)[:, None] * (4 * width) + column  # [BLOCK_E, BLOCK_H]
    a0, a1 = tl.load(at, mask=mask, other=0.0), tl.load(at + width, mask=mask, other=0.0)
    a2, a3 = tl.load(at + 2 * width, mask=mask, other=0.0), tl.load(at + 3 * width, mask=mask, other=0.0)
    place = edge.to(tl.int64)[:, None] * width + column
    tl.store(h_ptr + place, a0 + u * (a1 + u * (a2 + u * a3)), mask=mask)
    tl.store(slope_ptr + place, per_angstrom * (a1 + u * (2.0 * a2 + 3.0 * u * a3)), mask=mask)


def radial_table(r: torch.Tensor, table: torch.Tensor, edge_index, kind, per_angstrom: float):
    """r [E, 1], table [S, S, K, 4, H], edge_index [2, E] (sender, receiver), kind [N], contiguous -> (h, dh/dr) [E, H].

    edge_index and kind are read for several kinds only.
    """
    kinds, _, intervals, _, width = table.shape
    h, slope = (r.new_empty(r.shape[0], width) for _ in range(2))
    tensors, sizes = (r, table, edge_index, kind, h, slope), (intervals, kinds, width, per_angstrom)
    run(radial_table_kernel, "radial_table", r, tensors, *sizes, BLOCK_H=triton.next_power_of_2(width))
    return h, slope


def offline_cases(target: str = "sm_90", dtypes: tuple[str, ...] = ("fp64", "fp32")) -> list:
    """Every kernel with the tile in use, for `offline.compile_cases`: 64 functions, one kind of atoms and several."""
    from .offline import Case

    pointers = ("r_ptr", "table_ptr", "edge_ptr", "kind_ptr", "h_ptr", "slope_ptr")
    tile, cases = tiles.choose("radial_table", arch=target, edges=65000), []
    for dtype in dtypes:
        for kinds in (1, 3):
            words = {"edge_ptr": "*i64", "kind_ptr": "*i32"}
            signature = {name: words.get(name, f"*{dtype}") for name in pointers}
            signature |= dict.fromkeys(("n_edges", "intervals", "width"), "i32") | {"per_angstrom": "fp32"}
            constants = {"BLOCK_H": 64, "BLOCK_E": tile["BLOCK_E"]}
            if kinds == 1:  # as Triton specialises the number one
                constants["kinds"] = 1
            else:
                signature["kinds"] = "i32"
            launch = (constants, tile.num_warps, tile.num_stages, (*pointers, "width"))
            title = f"radial_table {dtype} {'one kind' if kinds == 1 else 'kinds'}"
            cases.append(Case(title, "radial_table", "radial_table_kernel", signature, *launch))
    return cases
