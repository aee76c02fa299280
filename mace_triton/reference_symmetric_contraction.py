"""The symmetric contraction in plain PyTorch, with its first and second derivatives: the formula, and the CPU path.

Monomials are products of gathered components; a component that is always one stands in for missing factors.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, reduce

import torch

from .symmetric_contraction_problem import PACK, SymmetricContractionProblem

CHUNK = 2**22
"""Terms times channels times nodes that are held at once."""


@lru_cache(maxsize=64)  # thousands of terms, wanted in every step
def _index(problem: SymmetricContractionProblem, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(output component [T], input components [degree, T]) of every term; dim_in stands for a missing factor."""
    padded = [(*mono, *(problem.dim_in,) * (problem.degree - len(mono))) for _, mono in problem.terms]
    m = torch.tensor([m for m, _ in problem.terms], dtype=torch.long, device=device)
    return m, torch.tensor(padded, dtype=torch.long, device=device).reshape(len(m), problem.degree).T


def _chunks(problem: SymmetricContractionProblem, nodes: int) -> Iterator[slice]:
    step = max(1, CHUNK // max(1, len(problem.terms) * problem.channels))
    return (slice(start, start + step) for start in range(0, nodes, step))


@lru_cache(maxsize=64)
def _exact_table(problem: SymmetricContractionProblem) -> torch.Tensor:
    """[T, paths], float64."""
    table = torch.zeros(len(problem.terms), problem.paths, dtype=torch.float64)
    for t, row in enumerate(problem.table):
        for path, factor in row:
            table[t, path] = factor
    return table


def _table(problem: SymmetricContractionProblem, like: torch.Tensor) -> torch.Tensor:
    """[T, paths]."""
    return _exact_table(problem).to(like.device, like.dtype)


def combine(problem: SymmetricContractionProblem, weights: torch.Tensor) -> torch.Tensor:
    """The coefficients [Z, rows, C, PACK] for weights [Z, paths, C]."""
    return _pack(problem, _table(problem, weights) @ weights)


def _unpack(problem: SymmetricContractionProblem, coef: torch.Tensor) -> torch.Tensor:
    """[Z, rows, C, PACK] -> [Z, T, C]."""
    terms = coef.transpose(2, 3).reshape(coef.shape[0], problem.rows * PACK, problem.channels)
    return terms[:, : len(problem.terms)]


def _pack(problem: SymmetricContractionProblem, terms: torch.Tensor) -> torch.Tensor:
    """[Z, T, C] -> [Z, rows, C, PACK], zeros after the last term."""
    missing = problem.rows * PACK - terms.shape[1]
    padded = torch.nn.functional.pad(terms, (0, 0, 0, missing))
    return padded.reshape(terms.shape[0], problem.rows, PACK, problem.channels).transpose(2, 3).contiguous()


def _factors(x: torch.Tensor, index: torch.Tensor, missing: float) -> list[torch.Tensor]:
    """The components of each term, one [n, T, C] a factor; `missing` stands for factors a term does not have."""
    one = x.new_full((x.shape[0], 1, x.shape[2]), missing)
    padded = torch.cat((x, one), dim=1)
    return [padded[:, row] for row in index]


def _product(factors: list[torch.Tensor], *leave_out: int) -> torch.Tensor:
    """One after another: torch.prod divides for its derivatives, and its second ones cancel where a factor is small."""
    kept = [factor for i, factor in enumerate(factors) if i not in leave_out]
    return reduce(torch.mul, kept) if kept else torch.ones_like(factors[0])


def _derivative(factors: list[torch.Tensor], tangents: list[torch.Tensor], *leave_out: int) -> torch.Tensor:
    """Of the product of the factors that are not left out, along the tangents."""
    places = [i for i in range(len(factors)) if i not in leave_out]
    parts = [tangents[i] * _product(factors, *leave_out, i) for i in places]
    return torch.stack(parts).sum(dim=0) if parts else torch.zeros_like(factors[0])


def _scatter(index: torch.Tensor, rows: int, parts: list[torch.Tensor]) -> torch.Tensor:
    """Sum [n, T, C] of every factor into its component: [n, rows, C]."""
    n, _, c = parts[0].shape
    out = parts[0].new_zeros(n, rows + 1, c)
    for place, part in zip(index, parts, strict=True):
        out.index_add_(1, place, part)
    return out[:, :rows]


def symmetric_contraction_fwd(
    problem: SymmetricContractionProblem, x: torch.Tensor, coef: torch.Tensor, species: torch.Tensor
) -> torch.Tensor:
    """x [N, dim_in, C], coef [Z, rows, C, PACK], species [N] -> [N, dim_out, C]."""
    m, index = _index(problem, x.device)
    terms, out = _unpack(problem, coef), x.new_zeros(x.shape[0], problem.dim_out, problem.channels)
    for part in _chunks(problem, x.shape[0]):
        out[part].index_add_(1, m, terms[species[part]] * _product(_factors(x[part], index, 1.0)))
    return out


def symmetric_contraction_bwd(
    problem: SymmetricContractionProblem, g: torch.Tensor, x: torch.Tensor, coef: torch.Tensor, species: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients (of x, of the weights) for the output gradient g [N, dim_out, C]."""
    m, index = _index(problem, x.device)
    terms, gx = _unpack(problem, coef), torch.zeros_like(x)
    g_terms = torch.zeros_like(terms)
    for part in _chunks(problem, x.shape[0]):
        factors, weight = _factors(x[part], index, 1.0), terms[species[part]] * g[part][:, m]
        gx[part] = _scatter(index, problem.dim_in, [weight * _product(factors, i) for i in range(len(factors))])
        g_terms.index_add_(0, species[part].long(), g[part][:, m] * _product(factors))
    return gx, _table(problem, coef).T @ g_terms


def symmetric_contraction_bwd_bwd(
    problem: SymmetricContractionProblem,
    g: torch.Tensor,
    x: torch.Tensor,
    coef: torch.Tensor,
    a: torch.Tensor,
    q: torch.Tensor | None,
    species: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients (of g, of x, of the weights) for the cotangents a of gx and q of gweights (None for zero).

    <a, gx> + <q, gweights> is the derivative of sum g out along (a, q), so a and q act as tangents of x and weights.
    """
    m, index = _index(problem, x.device)
    terms = _unpack(problem, coef)
    q_terms = torch.zeros_like(terms) if q is None else _table(problem, coef) @ q
    dg, dx, d_terms = torch.zeros_like(g), torch.zeros_like(x), torch.zeros_like(terms)
    for part in _chunks(problem, x.shape[0]):
        factors, tangents = _factors(x[part], index, 1.0), _factors(a[part], index, 0.0)
        weight, tilt, gm = terms[species[part]], q_terms[species[part]], g[part][:, m]
        change = _derivative(factors, tangents)
        dg[part] = dg[part].index_add(1, m, weight * change + tilt * _product(factors))
        parts = [
            gm * (tilt * _product(factors, i) + weight * _derivative(factors, tangents, i)) for i in range(len(factors))
        ]
        dx[part] = _scatter(index, problem.dim_in, parts)
        d_terms.index_add_(0, species[part].long(), gm * change)
    return dg, dx, _table(problem, coef).T @ d_terms
