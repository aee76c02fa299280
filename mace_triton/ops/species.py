"""The species of each node, read from MACE's one-hot node attributes, and the nodes sorted by it, once a structure."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from .graph import capturing, compressed_rows


class SpeciesPlan(NamedTuple):
    """species [N] int32; perm [N] int32, the nodes in the order of their species; ptr [Z + 1] int32: those of species
    z are perm[ptr[z]] .. perm[ptr[z + 1] - 1]. Absent species have no nodes."""

    species: torch.Tensor
    perm: torch.Tensor
    ptr: torch.Tensor

    @property
    def count(self) -> int:
        """How many species there are, present or not."""
        return self.ptr.shape[0] - 1


@torch.library.custom_op("mace_triton::species_plan", mutates_args=())
def _sorted(species: torch.Tensor, count: int) -> list[torch.Tensor]:
    ptr, perm = compressed_rows(species, count)
    return [species.to(torch.int32), perm, ptr]


@_sorted.register_fake
def _(species, count):
    n = species.shape[0]
    return [species.new_empty(size, dtype=torch.int32) for size in (n, n, count + 1)]


def plan_of(species: torch.Tensor, count: int) -> SpeciesPlan:
    """The plan of nodes whose species [N] (int64, 0 .. count - 1) are known; the range is not checked."""
    return SpeciesPlan(*_sorted(species, count))


def check_plan(plan: SpeciesPlan, x: torch.Tensor) -> None:
    """Raise ValueError unless the plan was made for the nodes of x [N, ...], on its device."""
    if plan.species.shape[0] != x.shape[0]:
        raise ValueError(f"plan: it was made for {plan.species.shape[0]} nodes, but x has {x.shape[0]}")
    if plan.species.device != x.device:
        raise ValueError(f"plan is on {plan.species.device}, x on {x.device}: move them together")


def one_species(nodes: int, device: torch.device) -> SpeciesPlan:
    """The plan of nodes that are all alike."""
    perm = torch.arange(nodes, dtype=torch.int32, device=device)
    ptr = nodes * torch.arange(2, dtype=torch.int32, device=device)  # a CUDA graph cannot capture a copy from the host
    return SpeciesPlan(torch.zeros_like(perm), perm, ptr)


_last: tuple | None = None
_given = threading.local()


@contextmanager
def given(node_attrs: torch.Tensor, plan: SpeciesPlan | None) -> Iterator[None]:
    """Inside, in this thread, `species_plan` gives `plan` for these node_attrs: their nodes are sorted already."""
    _given.plan = node_attrs, plan
    try:
        yield
    finally:
        _given.plan = None


def species_plan(node_attrs: torch.Tensor) -> SpeciesPlan | None:
    """The plan of one-hot `node_attrs` [N, Z]; None when some row is not one-hot.

    The answer needs one synchronisation; it is kept and given again for the same, unchanged tensor. Under capture of a
    CUDA graph and in torch.compile the rows are taken to be one-hot, as they were in the warm-up run.

    Raises ValueError for another shape.
    """
    global _last
    if node_attrs.ndim != 2 or node_attrs.shape[1] == 0:
        raise ValueError(f"node_attrs must have shape [N, Z], got {list(node_attrs.shape)}")
    known = getattr(_given, "plan", None)
    if known is not None and known[0] is node_attrs:
        return known[1]
    count = node_attrs.shape[1]
    if torch.compiler.is_compiling() or capturing(node_attrs):
        return plan_of(node_attrs.argmax(dim=1), count)
    if node_attrs.is_inference():  # has no version to tell whether it changed
        return _checked(node_attrs, count)
    if _last is None or _last[0] is not node_attrs or _last[1] != node_attrs._version:
        _last = (node_attrs, node_attrs._version, _checked(node_attrs, count))
    return _last[2]


def _checked(node_attrs: torch.Tensor, count: int) -> SpeciesPlan | None:
    attrs = node_attrs.detach()
    one_hot = ((attrs == 1).sum(dim=1) == 1) & ((attrs != 0).sum(dim=1) == 1)
    return plan_of(attrs.argmax(dim=1), count) if bool(one_hot.all()) else None
