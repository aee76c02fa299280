"""MACE's SymmetricContraction on the symmetric contraction op, and the reshaping in front of it."""

from __future__ import annotations

import mace  # noqa: F401  before e3nn, see mace_triton/__init__.py
import torch
from e3nn import o3
from mace.modules import symmetric_contraction as mace_contraction
from mace.modules.irreps_tools import reshape_irreps

from ..layout import convert_layout
from ..ops.graph import capturing
from ..ops.species import one_species, present_species, species_plan
from ..ops.symmetric_contraction import symmetric_contraction
from ..problem import check_layout
from ..symmetric_contraction_problem import PACK, SymmetricContractionProblem
from .conv import take_state
from .derived import Derived


def problem_of(module: mace_contraction.SymmetricContraction) -> tuple[SymmetricContractionProblem, torch.Tensor]:
    """The problem that a contraction poses, and the table [rows * PACK, P] that turns its weights into coefficients.

    P counts the weights of all outputs and correlations, in the order of `parameters_of`. The table is float64.

    Raises ValueError for weights from outside, slots of different multiplicities, and what the problem refuses.
    """
    if not module.internal_weights:
        raise ValueError("contraction: weights must be its own (internal_weights=True)")
    channels = {mul for irreps in (module.irreps_in, module.irreps_out) for mul, _ in irreps}
    if len(channels) != 1:
        raise ValueError(
            f"contraction: {module.irreps_in} -> {module.irreps_out} must have one multiplicity everywhere"
        )
    blocks, first, columns = [], 0, 0
    for contraction, (_, ir) in zip(module.contractions, module.irreps_out, strict=True):
        for degree in _degrees(contraction):
            u = contraction.U_tensors(degree).detach().to("cpu", torch.float64)
            found = _merge(u.reshape(ir.dim, -1, u.shape[-1]), u.shape[-2], degree)
            least = 1e-6 * u.abs().max()  # below lies the rounding of entries that cancel
            blocks += [((first + m, monomial), columns, row) for m, monomial, row in found if row.abs().max() > least]
            columns += u.shape[-1]
        first += ir.dim
    dim_in = sum(ir.dim for _, ir in module.irreps_in)
    problem = SymmetricContractionProblem(channels.pop(), dim_in, first, tuple(term for term, _, _ in blocks))
    table = torch.zeros(problem.rows * PACK, columns, dtype=torch.float64)
    place = {term: number for number, term in enumerate(problem.terms)}
    for term, column, row in blocks:
        table[place[term], column : column + len(row)] = row
    return problem, table


def _degrees(contraction: torch.nn.Module) -> range:
    """MACE's order of weights: the largest correlation first."""
    return range(contraction.correlation, 0, -1)


def parameters_of(module: mace_contraction.SymmetricContraction) -> list[torch.Tensor]:
    """The weights [species, paths, C] of every output and correlation, in MACE's order."""
    found = []
    for c in module.contractions:  # by number: torch.compile 2.11 cannot unpack a ParameterList
        found += [c.weights_max] + [c.weights[i] for i in range(len(c.weights))]
    return found


def _trained(weights: list[torch.Tensor]) -> bool:
    return torch.is_grad_enabled() and any(w.requires_grad for w in weights)


