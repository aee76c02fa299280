"""The radial networks: features of each edge to the weights of conv_tp, three hidden layers of 64.

RadialCase is that of MACE-MP, on 8 features. NormCase is the one with layer norms of the nonlinear block, on 8 features
and the embeddings of both elements, as in MH-1.

"forward" and "forward+backward" are inference, where the weights are frozen and the gradient is that of the features;
"training" gives the gradients of features and weights. cuEquivariance and OpenEquivariance leave this part to e3nn.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from . import providers, timing
from .blocks import ConvCase, Prepared, _forward_call, _generator, _leaves, _randn, _training_call, gate, poison

DIRECTIONS = ("forward", "forward+backward", "training")
TOLERANCE = {"fp64": 1e-12, "fp32": 1e-5, "tf32": 3e-3, "bf16": 2e-2, "fp16": 3e-3}
"""Relative error allowed after four layers."""
FEATURES, HIDDEN, EMBEDDING = 8, (64, 64, 64), 512


@dataclass(frozen=True)
class RadialCase:
    """The network in front of the second layer's conv_tp of MACE-MP `name`, on the edges of a water box."""

    name: str
    atoms: int
    channels: int = 128
    block: str = "radial_mlp"

    @property
    def widths(self) -> tuple[int, ...]:
        return (FEATURES, *HIDDEN, ConvCase(self.name, self.atoms, self.channels).problem.weight_numel)

    @property
    def edges(self) -> int:
        return ConvCase(self.name, self.atoms, self.channels).edges

    def inputs(self, precision: str, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
        """Features x [E, widths[0]] and the gradient of the weights [E, widths[-1]]."""
        dtype, generator = providers.model_dtype(precision), _generator(device, seed)
        return tuple(
            _randn(self.edges, width, dtype, device, generator) for width in self.widths[:: len(self.widths) - 1]
        )

    def build(self, provider: str, precision: str, device: torch.device, training: bool = False) -> providers.Block:
        block = providers.builder(self.block, provider)(self.widths, precision, device)
        for weight in block.weights:
            weight.requires_grad_(training)
        return block

    def stored(self, precision: str) -> torch.dtype:
        """What the weights, and so their gradient, are stored in."""
        return providers.STORAGE.get(precision, providers.model_dtype(precision))

    def work(self, size: int) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes and operations of each direction."""
        moved = self.edges * (self.widths[0] + self.widths[-1]) * size
        products = 2 * self.edges * sum(a * b for a, b in zip(self.widths[:-1], self.widths[1:], strict=True))
        counts = dict(zip(DIRECTIONS, (1, 2, 3), strict=True))
        return {d: n * moved for d, n in counts.items()}, {d: n * products for d, n in counts.items()}

    def prepare(self, provider: str, precision: str, variant: str, device: torch.device) -> Prepared:
        block, trained = (self.build(provider, precision, device, training) for training in (False, True))
        work, flops = self.work(providers.model_dtype(precision).itemsize)
        calls = {d: [] for d in DIRECTIONS}
        for seed in range(timing.sets_beyond_cache(work["forward"], device)):
            x, g = self.inputs(precision, device, seed)
            (x,), g = _leaves(x), g.to(self.stored(precision))  # as conv_tp hands it back
            calls["forward"].append(_forward_call(block, (x,), precision))
            calls["forward+backward"].append(_training_call(block, (x,), (x,), g, precision))
            calls["training"].append(_training_call(trained, (x,), (x, *trained.weights), g, precision))
        exact = reference(self, precision, device)
        poison(g)
        out, (gx,) = calls["forward+backward"][0]()
        trained_out, (trained_gx, *gw) = calls["training"][0]()
        results = {"out": out, "gx": gx, "out in training": trained_out, "gx in training": trained_gx}
        results["gw"] = torch.cat([w.reshape(-1) for w in gw])
        wanted = {name: exact[name.split()[0]] for name in results}
        errors = gate(results, wanted, dict.fromkeys(results, TOLERANCE[precision]))
        return Prepared(calls, work, flops, errors, {"edges": self.edges})


@dataclass(frozen=True)
class NormCase(RadialCase):
    """MACE's RadialMLP in front of a conv_tp with the shape of MACE-MP `name`."""

    block: str = "norm_mlp"

    @property
    def widths(self) -> tuple[int, ...]:
        return (FEATURES + 2 * EMBEDDING, *RadialCase.widths.fget(self)[1:])

    def stored(self, precision: str) -> torch.dtype:
        """MACE multiplies these weights with the cutoff in the model's dtype."""
        return providers.model_dtype(precision)


@lru_cache(maxsize=1)
def reference(case: RadialCase, precision: str, device: torch.device) -> dict[str, Tensor]:
    """e3nn in FP64 on the inputs of seed 0."""
    x, g = (t.to(torch.float64) for t in case.inputs(precision, device, seed=0))
    block = case.build("e3nn", "fp64", device, training=True)
    x.requires_grad_(True)
    out = block.call(x)
    gx, *gw = torch.autograd.grad(out, (x, *block.weights), g)
    return {"out": out.detach(), "gx": gx, "gw": torch.cat([w.reshape(-1) for w in gw])}
