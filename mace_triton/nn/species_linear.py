"""MACE's `skip_tp` on the species-indexed linear op."""

from __future__ import annotations

import math

import mace  # noqa: F401  before e3nn, see mace_triton/__init__.py
import torch
from e3nn import o3

from ..layout import convert_layout
from ..linear_problem import LinearProblem
from ..ops.linear import lowp_weight
from ..ops.species import species_plan
from ..ops.species_linear import species_linear
from ..precision import LINEAR_MODES, mode_for
from .conv import as_plain, take_state
from .derived import Derived


def problem_of(
    tp: o3.FullyConnectedTensorProduct, layout_in: str = "mul_ir", layout_out: str = "mul_ir"
) -> tuple[LinearProblem, float]:
    """The linear problem that a product with one-hot node attributes poses, and the scale that its path weights add.

    Raises ValueError for weights from outside, a second operand other than one slot of 0e, instructions that are not
    weighted "uvw", and path weights that e3nn's "component", "element" normalization does not give.
    """
    if not (tp.internal_weights and tp.shared_weights):
        raise ValueError("tp: weights must be its own and shared by all nodes (internal_weights=True)")
    if len(tp.irreps_in2) != 1 or not tp.irreps_in2[0].ir.is_scalar() or tp.irreps_in2.dim == 0:
        raise ValueError(f"tp: the second operand must be one-hot species (Zx0e), got {tp.irreps_in2}")
    for number, ins in enumerate(tp.instructions):
        if ins.connection_mode != "uvw" or not ins.has_weight:
            raise ValueError(f"tp: instruction {number} is {ins.connection_mode!r}; supported is 'uvw' with weights")
    pairs = tuple((ins.i_in1, ins.i_out) for ins in tp.instructions)
    problem = LinearProblem(str(tp.irreps_in1), str(tp.irreps_out), pairs, layout_in=layout_in, layout_out=layout_out)
    scale = 1.0 / math.sqrt(tp.irreps_in2.dim)
    for number, (ins, alpha) in enumerate(zip(tp.instructions, problem.alphas, strict=True)):
        expected = scale * alpha * math.sqrt(tp.irreps_out[ins.i_out].ir.dim)
        if not math.isclose(ins.path_weight, expected, rel_tol=1e-6):
            raise ValueError(
                f"tp: instruction {number} has path weight {ins.path_weight:.6g}, supported is {expected:.6g} "
                "(component and element normalization)"
            )
    return problem, scale


class SpeciesLinear(o3.FullyConnectedTensorProduct):
    """MACE's `skip_tp` on our kernel: a linear map with weights of each node's species.

    It stays an `o3.FullyConnectedTensorProduct` (same attributes, state dict and pickling) and shares the tensors of
    `tp`. mode: operand precision, as in `mace_triton.ops.linear.linear`. layout_in, layout_out: "mul_ir" or "ir_mul".
    Node attributes that are not one-hot go e3nn's own way.

    Raises TypeError when tp is no plain FullyConnectedTensorProduct and ValueError for what `problem_of` refuses.
    """

    def __init__(
        self, tp: o3.FullyConnectedTensorProduct, mode: str, layout_in: str = "mul_ir", layout_out: str = "mul_ir"
    ):
        torch.nn.Module.__init__(self)
        if type(tp) is not o3.FullyConnectedTensorProduct:
            raise TypeError(f"tp must be an e3nn.o3.FullyConnectedTensorProduct, got {type(tp).__name__}")
        if mode not in LINEAR_MODES:
            raise ValueError(f"mode must be one of {LINEAR_MODES}, got {mode!r}")
        problem, scale = problem_of(tp, layout_in, layout_out)
        take_state(self, tp)
        self.problem, self.scale, self.mode, self.species = problem, scale, mode, tp.irreps_in2.dim
        self._weights, self._lowp = Derived(), Derived()

    @property
    def run_mode(self) -> str:
        """The mode for the weights' dtype: "fp64" after `.double()`, "tf32x3" after `.float()` of an FP64 module."""
        return mode_for(self.mode, self.weight.dtype)

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """x [N, irreps_in1.dim] in layout_in, y [N, species] one-hot -> [N, irreps_out.dim] in layout_out."""
        plan = species_plan(y) if weight is None else None
        p = self.problem
        if plan is None:
            x = convert_layout(x, p.irreps_in, p.layout_in, "mul_ir")
            return convert_layout(super().forward(x, y, weight), p.irreps_out, "mul_ir", p.layout_out)
        weights, lowp = self.weights(), None
        if self.run_mode in ("bf16", "fp16") and not torch.compiler.is_compiling():
            lowp = self._lowp.get((self.weight,), lambda: lowp_weight(weights, self.run_mode), self.run_mode)
        return species_linear(p, x, weights, plan, mode=self.run_mode, scale=self.scale, weight_lowp=lowp)

    def weights(self) -> torch.Tensor:
        """The weights by species [Z, weight_numel]; kept until they change, unless gradients must flow."""
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and self.weight.requires_grad):
            return self._by_species()
        return self._weights.get((self.weight,), self._by_species)

    def _by_species(self) -> torch.Tensor:
        parts = []
        for block in self.problem.blocks:  # e3nn packs [mul in, species, mul out] for each
            rows, columns = block.slot_in.mul, block.slot_out.mul
            values = self.weight[block.weight * self.species :][: rows * self.species * columns]
            values = values.reshape(rows, self.species, columns).transpose(0, 1)
            parts.append(values.reshape(self.species, rows * columns))
        return torch.cat(parts, dim=1) if parts else self.weight.new_zeros(self.species, 0)

    def restore(self) -> o3.FullyConnectedTensorProduct:
        """The plain e3nn module with the same tensors; it expects and gives mul_ir."""
        return as_plain(
            o3.FullyConnectedTensorProduct, self, "problem", "scale", "mode", "species", "_weights", "_lowp"
        )
