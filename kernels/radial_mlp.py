"""The hidden layers of the radial network, which turns the radial features of each edge into the weights of conv_tp.

    h_0 = x,   z_i = h_i V_i,   h_{i+1} = norm silu(z_i)

V are MACE's weights over the square root of their fan-in, norm is e3nn's constant that gives silu a second moment of 1.
A program owns BLOCK_E edges and all layers; beside the result it writes the z_i, for the backward pass (where
the weights are frozen without z_0, which that makes again from x). With the cotangent gh of the result that is

    gz_i = gh_{i+1} norm silu'(z_i),   gh_i = gz_i V_i^T,   gx = gh_0,   gV_i = h_i^T gz_i

Double backward, for a cotangent a of gx: <a, gx> is <t_L, gh_L> with t the derivative of h along a,

    t_0 = a,   s_i = t_i V_i,   t_{i+1} = norm silu'(z_i) s_i

and its derivatives are the reverse sweep through both, with cotangents u of t and w of h (u_L = gh_L, w_L = 0):

    us_i = u_{i+1} norm silu'(z_i) = gz_i,   wz_i = w_{i+1} norm silu'(z_i) + u_{i+1} s_i norm silu''(z_i)
    u_i = us_i V_i^T,   w_i = wz_i V_i^T,    d(gh_L) = t_L,   dx = w_0,   dV_i = h_i^T wz_i + t_i^T us_i

The sums over edges in gV and dV are the linear map's gradient of its weights (`linear.py`), which is also where the
network's last layer runs, the one without activation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import tiles
from .linear import supported
from .products import dot, exp, interpreting


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z)) to the last bits."""
    if z.dtype == tl.float64:
        return 1.0 / (1.0 + exp(-z))
    else:
        d = 1.0 + exp(-z)
        s = 1.0 / d  # good to two units in the last place; a step of Newton's removes them, without div_rn's branches
        return tl.fma(s, tl.fma(-d, s, tl.full(z.shape, 1.0, tl.float32)), s)


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
    z_ptr,  # [LAYERS, n_edges, HIDDEN], without z_0 where it is not kept
    n_edges,
    width_in,
    NORM: tl.constexpr,
    LAYERS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    KEEP_FIRST: tl.constexpr,
    MODE: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    v0 = _first_weights(first_ptr, width_in, False, BLOCK_IN, HIDDEN)
    size = n_edges.to(tl.int64) * HIDDEN
    edge = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    place, inside = rows_of(edge, n_edges, HIDDEN)
    z = layer(_load_features(x_ptr, edge, n_edges, width_in, BLOCK_IN), v0, MODE, INTERPRET)
    if KEEP_FIRST:
        tl.store(z_ptr + place, z, mask=inside)
    h = NORM * z * sigmoid(z)  # [BLOCK_E, HIDDEN]
    for number in tl.static_range(1, LAYERS):
        z = layer(h, hidden_weights(hidden_ptr, number, False, HIDDEN), MODE, INTERPRET)
        tl.store(z_ptr + (number - 1 + KEEP_FIRST) * size + place, z, mask=inside)
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
    x_ptr,  # [n_edges, width_in]
    z_ptr,  # [LAYERS, n_edges, HIDDEN], without z_0 where it is not kept
    first_ptr,  # [width_in, HIDDEN]
    hidden_ptr,  # [LAYERS - 1, HIDDEN, HIDDEN]
    gx_ptr,  # [n_edges, width_in]
    gz_ptr,  # [LAYERS, n_edges, HIDDEN], written where the weights are trained
    n_edges,
    width_in,
    NORM: tl.constexpr,
    LAYERS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    KEEP_FIRST: tl.constexpr,
    TRAINED: tl.constexpr,
    MODE: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    size = n_edges.to(tl.int64) * HIDDEN
    edge = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    place, inside = rows_of(edge, n_edges, HIDDEN)
    gh = tl.load(g_ptr + place, mask=inside, other=0.0)
    for back in range(0, LAYERS - 1):  # not unrolled, which takes more registers than there are
        number = LAYERS - 1 - back
        z = tl.load(z_ptr + (number - 1 + KEEP_FIRST) * size + place, mask=inside, other=0.0)
        gz = _through_silu(gh, z, NORM)
        if TRAINED:
            tl.store(gz_ptr + number * size + place, gz, mask=inside)
        gh = layer(gz, hidden_weights(hidden_ptr, number, True, HIDDEN), MODE, INTERPRET)
    if KEEP_FIRST:
        z = tl.load(z_ptr + place, mask=inside, other=0.0)
    else:
        x = _load_features(x_ptr, edge, n_edges, width_in, BLOCK_IN)
        z = layer(x, _first_weights(first_ptr, width_in, False, BLOCK_IN, HIDDEN), MODE, INTERPRET)
    gz = _through_silu(gh, z, NORM)
    if TRAINED:
        tl.store(gz_ptr + place, gz, mask=inside)
    gx = layer(gz, _first_weights(first_ptr, width_in, True, BLOCK_IN, HIDDEN), MODE, INTERPRET)
    _store_features(gx_ptr, gx, edge, n_edges, width_in, BLOCK_IN)


