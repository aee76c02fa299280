"""Which implementation runs: the Triton kernel or the plain PyTorch reference, and a count of what ran."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

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


@lru_cache(maxsize=8)
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def beside(results: list[torch.Tensor], like: torch.Tensor) -> Iterator[None]:
    """Launch what is inside on a second stream of the GPU of `like`; `join` waits for it. On a CPU nothing changes.

    For kernels that do not fill a GPU alone. results: the block appends the tensors it made that outlive it.
    """
    if not like.is_cuda:
        yield
        return
    current, second = torch.cuda.current_stream(like.device), _second_stream(like.device)
    second.wait_stream(current)
    with torch.cuda.stream(second):
        yield
    for tensor in results:
        tensor.record_stream(current)


def join(like: torch.Tensor) -> None:
    """Let the current stream wait for what `beside` launched."""
    if like.is_cuda:
        torch.cuda.current_stream(like.device).wait_stream(_second_stream(like.device))
