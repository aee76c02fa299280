"""A tensor that is made from parameters and kept until one of them changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


class Derived:
    """What `make` gave for the parameters as they were. Copies and pickles start empty.

    Parameters that carry a gradient are in training; nothing is kept for them. An average of the weights may then be
    swapped in through `.data`, as torch_ema does for MACE's trainer, and that leaves no trace in their version.
    """

    def __init__(self) -> None:
        self.version: tuple | None = None
        self.value: torch.Tensor | None = None

    def get(self, weights: Sequence[torch.Tensor], make: Callable[[], torch.Tensor], word: str = "") -> torch.Tensor:
        """The kept value; made anew, without gradient, where a weight (or `word`) is another one than last time."""
        if any(w.is_leaf and w.grad is not None for w in weights):
            with torch.no_grad():
                return make()
        version = (word, *((w.data_ptr(), None if w.is_inference() else w._version, w.device) for w in weights))
        if version != self.version:
            with torch.no_grad():
                self.version, self.value = version, make()
        return self.value

    def __deepcopy__(self, memo: dict) -> Derived:
        return Derived()

    def __reduce__(self) -> tuple:
        return Derived, ()
