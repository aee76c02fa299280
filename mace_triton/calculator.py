"""The ASE face: MACE's own calculator around accelerated models."""

from __future__ import annotations

from glob import glob
from pathlib import Path

import ase
import mace  # noqa: F401  before e3nn, see mace_triton/__init__.py
import torch
from mace.calculators import MACECalculator

from .certify import Certificate, certify, pick_head
from .convert import accelerate, load_model
from .models import load_water
from .precision import Precision


class MACETritonCalculator(MACECalculator):
    """`MACECalculator` whose models run on our kernels; energies in eV, forces in eV/angstrom, stress in eV/angstrom^3.

    model: "water" (the model that ships with the package), a .model file, a pattern such as "committee_*.model", the
    name of a foundation model (fetched by MACE's own loader), a MACE module, or a list of any of these (a committee).
    precision: "fp64", "fp32", "tf32", "bf16", "fp16" or a `Precision`; None keeps the model's own.
    head: which head of a model with several. device: "cuda", "cuda:1" or "cpu"; the default is a GPU if there is one.
    deterministic: the same bits on every run. Other arguments go to `MACECalculator`.

    Raises FileNotFoundError for a file that is not there, ValueError or TypeError for what is no MACE model, an unknown
    precision, head or device.
    """

    def __init__(
        self,
        model: str | Path | torch.nn.Module | list = "water",
        *,
        precision: str | Precision | None = None,
        head: str | None = None,
        device: str | None = None,
        deterministic: bool = False,
        **kwargs,
    ):
        device = check_device(device)
        sources = model if isinstance(model, (list, tuple)) else [model]
        dtype = torch.float32 if precision is None else Precision.parse(precision).torch_dtype
        plain = [loaded for source in sources for loaded in load(source, device, dtype)]
        models = [accelerate(m.to(device), precision, deterministic=deterministic) for m in plain]
        head = pick_head(list(getattr(models[0], "heads", None) or ["Default"]), head)
        dtype = str(next(models[0].parameters()).dtype).removeprefix("torch.")
        super().__init__(models=models, device=device, default_dtype=dtype, head=head, **kwargs)

    def certify(self, atoms: ase.Atoms) -> Certificate:
        """The certificate of the (first) model on `atoms`: differences to e3nn FP64 with the same weights."""
        return certify(self.models[0], None, atoms, head=self.head)


def load(
    source: str | Path | torch.nn.Module, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> list[torch.nn.Module]:
    """Plain MACE models from "water", a name, a file, a pattern or a module; several only for a pattern.

    dtype: of "water" alone, whose constants are computed in it; the others come as they were saved.
    """
    if isinstance(source, torch.nn.Module):
        return [source]
    if str(source) == "water":
        return [load_water(device, dtype)]
    if any(mark in str(source) for mark in "*?["):
        files = sorted(glob(str(source)))
        if not files:
            raise FileNotFoundError(f"model: no file matches {str(source)!r}")
        return [load_model(file, device) for file in files]
    return [load_model(source, device)]


def check_device(device: str | None) -> str:
    """The device to use; None picks a GPU if there is one. Raises ValueError if it is not there."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is not known: use 'cuda', 'cuda:N' or 'cpu'") from error
    if kind.type not in ("cuda", "cpu"):
        raise ValueError(f"device {device!r} has no kernels here: use 'cuda', 'cuda:N' or 'cpu'")
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r} is not there: torch sees {torch.cuda.device_count()} GPUs; use 'cpu'")
    return device
