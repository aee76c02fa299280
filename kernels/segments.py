"""Sums over segments of rows, and over tiles of sorted nodes: how gradients are added up without atomics.

Nodes sorted by species are cut into tiles of at most `size` nodes, none of which holds two species. Species z has the
tiles from ptr[z] // size + z on; those that it does not need are empty. So a program finds its nodes from its number:
no launches before it cut them.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl

from . import tiles


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


def count_tiles(nodes: int, size: int, ptr: torch.Tensor) -> int:
    """How many tiles of at most `size` nodes there are for ptr [Z + 1], with the empty ones."""
    return nodes // size + ptr.shape[0] - 1


@triton.jit
def nodes_of_tile(ptr_ptr, number, size, SPECIES: tl.constexpr, PAD: tl.constexpr):
    """(first, end) of tile `number` in the sorted nodes; first >= end where it is empty. PAD: a power of two."""
    z = tl.arange(0, PAD)
    first = tl.load(ptr_ptr + z, mask=z < SPECIES, other=0) // size + z
    species = tl.sum(((first <= number) & (z < SPECIES)).to(tl.int32), axis=0) - 1
    start = tl.load(ptr_ptr + species)
    begin = start + (number - start // size - species) * size
    return begin, tl.minimum(begin + size, tl.load(ptr_ptr + species + 1))


@triton.jit(do_not_specialize=["size"])
def tile_sum_kernel(part_ptr, ptr_ptr, out_ptr, size, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out[z] = sum of the tiles of species z; zero without any."""
    z = tl.program_id(1)  # the slower one: species with tiles shall not wait for those without, if those come later
    start = tl.load(ptr_ptr + z)
    count = tl.cdiv(tl.load(ptr_ptr + z + 1) - start, size)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    out = out_ptr + z.to(tl.int64) * width + column
    if count == 0:  # most of a table of 89 species
        tl.store(out, tl.zeros([1, BLOCK], part_ptr.dtype.element_ty), mask=column < width)
    else:
        row = tl.arange(0, ROWS)[:, None]
        part = part_ptr + (start // size + z).to(tl.int64) * width + column
        total = tl.zeros([ROWS, BLOCK], part_ptr.dtype.element_ty)
        for first in range(0, count, ROWS):
            mask = (first + row < count) & (column < width)
            total += tl.load(part + (first + row).to(tl.int64) * width, mask=mask, other=0.0)
        tl.store(out, tl.sum(total, axis=0)[None, :], mask=column < width)


def sum_tiles(partial: torch.Tensor, ptr: torch.Tensor, size: int) -> torch.Tensor:
    """Add the tiles' rows [tiles, ...] of each species, ptr [Z + 1]: [Z, ...], same bits every run."""
    species, width = ptr.shape[0] - 1, partial[0].numel()
    out = torch.empty((species, *partial.shape[1:]), dtype=partial.dtype, device=partial.device)
    tile = tiles.choose("tile_sum", dtype=tiles.TAGS[partial.dtype], width=width)
    with torch.cuda.device_of(partial):
        tile_sum_kernel[(triton.cdiv(width, tile["BLOCK"]), species)](
            *(partial, ptr, out, size, width), **dict(tile.block), num_warps=tile.num_warps
        )
    return out


def offline_cases(target: str = "sm_90", dtypes: tuple[str, ...] = ("fp64", "fp32")) -> list:
    """The sum over tiles with the block sizes in use, for `offline.compile_cases`."""
    from .offline import Case

    cases = []
    for dtype, width in itertools.product(dtypes, (3712, 49152)):
        tile = tiles.choose("tile_sum", dtype=dtype, width=width, arch=target)
        signature = {"part_ptr": f"*{dtype}", "ptr_ptr": "*i32", "out_ptr": f"*{dtype}"}
        launch = (dict(tile.block), tile.num_warps, tile.num_stages, tuple(signature))
        signature |= {"size": "i32", "width": "i32"}
        cases.append(Case(f"tile_sum {dtype} of {width}", "segments", "tile_sum_kernel", signature, *launch))
    return cases
