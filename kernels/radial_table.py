"""Functions of a length, H of them, from a table of cubic polynomials: the radial network without the network.

The interval k of a length r has the width 2^-n, so that u = r 2^n - k is exact, and four rows of coefficients

    h(r) = a_0 + u (a_1 + u (a_2 + u a_3)),        dh/dr = 2^n (a_1 + u (2 a_2 + 3 u a_3))

A length behind the last interval takes the value at its end. Pairs of kinds of atoms may have tables of their own.
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


@triton.jit
def _coefficients(table_ptr, k, inside, width, BLOCK_H: tl.constexpr):
    """a_0 .. a_3 [BLOCK_E, BLOCK_H], and which of the columns exist."""
    column = tl.arange(0, BLOCK_H)[None, :]
    mask = inside[:, None] & (column < width)
    at = table_ptr + k.to(tl.int64)[:, None] * (4 * width) + column
    a0, a1 = tl.load(at, mask=mask, other=0.0), tl.load(at + width, mask=mask, other=0.0)
    a2, a3 = tl.load(at + 2 * width, mask=mask, other=0.0), tl.load(at + 3 * width, mask=mask, other=0.0)
    return a0, a1, a2, a3, column, mask


@triton.jit(do_not_specialize=["n_edges", "intervals"])
def radial_table_fwd_kernel(
    r_ptr,  # [n_edges]
    table_ptr,  # [kinds, kinds, intervals, 4, width]
    edge_ptr,  # [2, n_edges]
    kind_ptr,  # [nodes]
    h_ptr,  # [n_edges, width]
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
    a0, a1, a2, a3, column, mask = _coefficients(table_ptr, k, inside, width, BLOCK_H)
    u = u[:, None]
    tl.store(h_ptr + edge.to(tl.int64)[:, None] * width + column, a0 + u * (a1 + u * (a2 + u * a3)), mask=mask)


@triton.jit(do_not_specialize=["n_edges", "intervals"])
def radial_table_bwd_kernel(
    g_ptr,  # [n_edges, width]
    r_ptr,  # [n_edges]
    table_ptr,  # [kinds, kinds, intervals, 4, width]
    edge_ptr,  # [2, n_edges]
    kind_ptr,  # [nodes]
    gr_ptr,  # [n_edges]
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
    _, a1, a2, a3, column, mask = _coefficients(table_ptr, k, inside, width, BLOCK_H)
    u = u[:, None]
    g = tl.load(g_ptr + edge.to(tl.int64)[:, None] * width + column, mask=mask, other=0.0)
    slope = a1 + u * (2.0 * a2 + 3.0 * u * a3)
    tl.store(gr_ptr + edge, tl.sum(g * slope, axis=1) * per_angstrom, mask=inside)


def _run(kernel, op: str, tensors: tuple, r: torch.Tensor, table: torch.Tensor, per_angstrom: float) -> None:
    kinds, _, intervals, _, width = table.shape
    sizes = (intervals, kinds, width, per_angstrom)
    run(kernel, op, r, tensors, *sizes, BLOCK_H=triton.next_power_of_2(width))


def forward(r: torch.Tensor, table: torch.Tensor, edge_index, kind, per_angstrom: float) -> torch.Tensor:
    """r [E, 1], table [S, S, K, 4, H], edge_index [2, E] (sender, receiver), kind [N], contiguous -> h [E, H]."""
    h = r.new_empty(r.shape[0], table.shape[-1])
    tensors = (r, table, edge_index, kind, h)
    _run(radial_table_fwd_kernel, "radial_table_fwd", tensors, r, table, per_angstrom)
    return h


def grad(g: torch.Tensor, r: torch.Tensor, table: torch.Tensor, edge_index, kind, per_angstrom: float) -> torch.Tensor:
    """The gradient [E, 1] of r for the cotangent g [E, H] of the result."""
    gr = torch.empty_like(r)
    tensors = (g, r, table, edge_index, kind, gr)
    _run(radial_table_bwd_kernel, "radial_table_bwd", tensors, r, table, per_angstrom)
    return gr


def offline_cases(target: str = "sm_90", dtypes: tuple[str, ...] = ("fp64", "fp32")) -> list:
    """Every kernel with the tile in use, for `offline.compile_cases`: 64 functions, one kind of atoms and several."""
    from .offline import Case

    cases = []
    for op, names in (
        ("radial_table_fwd", ("r_ptr", "table_ptr", "edge_ptr", "kind_ptr", "h_ptr")),
        ("radial_table_bwd", ("g_ptr", "r_ptr", "table_ptr", "edge_ptr", "kind_ptr", "gr_ptr")),
    ):
        tile = tiles.choose(op, arch=target, edges=129470)
        for dtype in dtypes:
            for kinds in (1, 3):
                words = {"edge_ptr": "*i64", "kind_ptr": "*i32"}
                signature = {name: words.get(name, f"*{dtype}") for name in names}
                signature |= dict.fromkeys(("n_edges", "intervals", "width"), "i32") | {"per_angstrom": "fp32"}
                constants = {"BLOCK_H": 64, "BLOCK_E": tile["BLOCK_E"]}
                if kinds == 1:  # as Triton specialises the number one
                    constants["kinds"] = 1
                else:
                    signature["kinds"] = "i32"
                launch = (constants, tile.num_warps, tile.num_stages, (*names, "width"))
                title = f"{op} {dtype} {'one kind' if kinds == 1 else 'kinds'}"
                cases.append(Case(title, "radial_table", f"{op}_kernel", signature, *launch))
    return cases
