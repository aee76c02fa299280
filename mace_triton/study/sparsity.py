"""2:4 sparsity of equivariant linears: of each four weights along the inputs, two are kept. Explored in docs/studies.

Mishra et al., arXiv 2104.08378: the pattern that NVIDIA's sparse tensor cores take.
"""

from __future__ import annotations

import mace  # noqa: F401  before e3nn, see mace_triton/__init__.py
import torch
from e3nn import o3
from torch import Tensor

from ..linear_problem import LinearProblem
from ..nn.linear import IrrepsLinear


def mask_of(w: Tensor) -> Tensor:
    """True for the larger two of each four in a row of w [inputs, outputs], along the inputs; rests are kept whole."""
    inputs, outputs = w.shape
    whole = inputs - inputs % 4
    groups = w[:whole].detach().abs().reshape(whole // 4, 4, outputs)
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(2, dim=1).indices, True)
    return torch.cat([kept.reshape(whole, outputs), torch.ones_like(w[whole:], dtype=torch.bool)])


def pruned(w: Tensor) -> Tensor:
    """w [inputs, outputs] with two of each four zero."""
    return w * mask_of(w)


def linear_masks(model: torch.nn.Module) -> dict[str, Tensor]:
    """Masks by parameter name of the linears between channels, e3nn's or ours; readouts and embeddings stay whole."""
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, o3.Linear | IrrepsLinear) or not name.startswith(("interactions", "products")):
            continue
        problem = module.problem if isinstance(module, IrrepsLinear) else LinearProblem.from_module(module)
        mask = torch.ones_like(module.weight, dtype=torch.bool)
        for block in problem.blocks:
            place = slice(block.weight, block.weight + block.slot_in.mul * block.slot_out.mul)
            matrix = module.weight[place].reshape(block.slot_in.mul, block.slot_out.mul)
            mask[place] = mask_of(matrix).reshape(-1)
        found[f"{name}.weight"] = mask
    if not found:
        raise ValueError("model: it has no linear between channels to prune")
    return found


@torch.no_grad()
def prune_linears(model: torch.nn.Module, masks: dict[str, Tensor] | None = None) -> torch.nn.Module:
    """The model with its linears pruned, in place; masks: None takes those of its own weights."""
    parameters = dict(model.named_parameters())
    for name, mask in (masks or linear_masks(model)).items():
        parameters[name].mul_(mask)
    return model
