"""Which implementation runs: the Triton kernel or the plain PyTorch reference, and a count of what ran."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

calls: Counter[tuple[str, str]] = Counter()
"""(op, backend) -> how often it ran; tests read it to prove that the accelerated path was taken."""


def interpreting() -> bool:
    """True when Triton's interpreter runs the kernels (TRITON_INTERPRET=1), so that they accept CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def backend(tensor: torch.Tensor) -> str:
    """ "triton" for a tensor on a GPU (or any tensor under the interpreter), else "reference"."""
    return "triton" if tensor.is_cuda or interpreting() else "reference"


def wanted(ctx, argument: int) -> bool:
    """Whether this backward pass leads on to an argument's gradient; all arguments before it must be tensors.

    `needs_input_grad` only tells whether some pass might: forces are asked for while the weights require gradients.
    """
    if not ctx.needs_input_grad[argument]:
        return False
    try:
        node = ctx.next_functions[argument][0]
        return torch._C._will_engine_execute_node(node)
    except (AttributeError, IndexError, RuntimeError, TypeError):
        return True  # a leaf that the pass was asked for, or an autograd that keeps no such list


def count(op: str, which: str) -> None:
    """Note that `op` ran on backend `which`."""
    calls[op, which] += 1


@contextmanager
def uncounted() -> Iterator[None]:
    """Inside, what runs leaves no trace in `calls`."""
    before = calls.copy()
    try:
        yield
    finally:
        calls.clear()
        calls.update(before)
