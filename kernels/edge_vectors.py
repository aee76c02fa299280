"""The vector and the length of every edge from the positions of its atoms, and the way back.

    v_e = x[receiver_e] - x[sender_e] + shift_e,   r_e = |v_e|

Backward, for cotangents gv and gr: an edge's share goes to its shift as it is, and to its two atoms by atomic
additions, so that nothing has to be sorted.

    e = gv + gr v / r,   gx[receiver_e] += e,   gx[sender_e] -= e

An edge of length zero has no direction: its gr moves nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import tiles
from .edge_harmonics import edges_of, load_vector, run, store_vector


@triton.jit
def _atoms(edge_ptr, edge, inside, n_edges):
    """Sender and receiver of each edge."""
    sender = tl.load(edge_ptr + edge, mask=inside, other=0)
    return sender, tl.load(edge_ptr + n_edges.to(tl.int64) + edge, mask=inside, other=0)


@triton.jit(do_not_specialize=["n_edges"])
def edge_vectors_fwd_kernel(
    x_ptr,  # [nodes, 3]
    edge_ptr,  # [2, n_edges]
    shift_ptr,  # [n_edges, 3]
    v_ptr,  # [n_edges, 3]
    r_ptr,  # [n_edges]
    n_edges,
    BLOCK_E: tl.constexpr,
):
    edge, inside = edges_of(n_edges, BLOCK_E)
    sender, receiver = _atoms(edge_ptr, edge, inside, n_edges)
    a, b, s = (
        load_vector(x_ptr, receiver, inside),
        load_vector(x_ptr, sender, inside),
        load_vector(shift_ptr, edge, inside),
    )
    x, y, z = a[0] - b[0] + s[0], a[1] - b[1] + s[1], a[2] - b[2] + s[2]
    store_vector(v_ptr, edge, inside, (x, y, z))
    square = x * x + y * y + z * z
    r = tl.sqrt(square) if square.dtype == tl.float64 else tl.sqrt_rn(square)
    tl.store(r_ptr + edge, r, mask=inside)


@triton.jit
def _add_to(ptr, node, inside, e, SIGN: tl.constexpr):
    at = ptr + node.to(tl.int64) * 3
    tl.atomic_add(at, SIGN * e[0], mask=inside, sem="relaxed")
    tl.atomic_add(at + 1, SIGN * e[1], mask=inside, sem="relaxed")
    tl.atomic_add(at + 2, SIGN * e[2], mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=["n_edges"])
def edge_vectors_bwd_kernel(
    gv_ptr,  # [n_edges, 3]
    gr_ptr,  # [n_edges]
    v_ptr,  # [n_edges, 3]
    r_ptr,  # [n_edges]
    edge_ptr,  # [2, n_edges]
    gx_ptr,  # [nodes, 3], zero
    e_ptr,  # [n_edges, 3]
    n_edges,
    BLOCK_E: tl.constexpr,
):
    edge, inside = edges_of(n_edges, BLOCK_E)
    sender, receiver = _atoms(edge_ptr, edge, inside, n_edges)
    g, v = load_vector(gv_ptr, edge, inside), load_vector(v_ptr, edge, inside)
    r = tl.load(r_ptr + edge, mask=inside, other=0.0)
    rate = tl.where(r > 0, tl.load(gr_ptr + edge, mask=inside, other=0.0) / tl.where(r > 0, r, 1.0), 0.0)
    e = g[0] + rate * v[0], g[1] + rate * v[1], g[2] + rate * v[2]
    store_vector(e_ptr, edge, inside, e)
    _add_to(gx_ptr, receiver, inside, e, 1.0)
    _add_to(gx_ptr, sender, inside, e, -1.0)


def vectors(x: torch.Tensor, edge_index: torch.Tensor, shifts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [N, 3], edge_index [2, E] (sender, receiver), shifts [E, 3], contiguous -> (v [E, 3], r [E, 1])."""
    v, r = torch.empty_like(shifts), shifts.new_empty(shifts.shape[0], 1)
    run(edge_vectors_fwd_kernel, "edge_vectors", shifts, (x, edge_index, shifts, v, r))
    return v, r


def vectors_grad(gv, gr, v, r, edge_index: torch.Tensor, nodes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(gx [nodes, 3], e [E, 3]), the gradients of the positions and of the shifts; all arguments contiguous."""
    gx, e = v.new_zeros(nodes, 3), torch.empty_like(v)
    run(edge_vectors_bwd_kernel, "edge_vectors", v, (gv, gr, v, r, edge_index, gx, e))
    return gx, e


def offline_cases(target: str = "sm_90", dtypes: tuple[str, ...] = ("fp64", "fp32")) -> list:
    """Every kernel with the tile in use, for `offline.compile_cases`."""
    from .offline import Case

    tile, cases = tiles.choose("edge_vectors", arch=target, edges=129470), []
    for op, names in (
        ("fwd", ("x_ptr", "edge_ptr", "shift_ptr", "v_ptr", "r_ptr")),
        ("bwd", ("gv_ptr", "gr_ptr", "v_ptr", "r_ptr", "edge_ptr", "gx_ptr", "e_ptr")),
    ):
        for dtype in dtypes:
            signature = {name: "*i64" if name == "edge_ptr" else f"*{dtype}" for name in names} | {"n_edges": "i32"}
            launch = ({"BLOCK_E": tile["BLOCK_E"]}, tile.num_warps, tile.num_stages, names)
            cases.append(
                Case(f"edge_vectors_{op} {dtype}", "edge_vectors", f"edge_vectors_{op}_kernel", signature, *launch)
            )
    return cases
