"""Edge vectors on our kernel in a model whose forward stays MACE's own.

MACE computes them in a function, not in a module that could be replaced, and the gradient of its `positions[receiver]`
sorts all edges anew in every pass: most of the launches that vectors and their gradient take. So a function of ours
stands in for MACE's while an accelerated model runs, and only then. Another model that runs meanwhile, in another
thread, gets the same numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import mace  # noqa: F401  before e3nn, see mace_triton/__init__.py
import torch
from mace.modules import models, utils

from ..ops.edge_embedding import edge_vectors

NAME = "get_edge_vectors_and_lengths"
_plain = getattr(utils, NAME)
_places = (utils, models)
"""The modules of MACE that look the function up under its name; `extensions` goes through `utils`."""

_given = threading.local()
_lock = threading.Lock()
_running: set[tuple[int, int]] = set()
"""(thread, model) of the forwards under way."""


def vectors_and_lengths(positions, edge_index, shifts, normalize: bool = False, eps: float = 1e-9):
    """MACE's `get_edge_vectors_and_lengths`: vectors [E, 3] and lengths [E, 1] in angstrom."""
    known = getattr(_given, "vectors", None)
    if known is not None and known[0] is edge_index and not normalize:
        return known[1:]
    if normalize or torch.compiler.is_compiling() or shifts.dtype != positions.dtype:
        return _plain(positions, edge_index, shifts, normalize, eps)
    return edge_vectors(positions, edge_index, shifts)


@contextmanager
def given(edge_index: torch.Tensor, vectors: torch.Tensor, lengths: torch.Tensor) -> Iterator[None]:
    """Inside, in this thread, accelerated models take these for this `edge_index`: made of more exact positions."""
    _given.vectors = edge_index, vectors, lengths
    try:
        yield
    finally:
        _given.vectors = None


def _use(function) -> None:
    for place in _places:
        setattr(place, NAME, function)


def _enter(model: torch.nn.Module, args: tuple) -> None:
    if torch.compiler.is_compiling():
        return
    with _lock:
        _running.add((threading.get_ident(), id(model)))
        _use(vectors_and_lengths)


def _leave(model: torch.nn.Module, args: tuple, output) -> None:
    if torch.compiler.is_compiling():
        return
    with _lock:
        _running.discard((threading.get_ident(), id(model)))
        if not _running:
            _use(_plain)


def attach(model: torch.nn.Module) -> None:
    """Let `model` take its edge vectors from our kernel; the hooks are copied and pickled with it."""
    model.register_forward_pre_hook(_enter)
    model.register_forward_hook(_leave, always_call=True)


def detach(model: torch.nn.Module) -> None:
    """Undo `attach`, if it was done."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (_enter, _leave)]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)


def attached(model: torch.nn.Module) -> bool:
    """Whether `attach` was done."""
    return _enter in model._forward_pre_hooks.values()
