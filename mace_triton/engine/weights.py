"""Whether a model is still what it was."""

from __future__ import annotations

import torch


class Weights:
    """Notices parameters, buffers and modules of a model that others have changed in place or replaced.

    Asked in every step of dynamics: it keeps the places where these stand, as walking through the tree of modules takes
    as long as a step of few atoms. Compiled modules (e3nn's products) hold constants and are left out.
    """

    def __init__(self, model: torch.nn.Module):
        modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
        self._children = [module._modules for module in modules if module._modules]
        self._tensors = [kept for module in modules for kept in (module._parameters, module._buffers) if kept]
        self._was = self._now()

    def _now(self) -> tuple[list, list]:
        tensors = [(t.data_ptr(), t._version) for kept in self._tensors for t in kept.values() if t is not None]
        return tensors, [child for kept in self._children for child in kept.values()]

    def same(self) -> bool:
        """Whether nothing has changed."""
        return self._now() == self._was
