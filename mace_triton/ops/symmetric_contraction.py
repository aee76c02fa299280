"""The symmetric contraction as torch custom ops: coefficients, forward, gradients of x and of the weights, double
backward.

The polynomial is evaluated with coefficients, `combine(weights)`, but derivatives are those of the weights: to autograd
the coefficients are constants that lie beside them.

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
"""dtype of the features x -> dtype of the weights, the coefficients and the sums."""


def _kernels():
    from ..kernels import symmetric_contraction

    return symmetric_contraction


@torch.library.custom_op("mace_triton::symmetric_contraction_combine", mutates_args=())
def _combine(weights: Tensor, ptr: Tensor | None, problem: str) -> Tensor:
    spec, which = SymmetricContractionProblem.from_key(problem), dispatch.backend(weights)
    dispatch.count("symmetric_contraction_combine", which)
    if which == "reference":
        return reference.combine(spec, weights)
    return _kernels().combine(spec, weights.contiguous(), ptr)


@_combine.register_fake
def _(weights, ptr, problem):
    spec = SymmetricContractionProblem.from_key(problem)
    return weights.new_empty(weights.shape[0], spec.rows, spec.channels, PACK)


@torch.library.custom_op("mace_triton::symmetric_contraction", mutates_args=())
def _fwd(
    x: Tensor, weights: Tensor | None, coef: Tensor, species: Tensor, perm: Tensor, ptr: Tensor, problem: str
) -> Tensor:
    spec, which = SymmetricContractionProblem.from_key(problem), dispatch.backend(x)
    dispatch.count("symmetric_contraction_fwd", which)
    if which == "reference":
        return reference.symmetric_contraction_fwd(spec, x.to(coef.dtype), coef, species).to(x.dtype)
    return _kernels().forward(spec, x.contiguous(), coef.contiguous(), SpeciesPlan(species, perm, ptr))


@_fwd.register_fake
def _(x, weights, coef, species, perm, ptr, problem):
    return x.new_empty(x.shape[0], SymmetricContractionProblem.from_key(problem).dim_out, x.shape[2])


@torch.library.custom_op("mace_triton::symmetric_contraction_bwd", mutates_args=())
def _bwd(
    g: Tensor,
    x: Tensor,
    weights: Tensor | None,
    coef: Tensor,
    species: Tensor,
    perm: Tensor,
    ptr: Tensor,
    problem: str,
    wrt_x: bool,
    wrt_weights: bool,
) -> tuple[Tensor, Tensor]:
    spec, which = SymmetricContractionProblem.from_key(problem), dispatch.backend(x)
    dispatch.count("symmetric_contraction_bwd", which)
    none_x, none_weights = x.new_empty(0), coef.new_empty(0)
    if which == "reference":
        wide = (t.to(coef.dtype) for t in (g, x))
        gx, gweights = reference.symmetric_contraction_bwd(spec, *wide, coef, species)
        return gx.to(x.dtype) if wrt_x else none_x, gweights if wrt_weights else none_weights
    g, x, coef, plan = g.contiguous(), x.contiguous(), coef.contiguous(), SpeciesPlan(species, perm, ptr)
    gx = _kernels().grad_x(spec, g, x, coef, plan) if wrt_x else none_x
    return gx, _kernels().grad_weights(spec, g, x, plan, coef.dtype) if wrt_weights else none_weights


@_bwd.register_fake
def _(g, x, weights, coef, species, perm, ptr, problem, wrt_x, wrt_weights):
    return x.new_empty(x.shape if wrt_x else 0), coef.new_empty(weights.shape if wrt_weights else 0)


@torch.library.custom_op("mace_triton::symmetric_contraction_bwd_bwd", mutates_args=())
def _bwd_bwd(
    g: Tensor,
    x: Tensor,
    weights: Tensor | None,
    coef: Tensor,
    a: Tensor,
    q: Tensor | None,
    species: Tensor,
    perm: Tensor,
    ptr: Tensor,
    problem: str,
    wrt_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    spec, which = SymmetricContractionProblem.from_key(problem), dispatch.backend(x)
    dispatch.count("symmetric_contraction_bwd_bwd", which)
    none_weights = coef.new_empty(0)
    if which == "reference":
        wide = [t.to(coef.dtype) for t in (g, x)]
        dg, dx, dweights = reference.symmetric_contraction_bwd_bwd(spec, *wide, coef, a.to(coef.dtype), q, species)
        return dg.to(g.dtype), dx.to(x.dtype), dweights if wrt_weights else none_weights
    g, x, coef, a = (t.contiguous() for t in (g, x, coef, a))
    plan, kernels = SpeciesPlan(species, perm, ptr), _kernels()
    q = None if q is None else kernels.combine(spec, q.contiguous(), ptr)
    dg = kernels.forward(spec, x, coef, plan, a, q)
    dx = kernels.grad_x(spec, g, x, coef, plan, a, q)
    return dg, dx, kernels.grad_weights(spec, g, x, plan, coef.dtype, a) if wrt_weights else none_weights


@_bwd_bwd.register_fake
def _(g, x, weights, coef, a, q, species, perm, ptr, problem, wrt_weights):
    return g.new_empty(g.shape), x.new_empty(x.shape), coef.new_empty(weights.shape if wrt_weights else 0)


def _setup_fwd(ctx, inputs, output):
    *tensors, ctx.problem = inputs
    ctx.save_for_backward(*tensors)


def _fwd_backward(ctx, g):
    wrt_x, wrt_weights = ctx.needs_input_grad[0], dispatch.wanted(ctx, 1)
    gx, gweights = _bwd(g, *ctx.saved_tensors, ctx.problem, wrt_x, wrt_weights)
    return gx if wrt_x else None, gweights if wrt_weights else None, *(None,) * 5


def _setup_bwd(ctx, inputs, output):
    *tensors, ctx.problem, ctx.wrt_x, ctx.wrt_weights = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)  # force training never uses gweights: no tangent is cheaper than a zero one


def _bwd_backward(ctx, a, q):
    g, x, weights, coef, *plan = ctx.saved_tensors
    a = a if ctx.wrt_x and a is not None else torch.zeros_like(x)
    q = q if ctx.wrt_weights else None
    wrt_weights = dispatch.wanted(ctx, 2)
    dg, dx, dweights = _bwd_bwd(g, x, weights, coef, a, q, *plan, ctx.problem, wrt_weights)
    return dg, dx, dweights if wrt_weights else None, *(None,) * 7


_fwd.register_autograd(_fwd_backward, setup_context=_setup_fwd)
_bwd.register_autograd(_bwd_backward, setup_context=_setup_bwd)


def _check_table(name: str, table: Tensor, wanted: list[int], x: Tensor) -> None:
    if list(table.shape) != wanted:
        raise ValueError(f"{name} must have shape {wanted} for this problem and plan, got {list(table.shape)}")
    if table.device != x.device:
        raise ValueError(f"{name} is on {table.device}, x on {x.device}: move them together")
    if table.dtype != STORAGE[x.dtype]:
        raise TypeError(f"{name} must be {STORAGE[x.dtype]} when x is {x.dtype}, got {table.dtype}")


def combine(problem: SymmetricContractionProblem, weights: Tensor, plan: SpeciesPlan | None = None) -> Tensor:
    """The coefficients [Z, problem.rows, C, PACK] of the terms for weights [Z, problem.paths, C], without gradient.

    plan: only the coefficients of species that have nodes there are made, the others' are arbitrary.

    Raises ValueError (shape) naming the argument.
    """
    count = weights.shape[0] if plan is None else plan.count
    wanted = [count, problem.paths, problem.channels]
    if list(weights.shape) != wanted:
        raise ValueError(f"weights must have shape {wanted} for this problem, got {list(weights.shape)}")
    return _combine(weights.detach(), None if plan is None else plan.ptr, problem.key)


def symmetric_contraction(
    problem: SymmetricContractionProblem,
    x: Tensor,
    weights: Tensor | None,
    plan: SpeciesPlan,
    coef: Tensor | None = None,
) -> Tensor:
    """out[n, m, c] = sum over the terms of m of coef[species of n, term, c] times the term's product of x[n, :, c].

    x: [N, problem.dim_in, C] features, components before channels; weights: [Z, problem.paths, C], float32 beside
    16-bit features, else x's dtype; plan: from `species_plan`; coef: `combine(problem, weights)`, where the caller
    keeps it. Without weights, coef alone is needed, and gradients reach x only. Returns [N, problem.dim_out, C] in x's
    dtype; sums run in the weights' dtype. Differentiable twice in x and weights. The formula is MACE's
    SymmetricContraction (Batatia et al. 2022, eqs. 10 and 11) with the entries of U merged into `problem.table`.

    Raises ValueError (shape, device, neither weights nor coef) or TypeError (dtype) naming the argument.
    """
    if x.ndim != 3 or x.shape[1:] != (problem.dim_in, problem.channels):
        raise ValueError(f"x must have shape [N, {problem.dim_in}, {problem.channels}], got {list(x.shape)}")
    if weights is None and coef is None:
        raise ValueError("weights: give them, or coef")
    check_plan(plan, x)
    if x.dtype not in STORAGE:
        raise TypeError(f"x must be float64, float32, bfloat16 or float16, got {x.dtype}")
    if weights is not None:
        _check_table("weights", weights, [plan.count, problem.paths, problem.channels], x)
    if coef is None:
        coef = combine(problem, weights, plan)
    else:
        _check_table("coef", coef, [plan.count, problem.rows, problem.channels, PACK], x)
    return _fwd(x, weights, coef, *plan, problem.key)
