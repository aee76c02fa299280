"""The module that stands in for e3nn's `o3.Linear`: same weights, same state dict, one kernel launch."""

from __future__ import annotations

import torch
from e3nn import o3

from ..linear_problem import LinearProblem
from ..ops.linear import linear, lowp_weight
from ..precision import LINEAR_MODES, STORAGE, TORCH_DTYPES, mode_for, storage_for
from .derived import Derived


class IrrepsLinear(torch.nn.Module):
    """`o3.Linear` on our kernel. x [..., irreps_in.dim] -> [..., irreps_out.dim], in the dtype of the weights.

    module: the `o3.Linear` to stand in for; its parameters are shared, not copied, and the state dict has the same
    keys and shapes (weight, bias, output_mask). mode: "fp64", "ieee", "tf32x3", "tf32", "bf16" or "fp16", see
    `mace_triton.ops.linear.linear`; parameters in float64 always compute in FP64. layout_in, layout_out: storage order
    of x and of the result, "mul_ir" (e3nn's) or "ir_mul". storage: of the result; 16 bits ("bf16", "fp16") only beside
    float32 weights, else the weights' dtype.

    Raises ValueError for a module `LinearProblem.from_module` rejects, or an unknown mode, layout or storage.
    """

    storage = "fp32"  # of modules that were pickled before there was another

    def __init__(
        self, module: o3.Linear, mode: str, layout_in: str = "mul_ir", layout_out: str = "mul_ir", storage: str = "fp32"
    ):
        super().__init__()
        if storage not in STORAGE:
            raise ValueError(f"storage must be one of {STORAGE}, got {storage!r}")
        if mode not in LINEAR_MODES:
            raise ValueError(f"mode must be one of {LINEAR_MODES}, got {mode!r}")
        self.problem = LinearProblem.from_module(module, layout_in, layout_out)
        self.mode, self.storage = mode, storage
        self.irreps_in, self.irreps_out = module.irreps_in, module.irreps_out
        self.weight_numel, self.bias_numel = module.weight_numel, module.bias_numel
        self.instructions = module.instructions  # what MACE's LoRA computes merged weights from
        for name, size in (("weight", self.weight_numel), ("bias", self.bias_numel)):
            register = self.register_parameter if size else self.register_buffer
            register(name, getattr(module, name))
        self.register_buffer("output_mask", module.output_mask)
        self._weight_copy = Derived()
        self.train(module.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., irreps_in.dim] -> [..., irreps_out.dim]."""
        mode = self.run_mode
        lowp, trained = None, torch.is_grad_enabled() and self.weight.requires_grad
        if (mode in ("bf16", "fp16") or not trained) and not torch.compiler.is_compiling():
            lowp = self._weight_copy.get((self.weight,), lambda: lowp_weight(self.weight, mode, self.problem), mode)
        out = linear(
            self.problem,
            x.reshape(-1, x.shape[-1]),
            self.weight,
            mode=mode,
            bias=self.bias if self.bias_numel else None,
            weight_lowp=lowp,
            out_dtype=TORCH_DTYPES[self.run_storage],
        )
        return out.reshape(*x.shape[:-1], self.problem.dim_out)

    @property
    def run_mode(self) -> str:
        """The mode for the weights' dtype: "fp64" after `.double()`, "tf32x3" after `.float()` of an FP64 module."""
        return mode_for(self.mode, self.weight.dtype)

    @property
    def run_storage(self) -> str:
        """The storage of the result for the weights' dtype: "fp64" after `.double()`, "fp32" after `.float()`."""
        return storage_for(self.storage, self.weight.dtype)

    def restore(self) -> o3.Linear:
        """The `o3.Linear` (mul_ir) with the same parameters."""
        problem = self.problem
        module = o3.Linear(
            self.irreps_in,
            self.irreps_out,
            instructions=list(problem.instructions),
            biases=list(problem.biases),
            path_normalization=problem.path_normalization,
        )
        module.weight, module.bias, module.output_mask = self.weight, self.bias, self.output_mask
        return module.train(self.training)

    def extra_repr(self) -> str:
        p = self.problem
        return f"{p.irreps_in} ({p.layout_in}) -> {p.irreps_out} ({p.layout_out}), {self.run_mode}"
