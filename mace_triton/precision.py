"""Named precision policies: what is stored in which dtype and how the matrix products round their operands.

Sums are always FP32 (FP64 in preset "fp64"); parameters stay in `dtype`. MACE itself sums the energies, in `dtype`.

The radial weights are the largest tensor of a step. The radial network's last layer writes them in the storage of the
convolution, so that 16 bits halve that traffic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LINEAR_MODES = ("fp64", "ieee", "tf32x3", "tf32", "bf16", "fp16")
STORAGE = ("fp64", "fp32", "bf16", "fp16")
TORCH_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def mode_for(mode: str, dtype: torch.dtype) -> str:
    """`mode` for weights of `dtype`: "fp64" after `.double()`, "tf32x3" after `.float()` of an FP64 module."""
    if (dtype == torch.float64) == (mode == "fp64"):
        return mode
    return "fp64" if dtype == torch.float64 else "tf32x3"


def storage_for(storage: str, dtype: torch.dtype) -> str:
    """`storage` for a model of `dtype`: "fp64" after `.double()`, "fp32" after `.float()` of an FP64 model."""
    if (dtype == torch.float64) == (storage == "fp64"):
        return storage
    return "fp64" if dtype == torch.float64 else "fp32"


@dataclass(frozen=True)
class Precision:
    """One policy.

    name: how reports call it. dtype: "fp64" or "fp32", of the parameters and of what passes between blocks.
    linear: operand precision of the linears' dots ("tf32x3" keeps FP32 accuracy on tensor cores, "ieee" is plain FP32).
    tensor_product: storage of the radial weights that the convolution reads ("fp64", "fp32", "bf16", "fp16").

    Raises ValueError for an unknown word, or when FP64 is mixed with the others.
    """

    name: str
    dtype: str
    linear: str
    tensor_product: str

    def __post_init__(self):
        for field, allowed in (("dtype", ("fp64", "fp32")), ("linear", LINEAR_MODES), ("tensor_product", STORAGE)):
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"precision {self.name!r}: {field} must be one of {allowed}, got {getattr(self, field)!r}"
                )
        if len({field == "fp64" for field in (self.dtype, self.linear, self.tensor_product)}) == 2:
            raise ValueError(f"precision {self.name!r}: dtype, linear and tensor_product must all be fp64, or none")

    @property
    def torch_dtype(self) -> torch.dtype:
        """torch.float64 or torch.float32, the dtype of the model's parameters."""
        return TORCH_DTYPES[self.dtype]

    @property
    def storage(self) -> torch.dtype:
        """The torch dtype of the stored radial weights."""
        return TORCH_DTYPES[self.tensor_product]

    @staticmethod
    def parse(precision: str | Precision) -> Precision:
        """A policy from its name, or the policy itself. Raises ValueError listing the names."""
        if isinstance(precision, Precision):
            return precision
        if precision in PRESETS:
            return PRESETS[precision]
        raise ValueError(f"precision must be one of {', '.join(PRESETS)} or a Precision, got {precision!r}")


PRESETS = {
    policy.name: policy
    for policy in (
        Precision("fp64", "fp64", "fp64", "fp64"),
        Precision("fp32", "fp32", "tf32x3", "fp32"),
        Precision("tf32", "fp32", "tf32", "fp32"),
        Precision("bf16", "fp32", "bf16", "bf16"),
        Precision("fp16", "fp32", "fp16", "fp16"),
    )
}
