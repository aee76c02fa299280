"""The symmetric contraction as torch custom ops: forward, gradients of x and of the coefficients, double backward.

GPU tensors (and, under Triton's interpreter, CPU tensors) run `kernels/symmetric_contraction.py`, others
`reference_symmetric_contraction.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference_symmetric_contraction as reference
from ..symmetric_contraction_problem import PACK, SymmetricContractionProblem
from . import dispatch
from .species import SpeciesPlan, check_plan

STORAGE = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
"""dtype of the features x -> dtype of the coefficients and of the sums."""


def _kernels():
    from ..kernels import symmetric_contraction

    return symmetric_contraction


@torch.library.custom_op("mace_triton::symmetric_contraction", mutates_args=())
def _fwd(x: Tensor, coef: Tensor, species: Tensor, perm: Tensor, ptr: Tensor, problem: str) -> Tensor:
    spec, which = SymmetricContractionProblem.from_key(problem), dispatch.backend(x)
    dispatch.count("symmetric_contraction_fwd", which)
    if which == "reference":
        return reference.symmetric_contraction_fwd(spec, x.to(coef.dtype), coef, species).to(x.dtype)
    return _kernels().forward(spec, x.contiguous(), coef.contiguous(), SpeciesPlan(species, perm, ptr))


@_fwd.register_fake
def _(x, coef, species, perm, ptr, problem):
    return x.new_empty(x.shape[0], SymmetricContractionProblem.from_key(problem).dim_out, x.shape[2])


@torch.library.custom_op("mace_triton::symmetric_contraction_bwd", mutates_args=())
def _bwd(
    g: Tensor,
    x: Tensor,
    coef: Tensor,
    species: Tensor,
    perm: Tensor,
    ptr: Tensor,
    problem: str,
    wrt_x: bool,
    wrt_coef: bool,
) -> tuple[Tensor, Tensor]:
    spec, which = SymmetricContractionProblem.from_key(problem), dispatch.backend(x)
    dispatch.count("symmetric_contraction_bwd", which)
    none_x, none_coef = x.new_empty(0), coef.new_empty(0)
    if which == "reference":
        wide = (t.to(coef.dtype) for t in (g, x))
        gx, gcoef = reference.symmetric_contraction_bwd(spec, *wide, coef, species)
        return gx.to(x.dtype) if wrt_x else none_x, gcoef if wrt_coef else none_coef
    g, x, coef, plan = g.contiguous(), x.contiguous(), coef.contiguous(), SpeciesPlan(species, perm, ptr)
    gx = _kernels().grad_x(spec, g, x, coef, plan) if wrt_x else none_x
    return gx, _kernels().grad_coef(spec, g, x, plan, coef.dtype) if wrt_coef else none_coef


@_bwd.register_fake
def _(g, x, coef, species, perm, ptr, problem, wrt_x, wrt_coef):
    return x.new_empty(x.shape if wrt_x else 0), _coef_like(coef) if wrt_coef else coef.new_empty(0)


def _coef_like(coef: Tensor) -> Tensor:
    # The kernels make [Z, rows, PACK, C] and show it as [Z, rows, C, PACK].
    z, rows, channels, pack = coef.shape
    return coef.new_empty(z, rows, pack, channels).transpose(2, 3)


@torch.library.custom_op("mace_triton::symmetric_contraction_bwd_bwd", mutates_args=())
def _bwd_bwd(
    g: Tensor,
    x: Tensor,
    coef: Tensor,
    a: Tensor,
    q: Tensor | None,
    species: Tensor,
    perm: Tensor,
    ptr: Tensor,
    problem: str,
    wrt_coef: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    spec, which = SymmetricContractionProblem.from_key(problem), dispatch.backend(x)
    dispatch.count("symmetric_contraction_bwd_bwd", which)
    none_coef = coef.new_empty(0)
    if which == "reference":
        wide = [t.to(coef.dtype) for t in (g, x)]
        dg, dx, dcoef = reference.symmetric_contraction_bwd_bwd(spec, *wide, coef, a.to(coef.dtype), q, species)
        return dg.to(g.dtype), dx.to(x.dtype), dcoef if wrt_coef else none_coef
    g, x, coef, a = (t.contiguous() for t in (g, x, coef, a))
    q, plan = None if q is None else q.contiguous(), SpeciesPlan(species, perm, ptr)
    dg = _kernels().forward(spec, x, coef, plan, a, q)
    dx = _kernels().grad_x(spec, g, x, coef, plan, a, q)
    return dg, dx, _kernels().grad_coef(spec, g, x, plan, coef.dtype, a) if wrt_coef else none_coef


@_bwd_bwd.register_fake
def _(g, x, coef, a, q, species, perm, ptr, problem, wrt_coef):
    return g.new_empty(g.shape), x.new_empty(x.shape), _coef_like(coef) if wrt_coef else coef.new_empty(0)


def _setup_fwd(ctx, inputs, output):
    *tensors, ctx.problem = inputs
    ctx.save_for_backward(*tensors)


def _fwd_backward(ctx, g):
    x, coef, *plan = ctx.saved_tensors
    wrt_x, wrt_coef = ctx.needs_input_grad[:2]
    gx, gcoef = _bwd(g, x, coef, *plan, ctx.problem, wrt_x, wrt_coef)
    return gx if wrt_x else None, gcoef if wrt_coef else None, *(None,) * 4


def _setup_bwd(ctx, inputs, output):
    *tensors, ctx.problem, ctx.wrt_x, ctx.wrt_coef = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)  # force training never uses gcoef: no tangent of coef is cheaper than a zero one


def _bwd_backward(ctx, a, q):
    g, x, coef, *plan = ctx.saved_tensors
    a = a if ctx.wrt_x and a is not None else torch.zeros_like(x)
    q = q if ctx.wrt_coef else None
    wrt_coef = ctx.needs_input_grad[2]
    dg, dx, dcoef = _bwd_bwd(g, x, coef, a, q, *plan, ctx.problem, wrt_coef)
    return dg, dx, dcoef if wrt_coef else None, *(None,) * 6


_fwd.register_autograd(_fwd_backward, setup_context=_setup_fwd)
_bwd.register_autograd(_bwd_backward, setup_context=_setup_bwd)


def _check(problem: SymmetricContractionProblem, x: Tensor, coef: Tensor, plan: SpeciesPlan) -> None:
    if x.ndim != 3 or x.shape[1:] != (problem.dim_in, problem.channels):
        raise ValueError(f"x must have shape [N, {problem.dim_in}, {problem.channels}], got {list(x.shape)}")
    wanted = [plan.count, problem.rows, problem.channels, PACK]
    if list(coef.shape) != wanted:
        raise ValueError(f"coef must have shape {wanted} for this problem and plan, got {list(coef.shape)}")
    if coef.device != x.device:
        raise ValueError(f"coef is on {coef.device}, x on {x.device}: move them together")
    check_plan(plan, x)
    if x.dtype not in STORAGE:
        raise TypeError(f"x must be float64, float32, bfloat16 or float16, got {x.dtype}")
    if coef.dtype != STORAGE[x.dtype]:
        raise TypeError(f"coef must be {STORAGE[x.dtype]} when x is {x.dtype}, got {coef.dtype}")


def symmetric_contraction(problem: SymmetricContractionProblem, x: Tensor, coef: Tensor, plan: SpeciesPlan) -> Tensor:
    """out[n, m, c] = sum over the terms of m of coef[species of n, term, c] times the term's product of x[n, :, c].

    x: [N, problem.dim_in, C] features, components before channels; coef: [Z, problem.rows, C, PACK], float32 beside
    16-bit features, else x's dtype; plan: from `species_plan`. Returns [N, problem.dim_out, C] in x's dtype; sums run
    in coef's dtype. Differentiable twice in x and coef. The formula is MACE's SymmetricContraction (Batatia et al.
    2022, eqs. 10 and 11) with U and W multiplied beforehand.

    Raises ValueError (shape, device) or TypeError (dtype) naming the argument.
    """
    _check(problem, x, coef, plan)
    return _fwd(x, coef, *plan, problem.key)
