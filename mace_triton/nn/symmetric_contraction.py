"""MACE's SymmetricContraction on the symmetric contraction op, and the reshaping in front of it."""

from __future__ import annotations

import mace  # noqa: F401  before e3nn, see mace_triton/__init__.py
import numpy as np
import torch
from e3nn import o3
from mace.modules import symmetric_contraction as mace_contraction
from mace.modules.irreps_tools import reshape_irreps

from ..layout import convert_layout
from ..ops.species import one_species, species_plan
from ..ops.symmetric_contraction import combine, symmetric_contraction
from ..precision import STORAGE, TORCH_DTYPES, storage_for
from ..problem import check_layout
from ..symmetric_contraction_problem import SymmetricContractionProblem
from .conv import as_plain, take_state
from .derived import Derived


def problem_of(
    module: mace_contraction.SymmetricContraction,
) -> tuple[SymmetricContractionProblem, torch.Tensor | None]:
    """The problem that a contraction poses, and the matrix [paths, P], float64, that its weights are multiplied by.

    P counts the weights of all outputs and correlations, in the order of `parameters_of`. They are the weights of the
    problem (no matrix, None) if their polynomials are independent. Those of MACE's original basis are not: of 159 paths
    49 are left.

    Raises ValueError for weights from outside, slots of different multiplicities, and what the problem refuses.
    """
    if not module.internal_weights:
        raise ValueError("contraction: weights must be its own (internal_weights=True)")
    channels = {mul for irreps in (module.irreps_in, module.irreps_out) for mul, _ in irreps}
    if len(channels) != 1:
        raise ValueError(
            f"contraction: {module.irreps_in} -> {module.irreps_out} must have one multiplicity everywhere"
        )
    terms, table = _terms_of(module)
    double = module.contractions[0].weights_max.dtype == torch.float64
    table, mix = _independent(table, 1e-12 if double else 1e-6)
    rows = (row.nonzero().squeeze(1) for row in table)
    sparse = tuple(tuple((int(k), float(row[k])) for k in kept) for kept, row in zip(rows, table, strict=True))
    dims = [sum(ir.dim for _, ir in irreps) for irreps in (module.irreps_in, module.irreps_out)]
    return SymmetricContractionProblem(channels.pop(), *dims, tuple(terms), table.shape[1], sparse), mix


def _terms_of(module: mace_contraction.SymmetricContraction) -> tuple[list, torch.Tensor]:
    """The terms, and the table [terms, P] that turns the weights into their coefficients."""
    blocks, first, columns = [], 0, 0
    for contraction, (_, ir) in zip(module.contractions, module.irreps_out, strict=True):
        for degree in _degrees(contraction):
            u = contraction.U_tensors(degree).detach().to("cpu", torch.float64)
            found = _merge(u.reshape(ir.dim, -1, u.shape[-1]), u.shape[-2], degree)
            least = 1e-6 * u.abs().max()  # below lies the rounding of entries that cancel
            blocks += [((first + m, monomial), columns, row) for m, monomial, row in found if row.abs().max() > least]
            columns += u.shape[-1]
        first += ir.dim
    table = torch.zeros(len(blocks), columns, dtype=torch.float64)
    for place, (_, column, row) in enumerate(blocks):
        table[place, column : column + len(row)] = row
    if blocks:
        table[table.abs() < 1e-6 * table.abs().max()] = 0
    return [term for term, _, _ in blocks], table


