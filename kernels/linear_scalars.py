"""A linear map of few scalars to many, on many rows: the radial network's last layer, [edges, 64] -> [edges, 1280].

    out[n, w] = scale alpha sum_u x[n, u] W[u, w] + bias[w] + residual[n, w]
    gx[n, u] = scale alpha sum_w g[n, w] W[u, w]

The work is to write out and to read g. Forward: a program keeps one block of columns of W and walks over the rows, so
that W is rounded once and the rows' tiles are the only operands that move; the next one is asked for before the
products of the one at hand. Transposed: a program owns BLOCK_M rows and all of gx and walks over the columns. Both
write what type they are given; g may be stored in 16 bits. Where the GPU has units that move tiles by themselves (BULK,
Hopper's TMA) they move those of out and g: no addresses to compute, and a program goes on while its tile is written.

For "tf32x3" W comes as W' + W'' (see `products.dot`), split by a kernel of its own before either starts. Forward, x
and W are kept as blocks of BLOCK_K scalars whose sums join in rounded additions: the matrix units cut what they add.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tiles
from .products import dot_tf32, interpreting, round_tf32, summed

MODES = ("tf32x3", "tf32", "bf16", "fp16")
WIDTHS = (16, 32, 64, 128)
"""How many scalars the narrow side may have."""


def _summed(narrow: int, mode: str) -> int:
    """How many products the matrix units add up themselves, forward.

    In 3xTF32 a sum of 128 has 1.7 times the error of an FP32 sum, four of 32 have 0.7 times, at the same cost. One of
    64 has 1.4 times; it stays whole, as in halves it would cost a radial network's last layer up to a quarter more.
    """
    return summed(narrow, mode) if narrow > 64 else narrow


@triton.jit
def linear_scalars_split_kernel(
    w_ptr,  # [size]
    part_ptr,  # [2, size]: W', W''
    size,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(w_ptr + place, mask=place < size, other=0.0)
    high = round_tf32(w)
    tl.store(part_ptr + place, high, mask=place < size)
    tl.store(part_ptr + size + place, w - high, mask=place < size)


@triton.jit
def _dot(a, high, low, acc, MODE: tl.constexpr, INTERPRET: tl.constexpr):
    """acc + a (high + low), a being FP32 or in 16 bits; only "tf32x3" looks at low."""
    if MODE == "tf32x3":
        a = a.to(tl.float32)
        high_a = round_tf32(a)
        acc = dot_tf32(a - high_a, high, acc, INTERPRET)
        acc = dot_tf32(high_a, low, acc, INTERPRET)
        return dot_tf32(high_a, high, acc, INTERPRET)
    elif MODE == "tf32":
        a = a.to(tl.float32)
        return dot_tf32(tl.where(a == a, round_tf32(a), a), high, acc, INTERPRET)  # a NaN stays one
    else:
        a = a.to(high.dtype)
        if INTERPRET:  # its dot is wrong for bf16
            return tl.dot(a.to(tl.float32), high.to(tl.float32), acc, input_precision="ieee")
        else:
            return tl.dot(a, high, acc)


@triton.jit
def _weights(w_ptr, u, column, width, size, MODE: tl.constexpr):
    """W' and W'' [BLOCK_N, K]; W twice in the modes without W''."""
    place = u[None, :] * width + column[:, None]
    mask = (column < width)[:, None]
    high = tl.load(w_ptr + place, mask=mask, other=0.0)
    if MODE == "tf32x3":
        return high, tl.load(w_ptr + size + place, mask=mask, other=0.0)
    elif MODE == "tf32":
        high = tl.where(high == high, round_tf32(high), high)
        return high, high
    else:
        return high, high


