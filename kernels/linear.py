"""Equivariant linear map: one launch for all irreps, forward and transposed, and one for the gradient of the weights.

    out[n, w, m] = scale alpha sum_u W[u, w] x[n, u, m] + bias[w] + residual[n, w, m]          for every output slot

Rows are pairs (node, m) of one slot, columns its channels. A program owns [BLOCK_M rows, BLOCK_N channels] of one
output slot ("group") and walks the channels of every input slot that feeds it, BLOCK_K at a time; a small table says
where each of these K blocks lies, so that the code is the same for every irreps. The gradient of x is the same kernel
with the table of the transposed map. The gradient of the weights reduces over rows: the nodes are split in a fixed
number of parts, each part writes its own partial sums, and a second pass adds them: no atomics, the same bits always.

Operands are rounded in registers to the mode ("bf16", "fp16", "tf32", "tf32x3", "ieee", "fp64"); sums are FP32 (FP64).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import linear_scalars, tiles
from .products import dot, find_group, interpreting, load_rows, load_weights, row_places, store_rows, summed


@triton.jit(do_not_specialize=["n_nodes"])
def linear_fwd_kernel(
    x_ptr,  # [n_nodes, width_in]
    w_ptr,  # [weight_numel]
    bias_ptr,  # [bias_numel]
    residual_ptr,  # [n_nodes, width_out]
    out_ptr,  # [n_nodes, width_out]
    group_ptr,  # int32 [groups, 6]: offset, mul, 2l+1, bias, first K block, last K block + 1
    block_ptr,  # int32 [K blocks, 4]: offset of the slot in x, its mul, first channel, weight
    scale_ptr,  # float64 [groups]: scale * alpha
    n_nodes,
    width_in,
    width_out,
    X_LAYOUT: tl.constexpr,
    OUT_LAYOUT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    MODE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    ALIGN: tl.constexpr,
    INTERPRET: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    group, tile = find_group(group_ptr, n_nodes, 0, BLOCK_M, BLOCK_N)
    entry = group_ptr + group * 6
    offset = tl.multiple_of(tl.load(entry), ALIGN)
    mul = tl.multiple_of(tl.load(entry + 1), ALIGN)
    dim = tl.load(entry + 2)
    bias = tl.load(entry + 3)
    first_block = tl.load(entry + 4)
    end_block = tl.load(entry + 5)
    column_blocks = tl.cdiv(mul, BLOCK_N)
    row = (tile // column_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < n_nodes * dim
    first = (tile % column_blocks) * BLOCK_N
    column = first + tl.arange(0, BLOCK_N)
    acc_dtype: tl.constexpr = out_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_N), acc_dtype)
    for number in range(first_block, end_block):
        block = block_ptr + number * 4
        x_offset = tl.multiple_of(tl.load(block), ALIGN)
        x_mul = tl.multiple_of(tl.load(block + 1), ALIGN)
        x_first = tl.multiple_of(tl.load(block + 2), BLOCK_K)
        weight = tl.multiple_of(tl.load(block + 3), ALIGN)
        place = x_offset + row_places(row // dim, row % dim, width_in, x_mul, X_LAYOUT)
        x = load_rows(x_ptr, place, row_mask, x_first, x_mul, dim, BLOCK_C=BLOCK_K, LAYOUT=X_LAYOUT, LANES=LANES,
                       EVEN=EVEN_K)  # fmt: skip
        k = x_first + tl.arange(0, BLOCK_K)
        w = load_weights(w_ptr + weight, k, column, x_mul, mul, TRANSPOSED, EVEN_K and EVEN_N)
        acc = dot(x, w, acc, MODE, INTERPRET)  # [BLOCK_M, BLOCK_N]
    acc *= tl.load(scale_ptr + group).to(acc_dtype)
    if HAS_BIAS:
        biases = tl.where(bias >= 0, mul, 0)
        acc += tl.load(bias_ptr + bias + column, mask=column < biases, other=0.0)[None, :]
    place = offset + row_places(row // dim, row % dim, width_out, mul, OUT_LAYOUT)
    if HAS_RESIDUAL:
        acc += load_rows(residual_ptr, place, row_mask, first, mul, dim, BLOCK_C=BLOCK_N, LAYOUT=OUT_LAYOUT,
                          LANES=LANES, EVEN=EVEN_N)  # fmt: skip
    store_rows(out_ptr, acc, place, row_mask, first, mul, dim, OUT_LAYOUT, LANES, EVEN_N)


@triton.jit(do_not_specialize=["n_nodes", "nodes_per_part"])
def linear_wgrad_kernel(
    x_ptr,  # [n_nodes, width_in]
    g_ptr,  # [n_nodes, width_out]
    part_ptr,  # [parts, weight_numel]
    block_ptr,  # int32 [blocks, 8]: offset, mul, first channel of x; the same of g; 2l+1; weight
    scale_ptr,  # float64 [blocks]: scale * alpha
    n_nodes,
    nodes_per_part,
    width_in,
    width_out,
    weight_numel,
    X_LAYOUT: tl.constexpr,
    G_LAYOUT: tl.constexpr,
    MODE: tl.constexpr,
    EVEN: tl.constexpr,
    ALIGN: tl.constexpr,
    INTERPRET: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    part = tl.program_id(1)
    block = block_ptr + tl.program_id(0) * 8
    x_offset = tl.multiple_of(tl.load(block), ALIGN)
    x_mul = tl.multiple_of(tl.load(block + 1), ALIGN)
    x_first = tl.multiple_of(tl.load(block + 2), BLOCK_U)
    g_offset = tl.multiple_of(tl.load(block + 3), ALIGN)
    g_mul = tl.multiple_of(tl.load(block + 4), ALIGN)
    g_first = tl.multiple_of(tl.load(block + 5), BLOCK_W)
    dim = tl.load(block + 6)
    weight = tl.load(block + 7)
    end = tl.minimum((part + 1) * nodes_per_part, n_nodes) * dim
    acc_dtype: tl.constexpr = part_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_U, BLOCK_W), acc_dtype)
    for start in range(part * nodes_per_part * dim, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        x_place = x_offset + row_places(row // dim, row % dim, width_in, x_mul, X_LAYOUT)
        g_place = g_offset + row_places(row // dim, row % dim, width_out, g_mul, G_LAYOUT)
        x = load_rows(x_ptr, x_place, row < end, x_first, x_mul, dim, BLOCK_C=BLOCK_U, LAYOUT=X_LAYOUT, LANES=LANES,
                       EVEN=EVEN)  # fmt: skip
        g = load_rows(g_ptr, g_place, row < end, g_first, g_mul, dim, BLOCK_C=BLOCK_W, LAYOUT=G_LAYOUT, LANES=LANES,
                       EVEN=EVEN)  # fmt: skip
        acc = dot(tl.trans(x), g.to(x.dtype), acc, MODE, INTERPRET)  # [BLOCK_U, BLOCK_W]
    acc *= tl.load(scale_ptr + tl.program_id(0)).to(acc_dtype)
    u, w = x_first + tl.arange(0, BLOCK_U), g_first + tl.arange(0, BLOCK_W)
    place = part.to(tl.int64) * weight_numel + weight + u[:, None] * g_mul + w[None, :]
    tl.store(part_ptr + place, acc, mask=(u < x_mul)[:, None] & (w < g_mul)[None, :])


class _Plan(NamedTuple):
    """What a launch needs beside its tensors and the number of nodes."""

    tables: tuple[torch.Tensor, ...]
    shapes: tuple[tuple[int, int], ...]  # (2l+1, column blocks) of each group; empty for the weight gradient
    constants: dict


def supported(mode: str) -> str:
    """AMD has FP32 matrix instructions and no 3xTF32: exact FP32 stands in for the tf32 modes there."""
    return "ieee" if torch.version.hip and mode.startswith("tf32") else mode


@lru_cache(maxsize=512)
def _map_mode(problem, transposed: bool, mode: str) -> str:
    """The operands a map uses for `mode`. Sums of fewer than 64 products are more exact, and cheap, in plain FP32: the
    rounding of FP32 sums grows with their length, that of 3xTF32 does not (docs/numerics.md has the figures)."""
    groups = problem.groups_transposed if transposed else problem.groups
    lengths = [sum(segment.mul for segment in group.segments) for group in groups if group.segments]
    return "ieee" if mode == "tf32x3" and min(lengths, default=0) < 64 else supported(mode)


def _fit(block: int, muls: list[int]) -> int:
    """`block`, made smaller (never below 16) as long as that wastes fewer masked channels."""
    waste = {b: sum(-mul % b for mul in muls) for b in (16, 32, 64, 128, 256) if b <= block}
    least = min(waste.values())
    return max(b for b, w in waste.items() if w == least) if waste[block] > sum(muls) // 8 else block


def _align(*numbers: int) -> int:
    return math.gcd(16, *numbers)


def _layout(layout: str, dims: list[int]) -> str:
    """Scalars are stored alike in both layouts; ir_mul is the faster code."""
    return "ir_mul" if all(dim == 1 for dim in dims) else layout


def _tensors(device: torch.device, ints: tuple[list, ...], scales: list[float]) -> tuple[torch.Tensor, ...]:
    tables = [torch.tensor(rows, dtype=torch.int32, device=device) for rows in ints]
    return *tables, torch.tensor(scales, dtype=torch.float64, device=device)


@lru_cache(maxsize=512)
def _map_plan(problem, transposed: bool, mode: str, scale: float, device: torch.device, tile: tiles.Tile) -> _Plan:
    """Tables of the forward (transposed=False) or of its transpose."""
    groups = problem.groups_transposed if transposed else problem.groups
    x_layout, out_layout = (problem.layout_in, problem.layout_out)[:: -1 if transposed else 1]
    block_k = _fit(summed(tile["BLOCK_K"], mode), [s.mul for g in groups for s in g.segments] or [16])
    block_n = _fit(tile["BLOCK_N"], [g.mul for g in groups])
    group_rows, block_rows = [], []
    for group in groups:
        first = len(block_rows)
        block_rows += [(s.offset, s.mul, k, s.weight) for s in group.segments for k in range(0, s.mul, block_k)]
        group_rows.append((group.offset, group.mul, group.dim, group.bias, first, len(block_rows)))
    segments = [s for g in groups for s in g.segments]
    dims = [g.dim for g in groups]
    constants = {
        "X_LAYOUT": _layout(x_layout, dims),
        "OUT_LAYOUT": _layout(out_layout, dims),
        "TRANSPOSED": transposed,
        "MODE": mode,
        "EVEN_K": all(s.mul % block_k == 0 for s in segments),
        "EVEN_N": all(g.mul % block_n == 0 for g in groups),
        "ALIGN": _align(*(n for s in segments for n in s), *(n for g in groups for n in (g.offset, g.mul))),
        "INTERPRET": interpreting(),
        "LANES": min(tile["LANES"], block_k, block_n),
        "BLOCK_M": tile["BLOCK_M"],
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
    }
    scales = [scale * g.alpha for g in groups]
    tables = _tensors(device, (group_rows, block_rows or [(0, 0, 0, 0)]), scales)
    return _Plan(tables, tuple((g.dim, -(-g.mul // block_n)) for g in groups), constants)


@lru_cache(maxsize=512)
def _wgrad_plan(problem, mode: str, scale: float, device: torch.device, tile: tiles.Tile) -> _Plan:
    """Table of the weight gradient: one program per block of weights (and part of the nodes)."""
    blocks = problem.blocks
    block_u = _fit(tile["BLOCK_U"], [b.slot_in.mul for b in blocks])
    block_w = _fit(tile["BLOCK_W"], [b.slot_out.mul for b in blocks])
    rows, scales = [], []
    for block in sorted(blocks, key=lambda b: -b.slot_in.dim):  # the longest sums start first
        a, b = block.slot_in, block.slot_out
        for u in range(0, a.mul, block_u):
            for w in range(0, b.mul, block_w):
                rows.append((a.offset, a.mul, u, b.offset, b.mul, w, a.dim, block.weight))
                scales.append(scale * block.alpha)
    numbers = [n for row in rows for n in (row[0], row[1], row[3], row[4])]
    constants = {
        "X_LAYOUT": _layout(problem.layout_in, [s.dim for s in problem.slots_in if s.mul]),
        "G_LAYOUT": _layout(problem.layout_out, [s.dim for s in problem.slots_out if s.mul]),
        "MODE": supported(mode),
        "EVEN": all(row[1] % block_u == 0 and row[4] % block_w == 0 for row in rows),
        "ALIGN": _align(*numbers),
        "INTERPRET": interpreting(),
        "LANES": min(tile["LANES"], block_u, block_w),
        "BLOCK_R": summed(tile["BLOCK_R"], mode),
        "BLOCK_U": block_u,
        "BLOCK_W": block_w,
    }
    return _Plan(_tensors(device, (rows,), scales), (), constants)


def _run_map(problem, transposed, x, weight, bias, residual, mode, scale) -> torch.Tensor:
    nodes, width = x.shape[0], problem.dim_in if transposed else problem.dim_out
    out = torch.empty(nodes, width, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    mode = _map_mode(problem, transposed, mode)
    reads, writes = (problem.layout_in, problem.layout_out)[:: -1 if transposed else 1]
    tile = tiles.choose("linear_fwd", mode=mode, reads=reads, writes=writes, transposed=transposed, nodes=nodes)
    plan = _map_plan(problem, transposed, mode, scale, x.device, tile)
    block_m = tile["BLOCK_M"]
    programs = sum(-(-nodes * dim // block_m) * columns for dim, columns in plan.shapes)
    with torch.cuda.device_of(x):
        linear_fwd_kernel[(programs,)](
            x,
            weight,
            x if bias is None else bias,
            x if residual is None else residual,
            out,
            *plan.tables,
            nodes,
            x.shape[1],
            width,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            **plan.constants,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out


def forward(
    problem,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    mode: str,
    scale: float,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """scale (alpha x W) + bias + residual: x [N, dim_in] contiguous -> [N, dim_out]. alpha is taken per group."""
    if linear_scalars.fits(problem, mode):
        return linear_scalars.forward(problem, x, weight, bias, residual, mode, scale, out_dtype)
    return _run_map(problem, False, x, weight, bias, residual, mode, scale).to(out_dtype)


def grad_x(problem, grad: torch.Tensor, weight: torch.Tensor, mode: str, scale: float) -> torch.Tensor:
    """scale (alpha grad W^T): grad [N, dim_out] contiguous -> [N, dim_in], FP32 or, for "fp64", FP64."""
    if linear_scalars.fits(problem, mode):
        return linear_scalars.grad_x(problem, grad, weight, mode, scale)
    grad = grad.to(torch.float64 if mode == "fp64" else torch.float32)
    return _run_map(problem, True, grad, weight, None, None, mode, scale)


def grad_w(problem, x: torch.Tensor, grad: torch.Tensor, mode: str, scale: float) -> torch.Tensor:
    """scale alpha sum over (n, m) x[n, m, u] grad[n, m, w] -> [weight_numel], in x's dtype. Deterministic.

    x, grad: contiguous; grad may be stored in 16 bits.
    """
    nodes = x.shape[0]
    if nodes == 0 or problem.weight_numel == 0:
        return x.new_zeros(problem.weight_numel)
    tile = tiles.choose(
        "linear_wgrad", mode=mode, reads=problem.layout_in, writes=problem.layout_out, transposed=False, nodes=nodes
    )
    plan = _wgrad_plan(problem, mode, scale, x.device, tile)
    parts = max(1, min(tile["PARTS"], nodes // 32))
    nodes_per_part = -(-nodes // parts)
    partial = torch.empty(parts, problem.weight_numel, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        linear_wgrad_kernel[(plan.tables[0].shape[0], parts)](
            x,
            grad,
            partial,
            *plan.tables,
            nodes,
            nodes_per_part,
            x.shape[1],
            grad.shape[1],
            problem.weight_numel,
            **plan.constants,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return partial.sum(0)


def offline_cases(target: str = "sm_90") -> list:
    """Typical specialisations for `offline.compile_cases`: 128-channel maps in every mode, with the tiles in use.

    AMD: the tf32 modes run as "ieee" there, and Triton 3.6 cannot compile FP64 products for it.
    """
    from .offline import Case

    amd = target.startswith("gfx")
    cases = []
    for mode in ("bf16", "fp16", "ieee") if amd else ("bf16", "fp16", "tf32", "tf32x3", "ieee", "fp64"):
        word = "*fp64" if mode == "fp64" else "*fp32"
        weight = {"bf16": "*bf16", "fp16": "*fp16"}.get(mode, word)
        pointers = {"x_ptr": word, "w_ptr": weight, "bias_ptr": word, "residual_ptr": word, "out_ptr": word}
        tables = {"group_ptr": "*i32", "block_ptr": "*i32", "scale_ptr": "*fp64"}
        widths = {"width_in": "i32", "width_out": "i32"}
        for reads, writes, transposed in (
            ("ir_mul", "ir_mul", False),
            ("mul_ir", "ir_mul", False),
            ("ir_mul", "mul_ir", False),
            ("ir_mul", "mul_ir", True),
            ("mul_ir", "ir_mul", True),
        ):
            call = {"mode": mode, "reads": reads, "writes": writes, "transposed": transposed, "nodes": 5184}
            tile = tiles.choose("linear_fwd", arch=target, **call)
            constants = {"X_LAYOUT": reads, "OUT_LAYOUT": writes, "TRANSPOSED": transposed, "MODE": mode}
            constants |= {"HAS_BIAS": False, "HAS_RESIDUAL": False, "EVEN_K": True, "EVEN_N": True, "ALIGN": 16}
            name = f"linear_fwd {mode} {reads}->{writes}{' transposed' if transposed else ''}"
            signature = pointers | tables | {"n_nodes": "i32"} | widths
            constants |= {"INTERPRET": False} | dict(tile.block)
            known = (*pointers, *tables, *widths)
            fwd = ("linear", "linear_fwd_kernel", signature, constants, tile.num_warps, tile.num_stages, known)
            cases.append(Case(name, *fwd))
        call |= {"reads": "mul_ir", "writes": "mul_ir", "transposed": False}
        tile = tiles.choose("linear_wgrad", arch=target, **call)
        signature = {"x_ptr": word, "g_ptr": word, "part_ptr": word, "block_ptr": "*i32", "scale_ptr": "*fp64"}
        known = (*signature, *widths, "weight_numel")
        signature |= {"n_nodes": "i32", "nodes_per_part": "i32"} | widths | {"weight_numel": "i32"}
        constants = {"X_LAYOUT": "mul_ir", "G_LAYOUT": "mul_ir", "MODE": mode, "EVEN": True, "ALIGN": 16}
        constants |= {"INTERPRET": False} | {k: v for k, v in tile.block if k != "PARTS"}
        wgrad = ("linear", "linear_wgrad_kernel", signature, constants, tile.num_warps, tile.num_stages, known)
        cases.append(Case(f"linear_wgrad {mode}", *wgrad))
    return cases