@triton.jit
def _store_features(ptr, x, edge, n_edges, width, BLOCK_IN: tl.constexpr):
    column = tl.arange(0, BLOCK_IN)
    mask = (edge < n_edges)[:, None] & (column < width)[None, :]
    tl.store(ptr + edge.to(tl.int64)[:, None] * width + column[None, :], x, mask=mask)


@triton.jit
def _reverse(u, w, z_ptr, s_ptr, us_ptr, wz_ptr, place, inside, NORM: tl.constexpr):
    """us and wz of one layer, stored and returned."""
    z = tl.load(z_ptr + place, mask=inside, other=0.0)
    p = sigmoid(z)
    slope, curve = NORM * p * (1.0 + z * (1.0 - p)), NORM * p * (1.0 - p) * (2.0 + z * (1.0 - 2.0 * p))
    us = u * slope
    wz = w * slope + u * tl.load(s_ptr + place, mask=inside, other=0.0) * curve
    tl.store(us_ptr + place, us, mask=inside)
    tl.store(wz_ptr + place, wz, mask=inside)
    return us, wz


@triton.jit(do_not_specialize=["n_edges"])
def radial_mlp_bwd_bwd_kernel(
    a_ptr,  # [n_edges, width_in]
    g_ptr,  # [n_edges, HIDDEN]
    z_ptr,  # [LAYERS, n_edges, HIDDEN]
    first_ptr,  # [width_in, HIDDEN]
    hidden_ptr,  # [LAYERS - 1, HIDDEN, HIDDEN]
    dg_ptr,  # [n_edges, HIDDEN]
    dx_ptr,  # [n_edges, width_in]
    t_ptr,  # [LAYERS - 1, n_edges, HIDDEN], t_1 ..
    s_ptr,  # [LAYERS, n_edges, HIDDEN]
    us_ptr,  # [LAYERS, n_edges, HIDDEN]
    wz_ptr,  # [LAYERS, n_edges, HIDDEN]
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
    size = n_edges.to(tl.int64) * HIDDEN
    a = _load_features(a_ptr, edge, n_edges, width_in, BLOCK_IN)
    s = layer(a, _first_weights(first_ptr, width_in, False, BLOCK_IN, HIDDEN), MODE, INTERPRET)
    tl.store(s_ptr + place, s, mask=inside)
    for number in range(1, LAYERS):
        z = tl.load(z_ptr + (number - 1) * size + place, mask=inside, other=0.0)
        t = _through_silu(s, z, NORM)
        tl.store(t_ptr + (number - 1) * size + place, t, mask=inside)
        s = layer(t, hidden_weights(hidden_ptr, number, False, HIDDEN), MODE, INTERPRET)
        tl.store(s_ptr + number * size + place, s, mask=inside)
    z = tl.load(z_ptr + (LAYERS - 1) * size + place, mask=inside, other=0.0)
    tl.store(dg_ptr + place, _through_silu(s, z, NORM), mask=inside)
    tl.debug_barrier()  # s comes back from memory
    u = tl.load(g_ptr + place, mask=inside, other=0.0)
    w = tl.zeros_like(u)
    for back in range(0, LAYERS - 1):
        number = LAYERS - 1 - back
        us, wz = _reverse(u, w, z_ptr, s_ptr, us_ptr, wz_ptr, number * size + place, inside, NORM)
        weights = hidden_weights(hidden_ptr, number, True, HIDDEN)
        u, w = layer(us, weights, MODE, INTERPRET), layer(wz, weights, MODE, INTERPRET)
    us, wz = _reverse(u, w, z_ptr, s_ptr, us_ptr, wz_ptr, place, inside, NORM)
    first = _first_weights(first_ptr, width_in, True, BLOCK_IN, HIDDEN)
    _store_features(dx_ptr, layer(wz, first, MODE, INTERPRET), edge, n_edges, width_in, BLOCK_IN)


def _operands(op: str, mode: str, arch: str) -> str:
    """Plain FP32 stands in for 3xTF32 but in the backward passes on Hopper, where matrix units run it.

    Sums of at most 64 products are more exact in plain FP32. Rounding in the forward pass moves all that follows, that
    of the gradient itself does not. Elsewhere than on Hopper 3xTF32 spills registers.
    """
    if mode == "tf32x3":
        return mode if arch == "sm_90" and op != "radial_mlp_fwd" else "ieee"
    return supported(mode)


def _launch(kernel, op: str, edges: int, tensors: tuple, first, hidden, norm: float, mode: str, **constants):
    mode = _operands(op, mode, tiles.current_arch())
    tile = tiles.choose(op, mode=mode, hidden=first.shape[1], edges=edges, trained=constants.get("TRAINED", False))
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
            INTERPRET=interpreting(),
            BLOCK_E=tile["BLOCK_E"],
            **constants,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )


