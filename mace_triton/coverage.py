"""Which parts of MACE have no kernel of ours, and why: the words that `report` prints for them."""

from __future__ import annotations

import mace  # noqa: F401  before e3nn, see mace_triton/__init__.py
import torch
from e3nn import nn
from mace.modules import blocks, embeddings, field_blocks, gate, lora, radial

HOSTS = (blocks.__name__, field_blocks.__name__, lora.__name__)
"""Modules of MACE whose classes were read and only ever call their linears; another class may do more with them."""

KEPT: dict[type, str] = {
    nn.FullyConnectedNet: "a network on the nodes; only the radial ones of the edges have a kernel",
    radial.ZBLBasis: "elementwise sums over the edges without trained matrices; no kernel fuses them",
    gate.GatedEquivariantBlock: "elementwise on the nodes; no kernel fuses it into the linears beside it",
    embeddings.GenericJointEmbedding: "a look-up of one row a graph and one matrix product; PyTorch's are as good",
    field_blocks.SparseUvuTensorProduct: "a weight for each pair of channels, which no kernel of ours has",
}
"""Class -> reason."""

FOREIGN = {
    "graph_longrange": "long-range electrostatics of the package graph_longrange, no kernel of ours",
    "les": "latent Ewald summation of the package les, no kernel of ours",
}
"""Top-level package -> reason; `report` gives one row for each whole module of theirs."""


def foreign_reason(module: torch.nn.Module) -> str:
    """Why a module of another package is left alone; empty for MACE's, e3nn's and PyTorch's."""
    return FOREIGN.get(type(module).__module__.split(".")[0], "")


def kept_reason(module: torch.nn.Module) -> str:
    """Why a module without a kernel runs MACE's code; empty for one that is no block of its own."""
    return foreign_reason(module) or next((why for kind, why in KEPT.items() if isinstance(module, kind)), "")
