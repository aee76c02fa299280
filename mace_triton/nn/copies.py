"""Deep copies of MACE's models."""

from __future__ import annotations

import copy

import torch
from mace.modules.symmetric_contraction import EmptyParam


def copy_of(model: torch.nn.Module) -> torch.nn.Module:
    """A deep copy; `copy.deepcopy` cannot copy MACE's EmptyParam, the weight of paths that do not exist (use_so3)."""
    memo = {id(p): EmptyParam(p.detach()) for p in model.parameters() if type(p) is EmptyParam}
    return copy.deepcopy(model, memo)
