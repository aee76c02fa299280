"""From the vectors of a water box's edges to what a MACE-MP interaction needs of them: harmonics and radial weights.

Lengths, spherical harmonics to l = 3, 10 Bessel functions with the polynomial cutoff, then (but for case "features")
the radial network in front of the second layer's conv_tp. Weights are frozen, gradients are those of the vectors, as
for forces. e3nn stands for all providers of MACE here: none of them replaces these modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from . import providers, structures, timing
from .blocks import (
    DIRECTIONS,
    ConvCase,
    Prepared,
    _forward_call,
    _generator,
    _leaves,
    _randn,
    _training_call,
    gate,
    poison,
)

FEATURES, HIDDEN, HARMONICS, R_MAX = 10, (64, 64, 64), 16, 6.0
TOLERANCE = {"fp64": 1e-11, "fp32": 1e-5, "tf32": 3e-3, "bf16": 2e-2}
"""Relative error allowed: of the network's four layers, and in FP64 of FP32-free but long sums."""


@dataclass(frozen=True)
class WaterEdges:
    """The edges of a water box of so many atoms."""

    name: str
    atoms: int
    channels: int = 128

    @property
    def edges(self) -> int:
        return structures.graph(self.atoms, R_MAX).n_edges


@dataclass(frozen=True)
class EdgeCase(WaterEdges):
    """`name`: "features", without the network, or a MACE-MP model: with the network in front of its second layer."""

    block: str = "edge_embedding"

    @property
    def widths(self) -> tuple[int, ...]:
        if self.name == "features":
            return (FEATURES,)
        return (FEATURES, *HIDDEN, ConvCase(self.name, self.atoms, self.channels).problem.weight_numel)

    def inputs(self, precision: str, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors [E, 3] in angstrom, shaken a little, and the gradients of the harmonics and of the weights."""
        graph, dtype, generator = structures.graph(self.atoms, R_MAX), torch.float64, _generator(device, seed)
        sender, receiver = graph.edge_index
        vectors = torch.from_numpy(graph.positions[receiver] - graph.positions[sender] + graph.shifts).to(device)
        vectors = vectors + 0.01 * _randn(self.edges, 3, dtype, device, generator)
        gradients = (_randn(self.edges, width, dtype, device, generator) for width in (HARMONICS, self.widths[-1]))
        return tuple(t.to(providers.model_dtype(precision)) for t in (vectors, *gradients))

    def work(self, size: int) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes and operations of each direction; the products of the network alone are counted."""
        moved = self.edges * (3 + HARMONICS + self.widths[-1]) * size
        products = 2 * self.edges * sum(a * b for a, b in zip(self.widths[:-1], self.widths[1:], strict=True))
        return {d: n * moved for d, n in zip(DIRECTIONS, (1, 2), strict=True)}, {
            d: n * products for d, n in zip(DIRECTIONS, (1, 2), strict=True)
        }

    def prepare(self, provider: str, precision: str, variant: str, device: torch.device) -> Prepared:
        block = providers.builder(self.block, provider)(self.widths, R_MAX, precision, device)
        for weight in block.weights:
            weight.requires_grad_(False)
        work, flops = self.work(providers.model_dtype(precision).itemsize)
        calls = {d: [] for d in DIRECTIONS}
        for seed in range(timing.sets_beyond_cache(work["forward"], device)):
            vectors, *g = self.inputs(precision, device, seed)
            calls["forward"].append(_forward_call(block, (vectors,), precision))
            with torch.no_grad():  # a result stored in 16 bits gets its gradient in them
                g = [t.to(result.dtype) for t, result in zip(g, block.call(vectors), strict=True)]
            leaf = _leaves(vectors)
            calls["forward+backward"].append(_training_call(block, leaf, leaf, g, precision))
        exact = reference(self, precision, device)
        poison(g[-1])
        (harmonics, weights), (gv,) = calls["forward+backward"][0]()
        results = {"harmonics": harmonics, "weights": weights, "gv": gv}
        errors = gate(results, exact, dict.fromkeys(results, TOLERANCE[precision]))
        return Prepared(calls, work, flops, errors, {"edges": self.edges})

    def exact(self, precision: str, device: torch.device) -> dict[str, Tensor]:
        """e3nn in FP64 on the inputs of seed 0."""
        vectors, *g = (t.to(torch.float64) for t in self.inputs(precision, device, seed=0))
        block = providers.builder(self.block, "e3nn")(self.widths, R_MAX, "fp64", device)
        (vectors,) = _leaves(vectors)
        harmonics, weights = block.call(vectors)
        (gv,) = torch.autograd.grad((harmonics, weights), vectors, g)
        return {"harmonics": harmonics.detach(), "weights": weights.detach(), "gv": gv}


@dataclass(frozen=True)
class VectorsCase(WaterEdges):
    """Before that: the edges' vectors and lengths from the positions of a water box, and the gradient of these."""

    block: str = "edge_vectors"

    def inputs(self, precision: str, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Positions [N, 3], shaken a little, edge_index, shifts [E, 3], and the gradients of vectors and lengths."""
        graph, dtype, generator = structures.graph(self.atoms, R_MAX), torch.float64, _generator(device, seed)
        positions, shifts = (torch.from_numpy(a).to(device) for a in (graph.positions, graph.shifts))
        positions = positions + 0.01 * _randn(self.atoms, 3, dtype, device, generator)
        gradients = (_randn(self.edges, width, dtype, device, generator) for width in (3, 1))
        positions, shifts, *g = (t.to(providers.model_dtype(precision)) for t in (positions, shifts, *gradients))
        return positions, torch.from_numpy(graph.edge_index).to(device), shifts, g

    def prepare(self, provider: str, precision: str, variant: str, device: torch.device) -> Prepared:
        block = providers.builder(self.block, provider)(precision)
        work = dict.fromkeys(DIRECTIONS, self.edges * (16 + 7 * providers.model_dtype(precision).itemsize))
        calls = {d: [] for d in DIRECTIONS}
        edge_index = self.inputs(precision, device, 0)[1]  # one tensor, as in a step: what is known of it is kept
        for seed in range(timing.sets_beyond_cache(work["forward"], device)):
            positions, _, shifts, g = self.inputs(precision, device, seed)
            calls["forward"].append(_forward_call(block, (positions, edge_index, shifts), precision))
            leaf = _leaves(positions)
            call = _training_call(block, (*leaf, edge_index, shifts), leaf, g, precision)
            calls["forward+backward"].append(call)
        (v, r), (gx,) = calls["forward+backward"][0]()
        results = {"vectors": v, "lengths": r, "gx": gx}
        errors = gate(results, reference(self, precision, device), dict.fromkeys(results, TOLERANCE[precision]))
        return Prepared(calls, work, dict.fromkeys(DIRECTIONS, 0), errors, {"edges": self.edges})

    def exact(self, precision: str, device: torch.device) -> dict[str, Tensor]:
        """MACE in FP64 on the inputs of seed 0."""
        x, edge_index, shifts, g = self.inputs(precision, device, seed=0)
        (x,) = _leaves(x.double())
        v, r = providers.builder(self.block, "e3nn")("fp64").call(x, edge_index, shifts.double())
        (gx,) = torch.autograd.grad((v, r), x, [t.double() for t in g])
        return {"vectors": v.detach(), "lengths": r.detach(), "gx": gx}


@lru_cache(maxsize=1)
def reference(case: EdgeCase | VectorsCase, precision: str, device: torch.device) -> dict[str, Tensor]:
    return case.exact(precision, device)
