"""The hidden layers of MACE's RadialMLP: layer norm, silu, and the biased linear map to the next one.

    y_i = (z_i - mean z_i) / sqrt(var z_i + eps),   u_i = gain_i y_i + shift_i,   h_i = silu(u_i)
    z_{i+1} = h_i V_i + b_i

z_0 comes from the first layer and h_{L-1} goes to the last one, both linear maps (`linear.py`): the first has as many
inputs as the model has channels, far more than fit in registers. A program owns BLOCK_E rows and all layers; beside the
result it writes z_1 .. z_{L-1}, for the backward pass, which has the cotangent gh of the result:

    gy_i = gh_i silu'(u_i) gain_i,   gz_i = (gy_i - mean gy_i - y_i mean(y_i gy_i)) / sqrt(var z_i + eps)
    gh_{i-1} = gz_i V_{i-1}^T
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import tiles
from .linear import supported
from .products import interpreting
from .radial_mlp import hidden_weights, layer, rows_of, sigmoid


@triton.jit
def _normalize(z, EPS: tl.constexpr):
    """(y, 1 / sqrt(var + eps)) of the rows of z [BLOCK_E, HIDDEN]."""
    centred = z - (tl.sum(z, axis=1) / z.shape[1])[:, None]
    variance = tl.sum(centred * centred, axis=1) / z.shape[1] + EPS
    if z.dtype == tl.float64:
        inverse = 1.0 / tl.sqrt(variance)
    else:
        inverse = tl.div_rn(tl.full(variance.shape, 1.0, tl.float32), tl.sqrt_rn(variance))
    return centred * inverse[:, None], inverse


@triton.jit
def _vector(ptr, number, HIDDEN: tl.constexpr):
    """Row `number` of a table [layers, HIDDEN], to broadcast over rows."""
    return tl.load(ptr + number * HIDDEN + tl.arange(0, HIDDEN))[None, :]


@triton.jit
def _activate(z, gain_ptr, shift_ptr, number, EPS: tl.constexpr, HIDDEN: tl.constexpr):
    """h = silu(gain y + shift)."""
    y, _ = _normalize(z, EPS)
    u = _vector(gain_ptr, number, HIDDEN) * y + _vector(shift_ptr, number, HIDDEN)
    return u * sigmoid(u)


@triton.jit
def _through(gh, z, gain_ptr, shift_ptr, number, EPS: tl.constexpr, HIDDEN: tl.constexpr):
    """gz for the cotangent gh of h."""
    y, inverse = _normalize(z, EPS)
    gain = _vector(gain_ptr, number, HIDDEN)
    u = gain * y + _vector(shift_ptr, number, HIDDEN)
    s = sigmoid(u)
    gy = gh * (s * (1.0 + u * (1.0 - s))) * gain
    mean = tl.sum(gy, axis=1) / HIDDEN
    along = tl.sum(gy * y, axis=1) / HIDDEN
    return (gy - mean[:, None] - y * along[:, None]) * inverse[:, None]


@triton.jit(do_not_specialize=["n_rows"])
def norm_mlp_fwd_kernel(
    first_ptr,  # [n_rows, HIDDEN], z_0
    hidden_ptr,  # [LAYERS - 1, HIDDEN, HIDDEN]
    bias_ptr,  # [LAYERS - 1, HIDDEN]
    gain_ptr,  # [LAYERS, HIDDEN]
    shift_ptr,  # [LAYERS, HIDDEN]
    out_ptr,  # [n_rows, HIDDEN]
    z_ptr,  # [LAYERS - 1, n_rows, HIDDEN]
    n_rows,
    EPS: tl.constexpr,
    LAYERS: tl.constexpr,
    HIDDEN: tl.constexpr,
    MODE: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    place, inside = rows_of(row, n_rows, HIDDEN)
    h = _activate(tl.load(first_ptr + place, mask=inside, other=0.0), gain_ptr, shift_ptr, 0, EPS, HIDDEN)
    for number in tl.static_range(1, LAYERS):
        z = layer(h, hidden_weights(hidden_ptr, number, False, HIDDEN), MODE, INTERPRET)
        z += _vector(bias_ptr, number - 1, HIDDEN)
        tl.store(z_ptr + (number - 1) * n_rows.to(tl.int64) * HIDDEN + place, z, mask=inside)
        h = _activate(z, gain_ptr, shift_ptr, number, EPS, HIDDEN)
    tl.store(out_ptr + place, h, mask=inside)


@triton.jit(do_not_specialize=["n_rows"])
def norm_mlp_bwd_kernel(
    g_ptr,  # [n_rows, HIDDEN]
    first_ptr,  # [n_rows, HIDDEN], z_0
    z_ptr,  # [LAYERS - 1, n_rows, HIDDEN]
    hidden_ptr,  # [LAYERS - 1, HIDDEN, HIDDEN]
    gain_ptr,  # [LAYERS, HIDDEN]
    shift_ptr,  # [LAYERS, HIDDEN]
    gz_ptr,  # [n_rows, HIDDEN], of z_0
    n_rows,
    EPS: tl.constexpr,
    LAYERS: tl.constexpr,
    HIDDEN: tl.constexpr,
    MODE: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    place, inside = rows_of(row, n_rows, HIDDEN)
    gh = tl.load(g_ptr + place, mask=inside, other=0.0)
    for back in tl.static_range(0, LAYERS - 1):
        number = LAYERS - 1 - back
        z = tl.load(z_ptr + (number - 1) * n_rows.to(tl.int64) * HIDDEN + place, mask=inside, other=0.0)
        gz = _through(gh, z, gain_ptr, shift_ptr, number, EPS, HIDDEN)
        gh = layer(gz, hidden_weights(hidden_ptr, number, True, HIDDEN), MODE, INTERPRET)
    z = tl.load(first_ptr + place, mask=inside, other=0.0)
    tl.store(gz_ptr + place, _through(gh, z, gain_ptr, shift_ptr, 0, EPS, HIDDEN), mask=inside)


def _launch(kernel, op: str, tensors: tuple[torch.Tensor, ...], gain: torch.Tensor, eps: float, mode: str) -> None:
    # Sums of at most 64 products are more exact in plain FP32 than in 3xTF32.
    mode, rows = "ieee" if mode == "tf32x3" else supported(mode), tensors[0].shape[0]
    layers, hidden = gain.shape
    tile = tiles.choose(op, mode=mode, hidden=hidden, edges=rows)
    with torch.cuda.device_of(gain):  # Triton launches on the current device
        kernel[(triton.cdiv(rows, tile["BLOCK_E"]),)](
            *tensors,
            rows,
            EPS=eps,
            LAYERS=layers,
            HIDDEN=hidden,
            MODE=mode,
            INTERPRET=interpreting(),
            BLOCK_E=tile["BLOCK_E"],
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )


def forward(first, hidden, bias, gain, shift, eps: float, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """first = z_0 [E, H], hidden [L - 1, H, H], bias [L - 1, H], gain, shift [L, H], contiguous
    -> (h_{L-1} [E, H], z_1 .. z_{L-1} [L - 1, E, H])."""
    out, z = torch.empty_like(first), first.new_empty(len(hidden), *first.shape)
    if len(first):
        tensors = (first, hidden, bias, gain, shift, out, z)
        _launch(norm_mlp_fwd_kernel, "norm_mlp_fwd", tensors, gain, eps, mode)
    return out, z


def grad_first(g, first, z, hidden, gain, shift, eps: float, mode: str) -> torch.Tensor:
    """The gradient [E, H] of z_0 for the cotangent g [E, H] of the result; z from `forward`."""
    gz = torch.empty_like(g)
    if len(g):
        _launch(norm_mlp_bwd_kernel, "norm_mlp_bwd", (g, first, z, hidden, gain, shift, gz), gain, eps, mode)
    return gz


def offline_cases(target: str = "sm_90") -> list:
    """Specialisations for `offline.compile_cases`: three hidden layers of 64, the tiles in use."""
    from .offline import Case

    cases = []
    for mode in ("ieee",) if target.startswith("gfx") else ("tf32", "ieee", "fp64"):
        word = "*fp64" if mode == "fp64" else "*fp32"
        for op, names in (
            ("norm_mlp_fwd", ("first_ptr", "hidden_ptr", "bias_ptr", "gain_ptr", "shift_ptr", "out_ptr", "z_ptr")),
            ("norm_mlp_bwd", ("g_ptr", "first_ptr", "z_ptr", "hidden_ptr", "gain_ptr", "shift_ptr", "gz_ptr")),
        ):
            tile = tiles.choose(op, arch=target, mode=mode, hidden=64, edges=129470)
            signature = dict.fromkeys(names, word) | {"n_rows": "i32"}
            constants = {"EPS": 1e-5, "LAYERS": 3, "HIDDEN": 64, "MODE": mode, "INTERPRET": False}
            launch = (constants | dict(tile.block), tile.num_warps, tile.num_stages, names)
            cases.append(Case(f"{op} {mode}", "norm_mlp", f"{op}_kernel", signature, *launch))
    return cases
