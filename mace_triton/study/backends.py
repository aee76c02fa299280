"""A MACE model by e3nn, cuEquivariance (cueq), OpenEquivariance (oeq) and mace_triton, each built as MACE builds it.

`model_*(model, precision, device)` gives a copy that is called with MACE's dictionary. Benches use the same.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import mace  # noqa: F401  before e3nn, see mace_triton/__init__.py
import torch
from mace.tools.torch_tools import default_dtype


class MissingProviderError(RuntimeError):
    """A provider that is not installed, or does not offer this block or precision; the message says which."""


def model_dtype(precision: str) -> torch.dtype:
    """dtype of features and parameters: FP64 for fp64, FP32 for every other precision."""
    return torch.float64 if precision == "fp64" else torch.float32


def need(module: str, provider: str):
    """Import a peer's module, or raise MissingProviderError."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a peer may fail to import in its own ways: a compiler, a driver, a library
        raise MissingProviderError(f"{provider}: cannot import {module}: {error}") from error


def need_precision(provider: str, precision: str, offered: tuple[str, ...]) -> None:
    if precision not in offered:
        raise MissingProviderError(f"{provider} offers {', '.join(offered)} here, not {precision}")


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Let torch's FP32 matrix products run in TF32 inside the block when the precision says tf32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def cueq_of(device: torch.device):
    """cuequivariance_torch, with its closed GPU operations where a GPU is asked for."""
    cuet = need("cuequivariance_torch", "cueq")
    if device.type == "cuda":
        need("cuequivariance_ops_torch", "cueq")
    return cuet


def model_e3nn(model: torch.nn.Module, precision: str, device: torch.device, variant: str = "") -> torch.nn.Module:
    """Plain MACE."""
    need_precision("e3nn", precision, ("fp64", "fp32", "tf32"))
    return copy.deepcopy(model).to(device=device, dtype=model_dtype(precision))


def model_cueq(model: torch.nn.Module, precision: str, device: torch.device, variant: str = "") -> torch.nn.Module:
    """mace.cli.convert_e3nn_cueq.run: everything on cuEquivariance, convolution fused on a GPU."""
    need_precision("cueq", precision, ("fp64", "fp32", "tf32"))
    cueq_of(device)
    from mace.cli.convert_e3nn_cueq import run

    dtype = model_dtype(precision)
    with default_dtype(dtype):
        return run(copy.deepcopy(model).to(device=device, dtype=dtype), device=device.type, return_model=True)


def model_oeq(model: torch.nn.Module, precision: str, device: torch.device, variant: str = "") -> torch.nn.Module:
    """mace.cli.convert_e3nn_oeq.run: the convolution on OpenEquivariance, the rest e3nn."""
    need_precision("oeq", precision, ("fp64", "fp32", "tf32"))
    if device.type != "cuda":
        raise MissingProviderError("oeq runs on a GPU only")
    need("openequivariance", "oeq")
    from mace.cli.convert_e3nn_oeq import run

    dtype = model_dtype(precision)
    with default_dtype(dtype):
        return run(copy.deepcopy(model).to(device=device, dtype=dtype), device=device.type, return_model=True)


def model_mace_triton(
    model: torch.nn.Module, precision: str, device: torch.device, variant: str = ""
) -> torch.nn.Module:
    """mace_triton.accelerate."""
    from mace_triton import accelerate

    plain = copy.deepcopy(model).to(device=device, dtype=model_dtype(precision))
    return accelerate(plain, precision=precision, deterministic=variant == "deterministic")


MODELS = {"e3nn": model_e3nn, "cueq": model_cueq, "oeq": model_oeq, "mace_triton": model_mace_triton}
