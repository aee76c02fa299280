"""MACE's symmetric contraction: a polynomial of degree up to 4 in the components of each channel, for each node.

    out[n, m, c] = sum_t coef[z_n, t, c] prod_{i in t} x[n, i, c]            over the terms t of output component m
    coef[z, t, c] = sum_k table[t, k] weights[z, k, c]                       (`combine`)

Terms that share a prefix p (all factors but the last) are summed first, so that a term costs one multiply-add:

    out_m += p (c_p + sum_k c_pk x_k)

Backward, with a_k = sum_m g_m c_mpk:   gx_k += a_k p,   gx_i += (c_p g + sum_k a_k x_k) (p without x_i).
Gradient of the weights: the sum over the nodes of a species of  sum_p p (sum of table factors times g_m x_k). The
nodes, sorted by species, are cut into tiles; each keeps its sums in registers, one a path, and writes them once, and a
second kernel adds the tiles of a species in a fixed order. No atomics anywhere: the same bits on every run.

Double backward. For cotangents (a, q) of (gx, gweights), <a, gx> + <q, gweights> is the derivative of sum g out along
(a, q). So the same three kernels run on pairs (value, derivative), with a as the derivative of x and `combine(q)` as
that of the coefficients.

Programs of species without nodes end at once, so that only the species present cost time. The polynomials are unrolled
when the source is generated (`symmetric_contraction_source.py`).
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch
import triton
import triton.language as tl

from . import segments, tiles
from . import symmetric_contraction_source as source
from .generated import kernel_of

PACK = tl.constexpr(source.PACK)


@triton.jit
def symmetric_contraction_combine_kernel(
    weights_ptr,
    offset_ptr,
    stride_ptr,
    factor_ptr,
    ptr_ptr,
    coef_ptr,
    width,
    longest,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """coef[z, t, c] = sum over i of factor[t, i] weights[offset[t, i] + z stride[t, i] + c], in the order
    [row, C, PACK] of one species.

    A row of the table has `longest` entries, filled up with zeros. Nothing is written for species without nodes.
    """
    z = tl.program_id(1)
    if tl.load(ptr_ptr + z) == tl.load(ptr_ptr + z + 1):
        return
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < width
    term, channel = place // (C * PACK) * PACK + place % PACK, place // PACK % C
    total = tl.zeros([BLOCK], weights_ptr.dtype.element_ty)
    for i in range(longest):
        entry = term * longest + i
        offset = tl.load(offset_ptr + entry, mask=mask, other=0)
        offset += z.to(tl.int64) * tl.load(stride_ptr + entry, mask=mask, other=0) + channel
        factor = tl.load(factor_ptr + entry, mask=mask, other=0.0)
        total += factor * tl.load(weights_ptr + offset, mask=mask, other=0.0)
    tl.store(coef_ptr + z.to(tl.int64) * width + place, total, mask=mask)


@cache
def _kernel(write, problem, *how):
    return kernel_of("symmetric_contraction", write(problem, *how))


@cache
def _weights_kernels(problem, ptx: bool, registers: int, tangent: bool, products: bool) -> list:
    """The kernels of every part of the weights' gradient."""
    parts = source.parts(problem, registers, products)
    return [_kernel(source.weights_source, problem, ptx, part, tangent, products) for part in parts]


@lru_cache(maxsize=256)
def _table(problem, pieces: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device):
    """(offset, stride, factor) [rows * PACK, longest] of every term, filled up with zeros.

    pieces: how many elements behind the first tensor of weights each one starts, and its paths.
    """
    channels, longest = problem.channels, max(map(len, problem.table), default=1) or 1
    places = [(start + k * channels, paths * channels) for start, paths in pieces for k in range(paths)] or [(0, 0)]
    rows = [*problem.table, *((),) * (problem.rows * source.PACK - len(problem.table))]
    filled = [[(*places[k], factor) for k, factor in (*row, *((0, 0.0),) * (longest - len(row)))] for row in rows]
    columns = zip((0, 1, 2), (torch.int64, torch.int32, dtype), strict=True)
    return tuple(torch.tensor([[e[i] for e in row] for row in filled], dtype=t, device=device) for i, t in columns)


