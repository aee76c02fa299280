"""Sums over segments of rows, and segments cut into tiles: how gradients are added up without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def segment_sum_kernel(rows_ptr, ptr_ptr, perm_ptr, out_ptr, width, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = sum of rows[perm[k]] for k in ptr[i] .. ptr[i + 1], in that order."""
    blocks = tl.cdiv(width, BLOCK)
    node = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = column < width
    begin = tl.load(ptr_ptr + node)
    end = tl.load(ptr_ptr + node + 1)
    total = tl.zeros([BLOCK], ACC)
    for k in range(begin, end):
        row = tl.load(perm_ptr + k).to(tl.int64)
        total += tl.load(rows_ptr + row * width + column, mask=mask, other=0.0)
    tl.store(out_ptr + node * width + column, total, mask=mask)


def segment_sum(rows: torch.Tensor, ptr: torch.Tensor, perm: torch.Tensor) -> torch.Tensor:
    """Sum rows [E, width] into [n, width] along the compressed rows (ptr [n + 1], perm [E]), same bits every run."""
    n, width = ptr.shape[0] - 1, rows.shape[1]
    out = torch.empty((n, width), dtype=rows.dtype, device=rows.device)
    if n and width:
        grid, acc = (n * triton.cdiv(width, 128),), tl.float64 if rows.dtype == torch.float64 else tl.float32
        with torch.cuda.device_of(rows):
            segment_sum_kernel[grid](rows, ptr, perm, out, width, ACC=acc, BLOCK=128, num_warps=1)
    return out


def cut(ptr: torch.Tensor, n: int, parts: int, least: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut n sorted rows, segment z being ptr[z] .. ptr[z + 1] - 1, into tiles of at most max(least, n / parts) rows.

    Returns (bounds [T + 1] of each tile, first tile [Z + 1] of each segment), int32. No tile holds rows of two
    segments; an empty segment has none, and tiles at the end may be empty. T depends on n, parts and Z only.
    """
    size, segments = max(least, -(-n // parts)), ptr.shape[0] - 1
    first = torch.nn.functional.pad((ptr.diff() + size - 1).div(size, rounding_mode="floor").cumsum(0), (1, 0))
    number = torch.arange(-(-n // size) + min(segments, n) + 1, device=ptr.device)
    owner = torch.searchsorted(first, number, right=True).sub(1).clamp(max=segments - 1)
    bounds = torch.minimum(ptr[owner] + (number - first[owner]) * size, ptr[owner + 1])
    return bounds.to(torch.int32), first.to(torch.int32)


def sum_tiles(partial: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Add the tiles' rows [T, width] of each segment in their order: [Z, width]."""
    order = torch.arange(partial.shape[0], device=partial.device, dtype=torch.int32)
    return segment_sum(partial, first, order)
