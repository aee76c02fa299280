"""Kernels of a model whose forward stays MACE's own, compiled side by side before they are first asked for.

Triton compiles a kernel when it is launched, so MACE's forward would wait for one after another. Before a model's first
call of a kind, a copy of it takes the same call with the launches of kernels that are not compiled yet noted instead
(`compiling.py`); then all of them compile at once, and the call itself finds them ready. What the copy gives is nowhere
to be seen: an error comes again in the call itself.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from functools import cache

import mace  # noqa: F401  before e3nn, see mace_triton/__init__.py
import torch
from torch.utils.hooks import RemovableHandle

from ..compiling import side_by_side
from ..ops import dispatch
from . import edge_vectors
from .copies import copy_of

LEFT_ALONE = ("compute_hessian", "lammps_mliap")
"""Calls of these kinds are not made twice: a way back for each coordinate, and messages to LAMMPS's other processes."""
IN_A_LOSS = ("energy", "forces", "virials", "stress", "dipole")
"""Results that a training step differentiates once more."""


class CompileAhead:
    """The hook before a model's forward. Copies and pickles of a model begin anew.

    A pickle keeps the numbers of a model's hooks, but PyTorch counts them from zero in each process: without their
    handles, which do as much, others would take the places of these.
    """

    def __init__(self) -> None:
        self.seen: set[tuple] = set()
        self.number = -1
        """Its own, the last that `accelerate` gives."""

    def __getstate__(self) -> dict:
        return {"number": self.number}

    def __setstate__(self, state: dict) -> None:
        self.seen, self.number = set(), state["number"]
        RemovableHandle.next_id = max(RemovableHandle.next_id, self.number + 1)

    def __call__(self, model: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        if torch.compiler.is_compiling():
            return
        call = _bound(model, args, kwargs)
        flags = {name: value for name, value in call.items() if isinstance(value, bool)}
        device = _device(call.get("data"))
        if device is None or any(flags.get(name) for name in LEFT_ALONE):
            return
        kind = (device, torch.is_grad_enabled(), *flags.items())
        if kind not in self.seen:
            self.seen.add(kind)
            _compile(model, call["data"], args[1:], {k: v for k, v in kwargs.items() if k != "data"}, flags)


@cache
def _signature(kind: type[torch.nn.Module]) -> inspect.Signature:
    return inspect.signature(kind.forward)


def _bound(model: torch.nn.Module, args: tuple, kwargs: dict) -> dict:
    """A call's arguments by name; none for a call that forward does not take, and it will say so."""
    try:
        return _signature(type(model)).bind(model, *args, **kwargs).arguments
    except TypeError:
        return {}


def _device(data: object) -> torch.device | None:
    """The GPU that a call with this `data` runs on; None where there is nothing to compile, or no moment for it."""
    positions = data.get("positions") if isinstance(data, dict) else None
    if not torch.is_tensor(positions) or not positions.is_cuda or torch.cuda.is_current_stream_capturing():
        return None
    return positions.device


def _compile(model: torch.nn.Module, data: dict, args: tuple, kwargs: dict, flags: dict[str, bool]) -> None:
    """Of a copy, on copies: what a model keeps of its weights, or `data` of a call, would never be written."""
    one_thread = torch.autograd.set_multithreading_enabled(False)
    with side_by_side(), suppress(Exception), dispatch.uncounted(), one_thread:
        data = {key: _copied(value) for key, value in data.items()}
        _way_back(_alone(model)(data, *args, **kwargs), data, flags)


def _alone(model: torch.nn.Module) -> torch.nn.Module:
    """A copy without the hooks that others put on the model."""
    copied = copy_of(model)
    for module in copied.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
        module._backward_pre_hooks.clear()
        module._backward_hooks.clear()
    if edge_vectors.attached(model):
        edge_vectors.attach(copied)
    return copied


def _copied(value: object) -> object:
    return value.detach().clone().requires_grad_(value.requires_grad) if torch.is_tensor(value) else value


def _way_back(out: dict, data: dict, flags: dict[str, bool]) -> None:
    """What is likely to be asked of the results of such a call."""
    if flags.get("training"):
        found = [out[key] for key in IN_A_LOSS if torch.is_tensor(out.get(key)) and out[key].requires_grad]
        sum(value.sum() for value in found).backward()
    elif flags.get("compute_force") is False:
        wanted = [value for value in data.values() if torch.is_tensor(value) and value.requires_grad]
        torch.autograd.grad(out["energy"].sum(), wanted, allow_unused=True)


def attach(model: torch.nn.Module) -> None:
    """Let `model` compile ahead."""
    hook = CompileAhead()
    hook.number = model.register_forward_pre_hook(hook, prepend=True, with_kwargs=True).id


def detach(model: torch.nn.Module) -> None:
    """Undo `attach`, if it was done."""
    for key in [key for key, hook in model._forward_pre_hooks.items() if isinstance(hook, CompileAhead)]:
        del model._forward_pre_hooks[key]
        model._forward_pre_hooks_with_kwargs.pop(key, None)
