"""Equivariant linear map with weights of each species: MACE's `skip_tp`, a grouped matrix product.

    out[n, w, m] = scale alpha sum_u W[z_n, u, w] x[n, u, m]                                for every output slot

Nodes are taken in the order of their species, and no tile of rows holds two species; otherwise the programs are those
of `linear.py`, whose tables, loads and products they use. How many tiles a species fills is known on the device only:
each group of the grid has room for one more tile than its rows fill for every species, and programs beyond the last
tile leave at once. The gradient of the weights takes the sorted nodes in the tiles of `segments.py`, writes the sums of
each, and adds the tiles of a species in a fixed order: no atomics, the same bits always.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import tiles
from .linear import _map_mode, _map_plan, _wgrad_plan
from .products import dot, find_group, load_rows, load_weights, row_places, store_rows
from .segments import count_tiles, nodes_of_tile, sum_tiles


@triton.jit
def _species_of_tile(ptr_ptr, tile, dim, SPECIES: tl.constexpr, PAD: tl.constexpr, BLOCK_M: tl.constexpr):
    """(species, row tile inside it) of a row tile; species is SPECIES beyond the last one."""
    number = tl.arange(0, PAD)
    known = number < SPECIES
    begin = tl.load(ptr_ptr + number, mask=known, other=0)
    end = tl.load(ptr_ptr + number + 1, mask=known, other=0)
    count = tl.cdiv((end - begin) * dim, BLOCK_M)  # [PAD]
    last = tl.cumsum(count, 0)
    species = tl.sum((known & (last <= tile)).to(tl.int32), 0)
    return species, tile - tl.sum(tl.where(number == species, last - count, 0), 0)


@triton.jit(do_not_specialize=["n_nodes", "extra"])
def species_linear_fwd_kernel(
    x_ptr,  # [n_nodes, width_in]
    w_ptr,  # [SPECIES, weight_numel]
    out_ptr,  # [n_nodes, width_out]
    perm_ptr,  # int32 [n_nodes]: nodes in the order of their species
    ptr_ptr,  # int32 [SPECIES + 1]: where each species begins in it
    group_ptr,  # int32 [groups, 6]: offset, mul, 2l+1, unused, first K block, last K block + 1
    block_ptr,  # int32 [K blocks, 4]: offset of the slot in x, its mul, first channel, weight
    scale_ptr,  # float64 [groups]: scale * alpha
    n_nodes,
    extra,  # row tiles of a group beyond those its rows fill
    width_in,
    width_out,
    weight_numel,
    SPECIES: tl.constexpr,
    PAD: tl.constexpr,
    X_LAYOUT: tl.constexpr,
    OUT_LAYOUT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    MODE: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    ALIGN: tl.constexpr,
    INTERPRET: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    group, tile = find_group(group_ptr, n_nodes, extra, BLOCK_M, BLOCK_N)
    entry = group_ptr + group * 6
    offset = tl.multiple_of(tl.load(entry), ALIGN)
    mul = tl.multiple_of(tl.load(entry + 1), ALIGN)
    dim = tl.load(entry + 2)
    first_block = tl.load(entry + 4)
    end_block = tl.load(entry + 5)
    column_blocks = tl.cdiv(mul, BLOCK_N)
    species, row_tile = _species_of_tile(ptr_ptr, tile // column_blocks, dim, SPECIES, PAD, BLOCK_M)
    if species < SPECIES:
        begin = tl.load(ptr_ptr + species)
        row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        row_mask = row < (tl.load(ptr_ptr + species + 1) - begin) * dim
        node = tl.load(perm_ptr + begin + row // dim, mask=row_mask, other=0)  # [BLOCK_M]
        first = (tile % column_blocks) * BLOCK_N
        column = first + tl.arange(0, BLOCK_N)
        own_w_ptr = w_ptr + species.to(tl.int64) * weight_numel
        acc_dtype: tl.constexpr = out_ptr.dtype.element_ty
        acc = tl.zeros((BLOCK_M, BLOCK_N), acc_dtype)
        for number in range(first_block, end_block):
            block = block_ptr + number * 4
            x_offset = tl.multiple_of(tl.load(block), ALIGN)
            x_mul = tl.multiple_of(tl.load(block + 1), ALIGN)
            x_first = tl.multiple_of(tl.load(block + 2), BLOCK_K)
            weight = tl.multiple_of(tl.load(block + 3), ALIGN)
            place = x_offset + row_places(node, row % dim, width_in, x_mul, X_LAYOUT)
            x = load_rows(x_ptr, place, row_mask, x_first, x_mul, dim, BLOCK_C=BLOCK_K, LAYOUT=X_LAYOUT, LANES=LANES,
                           EVEN=EVEN_K)  # fmt: skip
            k = x_first + tl.arange(0, BLOCK_K)
            w = load_weights(own_w_ptr + weight, k, column, x_mul, mul, TRANSPOSED, EVEN_K and EVEN_N)
            acc = dot(x, w, acc, MODE, INTERPRET)  # [BLOCK_M, BLOCK_N]
        acc *= tl.load(scale_ptr + group).to(acc_dtype)
        place = offset + row_places(node, row % dim, width_out, mul, OUT_LAYOUT)
        store_rows(out_ptr, acc, place, row_mask, first, mul, dim, OUT_LAYOUT, LANES, EVEN_N)


@triton.jit(do_not_specialize=["size"])
def species_linear_wgrad_kernel(
    x_ptr,  # [n_nodes, width_in]
    g_ptr,  # [n_nodes, width_out]
    part_ptr,  # [tiles, weight_numel]
    perm_ptr,  # int32 [n_nodes]: nodes in the order of their species
    ptr_ptr,  # int32 [SPECIES + 1]: where each species begins in it
    block_ptr,  # int32 [blocks, 8]: offset, mul, first channel of x; the same of g; 2l+1; weight
    scale_ptr,  # float64 [blocks]: scale * alpha
    size,  # most nodes of a tile
    width_in,
    width_out,
    weight_numel,
    SPECIES: tl.constexpr,
    PAD: tl.constexpr,
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
    begin, end = nodes_of_tile(ptr_ptr, part, size, SPECIES, PAD)
    if begin < end:  # empty tiles are never read
        block = block_ptr + tl.program_id(0) * 8
        x_offset = tl.multiple_of(tl.load(block), ALIGN)
        x_mul = tl.multiple_of(tl.load(block + 1), ALIGN)
        x_first = tl.multiple_of(tl.load(block + 2), BLOCK_U)
        g_offset = tl.multiple_of(tl.load(block + 3), ALIGN)
        g_mul = tl.multiple_of(tl.load(block + 4), ALIGN)
        g_first = tl.multiple_of(tl.load(block + 5), BLOCK_W)
        dim = tl.load(block + 6)
        weight = tl.load(block + 7)
        acc_dtype: tl.constexpr = part_ptr.dtype.element_ty
        acc = tl.zeros((BLOCK_U, BLOCK_W), acc_dtype)
        rows = (end - begin) * dim
        for start in range(0, rows, BLOCK_R):
            row = start + tl.arange(0, BLOCK_R)
            node = tl.load(perm_ptr + begin + row // dim, mask=row < rows, other=0)  # [BLOCK_R]
            x_place = x_offset + row_places(node, row % dim, width_in, x_mul, X_LAYOUT)
            g_place = g_offset + row_places(node, row % dim, width_out, g_mul, G_LAYOUT)
            x = load_rows(x_ptr, x_place, row < rows, x_first, x_mul, dim, BLOCK_C=BLOCK_U, LAYOUT=X_LAYOUT,
                           LANES=LANES, EVEN=EVEN)  # fmt: skip
            g = load_rows(g_ptr, g_place, row < rows, g_first, g_mul, dim, BLOCK_C=BLOCK_W, LAYOUT=G_LAYOUT,
                           LANES=LANES, EVEN=EVEN)  # fmt: skip
            acc = dot(tl.trans(x), g, acc, MODE, INTERPRET)  # [BLOCK_U, BLOCK_W]
        acc *= tl.load(scale_ptr + tl.program_id(0)).to(acc_dtype)
        u, w = x_first + tl.arange(0, BLOCK_U), g_first + tl.arange(0, BLOCK_W)
        place = part.to(tl.int64) * weight_numel + weight + u[:, None] * g_mul + w[None, :]
        tl.store(part_ptr + place, acc, mask=(u < x_mul)[:, None] & (w < g_mul)[None, :])


def _run_map(problem, transposed: bool, x: torch.Tensor, weight: torch.Tensor, plan, mode: str, scale: float):
    nodes, width = x.shape[0], problem.dim_in if transposed else problem.dim_out
    out = torch.empty(nodes, width, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    mode = _map_mode(problem, transposed, mode)
    reads, writes = (problem.layout_in, problem.layout_out)[:: -1 if transposed else 1]
    tile = tiles.choose("species_linear_fwd", mode=mode, reads=reads, writes=writes, transposed=transposed, nodes=nodes)
    tables, shapes, constants = _map_plan(problem, transposed, mode, scale, x.device, tile)
    extra = min(plan.count, nodes)
    programs = sum((-(-nodes * dim // tile["BLOCK_M"]) + extra) * columns for dim, columns in shapes)
    with torch.cuda.device_of(x):
        species_linear_fwd_kernel[(programs,)](
            x,
            weight,
            out,
            plan.perm,
            plan.ptr,
            *tables,
            nodes,
            extra,
            x.shape[1],
            width,
            weight.shape[1],
            SPECIES=plan.count,
            PAD=triton.next_power_of_2(plan.count),
            **constants,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out


def forward(problem, x: torch.Tensor, weight: torch.Tensor, plan, mode: str, scale: float) -> torch.Tensor:
    """scale (alpha x W[species]): x [N, dim_in], weight [Z, weight_numel], both contiguous -> [N, dim_out]."""
    return _run_map(problem, False, x, weight, plan, mode, scale)


def grad_x(problem, grad: torch.Tensor, weight: torch.Tensor, plan, mode: str, scale: float) -> torch.Tensor:
    """scale (alpha grad W[species]^T): grad [N, dim_out] contiguous -> [N, dim_in]."""
    return _run_map(problem, True, grad, weight, plan, mode, scale)


def grad_w(problem, x: torch.Tensor, grad: torch.Tensor, plan, mode: str, scale: float) -> torch.Tensor:
    """scale alpha sum over (n of z, m) x[n, m, u] grad[n, m, w] -> [Z, weight_numel], in x's dtype. Deterministic."""
    nodes, numel = x.shape[0], problem.weight_numel
    if nodes == 0 or numel == 0:
        return x.new_zeros(plan.count, numel)
    reads, writes = problem.layout_in, problem.layout_out
    tile = tiles.choose("species_linear_wgrad", mode=mode, reads=reads, writes=writes, transposed=False, nodes=nodes)
    tables, _, constants = _wgrad_plan(problem, mode, scale, x.device, tile)
    size = max(16, triton.cdiv(nodes, tile["PARTS"]))
    partial = torch.empty(count_tiles(nodes, size, plan.ptr), numel, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        species_linear_wgrad_kernel[(tables[0].shape[0], partial.shape[0])](
            x,
            grad,
            partial,
            plan.perm,
            plan.ptr,
            *tables,
            size,
            x.shape[1],
            grad.shape[1],
            numel,
            SPECIES=plan.count,
            PAD=triton.next_power_of_2(plan.count),
            **constants,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return sum_tiles(partial, plan.ptr, size)


def offline_cases(target: str = "sm_90") -> list:
    """Typical specialisations for `offline.compile_cases`: 128 channels, 89 species, every mode, the tiles in use."""
    from .offline import Case

    amd, cases = target.startswith("gfx"), []
    for mode in ("bf16", "fp16", "ieee") if amd else ("bf16", "fp16", "tf32", "tf32x3", "ieee", "fp64"):
        word = "*fp64" if mode == "fp64" else "*fp32"
        shared = {"perm_ptr": "*i32", "ptr_ptr": "*i32", "block_ptr": "*i32", "scale_ptr": "*fp64"}
        sizes = {"width_in": "i32", "width_out": "i32", "weight_numel": "i32"}
        call = {"mode": mode, "reads": "mul_ir", "writes": "mul_ir", "nodes": 5184}
        shape = {"X_LAYOUT": "mul_ir", "MODE": mode, "ALIGN": 16, "INTERPRET": False}
        shape |= {"SPECIES": 89, "PAD": 128}
        for transposed in (False, True):
            tile = tiles.choose("species_linear_fwd", arch=target, transposed=transposed, **call)
            signature = {"x_ptr": word, "w_ptr": {"bf16": "*bf16", "fp16": "*fp16"}.get(mode, word), "out_ptr": word}
            signature |= shared | {"group_ptr": "*i32"} | sizes
            known = tuple(signature)
            constants = shape | {"OUT_LAYOUT": "mul_ir", "TRANSPOSED": transposed, "EVEN_K": True, "EVEN_N": True}
            constants |= dict(tile.block)
            name = f"species_linear_fwd {mode}{' transposed' if transposed else ''}"
            launch = (constants, tile.num_warps, tile.num_stages, known)
            signature |= {"n_nodes": "i32", "extra": "i32"}
            cases.append(Case(name, "species_linear", "species_linear_fwd_kernel", signature, *launch))
        tile = tiles.choose("species_linear_wgrad", arch=target, transposed=False, **call)
        signature = {"x_ptr": word, "g_ptr": word, "part_ptr": word} | shared | sizes
        constants = shape | {"G_LAYOUT": "mul_ir", "EVEN": True}
        constants |= {k: v for k, v in tile.block if k != "PARTS"}
        launch = (constants, tile.num_warps, tile.num_stages, tuple(signature))
        signature |= {"size": "i32"}
        name = f"species_linear_wgrad {mode}"
        cases.append(Case(name, "species_linear", "species_linear_wgrad_kernel", signature, *launch))
    return cases