def combine(problem, weights: list[torch.Tensor], ptr: torch.Tensor | None) -> torch.Tensor:
    """The coefficients [Z, rows, C, PACK] for weights [Z, paths, C], given in pieces along the paths, contiguous.

    Those of species that have no node by `ptr` [Z + 1] stay unwritten: nobody reads them. ptr None: all are made.
    """
    base = weights[0]
    shape = (base.shape[0], problem.rows, problem.channels, source.PACK)
    out = torch.empty(shape, dtype=base.dtype, device=base.device)
    width = out.shape[1:].numel()
    if out.numel() == 0:
        return out
    if ptr is None:
        ptr = torch.arange(shape[0] + 1, dtype=torch.int32, device=base.device)  # as if each had a node
    pieces = tuple(((w.data_ptr() - base.data_ptr()) // base.element_size(), w.shape[1]) for w in weights)
    offset, stride, factor = _table(problem, pieces, base.dtype, base.device)
    tile = tiles.choose("symmetric_contraction_combine", dtype=tiles.TAGS[base.dtype])
    with torch.cuda.device_of(base):  # Triton launches on the current device
        symmetric_contraction_combine_kernel[(triton.cdiv(width, tile["BLOCK"]), shape[0])](
            *(base, offset, stride, factor, ptr, out, width, offset.shape[1]),
            C=problem.channels,
            BLOCK=tile["BLOCK"],
            num_warps=tile.num_warps,
        )
    return out


def _ptx(x: torch.Tensor) -> bool:
    """Whether a kernel on x may hold PTX."""
    return x.is_cuda and torch.version.hip is None


def _launch(kernel, tile: tiles.Tile, programs: int, channels: int, *arguments, acc: torch.dtype) -> None:
    """arguments: the tensors, the last one being the first node of each species, and the tile's size where asked."""
    tensors = [t for t in arguments if isinstance(t, torch.Tensor)]
    double, species = acc == torch.float64, tensors[-1].shape[0] - 1
    with torch.cuda.device_of(tensors[0]):
        kernel[(programs, triton.cdiv(channels, tile["BLOCK_C"]))](
            *arguments,
            C=channels,
            Z=species,
            ZW=triton.next_power_of_2(species),
            NODES=tile["NODES"],
            BLOCK_C=tile["BLOCK_C"],
            ACC=tl.float64 if double else tl.float32,
            INT=tl.int64 if double else tl.int32,
            num_warps=tile.num_warps,
        )


def _run_map(problem, op: str, write, inputs: tuple[torch.Tensor, ...], x, coef, a, q, plan, dim: int) -> torch.Tensor:
    """The forward or the gradient of x, or its derivative along a (and q) where a is given."""
    nodes = x.shape[0]
    out = torch.empty((nodes, dim, problem.channels), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    op += "" if a is None else "_tangent"
    call = {"dtype": tiles.TAGS[x.dtype], "terms": len(problem.terms), "nodes": nodes, "channels": problem.channels}
    tile = tiles.choose(op, **call)
    kernel = _kernel(write, problem, _ptx(x), a is not None, q is not None)
    tangents = [t for t in (a, q) if t is not None]
    tensors = (*inputs, x, coef, *tangents, out, plan.perm, plan.ptr)
    programs = segments.count_tiles(nodes, tile["NODES"], plan.ptr)
    _launch(kernel, tile, programs, problem.channels, *tensors, acc=coef.dtype)
    return out


def forward(problem, x: torch.Tensor, coef: torch.Tensor, plan, a=None, q=None) -> torch.Tensor:
    """x [N, dim_in, C], coef [Z, rows, C, PACK] -> [N, dim_out, C].

    a, q: tangents of x and coef; then the result is the derivative along them (q may be None for zero).
    """
    write = source.forward_source
    return _run_map(problem, "symmetric_contraction_fwd", write, (), x, coef, a, q, plan, problem.dim_out)


def grad_x(problem, g: torch.Tensor, x: torch.Tensor, coef: torch.Tensor, plan, a=None, q=None) -> torch.Tensor:
    """The gradient of x [N, dim_in, C] for the output gradient g; or its derivative along (a, q)."""
    write = source.backward_source
    return _run_map(problem, "symmetric_contraction_bwd", write, (g,), x, coef, a, q, plan, problem.dim_in)


def grad_weights(problem, g: torch.Tensor, x: torch.Tensor, plan, dtype: torch.dtype, a=None) -> torch.Tensor:
    """The gradient [Z, paths, C] of the weights, of `dtype`; or its derivative along a."""
    nodes, species, channels = x.shape[0], plan.ptr.shape[0] - 1, problem.channels
    shape = (species, problem.paths, channels)
    if nodes == 0 or problem.paths == 0:
        return torch.zeros(shape, dtype=dtype, device=x.device)
    op = "symmetric_contraction_weights" + ("" if a is None else "_tangent")
    tile = tiles.choose(op, dtype=tiles.TAGS[x.dtype], terms=len(problem.terms), nodes=nodes, channels=channels)
    size = max(2, triton.cdiv(nodes, tile["PARTS"]))
    count = segments.count_tiles(nodes, size, plan.ptr)
    partial = torch.empty((count, problem.paths, channels), dtype=dtype, device=x.device)
    tensors = (g, x, *(() if a is None else (a,)), partial, plan.perm, plan.ptr)
    for kernel in _weights_kernels(problem, _ptx(x), tile["REGISTERS"], a is not None, bool(tile["PRODUCTS"])):
        _launch(kernel, tile, count, channels, *tensors, size, acc=dtype)
    return segments.sum_tiles(partial, plan.ptr, size)


def offline_cases(problem, target: str = "sm_90", dtypes: tuple[str, ...] = ("fp64", "fp32"), species: int = 89):
    """The kernels of `problem` with the tiles in use, for `offline.compile_cases`; a case's module is a generated file.

    Left out: derivatives along tangents of the coefficients, which no training step asks for.
    """
    cases, ptx = [], target.startswith("sm_")
    for dtype in dtypes:
        call = {"dtype": dtype, "terms": len(problem.terms), "nodes": 1536, "channels": problem.channels}
        call["arch"] = target
        for tangent in (False, True):
            word = "_tangent" if tangent else ""
            for op, write in (("fwd", source.forward_source), ("bwd", source.backward_source)):
                tile = tiles.choose(f"symmetric_contraction_{op}{word}", **call)
                kernel = _kernel(write, problem, ptx, tangent)
                cases.append(_offline_case(kernel.fn, "", tile, problem, dtype, species))
            tile = tiles.choose(f"symmetric_contraction_weights{word}", **call)
            kernels = _weights_kernels(problem, ptx, tile["REGISTERS"], tangent, bool(tile["PRODUCTS"]))
            for number, kernel in enumerate(kernels):
                part = f" {number + 1}/{len(kernels)}"
                cases.append(_offline_case(kernel.fn, part, tile, problem, dtype, species))
        cases += _plain_cases(problem, target, dtype)
    return cases


def _offline_case(function, part: str, tile: tiles.Tile, problem, dtype: str, species: int):
    """The specialisation of one generated kernel that a launch with `tile` compiles."""
    import inspect

    from .offline import Case

    plan, names = ("perm_ptr", "ptr_ptr"), inspect.signature(function).parameters
    signature = {name: "*i32" if name in plan else f"*{dtype}" for name in names if name.endswith("_ptr")}
    signature |= {"size": "i32"} if "size" in names else {}
    double = dtype == "fp64"
    constants = {"C": problem.channels, "Z": species, "ZW": triton.next_power_of_2(species)}
    constants |= {"NODES": tile["NODES"], "BLOCK_C": tile["BLOCK_C"]}
    constants |= {"ACC": tl.float64 if double else tl.float32, "INT": tl.int64 if double else tl.int32}
    name = f"{function.__name__.removesuffix('_kernel')} {dtype}{part}"
    launch = (constants, tile.num_warps, tile.num_stages, plan)
    return Case(name, inspect.getfile(function), function.__name__, signature, *launch)


def _plain_cases(problem, target: str, dtype: str) -> list:
    """The kernels that are not generated: what is before the polynomials and what is after them."""
    from .offline import Case

    signature = {f"{name}_ptr": f"*{dtype}" for name in ("factor", "weights", "coef")}
    signature |= {"offset_ptr": "*i64", "stride_ptr": "*i32", "ptr_ptr": "*i32", "width": "i32", "longest": "i32"}
    tile = tiles.choose("symmetric_contraction_combine", dtype=dtype, arch=target)
    divisible = tuple(name for name, kind in signature.items() if kind.startswith("*"))
    launch = (dict(tile.block) | {"C": problem.channels}, tile.num_warps, tile.num_stages, divisible)
    name = "symmetric_contraction_combine"
    combine = Case(f"{name} {dtype}", "symmetric_contraction", f"{name}_kernel", signature, *launch)
    return [combine, *segments.offline_cases(target, (dtype,))]
