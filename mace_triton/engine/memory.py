"""How much device memory a step takes, from shapes alone, before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..precision import TORCH_DTYPES, storage_for
from .buckets import ROOM

CANDIDATE_BYTES = 64
"""Of a candidate: sender, twin, number, two vectors in FP64, a flag."""
EDGE_NUMBERS = 37
"""Of an edge: harmonics up to l = 3 and their gradient, vector, length and its gradient."""
EDGE_BYTES = 108
"""Of an edge: sender and receiver, sender again, pair, candidate; two shifts, vector and length in FP64."""
NODE_COPIES = 1.25
"""Of features, messages and products of all layers together, gradients among them, at the peak."""


MOST = 256
"""Shares beyond which more of them save nothing."""
USABLE = 0.9
"""Of the memory that is free; the rest is left to others and to gaps."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of a step of so many atoms: weights of all edges, in pairs; the same without pairs, of which a share at a
    time will do; all else that grows with edges and atoms; the model with its tables.
    """

    atoms: int
    weights: int
    apart: int
    rest: int
    model: int

    @property
    def total(self) -> int:
        return self.weights + self.rest + self.model

    def shares(self, memory: int) -> int:
        """In how many shares weights must be made for a step to fit into `memory` bytes; 1: all at once."""
        if self.total <= memory:
            return 1
        left = max(memory - self.rest - self.model, 1)
        return min(MOST, max(2, -(-self.apart // left)))

    def in_shares(self, number: int) -> int:
        """Bytes of a step whose weights are made in so many shares."""
        return self.total if number == 1 else self.apart // number + self.rest + self.model

    def largest(self, memory: int) -> int:
        """How many atoms, as dense as these, fit into `memory` bytes, in as many shares as it takes."""
        return max(0, int(self.atoms * (memory - self.model) / (self.apart / MOST + self.rest)))

    def verdict(self, number: int, device: torch.device) -> str:
        """What so many shares take, and how many atoms would fit on a GPU, where these are too many."""
        most = self.largest(int(USABLE * torch.cuda.get_device_properties(device).total_memory))
        fitting = f"; about {most} atoms as dense as these would fit" if most < self.atoms else ""
        return f"it takes about {self.in_shares(number) / 2**30:.1f} GiB{fitting}"


def footprint(model: torch.nn.Module, atoms: int, edges: int, candidates: int) -> Footprint:
    """The peak of a step of an accelerated model that the engine writes out; an estimate, good to a tenth or so.

    Last layer: its weights and their slopes, for pairs of edges. Other layers make theirs anew, one after another.
    """
    size, pairs, blocks = next(model.parameters()).element_size(), (edges + 1) // 2, list(model.interactions)
    stored = [TORCH_DTYPES[storage_for(block.conv_tp.storage, block.conv_tp.output_mask.dtype)] for block in blocks]
    widths = [block.conv_tp.weight_numel * dtype.itemsize for block, dtype in zip(blocks, stored, strict=True)]
    hidden = sum(block.conv_tp_weights.layers[-1].weight.shape[0] for block in blocks)
    nodes = sum(_node_numbers(block, product) for block, product in zip(blocks, model.products, strict=True))
    rest = 2 * hidden * size * pairs + (EDGE_NUMBERS * size + EDGE_BYTES) * edges + CANDIDATE_BYTES * candidates
    rest += int(NODE_COPIES * nodes * size) * atoms
    own = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    return Footprint(atoms, 2 * max(widths) * pairs, int(2 * max(widths) * ROOM * edges), rest, own)


def unused(device: torch.device) -> int | None:
    """Bytes that a step may take of what is free on a GPU, torch's own reserve included; None on a CPU."""
    if device.type != "cuda":
        return None
    own = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(USABLE * (torch.cuda.mem_get_info(device)[0] + own))


def _node_numbers(block: torch.nn.Module, product: torch.nn.Module) -> int:
    """Numbers of one layer's features, message, linear and result, of one node."""
    return (
        block.linear_up.problem.dim_out
        + block.conv_tp.problem.dim_out
        + block.linear.problem.dim_out
        + (product.linear.problem.dim_out)
    )
