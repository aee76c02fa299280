"""The symmetric contraction as torch custom ops: coefficients, forward, gradients of x and of the weights, double
backward.

The polynomial is evaluated with coefficients, `combine(weights)`, but derivatives are those of the weights: to autograd
the coefficients are constants that lie beside them.

GPU tensors (and, under Triton's interpreter, CPU tensors) run `kernels/symmetric_contraction.py`, others
`reference_symmetric_contraction.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

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
def _combine(weights: Sequence[Tensor], ptr: Tensor | None, problem: str) -> Tensor:
    spec, which = SymmetricContractionProblem.from_key(problem), dispatch.backend(weights[0])
    dispatch.count("symmetric_contraction_combine", which)
    if which == "reference":
        return reference.combine(spec, torch.cat(weights, dim=1))
    return _kernels().combine(spec, [w.contiguous() for w in weights], ptr)


@_combine.register_fake
def _(weights, ptr, problem):
    spec = SymmetricContractionProblem.from_key(problem)
    return weights[0].new_empty(weights[0].shape[0], spec.rows, spec.channels, PACK)


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
    q = None if q is None else kernels.combine(spec, [q.contiguous()], ptr)
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


def _check_like(name: str, table: Tensor, x: Tensor) -> None:
    if table.device != x.device:
        raise ValueError(f"{name} is on {table.device}, x on {x.device}: move them together")
    if table.dtype != STORAGE[x.dtype]:
        raise TypeError(f"{name} must be {STORAGE[x.dtype]} when x is {x.dtype}, got {table.dtype}")


@lru_cache(maxsize=16)
def _unknown(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((), torch.nan, dtype=dtype, device=device)


class _AsOne(torch.autograd.Function):
    """Pieces [Z, paths of the piece, C] of the weights as one tensor that a gradient can be asked of.

    It saves the copy: nothing of it is ever read, since the kernels take the coefficients. Its values are NaN.
    """

    @staticmethod
    def forward(ctx, *pieces):
        ctx.paths = [piece.shape[1] for piece in pieces]
        z, _, channels = pieces[0].shape
        return _unknown(pieces[0].dtype, pieces[0].device).expand(z, sum(ctx.paths), channels)

    @staticmethod
    def backward(ctx, g):
        return g.split(ctx.paths, dim=1)


def _as_one(pieces: list[Tensor]) -> Tensor:
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat(pieces, dim=1) if torch.compiler.is_compiling() else _AsOne.apply(*pieces)


def _pieces(
    problem: SymmetricContractionProblem, weights: Tensor | Sequence[Tensor], count: int | None
) -> list[Tensor]:
    """The weights [Z, paths, C] as a list of pieces; `count` is Z, where it is known."""
    pieces = [weights] if isinstance(weights, Tensor) else list(weights)
    shapes = [list(piece.shape) for piece in pieces]
    species = shapes[0][0] if count is None and shapes and shapes[0] else count
    wanted = [species, problem.paths, problem.channels]
    fits = all(len(shape) == 3 and [shape[0], shape[2]] == wanted[::2] for shape in shapes)
    if not fits or sum(shape[1] for shape in shapes) != problem.paths or not pieces:
        raise ValueError(f"weights must have shape {wanted} for this problem, got {' and '.join(map(str, shapes))}")
    for piece in pieces[1:]:
        _check_same(piece, pieces[0])
    return pieces


def _check_same(piece: Tensor, first: Tensor) -> None:
    if piece.device != first.device:
        raise ValueError(f"weights: pieces are on {first.device} and {piece.device}, move them together")
    if piece.dtype != first.dtype:
        raise TypeError(f"weights: pieces are {first.dtype} and {piece.dtype}, convert them to one")


def combine(
    problem: SymmetricContractionProblem, weights: Tensor | Sequence[Tensor], plan: SpeciesPlan | None = None
) -> Tensor:
    """The coefficients [Z, problem.rows, C, PACK] of the terms for weights [Z, problem.paths, C], without gradient.

    weights may come in pieces along the paths. plan: only the coefficients of species that have nodes there are made,
    the others' are arbitrary.

    Raises ValueError (shape, device) or TypeError (dtype) naming the argument.
    """
    pieces = _pieces(problem, weights, None if plan is None else plan.count)
    return _combine([piece.detach() for piece in pieces], None if plan is None else plan.ptr, problem.key)


def symmetric_contraction(
    problem: SymmetricContractionProblem,
    x: Tensor,
    weights: Tensor | Sequence[Tensor] | None,
    plan: SpeciesPlan,
    coef: Tensor | None = None,
) -> Tensor:
    """out[n, m, c] = sum over the terms of m of coef[species of n, term, c] times the term's product of x[n, :, c].

    x: [N, problem.dim_in, C] features, components before channels; weights: [Z, problem.paths, C], or pieces of it
    along the paths, float32 beside 16-bit features, else x's dtype; plan: from `species_plan`; coef:
    `combine(problem, weights)`, where the caller keeps it. Without weights, coef alone is needed, and gradients reach x
    only. Returns [N, problem.dim_out, C] in x's dtype; sums run in the weights' dtype. Differentiable twice in x and
    weights. The formula is MACE's SymmetricContraction (Batatia et al. 2022, eqs. 10 and 11) with the entries of U
    merged into `problem.table`.

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
        pieces = _pieces(problem, weights, plan.count)
        _check_like("weights", pieces[0], x)
        weights = _as_one(pieces)
    if coef is None:
        coef = _combine([piece.detach() for piece in pieces], plan.ptr, problem.key)
    else:
        wanted = [plan.count, problem.rows, problem.channels, PACK]
        if list(coef.shape) != wanted:
            raise ValueError(f"coef must have shape {wanted} for this problem and plan, got {list(coef.shape)}")
        _check_like("coef", coef, x)
    return _fwd(x, weights, coef, *plan, problem.key)
