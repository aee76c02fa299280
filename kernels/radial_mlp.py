"""The hidden layers of the radial network, which turns the radial features of each edge into the weights of conv_tp.

    h_0 = x,   z_i = h_i V_i,   h_{i+1} = norm silu(z_i)

V are MACE's weights over the square root of their fan-in, norm is e3nn's constant that gives silu a second moment of 1.
A program owns BLOCK_E edges and all layers; beside the result it writes the z_i, for the backward pass, which has the
cotangent gh of the result:

    gz_i = gh_{i+1} norm silu'(z_i),   gh_i = gz_i V_i^T,   gx = gh_0

The last layer, without activation, is a linear map (`linear.py`).
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from . import tiles
from .linear import supported
from .products import dot, exp


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z)) to the last bits."""
    if z.dtype == tl.float64:
        return 1.0 / (1.0 + exp(-z))
    else:
        return tl.div_rn(tl.full(z.shape, 1.0, tl.float32), 1.0 + exp(-z))


@triton.jit
def _load_features(x_ptr, edge, n_edges, width, BLOCK_IN: tl.constexpr):
    """[BLOCK_E, BLOCK_IN], zero beyond the last feature."""
    column = tl.arange(0, BLOCK_IN)
    mask = (edge < n_edges)[:, None] & (column < width)[None, :]
    return tl.load(x_ptr + edge.to(tl.int64)[:, None] * width + column[None, :], mask=mask, other=0.0)


@triton.jit
def _first_weights(first_ptr, width, TRANSPOSED: tl.constexpr, BLOCK_IN: tl.constexpr, HIDDEN: tl.constexpr):
    """V_0 [BLOCK_IN, HIDDEN] or its transpose, zero beyond the last feature."""
    row, column = tl.arange(0, BLOCK_IN), tl.arange(0, HIDDEN)
    if TRANSPOSED:
        return tl.load(first_ptr + row[None, :] * HIDDEN + column[:, None], mask=(row < width)[None, :], other=0.0)
    else:
        return tl.load(first_ptr + row[:, None] * HIDDEN + column[None, :], mask=(row < width)[:, None], other=0.0)


@triton.jit
def hidden_weights(hidden_ptr, number, TRANSPOSED: tl.constexpr, HIDDEN: tl.constexpr):
    """V_number [HIDDEN, HIDDEN] or its transpose."""
    row, column = tl.arange(0, HIDDEN), tl.arange(0, HIDDEN)
    start = hidden_ptr + (number - 1) * HIDDEN * HIDDEN
    if TRANSPOSED:
        return tl.load(start + row[None, :] * HIDDEN + column[:, None])
    else:
        return tl.load(start + row[:, None] * HIDDEN + column[None, :])


@triton.jit
def rows_of(edge, n_edges, HIDDEN: tl.constexpr):
    """Places [BLOCK_E, HIDDEN] of the edges' rows, and whether they exist."""
    return edge.to(tl.int64)[:, None] * HIDDEN + tl.arange(0, HIDDEN)[None, :], (edge < n_edges)[:, None]


@triton.jit
def layer(h, weights, MODE: tl.constexpr, INTERPRET: tl.constexpr):
    """z = h V."""
    return dot(h, weights, tl.zeros((h.shape[0], weights.shape[1]), h.dtype), MODE, INTERPRET)