@triton.jit
def _blocks_of_weights(w_ptr, column, width, size, MODE: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """W' and W'' as tuples of blocks [BLOCK_N, BLOCK_K]."""
    block = _weights(w_ptr, tl.arange(0, BLOCK_K), column, width, size, MODE)
    high, low = (block[0],), (block[1],)
    for k in tl.static_range(BLOCK_K, K, BLOCK_K):
        block = _weights(w_ptr, k + tl.arange(0, BLOCK_K), column, width, size, MODE)
        high, low = high + (block[0],), low + (block[1],)  # noqa: RUF005, Triton's Python has no stars
    return high, low


@triton.jit
def _block_of_rows(x_ptr, first, rows, k, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    row, u = tl.arange(0, BLOCK_M)[:, None], k + tl.arange(0, BLOCK_K)[None, :]
    return tl.load(x_ptr + first.to(tl.int64) * K + (row * K + u), mask=row < rows - first, other=0.0)


@triton.jit
def _rows_of_x(x_ptr, first, rows, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """x from row `first` on, zero beyond the last row, as a tuple of blocks [BLOCK_M, BLOCK_K]."""
    blocks = (_block_of_rows(x_ptr, first, rows, 0, K, BLOCK_M, BLOCK_K),)
    for k in tl.static_range(BLOCK_K, K, BLOCK_K):
        blocks = blocks + (_block_of_rows(x_ptr, first, rows, k, K, BLOCK_M, BLOCK_K),)  # noqa: RUF005
    return blocks


@triton.jit
def _dot_of_blocks(x, high, low, MODE: tl.constexpr, INTERPRET: tl.constexpr):
    """x (W' + W'') of blocks along K: each sums from zero and joins the others in a rounded addition."""
    zeros = tl.zeros((x[0].shape[0], high[0].shape[0]), tl.float32)
    acc = _dot(x[0], high[0].T, low[0].T, zeros, MODE, INTERPRET)
    for i in tl.static_range(1, len(x)):
        acc += _dot(x[i], high[i].T, low[i].T, zeros, MODE, INTERPRET)
    return acc


@triton.jit(do_not_specialize=["rows"])
def linear_scalars_fwd_kernel(
    x_ptr,  # [rows, K]
    w_ptr,  # [K, width], or [2, K, width]
    bias_ptr,  # [width]
    residual_ptr,  # [rows, width]
    out_ptr,  # [rows, width], or its descriptor
    rows,
    width,
    scale,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BULK: tl.constexpr,
    MODE: tl.constexpr,
    INTERPRET: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first_column = tl.program_id(1) * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N)
    high, low = _blocks_of_weights(w_ptr, column, width, K * width, MODE, K, BLOCK_K)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=column < width, other=0.0)[None, :]
    start, step = tl.program_id(0) * BLOCK_M, tl.num_programs(0) * BLOCK_M
    x = _rows_of_x(x_ptr, start, rows, K, BLOCK_M, BLOCK_K)
    for first in range(start, rows, step):
        ahead = _rows_of_x(x_ptr, first + step, rows, K, BLOCK_M, BLOCK_K)
        acc = _dot_of_blocks(x, high, low, MODE, INTERPRET) * scale
        x = ahead
        if HAS_BIAS:
            acc += bias
        row = first + tl.arange(0, BLOCK_M)
        place = row.to(tl.int64)[:, None] * width + column[None, :]
        mask = (row < rows)[:, None] & (column < width)[None, :]
        if HAS_RESIDUAL:
            acc += tl.load(residual_ptr + place, mask=mask, other=0.0)
        if BULK:
            out_ptr.store([first, first_column], acc.to(out_ptr.dtype))
        else:
            tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def linear_scalars_bwd_kernel(
    g_ptr,  # [rows, width], or its descriptor
    w_ptr,  # [K, width], or [2, K, width]
    gx_ptr,  # [rows, K]
    rows,
    width,
    scale,
    BULK: tl.constexpr,
    MODE: tl.constexpr,
    INTERPRET: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first_row = tl.program_id(0) * BLOCK_M
    row, u = first_row + tl.arange(0, BLOCK_M), tl.arange(0, K)
    inside = (row < rows)[:, None]
    acc = tl.zeros((BLOCK_M, K), tl.float32)
    for first in range(0, width, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        mask = (column < width)[None, :]
        if BULK:
            g = g_ptr.load([first_row, first])
        else:
            g = tl.load(g_ptr + row.to(tl.int64)[:, None] * width + column[None, :], mask=inside & mask, other=0.0)
        place = u[:, None] * width + column[None, :]
        high = tl.load(w_ptr + place, mask=mask, other=0.0)
        low = high
        if MODE == "tf32x3":
            low = tl.load(w_ptr + K * width + place, mask=mask, other=0.0)
        if MODE == "tf32":
            high = tl.where(high == high, round_tf32(high), high)
        if MODE == "tf32x3":  # sums of a block join the long sum in a rounded addition, see `products.dot`
            acc += _dot(g, high.T, low.T, tl.zeros_like(acc), MODE, INTERPRET)
        else:
            acc = _dot(g, high.T, low.T, acc, MODE, INTERPRET)
    tl.store(gx_ptr + row.to(tl.int64)[:, None] * K + u[None, :], acc * scale, mask=inside)


def fits(problem, mode: str) -> bool:
    """Whether these kernels compute the map: one block of scalars from 16, 32, 64 or 128 to at least as many."""
    if mode not in MODES or torch.version.hip or len(problem.blocks) != 1:
        return False
    slots = (*problem.slots_in, *problem.slots_out)
    narrow, wide = problem.dim_in, problem.dim_out
    return len(slots) == 2 and all(s.dim == 1 for s in slots) and narrow in WIDTHS and wide >= max(narrow, 64)


@lru_cache(maxsize=8)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def split(weight: torch.Tensor) -> torch.Tensor:
    """W' and W'' [2, K width] of the FP32 weights [K width], contiguous."""
    parts = torch.empty(2, weight.numel(), dtype=weight.dtype, device=weight.device)
    block = 1024
    with torch.cuda.device_of(weight):
        linear_scalars_split_kernel[(triton.cdiv(weight.numel(), block),)](weight, parts, weight.numel(), BLOCK=block)
    return parts


def _operand(weight: torch.Tensor, mode: str) -> torch.Tensor:
    """The weights as the kernels read them; "tf32x3" splits what the caller did not."""
    return split(weight) if mode == "tf32x3" and weight.ndim == 1 else weight


def _moved(wide: torch.Tensor, tile: tiles.Tile):
    """`wide` [rows, width] as the kernels get it: its descriptor where units of the GPU can move its tiles.

    They are there from Hopper on (and in the interpreter), and want rows that start at multiples of 16 bytes.
    """
    able = interpreting() or torch.cuda.get_device_capability(wide.device)[0] >= 9
    if able and wide.data_ptr() % 16 == 0 and wide.shape[1] * wide.element_size() % 16 == 0:
        return TensorDescriptor.from_tensor(wide, [tile["BLOCK_M"], tile["BLOCK_N"]])
    return wide


def _constants(problem, mode: str, tile: tiles.Tile) -> dict:
    launch = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    blocks = {name: tile[name] for name in ("BLOCK_M", "BLOCK_N")}
    return {"MODE": mode, "INTERPRET": interpreting(), "K": problem.dim_in} | blocks | launch


def forward(problem, x, weight, bias, residual, mode: str, scale: float, out_dtype: torch.dtype) -> torch.Tensor:
    """x [N, K] float32 contiguous -> [N, width] of out_dtype; weight [K width] in the operands' dtype, or `split`.

    bias [width], residual [N, width] or None, float32 and contiguous.
    """
    rows, width = x.shape[0], problem.dim_out
    out = torch.empty(rows, width, dtype=out_dtype, device=x.device)
    if out.numel() == 0:
        return out
    tile = tiles.choose("linear_scalars_fwd", mode=mode, narrow=problem.dim_in, width=width, rows=rows)
    columns = triton.cdiv(width, tile["BLOCK_N"])
    walkers = max(1, tile["PER_PROCESSOR"] * _processors(x.device) // columns)
    grid = (min(walkers, triton.cdiv(rows, tile["BLOCK_M"])), columns)
    weight, factor, moved = _operand(weight, mode), scale * problem.blocks[0].alpha, _moved(out, tile)
    with torch.cuda.device_of(x):
        linear_scalars_fwd_kernel[grid](
            x,
            weight,
            x if bias is None else bias,
            x if residual is None else residual,
            moved,
            rows,
            width,
            factor,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            BULK=moved is not out,
            BLOCK_K=_summed(problem.dim_in, mode),
            **_constants(problem, mode, tile),
        )
    return out


def grad_x(problem, grad: torch.Tensor, weight: torch.Tensor, mode: str, scale: float) -> torch.Tensor:
    """grad [N, width] contiguous, in any dtype below FP64, weight as in `forward` -> [N, K] float32."""
    rows, width = grad.shape
    gx = torch.empty(rows, problem.dim_in, dtype=torch.float32, device=grad.device)
    if gx.numel() == 0:
        return gx
    tile = tiles.choose("linear_scalars_bwd", mode=mode, narrow=problem.dim_in, width=width, rows=rows)
    weight, factor, moved = _operand(weight, mode), scale * problem.blocks[0].alpha, _moved(grad, tile)
    with torch.cuda.device_of(grad):
        linear_scalars_bwd_kernel[(triton.cdiv(rows, tile["BLOCK_M"]),)](
            moved, weight, gx, rows, width, factor, BULK=moved is not grad, **_constants(problem, mode, tile)
        )
    return gx


def offline_cases(target: str = "sm_90") -> list:
    """Specialisations for `offline.compile_cases`: 64 and 128 scalars to 1280, the tiles in use. None on AMD."""
    cases = {}
    for mode, narrow in itertools.product(() if target.startswith("gfx") else MODES, (64, 128)):
        low = {"bf16": "*bf16", "fp16": "*fp16"}.get(mode, "*fp32")
        for op, stored, rows in itertools.product(("fwd", "bwd"), dict.fromkeys(("*fp32", low)), (1080, 8640, 129470)):
            call = {"mode": mode, "narrow": narrow, "width": 1280, "rows": rows}
            tile = tiles.choose(f"linear_scalars_{op}", arch=target, **call)
            title = f"linear_scalars_{op} {mode} {stored[1:]} from {narrow}, {tile['BLOCK_M']} x {tile['BLOCK_N']}"
            cases[title] = _offline_case(title, op, mode, narrow, low, stored, tile, bulk=int(target[3:]) >= 90)
    return list(cases.values())


def _offline_case(title: str, op: str, mode: str, narrow: int, low: str, stored: str, tile: tiles.Tile, bulk: bool):
    """One of them; low: pointers to weights, stored: to what is wide."""
    from .offline import Case

    wide, others = ("out_ptr", ("x_ptr", "bias_ptr", "residual_ptr")) if op == "fwd" else ("g_ptr", ("gx_ptr",))
    pointers = dict.fromkeys(others, "*fp32") | {"w_ptr": low}
    moved = f"tensordesc<{stored[1:]}[{tile['BLOCK_M']},{tile['BLOCK_N']}]>" if bulk else stored
    signature = pointers | {wide: moved, "rows": "i32", "width": "i32", "scale": "fp32"}
    constants = {"BULK": bulk, "MODE": mode, "INTERPRET": False, "K": narrow}
    constants |= {name: tile[name] for name in ("BLOCK_M", "BLOCK_N")}
    if op == "fwd":
        constants |= {"HAS_BIAS": False, "HAS_RESIDUAL": False, "BLOCK_K": _summed(narrow, mode)}
    divisible = (*pointers, "width") if bulk else (*pointers, wide, "width")
    launch = (constants, tile.num_warps, tile.num_stages, divisible)
    return Case(title, "linear_scalars", f"linear_scalars_{op}_kernel", signature, *launch)
