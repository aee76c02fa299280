"""Without a GPU the kernels run in Triton's interpreter, which must be chosen before Triton is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the processors: threads of each would wait for those of others
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import triton
from triton.runtime import interpreter

from mace_triton import compiling
from mace_triton.kernels import channelwise_tp as kernels
from mace_triton.kernels import channelwise_tp_source as source
from mace_triton.ops import dispatch


def _let_old_interpreters_count() -> None:
    """Triton 3.6 takes int() of one-element arrays, which NumPy 2.4 refuses; later versions squeeze them first."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patched


if os.environ.get("TRITON_INTERPRET") == "1" and triton.__version__.startswith("3.6."):
    _let_old_interpreters_count()


def _poisoned(make):
    """`make`, but floating-point tensors that our own code asks for start as NaN: elements never written show."""

    def wrapper(*args, **kwargs):
        tensor = make(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("mace_triton") and tensor.is_floating_point():
            tensor.fill_(float("nan"))
        return tensor

    return wrapper


@pytest.fixture(autouse=True)
def nan_filled_empties(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty, empty_like, Tensor.new_empty give NaN to mace_triton. TorchScript cannot compile such wrappers."""
    if "torchscript" in request.keywords:
        return
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in every test, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """The GPU if there is one; else the CPU, where the kernels run in the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def reference_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors take the plain PyTorch formulas, as they do for users, instead of the interpreter."""
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)


@pytest.fixture
def assembly_by_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Kernels as for NVIDIA cards without a prefetch; what assembly would load Triton does. Gives the loads' names."""
    names, made = [], (kernels._forward_kernels, kernels._backward_kernels, kernels._forces_kernels)

    def load_source(name: str, offsets: tuple[int, ...], widen: bool) -> str:
        names.append(name)
        loads = ", ".join(f"tl.load(ptr + {offset})" for offset in offsets)
        return f"@triton.jit\ndef {name}(ptr):\n    return {loads}\n\n\n"

    monkeypatch.setattr(source, "load_source", load_source)
    monkeypatch.setattr(kernels, "_ahead", lambda tile, x: 0)
    for cached in made:
        cached.cache_clear()
    yield names
    for cached in made:
        cached.cache_clear()


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many kernels were compiled at a time, whenever some were."""
    sizes, together = [], compiling.together

    def counted(jobs: compiling.Jobs) -> None:
        sizes.extend([len(jobs)] if jobs else [])
        together(jobs)

    monkeypatch.setattr(compiling, "together", counted)
    return sizes