@triton.jit(do_not_specialize=["n_edges"])
def radial_mlp_fwd_kernel(
    x_ptr,  # [n_edges, width_in]
    first_ptr,  # [width_in, HIDDEN]
    hidden_ptr,  # [LAYERS - 1, HIDDEN, HIDDEN]
    out_ptr,  # [n_edges, HIDDEN]
    z_ptr,  # [LAYERS, n_edges, HIDDEN]
    n_edges,
    width_in,
    NORM: tl.constexpr,
    LAYERS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    MODE: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    edge = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    place, inside = rows_of(edge, n_edges, HIDDEN)
    x = _load_features(x_ptr, edge, n_edges, width_in, BLOCK_IN)
    z = layer(x, _first_weights(first_ptr, width_in, False, BLOCK_IN, HIDDEN), MODE, INTERPRET)
    tl.store(z_ptr + place, z, mask=inside)
    h = NORM * z * sigmoid(z)  # [BLOCK_E, HIDDEN]
    for number in tl.static_range(1, LAYERS):
        z = layer(h, hidden_weights(hidden_ptr, number, False, HIDDEN), MODE, INTERPRET)
        tl.store(z_ptr + number * n_edges.to(tl.int64) * HIDDEN + place, z, mask=inside)
        h = NORM * z * sigmoid(z)
    tl.store(out_ptr + place, h, mask=inside)


@triton.jit
def _through_silu(gh, z, NORM: tl.constexpr):
    """gz = gh norm silu'(z)."""
    s = sigmoid(z)
    return gh * (NORM * s * (1.0 + z * (1.0 - s)))


@triton.jit(do_not_specialize=["n_edges"])
def radial_mlp_bwd_kernel(
    g_ptr,  # [n_edges, HIDDEN]
    z_ptr,  # [LAYERS, n_edges, HIDDEN]
    first_ptr,  # [width_in, HIDDEN]
    hidden_ptr,  # [LAYERS - 1, HIDDEN, HIDDEN]
    gx_ptr,  # [n_edges, width_in]
    n_edges,
    width_in,
    NORM: tl.constexpr,
    LAYERS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    MODE: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    edge = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    place, inside = rows_of(edge, n_edges, HIDDEN)
    gh = tl.load(g_ptr + place, mask=inside, other=0.0)
    for back in tl.static_range(0, LAYERS - 1):
        number = LAYERS - 1 - back
        z = tl.load(z_ptr + number * n_edges.to(tl.int64) * HIDDEN + place, mask=inside, other=0.0)
        gz = _through_silu(gh, z, NORM)
        gh = layer(gz, hidden_weights(hidden_ptr, number, True, HIDDEN), MODE, INTERPRET)
    gz = _through_silu(gh, tl.load(z_ptr + place, mask=inside, other=0.0), NORM)
    gx = layer(gz, _first_weights(first_ptr, width_in, True, BLOCK_IN, HIDDEN), MODE, INTERPRET)
    column = tl.arange(0, BLOCK_IN)
    mask = (edge < n_edges)[:, None] & (column < width_in)[None, :]
    tl.store(gx_ptr + edge.to(tl.int64)[:, None] * width_in + column[None, :], gx, mask=mask)


def _operands(op: str, mode: str, arch: str) -> str:
    """Plain FP32 stands in for 3xTF32 but in the backward pass on Hopper, where it is four times faster.

    Sums of at most 64 products are more exact in plain FP32. Rounding in the forward pass moves all that follows, that
    of the gradient itself does not. Elsewhere than on Hopper 3xTF32 spills registers.
    """
    if mode == "tf32x3":
        return mode if (op, arch) == ("radial_mlp_bwd", "sm_90") else "ieee"
    return supported(mode)


def _launch(kernel, op: str, edges: int, tensors: tuple[torch.Tensor, ...], first, hidden, norm: float, mode: str):
    mode = _operands(op, mode, tiles.current_arch())
    tile = tiles.choose(op, mode=mode, hidden=first.shape[1], edges=edges)
    with torch.cuda.device_of(first):  # Triton launches on the current device
        kernel[(triton.cdiv(edges, tile["BLOCK_E"]),)](
            *tensors,
            edges,
            first.shape[0],
            NORM=norm,
            LAYERS=hidden.shape[0] + 1,
            HIDDEN=first.shape[1],
            BLOCK_IN=max(16, triton.next_power_of_2(first.shape[0])),
            MODE=mode,
            INTERPRET=os.environ.get("TRITON_INTERPRET", "0") == "1",
            BLOCK_E=tile["BLOCK_E"],
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )


def forward(x: torch.Tensor, first: torch.Tensor, hidden: torch.Tensor, norm: float, mode: str):
    """x [E, width_in], first [width_in, H], hidden [L - 1, H, H], contiguous -> (h_L [E, H], z [L, E, H])."""
    edges, width = x.shape[0], first.shape[1]
    out = torch.empty(edges, width, dtype=x.dtype, device=x.device)
    z = torch.empty(hidden.shape[0] + 1, edges, width, dtype=x.dtype, device=x.device)
    if edges:
        _launch(radial_mlp_fwd_kernel, "radial_mlp_fwd", edges, (x, first, hidden, out, z), first, hidden, norm, mode)
    return out, z


def grad_x(g: torch.Tensor, z: torch.Tensor, first: torch.Tensor, hidden: torch.Tensor, norm: float, mode: str):
    """The gradient [E, width_in] of x for the cotangent g [E, H] of the result; z from `forward`."""
    edges = g.shape[0]
    gx = torch.empty(edges, first.shape[0], dtype=g.dtype, device=g.device)
    if edges:
        _launch(radial_mlp_bwd_kernel, "radial_mlp_bwd", edges, (g, z, first, hidden, gx), first, hidden, norm, mode)
    return gx


def offline_cases(target: str = "sm_90") -> list:
    """Specialisations for `offline.compile_cases`: 8 features, three hidden layers of 64, the tiles in use."""
    from .offline import Case

    cases = []
    for mode in ("ieee",) if target.startswith("gfx") else ("tf32", "tf32x3", "fp64"):
        word = "*fp64" if mode == "fp64" else "*fp32"
        for op, names in (
            ("radial_mlp_fwd", ("x_ptr", "first_ptr", "hidden_ptr", "out_ptr", "z_ptr")),
            ("radial_mlp_bwd", ("g_ptr", "z_ptr", "first_ptr", "hidden_ptr", "gx_ptr")),
        ):
            mode_of = mode if target.startswith("gfx") else _operands(op, mode, target)
            tile = tiles.choose(op, arch=target, mode=mode_of, hidden=64, edges=129470)
            signature = dict.fromkeys(names, word) | {"n_edges": "i32", "width_in": "i32"}
            constants = {"NORM": 1.679, "LAYERS": 3, "HIDDEN": 64, "BLOCK_IN": 16, "MODE": mode_of, "INTERPRET": False}
            launch = (constants | dict(tile.block), tile.num_warps, tile.num_stages, names)
            cases.append(Case(f"{op} {mode_of}", "radial_mlp", f"{op}_kernel", signature, *launch))
    return cases
