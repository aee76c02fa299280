"""Blocks whose weights depend on the species: skip_tp and the symmetric contraction, called as MACE calls them.

All species of a MACE-MP model have weights; the nodes are those of water. "forward" and "forward+backward" are
inference, where the weights are frozen and the gradient is that of x; "training" gives the gradients of x and weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from e3nn import o3
from torch import Tensor

from mace_triton.layout import convert_layout
from mace_triton.linear_problem import LinearProblem

from . import providers, structures, timing
from .blocks import (
    HIDDEN,
    OPERANDS,
    TARGET,
    Prepared,
    _forward_call,
    _generator,
    _leaves,
    _randn,
    _training_call,
    gate,
    poison,
)

DIRECTIONS = ("forward", "forward+backward", "training")


@dataclass(frozen=True)
class SpeciesCase:
    """What both blocks share: call(x, one_hot) -> [N, dim_out]."""

    name: str
    atoms: int
    channels: int = 128
    elements: int = 89

    def one_hot(self, precision: str, device: torch.device) -> Tensor:
        """[N, elements]: one structure, whatever the inputs, so what is done once a structure is done once."""
        numbers = torch.from_numpy(structures.water(self.atoms)[0]).to(device)
        one_hot = torch.nn.functional.one_hot((numbers - 1) % self.elements, self.elements)
        return one_hot.to(providers.model_dtype(precision))

    def inputs(self, precision: str, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
        """x and the gradient of the output, in mul_ir."""
        dtype, generator = providers.model_dtype(precision), _generator(device, seed)
        x, g = (_randn(self.atoms, o3.Irreps(i).dim, dtype, device, generator) for i in self.irreps)
        return self.shaped(x), g

    def build(self, provider: str, precision: str, device: torch.device, training: bool = False) -> providers.Block:
        block = providers.builder(self.block, provider)(*self.irreps, self.elements, precision, device)
        for weight in block.weights:
            weight.requires_grad_(training)
        return block

    def prepare(self, provider: str, precision: str, variant: str, device: torch.device) -> Prepared:
        block = self.build(provider, precision, device)
        trained = self.build(provider, precision, device, training=True)
        work, flops = self.work(providers.model_dtype(precision).itemsize)
        one_hot, calls = self.one_hot(precision, device), {d: [] for d in DIRECTIONS}
        for seed in range(timing.sets_beyond_cache(work["forward"], device)):
            x, g = self.inputs(precision, device, seed)
            (x,) = _leaves(self.moved(x, "mul_ir", block.layout_in))
            g = convert_layout(g, self.irreps[1], "mul_ir", block.layout_out)
            calls["forward"].append(_forward_call(block, (x, one_hot), precision))
            calls["forward+backward"].append(_training_call(block, (x, one_hot), (x,), g, precision))
            calls["training"].append(_training_call(trained, (x, one_hot), (x, *trained.weights), g, precision))
        exact = reference(self, precision, device)
        poison(g)
        out, (gx,) = calls["forward+backward"][0]()
        trained_out, (trained_gx, *gw) = calls["training"][0]()
        results = {
            "out": convert_layout(out, self.irreps[1], block.layout_out, "mul_ir"),
            "gx": self.moved(gx, block.layout_in, "mul_ir"),
            "out in training": convert_layout(trained_out, self.irreps[1], block.layout_out, "mul_ir"),
            "gx in training": self.moved(trained_gx, block.layout_in, "mul_ir"),
        }
        if block.weights_as_e3nn:
            results["gw"] = torch.cat([g.reshape(-1) for g in gw])
        wanted = {name: exact[name.split()[0]] for name in results}
        return Prepared(calls, work, flops, gate(results, wanted, dict.fromkeys(results, OPERANDS[precision])))

    def _directions(self, work: dict[str, int], training: dict[str, int]) -> dict[str, int]:
        """Work of each direction, from that of a pass forward, back to x, and back to x and the weights."""
        return dict(zip(DIRECTIONS, (work["forward"], sum(work.values()), sum(training.values())), strict=True))


@lru_cache(maxsize=1)
def reference(case: SpeciesCase, precision: str, device: torch.device) -> dict[str, Tensor]:
    x, g = (t.to(torch.float64) for t in case.inputs(precision, device, seed=0))
    block = case.build("e3nn", "fp64", device, training=True)
    x.requires_grad_(True)
    out = block.call(x, case.one_hot("fp64", device))
    gx, *gw = torch.autograd.grad(out, (x, *block.weights), g)
    return {"out": out.detach(), "gx": gx, "gw": torch.cat([w.reshape(-1) for w in gw])}


@dataclass(frozen=True)
class SpeciesLinearCase(SpeciesCase):
    """MACE's skip_tp: "up-*" from hidden to hidden irreps, "last-*" from hidden irreps to scalars (a last layer's)."""

    block: str = "species_linear"

    @property
    def irreps(self) -> tuple[str, str]:
        kind, size = self.name.split("-")
        return HIDDEN[size].format(c=self.channels), HIDDEN[size if kind == "up" else "small"].format(c=self.channels)

    def shaped(self, x: Tensor) -> Tensor:
        return x

    def moved(self, x: Tensor, source: str, target: str) -> Tensor:
        return convert_layout(x, self.irreps[0], source, target)

    def work(self, size: int) -> tuple[dict[str, int], dict[str, int]]:
        problem = LinearProblem(*self.irreps)
        x, out = (self.atoms * o3.Irreps(i).dim * size for i in self.irreps)
        weights = 2 * problem.weight_numel * size  # hydrogen and oxygen
        moved = {"forward": x + out + weights, "backward": x + out + weights}
        flops = problem.flops(self.atoms)
        halved = flops | {"backward": flops["forward"]}
        trained = moved | {"weights": x + out + weights}
        return self._directions(moved, trained), self._directions(halved, flops)


@dataclass(frozen=True)
class ContractionCase(SpeciesCase):
    """The symmetric contraction behind layer 1 of a MACE-MP model, correlation 3."""

    block: str = "symmetric_contraction"

    @property
    def irreps(self) -> tuple[str, str]:
        return TARGET.format(c=self.channels), HIDDEN[self.name].format(c=self.channels)

    def shaped(self, x: Tensor) -> Tensor:
        return x.reshape(self.atoms, self.channels, 16)

    def moved(self, x: Tensor, source: str, target: str) -> Tensor:
        return x if source == target else x.transpose(1, 2)

    def work(self, size: int) -> tuple[dict[str, int], dict[str, int]]:
        x, out = (self.atoms * o3.Irreps(i).dim * size for i in self.irreps)
        moved = {"forward": x + out, "backward": 2 * x + out}
        return self._directions(moved, moved | {"weights": x + out}), {}
