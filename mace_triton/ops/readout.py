"""A readout's energy of every node with its gradient, as a torch custom op.

The gradient comes with the energy, so the op has none of its own. GPU tensors (and, under Triton's interpreter, CPU
tensors) run `kernels/readout.py`, others `reference_readout.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference_readout as reference
from . import dispatch

MAX_SIZE = 1 << 14
"""Channels times hidden units, each rounded up to a power of two, that the kernel holds."""


@torch.library.custom_op("mace_triton::readout", mutates_args=())
def _readout(x: Tensor, first: Tensor | None, last: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    which = dispatch.backend(x)
    dispatch.count("readout", which)
    if which == "reference":
        return reference.readout(x, first, last, before)
    from ..kernels import readout as kernels

    first = None if first is None else first.contiguous()
    return kernels.readout(x.contiguous(), first, last.contiguous(), before.contiguous())


@_readout.register_fake
def _(x, first, last, before):
    return before.new_empty(before.shape), x.new_empty(x.shape)


def fits(channels: int, hidden: int) -> bool:
    """Whether the kernel holds the weights of such a readout."""
    return (1 << (channels - 1).bit_length()) * (1 << (hidden - 1).bit_length()) <= MAX_SIZE


def readout(x: Tensor, first: Tensor | None, last: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """(before + e [N] float64, de/dx [N, dim]) for e = x.last, or sum_j last_j silu((x first)_j).

    x [N, dim], of which the first C columns are read; first [C, hidden], or None; last [hidden], or [C] without it,
    all float64 or float32 alike; before [N] float64. Formulas: MACE 0.3.16 `LinearReadoutBlock`,
    `NonLinearReadoutBlock` of one head, with every factor of the energy in `last`.

    Raises ValueError for another shape or device and weights beyond `fits`, TypeError for another dtype.
    """
    channels, hidden = (last.numel(), 1) if first is None else (first.shape[0], first.shape[-1])
    if x.ndim != 2 or last.ndim != 1 or not 0 < channels <= x.shape[1] or (first is not None and first.ndim != 2):
        raise ValueError(f"x, first and last must be [N, dim], [C, hidden] and [hidden], got {list(x.shape)} for x")
    if first is not None and last.shape[0] != hidden:
        raise ValueError(f"last must have shape [{hidden}], as first has columns, got {list(last.shape)}")
    if not fits(channels, hidden):
        raise ValueError(f"first: {channels} channels times {hidden} hidden units are too many")
    if before.shape != (x.shape[0],) or before.dtype != torch.float64:
        raise ValueError(f"before must be float64 [{x.shape[0]}], got {before.dtype} {list(before.shape)}")
    tensors = [t for t in (x, first, last) if t is not None]
    if x.dtype not in (torch.float64, torch.float32) or {t.dtype for t in tensors} != {x.dtype}:
        raise TypeError(f"x, first and last must all be float64 or all float32, got {[t.dtype for t in tensors]}")
    if len({t.device for t in (*tensors, before)}) != 1:
        raise ValueError("x, first, last and before must be on one device")
    return _readout(x, first, last, before)
