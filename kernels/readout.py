"""The energy that a readout gives each node, and its gradient, in one pass: the cotangent is known before.

    linear:       e = x.w                                gx = w
    non-linear:   z = x V,   e = sum_j w_j silu(z_j),    gx = V (w silu'(z))

w holds every factor that the energy is multiplied by. e is added, in FP64, to what is there. Only the first C columns
of x are read, its scalars; the others' gradient is zero. Products are plain ones of x's type.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import tiles
from .products import sum_products
from .radial_mlp import sigmoid


@triton.jit(do_not_specialize=["nodes"])
def readout_kernel(
    x_ptr,  # [nodes, dim]
    first_ptr,  # [channels, hidden]
    last_ptr,  # [hidden], or [channels]
    before_ptr,  # [nodes] FP64
    e_ptr,  # [nodes] FP64
    gx_ptr,  # [nodes, dim]
    nodes,
    dim,
    channels,
    hidden,
    LINEAR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    node = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    inside = node < nodes
    c = tl.arange(0, BLOCK_C)  # [BLOCK_C]
    row = node[:, None] * dim + c[None, :]  # [BLOCK_N, BLOCK_C]
    x = tl.load(x_ptr + row, mask=inside[:, None] & (c < channels)[None, :], other=0.0)
    if LINEAR:
        w = tl.load(last_ptr + c, mask=c < channels, other=0.0)
        e = sum_products(x * w[None, :], (c < channels)[None, :], axis=1)
        gx = tl.broadcast_to(w[None, :], x.shape)
    else:
        j = tl.arange(0, BLOCK_H)
        place = c[:, None] * hidden + j[None, :]
        v = tl.load(first_ptr + place, mask=(c < channels)[:, None] & (j < hidden)[None, :], other=0.0)
        w = tl.load(last_ptr + j, mask=j < hidden, other=0.0)  # [BLOCK_H]
        # Summed over the last axis: a sum over the middle one of x[:, :, None] v[None] becomes a product in TF32.
        z = sum_products(x[:, None, :] * v.T[None, :, :], (c < channels)[None, None, :], axis=2)  # [BLOCK_N, BLOCK_H]
        s = sigmoid(z)
        e = sum_products(w[None, :] * z * s, (j < hidden)[None, :], axis=1)
        gz = w[None, :] * s * (1.0 + z * (1.0 - s))
        gx = sum_products(gz[:, None, :] * v[None, :, :], (j < hidden)[None, None, :], axis=2)  # [BLOCK_N, BLOCK_C]
    tl.store(e_ptr + node, tl.load(before_ptr + node, mask=inside) + e.to(tl.float64), mask=inside)
    tl.store(gx_ptr + row, gx, mask=inside[:, None] & (c < channels)[None, :])
    for start in range(channels, dim, BLOCK_C):
        column = start + c
        row = node[:, None] * dim + column[None, :]
        tl.store(gx_ptr + row, tl.zeros_like(x), mask=inside[:, None] & (column < dim)[None, :])


def readout(x: torch.Tensor, first: torch.Tensor | None, last: torch.Tensor, before: torch.Tensor):
    """x [N, dim], first [C, hidden] (None: linear), last [hidden] or [C], before [N] FP64, contiguous ->
    (before + e [N] FP64, gx [N, dim])."""
    nodes, dim = x.shape
    channels, hidden = (last.shape[0], 1) if first is None else first.shape
    e, gx = torch.empty_like(before), torch.empty_like(x)
    if nodes:
        block_c, block_h = triton.next_power_of_2(channels), triton.next_power_of_2(hidden)
        tile = tiles.choose("readout", dtype=tiles.TAGS[x.dtype], size=block_c * block_h)
        block_n = tile["BLOCK_N"]
        with torch.cuda.device_of(x):  # Triton launches on the current device
            readout_kernel[(triton.cdiv(nodes, block_n),)](
                *(x, last if first is None else first, last, before, e, gx),
                *(nodes, dim, channels, hidden),
                LINEAR=first is None,
                BLOCK_C=block_c,
                BLOCK_H=block_h,
                BLOCK_N=block_n,
                num_warps=tile.num_warps,
            )
    return e, gx


def offline_cases(target: str = "sm_90", dtypes: tuple[str, ...] = ("fp64", "fp32")) -> list:
    """Specialisations for `offline.compile_cases`: 128 channels, 16 hidden units, the tile in use."""
    from .offline import Case

    pointers = ("x_ptr", "first_ptr", "last_ptr", "before_ptr", "e_ptr", "gx_ptr")
    cases = []
    for dtype in dtypes:
        for linear, hidden in ((True, 1), (False, 16)):
            tile = tiles.choose("readout", arch=target, dtype=dtype, size=128 * hidden)
            signature = {name: "*fp64" if name in ("before_ptr", "e_ptr") else f"*{dtype}" for name in pointers}
            signature |= dict.fromkeys(("nodes", "dim", "channels", "hidden"), "i32")
            constants = dict(tile.block) | {"LINEAR": linear, "BLOCK_C": 128, "BLOCK_H": hidden}
            launch = (constants, tile.num_warps, tile.num_stages, (*pointers, "dim", "channels"))
            title = f"readout {dtype} {'linear' if linear else 'non-linear'}"
            cases.append(Case(title, "readout", "readout_kernel", signature, *launch))
    return cases
