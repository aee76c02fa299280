"""MACE's symmetric contraction: a polynomial of degree up to 4 in the components of each channel, for each node.

    out[n, m, c] = sum_t coef[z_n, t, c] prod_{i in t} x[n, i, c]            over the terms t of output component m

Terms that share a prefix p (all factors but the last) are summed first, so that a term costs one multiply-add:

    out_m += p (c_p + sum_k c_pk x_k)

Backward, with a_k = sum_m g_m c_mpk:   gx_k += a_k p,   gx_i += (c_p g + sum_k a_k x_k) (p without x_i).
Gradient of the coefficients: sum over the nodes of a species of g_m times the monomial. The nodes, sorted by species,
are cut into tiles; each tile keeps its sums in registers, writes them once, and a second kernel adds the tiles of a
species in their order. No atomics anywhere: the same bits on every run.

Double backward. For cotangents (a, q) of (gx, gcoef), <a, gx> + <q, gcoef> is the derivative of sum g out along (a, q).
So the same three kernels run on pairs (value, derivative), with a and q as the derivatives of x and coef.

The polynomials are unrolled when the source is generated (`symmetric_contraction_source.py`).
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from . import symmetric_contraction_source as source
from . import tiles
from .generated import kernel_of
from .segments import cut, sum_tiles


@cache
def _kernel(write, problem, *how):
    return kernel_of("symmetric_contraction", write(problem, *how))


@cache
def _coef_kernels(problem, terms: int, tangent: bool) -> list:
    """The kernels of every part of the coefficients' gradient, at most `terms` terms each."""
    return [_kernel(source.coef_source, problem, part, tangent) for part in source.parts(problem, terms)]


def _launch(kernel, tile: tiles.Tile, programs: int, channels: int, *tensors: torch.Tensor, acc: torch.dtype) -> None:
    double, x = acc == torch.float64, tensors[0]
    with torch.cuda.device_of(x):  # Triton launches on the current device
        kernel[(programs, triton.cdiv(channels, tile["BLOCK_C"]))](
            *tensors,
            C=channels,
            BLOCK_C=tile["BLOCK_C"],
            ACC=tl.float64 if double else tl.float32,
            INT=tl.int64 if double else tl.int32,
            num_warps=tile.num_warps,
        )


def _run_map(problem, op: str, write, inputs: tuple[torch.Tensor, ...], x, coef, a, q, plan, dim: int) -> torch.Tensor:
    """One program a node: the forward or the gradient of x, or its derivative along (a, q) where a is given."""
    out = torch.empty((x.shape[0], dim, problem.channels), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    tile = tiles.choose(op, dtype=tiles.TAGS[x.dtype], terms=len(problem.terms), nodes=x.shape[0])
    ptx = x.is_cuda and torch.version.hip is None
    kernel = _kernel(write, problem, ptx, a is not None, q is not None)
    tangents = [t for t in (a, q) if t is not None]
    tensors = (*inputs, x, coef, *tangents, out, plan.species, plan.perm)
    _launch(kernel, tile, x.shape[0], problem.channels, *tensors, acc=coef.dtype)
    return out


def forward(problem, x: torch.Tensor, coef: torch.Tensor, plan, a=None, q=None) -> torch.Tensor:
    """x [N, dim_in, C], coef [Z, rows, C, PACK] -> [N, dim_out, C]; or its derivative along (a, q)."""
    write = source.forward_source
    return _run_map(problem, "symmetric_contraction_fwd", write, (), x, coef, a, q, plan, problem.dim_out)


def grad_x(problem, g: torch.Tensor, x: torch.Tensor, coef: torch.Tensor, plan, a=None, q=None) -> torch.Tensor:
    """The gradient of x [N, dim_in, C] for the output gradient g; or its derivative along (a, q)."""
    write = source.backward_source
    return _run_map(problem, "symmetric_contraction_bwd", write, (g,), x, coef, a, q, plan, problem.dim_in)


def grad_coef(problem, g: torch.Tensor, x: torch.Tensor, plan, dtype: torch.dtype, a=None) -> torch.Tensor:
    """The gradient [Z, rows, C, PACK] of the coefficients, of `dtype`; or its derivative along a."""
    nodes, species, width = x.shape[0], plan.ptr.shape[0] - 1, problem.rows * source.PACK
    if nodes == 0 or not problem.terms:
        return torch.zeros((species, problem.rows, problem.channels, source.PACK), dtype=dtype, device=x.device)
    tile = tiles.choose("symmetric_contraction_coef", dtype=tiles.TAGS[x.dtype], terms=len(problem.terms), nodes=nodes)
    bounds, first = cut(plan.ptr, nodes, tile["PARTS"], 8)
    count = bounds.shape[0] - 1
    partial = torch.empty((count, width * problem.channels), dtype=dtype, device=x.device)
    for kernel in _coef_kernels(problem, tile["TERMS"], a is not None):
        tensors = (g, x, *(() if a is None else (a,)), partial, plan.perm, bounds)
        _launch(kernel, tile, count, problem.channels, *tensors, acc=dtype)
    total = sum_tiles(partial, first).view(species, width, problem.channels)
    total[:, len(problem.terms) :] = 0
    return total.view(species, problem.rows, source.PACK, problem.channels).transpose(2, 3)


def offline_cases(problem, target: str = "sm_90", dtypes: tuple[str, ...] = ("fp64", "fp32")) -> list:
    """The kernels of `problem` with the tiles in use, for `offline.compile_cases`; a case's module is a generated file.

    Left out: derivatives along tangents of the coefficients, which no training step asks for.
    """
    cases, ptx = [], target.startswith("sm_")
    for dtype in dtypes:
        call = {"dtype": dtype, "terms": len(problem.terms), "nodes": 1536, "arch": target}
        for op, write in (("fwd", source.forward_source), ("bwd", source.backward_source)):
            tile = tiles.choose(f"symmetric_contraction_{op}", **call)
            for tangent in (False, True):
                kernel = _kernel(write, problem, ptx, tangent)
                cases.append(_offline_case(kernel.fn, "", tile, problem, dtype))
        tile = tiles.choose("symmetric_contraction_coef", **call)
        for tangent in (False, True):
            kernels = _coef_kernels(problem, tile["TERMS"], tangent)
            for number, kernel in enumerate(kernels):
                part = f" {number + 1}/{len(kernels)}"
                cases.append(_offline_case(kernel.fn, part, tile, problem, dtype))
    return cases


def _offline_case(function, part: str, tile: tiles.Tile, problem, dtype: str):
    """The specialisation of one generated kernel that a launch with `tile` compiles."""
    import inspect

    from .offline import Case

    plan = ("species_ptr", "perm_ptr", "tile_ptr")
    pointers = [name for name in inspect.signature(function).parameters if name.endswith("_ptr")]
    signature = {name: "*i32" if name in plan else f"*{dtype}" for name in pointers}
    double = dtype == "fp64"
    types = {"ACC": tl.float64 if double else tl.float32, "INT": tl.int64 if double else tl.int32}
    constants = {"C": problem.channels, "BLOCK_C": tile["BLOCK_C"]} | types
    name = f"{function.__name__.removesuffix('_kernel')} {dtype}{part}"
    known = tuple(name for name in pointers if name in plan)
    launch = (constants, tile.num_warps, tile.num_stages, known)
    return Case(name, inspect.getfile(function), function.__name__, signature, *launch)