def _independent(table: torch.Tensor, tolerance: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(table', mix) with table = table' @ mix, table' of full rank; (table, None) if it is, or rounding hides it.

    Gaussian elimination: mix has the rows of the pivots, so that table' has a one in each and is about as sparse as a
    basis can be.
    """
    if not table.numel():
        return table, None
    rest, pivots = table.T.numpy().copy(), []  # NumPy's small operations take a fraction of PyTorch's time
    for place in range(len(table)):
        row = len(pivots)
        if row == len(rest):
            return table, None
        best = row + int(np.abs(rest[row:, place]).argmax())
        if abs(rest[best, place]) < 1e-4:
            continue
        rest[[row, best]] = rest[[best, row]]
        rest[row] /= rest[row, place]
        factors = rest[:, place].copy()
        factors[row] = 0
        rest -= np.outer(factors, rest[row])
        pivots.append(place)
    if len(pivots) == table.shape[1]:
        return table, None
    mix = table[pivots]
    reduced = table @ torch.linalg.pinv(mix)
    reduced[reduced.abs() < 1e-6] = 0
    exact = (reduced @ mix - table).abs().max() <= tolerance * table.abs().max()
    return (reduced, mix) if exact else (table, None)


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
    agnostic: the weights do not depend on the species (MACE then passes ones as node attributes). storage: of what the
    kernel reads and writes, "fp32" or 16 bits beside it; weights and sums stay in the parameters' dtype.

    Node attributes that are not one-hot go MACE's own way. Raises TypeError when `module` is no plain
    SymmetricContraction, ValueError for an unknown storage, and what `problem_of` raises.
    """

    storage = "fp32"  # of modules that were pickled before there was another

    def __init__(
        self,
        module: mace_contraction.SymmetricContraction,
        layout_out: str = "mul_ir",
        agnostic: bool = False,
        storage: str = "fp32",
    ):
        torch.nn.Module.__init__(self)
        if type(module) is not mace_contraction.SymmetricContraction:
            raise TypeError(f"module must be MACE's SymmetricContraction, got {type(module).__name__}")
        check_layout(layout_out, "layout_out")
        if storage not in STORAGE:
            raise ValueError(f"storage must be one of {STORAGE}, got {storage!r}")
        problem, mix = problem_of(module)
        take_state(self, module)
        self.problem, self.layout_out, self.agnostic, self.storage = problem, layout_out, agnostic, storage
        weight = module.contractions[0].weights_max
        self.register_buffer("mix", None if mix is None else mix.to(weight.device, weight.dtype), persistent=False)
        self._coefficients = Derived()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x [N, C, components], y [N, species] one-hot -> [N, irreps_out.dim] in layout_out."""
        plan = one_species(x.shape[0], x.device) if self.agnostic else species_plan(y)
        if plan is None:
            return convert_layout(super().forward(x, y), self.irreps_out, "mul_ir", self.layout_out)
        dtype, parameters = x.dtype, parameters_of(self)
        x = x.transpose(1, 2).to(TORCH_DTYPES[self.run_storage])
        if torch.compiler.is_compiling() or _trained(parameters):
            out = symmetric_contraction(self.problem, x, self._weights(parameters), plan)
        else:
            out = symmetric_contraction(self.problem, x, None, plan, self.coefficients())
        return convert_layout(out.reshape(x.shape[0], -1).to(dtype), self.irreps_out, "ir_mul", self.layout_out)

    @property
    def run_storage(self) -> str:
        """The storage for the weights' dtype: "fp64" after `.double()`, "fp32" after `.float()` of an FP64 model."""
        return storage_for(self.storage, self.contractions[0].weights_max.dtype)

    def coefficients(self, species: torch.Tensor | None = None) -> torch.Tensor:
        """The coefficients [species, rows, C, PACK], without gradient; kept until a weight changes.

        species [S]: of these alone, and not kept.
        """
        parameters = parameters_of(self)
        if species is not None:
            with torch.no_grad():
                return combine(self.problem, self._weights([torch.cat(parameters, dim=1)[species]]))
        return self._coefficients.get(parameters, lambda: combine(self.problem, self._weights(parameters)))

    def _weights(self, parameters: list[torch.Tensor]) -> list[torch.Tensor]:
        """The weights of the problem, [species, paths, C], in pieces along the paths."""
        return parameters if self.mix is None else [self.mix @ torch.cat(parameters, dim=1)]

    def restore(self) -> mace_contraction.SymmetricContraction:
        """MACE's module with the same tensors."""
        return as_plain(
            mace_contraction.SymmetricContraction,
            self,
            *("problem", "layout_out", "agnostic", "storage", "_coefficients", "mix"),
        )


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
