"""Named precision policies: what is stored in which dtype and how the matrix products round their operands.

Sums are always FP32 (FP64 in preset "fp64"); parameters stay in `dtype`. The engine sums energies in FP64; MACE's own
forward sums them in `dtype`.

The radial weights are the largest tensor of a step. The radial network's last layer writes them in the storage of the
convolution, so that 16 bits halve that traffic.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

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


EXACT = {"fp64": "fp64", "fp32": "tf32x3"}
"""dtype -> the mode of products that keep it."""


@dataclass(frozen=True)
class Precision:
    """One policy, block by block.

    name: how reports call it. dtype: "fp64" or "fp32", of the parameters and of what passes between blocks.
    linear: operand precision of the linears' dots ("tf32x3" keeps FP32 accuracy on tensor cores, "ieee" is plain FP32).
    tensor_product: storage of the radial weights that the convolution reads ("fp64", "fp32", "bf16", "fp16").
    radial: operands of the radial network's last layer; None: as `linear`. readout: operands of the readouts; None:
    exact. contraction: storage of what the symmetric contraction reads and writes; features: storage of the node
    features that the convolution gathers; None: `dtype`, for both. product: operands of the linears behind the
    contraction, which most of the linears' error in energies comes from; None: as `linear`.

    Raises ValueError for an unknown word, or when FP64 is mixed with the others.
    """

    name: str
    dtype: str
    linear: str
    tensor_product: str
    radial: str | None = None
    readout: str | None = None
    contraction: str | None = None
    features: str | None = None
    product: str | None = None

    def __post_init__(self):
        defaults = {"radial": self.linear, "product": self.linear, "readout": EXACT.get(self.dtype)}
        defaults |= {"contraction": self.dtype, "features": self.dtype}
        for field, word in defaults.items():
            if getattr(self, field) is None:
                object.__setattr__(self, field, word)
        for field, allowed in WORDS.items():
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"precision {self.name!r}: {field} must be one of {allowed}, got {getattr(self, field)!r}"
                )
        if len({getattr(self, field) == "fp64" for field in WORDS}) == 2:
            raise ValueError(f"precision {self.name!r}: {', '.join(WORDS)} must all be fp64, or none")

    @property
    def torch_dtype(self) -> torch.dtype:
        """torch.float64 or torch.float32, the dtype of the model's parameters."""
        return TORCH_DTYPES[self.dtype]

    @property
    def storage(self) -> torch.dtype:
        """The torch dtype of the stored radial weights."""
        return TORCH_DTYPES[self.tensor_product]

    @property
    def words(self) -> dict[str, str]:
        """The policy block by block, without its name: policies of the same words compute alike."""
        return {field: word for field, word in asdict(self).items() if field != "name"}

    def says(self, words: dict[str, str]) -> bool:
        """Whether this is the policy of these words, which may come from a version that knew fewer blocks."""
        return words.items() <= self.words.items()

    @staticmethod
    def parse(precision: str | Path | Precision) -> Precision:
        """A policy from its name or its file (.json, see `save`), or the policy itself.

        Raises ValueError listing the names, or saying what is wrong with the file.
        """
        if isinstance(precision, Precision):
            return precision
        if str(precision) in PRESETS:
            return PRESETS[str(precision)]
        if str(precision).endswith(".json"):
            return Precision.load(precision)
        raise ValueError(
            f"precision must be one of {', '.join(PRESETS)}, a policy's .json file or a Precision, got {precision!r}"
        )

    def save(self, path: str | Path) -> None:
        """Write a policy file: a JSON object of the fields; others that a file has are not read."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def load(path: str | Path) -> Precision:
        """The policy of a file. Raises ValueError where there is none, or no policy in it."""
        try:
            words = json.loads(Path(path).read_text())
            names = {field.name for field in fields(Precision)}
            return Precision(**{name: word for name, word in words.items() if name in names})
        except FileNotFoundError:
            raise ValueError(f"precision: there is no policy file {path}") from None
        except (TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"precision: {path} is no policy file ({error})") from error


WORDS = {
    "dtype": ("fp64", "fp32"),
    "linear": LINEAR_MODES,
    "tensor_product": STORAGE,
    "radial": LINEAR_MODES,
    "readout": LINEAR_MODES,
    "contraction": STORAGE,
    "features": STORAGE,
    "product": LINEAR_MODES,
}
"""Field of a policy -> what it may be."""
PRESETS = {
    policy.name: policy
    for policy in (
        Precision("fp64", "fp64", "fp64", "fp64"),
        Precision("fp32", "fp32", "tf32x3", "fp32"),
        Precision("tf32", "fp32", "tf32", "fp32"),
        Precision("bf16", "fp32", "bf16", "bf16", product="tf32x3"),
        Precision("fp16", "fp32", "fp16", "fp16"),
    )
}