def forward(x: torch.Tensor, first: torch.Tensor, hidden: torch.Tensor, norm: float, mode: str, keep_first: bool):
    """x [E, width_in], first [width_in, H], hidden [L - 1, H, H], contiguous -> (h_L [E, H], z [L, E, H]).

    keep_first: whether z holds z_0, which is made anew from x where only the gradient of x is asked for.
    """
    edges, width = x.shape[0], first.shape[1]
    out = torch.empty(edges, width, dtype=x.dtype, device=x.device)
    z = torch.empty(hidden.shape[0] + keep_first, edges, width, dtype=x.dtype, device=x.device)
    if edges:
        tensors, op = (x, first, hidden, out, z), "radial_mlp_fwd"
        _launch(radial_mlp_fwd_kernel, op, edges, tensors, first, hidden, norm, mode, KEEP_FIRST=keep_first)
    return out, z


def _grad_x(g, x, z, first, hidden, norm: float, mode: str, gz: torch.Tensor | None) -> torch.Tensor:
    edges = g.shape[0]
    gx = torch.empty(edges, first.shape[0], dtype=g.dtype, device=g.device)
    if edges:
        tensors = (g, x, z, first, hidden, gx, gx if gz is None else gz)
        how = {"TRAINED": gz is not None, "KEEP_FIRST": z.shape[0] > hidden.shape[0]}
        _launch(radial_mlp_bwd_kernel, "radial_mlp_bwd", edges, tensors, first, hidden, norm, mode, **how)
    return gx


def grad_x(g: torch.Tensor, x: torch.Tensor, z: torch.Tensor, first, hidden: torch.Tensor, norm: float, mode: str):
    """The gradient [E, width_in] of x for the cotangent g [E, H] of the result; z from `forward`, with z_0 or not."""
    return _grad_x(g, x, z, first, hidden, norm, mode, None)


def grads(g: torch.Tensor, x: torch.Tensor, z: torch.Tensor, first, hidden: torch.Tensor, norm: float, mode: str):
    """(gx, gz [L, E, H]): that gradient, and those of z, which make the gradients of the weights."""
    gz = torch.empty_like(z)
    return _grad_x(g, x, z, first, hidden, norm, mode, gz), gz


def grad_grads(a, g, z, first, hidden, norm: float, mode: str) -> tuple[torch.Tensor, ...]:
    """(dg, dx, t [L - 1, E, H], us and wz [L, E, H]) for a cotangent a [E, width_in] of gx: see the file's head."""
    dg, dx, t = torch.empty_like(g), torch.empty_like(a), torch.empty_like(z[1:])
    s, us, wz = (torch.empty_like(z) for _ in range(3))
    if g.shape[0]:
        tensors = (a, g, z, first, hidden, dg, dx, t, s, us, wz)
        op = "radial_mlp_bwd_bwd"
        _launch(radial_mlp_bwd_bwd_kernel, op, g.shape[0], tensors, first, hidden, norm, mode)
    return dg, dx, t, us, wz


def offline_cases(target: str = "sm_90") -> list:
    """Specialisations for `offline.compile_cases`: 8 features, three hidden layers of 64, the tiles in use."""
    from .offline import Case

    backward = ("g_ptr", "x_ptr", "z_ptr", "first_ptr", "hidden_ptr", "gx_ptr", "gz_ptr")
    twice = (f"{name}_ptr" for name in ("a", "g", "z", "first", "hidden", "dg", "dx", "t", "s", "us", "wz"))
    kernels = (
        ("radial_mlp_fwd", "", ("x_ptr", "first_ptr", "hidden_ptr", "out_ptr", "z_ptr"), {"KEEP_FIRST": False}),
        ("radial_mlp_bwd", "", backward, {"KEEP_FIRST": False, "TRAINED": False}),
        ("radial_mlp_bwd", " kept", backward, {"KEEP_FIRST": True, "TRAINED": False}),
        ("radial_mlp_bwd", " trained", backward, {"KEEP_FIRST": True, "TRAINED": True}),
        ("radial_mlp_bwd_bwd", "", tuple(twice), {}),
    )
    cases = []
    for asked in ("ieee",) if target.startswith("gfx") else ("tf32", "tf32x3", "fp64"):
        word = "*fp64" if asked == "fp64" else "*fp32"
        for op, title, names, own in kernels:
            mode = asked if target.startswith("gfx") else _operands(op, asked, target)
            call = {"mode": mode, "hidden": 64, "edges": 129470, "trained": own.get("TRAINED", False)}
            tile = tiles.choose(op, arch=target, **call)
            signature = dict.fromkeys(names, word) | {"n_edges": "i32", "width_in": "i32"}
            constants = {"NORM": 1.679, "LAYERS": 3, "HIDDEN": 64, "BLOCK_IN": 16, "MODE": mode, "INTERPRET": False}
            launch = (constants | own | dict(tile.block), tile.num_warps, tile.num_stages, names)
            cases.append(Case(f"{op} {mode}{title}", "radial_mlp", f"{op}_kernel", signature, *launch))
    return cases
