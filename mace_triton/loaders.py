"""MACE's foundation models in one line: the functions of `mace.calculators`, which fetch them, with our calculator.

>>> atoms.calc = mt.mace_mp("medium", precision="fp32")
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ase.calculators.calculator
import mace  # noqa: F401  before e3nn, see mace_triton/__init__.py
import torch
from ase import units
from ase.calculators.mixing import SumCalculator
from mace.calculators import foundations_models as foundations

from .calculator import MACETritonCalculator, check_device
from .precision import Precision


def mace_mp(
    model: str | Path | None = None,
    *,
    precision: str | Precision | None = "fp32",
    device: str | None = None,
    dispersion: bool = False,
    damping: str = "bj",
    dispersion_xc: str = "pbe",
    dispersion_cutoff: float = 40.0 * units.Bohr,
    **kwargs,
) -> ase.calculators.calculator.Calculator:
    """A calculator for a model of the Materials Project family: "small", "medium", "medium-mpa-0", ..., or a file.

    model: None takes MACE's default. dispersion: add D3 as MACE does, by torch-dftd, with its damping, functional and
    cutoff (angstrom). Other arguments: see `MACETritonCalculator`, which also says what is raised; ImportError where
    torch-dftd is wanted and missing.
    """
    ours = _calculator(foundations.mace_mp, {"model": model}, precision, device, **kwargs)
    if not dispersion:
        return ours
    try:
        from torch_dftd.torch_dftd3_calculator import TorchDFTD3Calculator
    except ImportError as error:
        raise ImportError("dispersion=True needs torch-dftd: pip install torch-dftd") from error
    dtype = next(ours.models[0].parameters()).dtype
    how = {"damping": damping, "xc": dispersion_xc, "cutoff": dispersion_cutoff}
    return SumCalculator([ours, TorchDFTD3Calculator(device=check_device(device), dtype=dtype, **how)])


def mace_off(model: str | Path | None = None, *, precision="fp32", device=None, **kwargs) -> MACETritonCalculator:
    """A calculator for organic molecules: "small", "medium", "large", or a file; arguments as in `mace_mp`."""
    return _calculator(foundations.mace_off, {"model": model}, precision, device, **kwargs)


def mace_omol(model: str | Path | None = None, *, precision="fp32", device=None, **kwargs) -> MACETritonCalculator:
    """A calculator for the OMol models ("extra_large"), or a file, with their head; arguments as in `mace_mp`."""
    return _calculator(foundations.mace_omol, {"model": model}, precision, device, **{"head": "omol"} | kwargs)


def mace_anicc(model: str | Path | None = None, *, precision="fp32", device=None, **kwargs) -> MACETritonCalculator:
    """A calculator for the ANI-cc model (H, C, N, O), or a file; arguments as in `mace_mp`."""
    return _calculator(foundations.mace_anicc, {"model_path": model}, precision, device, **kwargs)


def mace_polar(model: str | Path, *, precision="fp32", device=None, **kwargs) -> MACETritonCalculator:
    """A calculator for the polarisable models "polar-1-s", "-m", "-l", or a file; arguments as in `mace_mp`."""
    kwargs = {"model_type": "PolarMACE"} | kwargs
    return _calculator(foundations.mace_polar, {"model": model}, precision, device, **kwargs)


def _calculator(load: Callable, which: dict, precision, device: str | None, **kwargs) -> MACETritonCalculator:
    """Our calculator around the model that one of MACE's functions fetches."""
    device = check_device(device)
    plain: torch.nn.Module = load(device=device, return_raw_model=True, **which)
    return MACETritonCalculator(plain, precision=precision, device=device, **kwargs)