def _merge(u: torch.Tensor, dim: int, degree: int):
    """(component, sorted monomial, row of weights) of the entries of U [2l+1, dim ** degree, P] that share them."""
    component, place = u.abs().sum(dim=-1).nonzero(as_tuple=True)
    digits = torch.stack([place // dim**k % dim for k in range(degree)], dim=1).sort(dim=1).values
    keys, inverse = torch.unique(torch.cat((component[:, None], digits), dim=1), dim=0, return_inverse=True)
    rows = u.new_zeros(len(keys), u.shape[-1]).index_add_(0, inverse, u[component, place])
    for (m, *monomial), row in zip(keys.tolist(), rows, strict=True):
        yield m, tuple(monomial), row


class SymmetricContraction(mace_contraction.SymmetricContraction):
    """MACE's SymmetricContraction with its polynomial in one kernel; it shares the tensors of `module`.

    It stays MACE's class (attributes, state dict, pickling). layout_out: "mul_ir" or "ir_mul", of the result.
    agnostic: the weights do not depend on the species (MACE then passes ones as node attributes).

    Node attributes that are not one-hot go MACE's own way. Raises TypeError when `module` is no plain
    SymmetricContraction, and what `problem_of` raises.
    """

    def __init__(self, module: mace_contraction.SymmetricContraction, layout_out: str = "mul_ir", agnostic=False):
        torch.nn.Module.__init__(self)
        if type(module) is not mace_contraction.SymmetricContraction:
            raise TypeError(f"module must be MACE's SymmetricContraction, got {type(module).__name__}")
        check_layout(layout_out, "layout_out")
        problem, table = problem_of(module)
        take_state(self, module)
        self.problem, self.layout_out, self.agnostic = problem, layout_out, agnostic
        weight = module.contractions[0].weights_max
        self.register_buffer("table", table.to(weight.device, weight.dtype), persistent=False)
        self._coefficients = Derived()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x [N, C, components], y [N, species] one-hot -> [N, irreps_out.dim] in layout_out."""
        plan = one_species(x.shape[0], x.device) if self.agnostic else species_plan(y)
        if plan is None:
            return convert_layout(super().forward(x, y), self.irreps_out, "mul_ir", self.layout_out)
        weights = parameters_of(self)
        if _trained(weights) and not (self.agnostic or torch.compiler.is_compiling() or capturing(x)):
            plan, numbers = present_species(plan)  # of many species a batch has few
            coefficients = self._combine(weights, numbers)
        else:
            coefficients = self._coefficients_of(weights)
        out = symmetric_contraction(self.problem, x.transpose(1, 2), coefficients, plan)
        return convert_layout(out.reshape(x.shape[0], -1), self.irreps_out, "ir_mul", self.layout_out)

    def coefficients(self) -> torch.Tensor:
        """The coefficients [species, rows, C, PACK]; kept until a weight changes, unless gradients must flow."""
        return self._coefficients_of(parameters_of(self))

    def _coefficients_of(self, weights: list[torch.Tensor]) -> torch.Tensor:
        if torch.compiler.is_compiling() or _trained(weights):
            return self._combine(weights)
        return self._coefficients.get(weights, lambda: self._combine(weights))

    def _combine(self, weights: list[torch.Tensor], numbers: torch.Tensor | None = None) -> torch.Tensor:
        """The coefficients of all species, or of those in `numbers`."""
        packed = torch.cat(weights, dim=1)
        terms = self.table @ (packed if numbers is None else packed[numbers])  # [species, rows * PACK, C]
        terms = terms.reshape(terms.shape[0], self.problem.rows, PACK, self.problem.channels)
        return terms.transpose(2, 3).contiguous()

    def restore(self) -> mace_contraction.SymmetricContraction:
        """MACE's module with the same tensors."""
        module = mace_contraction.SymmetricContraction.__new__(mace_contraction.SymmetricContraction)
        torch.nn.Module.__init__(module)
        take_state(module, self)
        for name in ("problem", "layout_out", "agnostic", "_coefficients"):
            del module.__dict__[name]
        del module.table
        return module


class ReshapeIrreps(reshape_irreps):
    """MACE's reshape_irreps for features in ir_mul: [N, irreps.dim] to [N, C, components], a view.

    Raises ValueError for slots of different multiplicities.
    """

    def __init__(self, module: reshape_irreps):
        torch.nn.Module.__init__(self)
        if len({mul for mul, _ in module.irreps}) != 1:
            raise ValueError(f"reshape: {module.irreps} must have one multiplicity everywhere")
        take_state(self, module)

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        """tensor [N, irreps.dim] in ir_mul -> [N, C, components]."""
        return tensor.reshape(tensor.shape[0], sum(self.dims), self.muls[0]).transpose(1, 2)

    def restore(self) -> reshape_irreps:
        """MACE's module; it expects mul_ir."""
        return reshape_irreps(o3.Irreps(self.irreps), cueq_config=self.__dict__.get("cueq_config"))
