"""From the gradients of every edge's harmonics and length to those of the atoms, and the virial of each atom's edges.

    e = (G - n (n.G)) / r + gr n                    the gradient of the edge's vector v = r n = x_receiver - x_sender
    gx[receiver] += e,   gx[sender] -= e            virial[receiver] = sum_e v (x) e

G is the gradient of <gy, Y> by n, as in `edge_harmonics.py`. One program owns a receiver and walks its edges, sorted,
BLOCK_E at a time; the receiver's share is summed in registers, the senders' go by atomic additions. An edge of length
zero moves nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import tiles
from .edge_harmonics import gradient, load_harmonics, load_vector, products, scaled, tangential, unit


@triton.jit
def edge_forces_kernel(
    gy_ptr,  # [edges, DIM]
    gr_ptr,  # [edges]
    v_ptr,  # [edges, 3]
    row_ptr,  # [nodes + 1]
    sender_ptr,  # [edges]
    gx_ptr,  # [nodes, 3], zero
    virial_ptr,  # [nodes, 9]
    DIM: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    node = tl.program_id(0)
    begin, end = tl.load(row_ptr + node), tl.load(row_ptr + node + 1)
    zero = tl.zeros([BLOCK_E], gx_ptr.dtype.element_ty)
    fx, fy, fz = zero, zero, zero
    xx, xy, xz, yx, yy, yz, zx, zy, zz = zero, zero, zero, zero, zero, zero, zero, zero, zero
    for first in range(begin, end, BLOCK_E):
        edge = first + tl.arange(0, BLOCK_E)
        inside = edge < end
        x, y, z = load_vector(v_ptr, edge, inside)
        n, inverse = unit((x, y, z))
        by_n = gradient(load_harmonics(gy_ptr, edge, inside, DIM), n, products(n))
        a, b, c = scaled(tangential(by_n, n), inverse)
        gr = tl.load(gr_ptr + edge, mask=inside, other=0.0)
        a, b, c = a + gr * n[0], b + gr * n[1], c + gr * n[2]
        at = gx_ptr + 3 * tl.load(sender_ptr + edge, mask=inside, other=0).to(tl.int64)
        tl.atomic_add(at, -a, mask=inside, sem="relaxed")
        tl.atomic_add(at + 1, -b, mask=inside, sem="relaxed")
        tl.atomic_add(at + 2, -c, mask=inside, sem="relaxed")
        fx, fy, fz = fx + a, fy + b, fz + c
        xx, xy, xz = xx + x * a, xy + x * b, xz + x * c
        yx, yy, yz = yx + y * a, yy + y * b, yz + y * c
        zx, zy, zz = zx + z * a, zy + z * b, zz + z * c
    to = gx_ptr + 3 * node.to(tl.int64)
    tl.atomic_add(to, tl.sum(fx, axis=0), sem="relaxed")
    tl.atomic_add(to + 1, tl.sum(fy, axis=0), sem="relaxed")
    tl.atomic_add(to + 2, tl.sum(fz, axis=0), sem="relaxed")
    at = virial_ptr + 9 * node.to(tl.int64)
    tl.store(at, tl.sum(xx, axis=0))
    tl.store(at + 1, tl.sum(xy, axis=0))
    tl.store(at + 2, tl.sum(xz, axis=0))
    tl.store(at + 3, tl.sum(yx, axis=0))
    tl.store(at + 4, tl.sum(yy, axis=0))
    tl.store(at + 5, tl.sum(yz, axis=0))
    tl.store(at + 6, tl.sum(zx, axis=0))
    tl.store(at + 7, tl.sum(zy, axis=0))
    tl.store(at + 8, tl.sum(zz, axis=0))


def edge_forces(gy: torch.Tensor, gr: torch.Tensor, v: torch.Tensor, row_ptr: torch.Tensor, sender: torch.Tensor):
    """gy [E, dim], gr [E, 1], v [E, 3], row_ptr [N + 1] and sender [E] int32, contiguous, edges sorted by receiver ->
    (gx [N, 3], virial [N, 3, 3])."""
    nodes = row_ptr.shape[0] - 1
    gx, virial = v.new_zeros(nodes, 3), v.new_empty(nodes, 3, 3)
    if nodes:
        tile = tiles.choose("edge_forces", dtype=tiles.TAGS[v.dtype], nodes=nodes)
        with torch.cuda.device_of(v):  # Triton launches on the current device
            edge_forces_kernel[(nodes,)](
                *(gy, gr, v, row_ptr, sender, gx, virial),
                DIM=gy.shape[1],
                BLOCK_E=tile["BLOCK_E"],
                num_warps=tile.num_warps,
            )
    return gx, virial


def offline_cases(target: str = "sm_90", dtypes: tuple[str, ...] = ("fp64", "fp32")) -> list:
    """Specialisations for `offline.compile_cases`: l up to 3, the tile in use."""
    from .offline import Case

    pointers = ("gy_ptr", "gr_ptr", "v_ptr", "row_ptr", "sender_ptr", "gx_ptr", "virial_ptr")
    cases = []
    for dtype in dtypes:
        tile = tiles.choose("edge_forces", arch=target, dtype=dtype, nodes=1536)
        signature = {name: "*i32" if name in ("row_ptr", "sender_ptr") else f"*{dtype}" for name in pointers}
        launch = (dict(tile.block) | {"DIM": 16}, tile.num_warps, tile.num_stages, pointers)
        cases.append(Case(f"edge_forces {dtype}", "edge_forces", "edge_forces_kernel", signature, *launch))
    return cases
