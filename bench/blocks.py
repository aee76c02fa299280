"""What is measured: every block at every shape, its inputs, its FP64 reference and the parity gate before timing.

A case knows its problem; `prepare` builds one provider for it, checks it against the reference and hands back the
calls to time. The reference is always e3nn's own formula in FP64 on the very inputs the provider gets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from e3nn import o3
from torch import Tensor

from mace_triton.layout import convert_layout
from mace_triton.linear_problem import LinearProblem
from mace_triton.problem import ChannelwiseTPProblem
from mace_triton.study.store import relative_error

from . import providers, structures, timing
from .rows import OURS, Row

DIRECTIONS = ("forward", "forward+backward")
HIDDEN = {"small": "{c}x0e", "medium": "{c}x0e+{c}x1o", "large": "{c}x0e+{c}x1o+{c}x2e"}
"""Hidden irreps of the MACE-MP models, c channels. The first layer of all three sees small's 0e features."""
HARMONICS = "1x0e+1x1o+1x2e+1x3o"
TARGET = "{c}x0e+{c}x1o+{c}x2e+{c}x3o"
REFERENCE_EDGES = 16384  # the FP64 reference walks the edges in pieces of this many

STORED_AS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
"""Relative error allowed by the dtype a result is stored in, its sums being FP32 (FP64): twice the unit roundoff of
the 16-bit types; FP32 leaves room for sums over 3 x 128 channels and a hundred edges."""
OPERANDS = {"fp64": 1e-12, "fp32": 1e-5, "tf32": 1e-3, "fp16": 1e-3, "bf16": 8e-3}
"""Relative error allowed by the operand precision of a matrix product: about twice the operands' unit roundoff."""


class ParityError(RuntimeError):
    """The provider's result is not the reference's: it is not timed."""


def gate(results: dict[str, Tensor], reference: dict[str, Tensor], tolerance: dict[str, float]) -> dict[str, float]:
    """Relative error by name. Raises ParityError naming the result that is off, or has another shape."""
    errors = {}
    for name, expected in reference.items():
        got = results[name]
        if got.shape != expected.shape:
            raise ParityError(f"{name} has shape {list(got.shape)}, the reference {list(expected.shape)}")
        errors[name] = relative_error(got, expected)
        if not errors[name] <= tolerance[name]:
            raise ParityError(f"{name}: relative error {errors[name]:.2e}, allowed {tolerance[name]:.0e}")
    return errors


def poison(like: Tensor) -> None:
    """Leave NaN in the memory the next outputs are likely to get, so that an element never written is seen."""
    torch.full_like(like, torch.nan)


@dataclass
class Prepared:
    """A provider that passed its gate: calls per direction (one per input set), work per direction, and errors."""

    calls: dict[str, list[Callable[[], object]]]
    bytes: dict[str, int]
    flops: dict[str, int]
    errors: dict[str, float]
    extra: Row = field(default_factory=dict)


def _both(work: dict[str, int]) -> dict[str, int]:
    """Work of the two directions we time, from that of the forward and the backward pass."""
    return {"forward": work["forward"], "forward+backward": work["forward"] + work["backward"]}


def _forward_call(block: providers.Block, inputs: tuple[Tensor, ...], precision: str) -> Callable[[], object]:
    def call():
        with torch.no_grad(), providers.matmul_precision(precision):
            return block.call(*inputs)

    return call


def _training_call(block, inputs, wanted: tuple[Tensor, ...], g, precision: str) -> Callable[[], object]:
    """A call that gives the result and the gradients of `wanted`; g: the result's gradient, or those of its parts."""

    def call():
        with providers.matmul_precision(precision):
            out = block.call(*inputs)
            return out, torch.autograd.grad(out, wanted, g)

    return call


def _leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().contiguous().requires_grad_(True) for t in tensors)


def _randn(rows: int, width: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, width, dtype=dtype, device=device, generator=generator)


def _generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)


@dataclass(frozen=True)
class ConvCase:
    """conv_tp of a MACE-MP model's second layer on a water box; "small" is also the first layer of all three."""

    name: str
    atoms: int
    channels: int = 128
    block: str = "conv_tp"

    @property
    def problem(self) -> ChannelwiseTPProblem:
        hidden, target = (t.format(c=self.channels) for t in (HIDDEN[self.name], TARGET))
        return ChannelwiseTPProblem.from_mace(hidden, HARMONICS, target)

    @property
    def edges(self) -> int:
        return structures.graph(self.atoms).n_edges

    def edge_index(self, device: torch.device) -> Tensor:
        return torch.from_numpy(structures.graph(self.atoms).edge_index).to(device)

    def inputs(self, precision: str, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        """(x, y, w, g) in mul_ir: features, harmonics, stored weights, and the gradient of the output."""
        p, dtype, generator = self.problem, providers.model_dtype(precision), _generator(device, seed)
        x = _randn(self.atoms, p.dim_in1, dtype, device, generator)
        y = _randn(self.edges, p.dim_in2, dtype, device, generator)
        w = _randn(self.edges, p.weight_numel, dtype, device, generator).to(providers.STORAGE[precision])
        return x, y, w, _randn(self.atoms, p.dim_out, dtype, device, generator)

    def work(self, precision: str) -> tuple[dict[str, int], dict[str, int]]:
        size, stored = (t.itemsize for t in (providers.model_dtype(precision), providers.STORAGE[precision]))
        p = self.problem
        return _both(p.min_bytes(self.atoms, self.atoms, self.edges, size, stored)), _both(p.flops(self.edges))

    def prepare(self, provider: str, precision: str, variant: str, device: torch.device) -> Prepared:
        p = self.problem
        block = providers.builder(self.block, provider)(p, precision, device, variant)
        work, flops = self.work(precision)
        edge_index, calls = self.edge_index(device), {d: [] for d in DIRECTIONS}
        for seed in range(timing.sets_beyond_cache(work["forward"], device)):
            x, y, w, g = self.inputs(precision, device, seed)
            x = convert_layout(x, p.irreps_in1, "mul_ir", block.layout_in)
            g = convert_layout(g, p.irreps_out, "mul_ir", block.layout_out)
            x, y, w = _leaves(x, y, w)
            calls["forward"].append(_forward_call(block, (x, y, w, edge_index), precision))
            calls["forward+backward"].append(_training_call(block, (x, y, w, edge_index), (x, y, w), g, precision))
        reference = conv_reference(self, precision, device)
        poison(w)
        poison(g)
        out, (gx, gy, gw) = calls["forward+backward"][0]()
        results = {
            "out": convert_layout(out, p.irreps_out, block.layout_out, "mul_ir"),
            "gx": convert_layout(gx, p.irreps_in1, block.layout_in, "mul_ir"),
            "gy": gy,
            "gw": gw,
        }
        # Ours promises FP32 sums whatever the weights are stored in; a peer may round to the storage dtype inside.
        floor = 0.0 if provider == OURS else STORED_AS[w.dtype]
        errors = gate(results, reference, {name: max(floor, STORED_AS[t.dtype]) for name, t in results.items()})
        return Prepared(calls, work, flops, errors, {"edges": self.edges})


@lru_cache(maxsize=1)
def conv_reference(case: ConvCase, precision: str, device: torch.device) -> dict[str, Tensor]:
    """e3nn's TensorProduct in FP64, a piece of the edges at a time: the output and the three gradients."""
    x, y, w, g = case.inputs(precision, device, seed=0)
    x, g = x.to(torch.float64).requires_grad_(True), g.to(torch.float64)
    edge_index, block = case.edge_index(device), providers.conv_e3nn(case.problem, "fp64", device)
    out, gx = torch.zeros_like(g), torch.zeros_like(x)
    gy, gw = (torch.empty(t.shape, dtype=torch.float64, device=device) for t in (y, w))
    for start in range(0, case.edges, REFERENCE_EDGES):
        piece = slice(start, start + REFERENCE_EDGES)
        yp, wp = (t[piece].to(torch.float64).requires_grad_(True) for t in (y, w))
        part = block.call(x, yp, wp, edge_index[:, piece])
        gxp, gy[piece], gw[piece] = torch.autograd.grad(part, (x, yp, wp), g)
        out += part.detach()
        gx += gxp
    return {"out": out, "gx": gx, "gy": gy, "gw": gw}


@dataclass(frozen=True)
class LinearCase:
    """An o3.Linear of MACE-MP: "up-*" is linear_up (hidden to hidden), "mid-*" the linear behind conv_tp of layer 2."""

    name: str
    atoms: int
    channels: int = 128

    @property
    def block(self) -> str:
        return "linear_up" if self.name.startswith("up") else "linear"

    @property
    def irreps(self) -> tuple[str, str]:
        size = self.name.split("-")[1]
        if self.name.startswith("up"):
            hidden = HIDDEN[size].format(c=self.channels)
            return hidden, hidden
        problem = ConvCase(size, self.atoms, self.channels).problem
        return problem.irreps_out, TARGET.format(c=self.channels)

    def inputs(self, precision: str, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        """(x, g, weight), x and g in mul_ir; the weight is the same for every seed."""
        irreps_in, irreps_out = (o3.Irreps(i) for i in self.irreps)
        dtype, generator = providers.model_dtype(precision), _generator(device, seed)
        x = _randn(self.atoms, irreps_in.dim, dtype, device, generator)
        g = _randn(self.atoms, irreps_out.dim, dtype, device, generator)
        count = LinearProblem(*self.irreps).weight_numel
        return x, g, _randn(1, count, dtype, device, _generator(device, 1000))[0]

    def prepare(self, provider: str, precision: str, variant: str, device: torch.device) -> Prepared:
        irreps_in, irreps_out = self.irreps
        problem, size = LinearProblem(irreps_in, irreps_out), providers.model_dtype(precision).itemsize
        block = providers.builder("linear", provider)(irreps_in, irreps_out, precision, device, variant)
        weight, calls = block.weight, {d: [] for d in DIRECTIONS}
        with torch.no_grad():
            weight.copy_(self.inputs(precision, device, 0)[2].reshape(weight.shape))
        work = _both(problem.min_bytes(self.atoms, size, size))
        for seed in range(timing.sets_beyond_cache(work["forward"], device)):
            x, g, _ = self.inputs(precision, device, seed)
            (x,) = _leaves(convert_layout(x, irreps_in, "mul_ir", block.layout_in))
            g = convert_layout(g, irreps_out, "mul_ir", block.layout_out)
            calls["forward"].append(_forward_call(block, (x,), precision))
            calls["forward+backward"].append(_training_call(block, (x,), (x, weight), g, precision))
        reference = _linear_reference(self, precision, device)
        poison(g)
        out, (gx, gw) = calls["forward+backward"][0]()
        results = {
            "out": convert_layout(out, irreps_out, block.layout_out, "mul_ir"),
            "gx": convert_layout(gx, irreps_in, block.layout_in, "mul_ir"),
            "gw": gw.reshape(-1),
        }
        errors = gate(results, reference, dict.fromkeys(results, OPERANDS[precision]))
        return Prepared(calls, work, _both(problem.flops(self.atoms)), errors)


@lru_cache(maxsize=1)
def _linear_reference(case: LinearCase, precision: str, device: torch.device) -> dict[str, Tensor]:
    x, g, weight = (t.to(torch.float64) for t in case.inputs(precision, device, seed=0))
    block = providers.linear_e3nn(*case.irreps, "fp64", device)
    with torch.no_grad():
        block.weight.copy_(weight)
    x.requires_grad_(True)
    out = block.call(x)
    gx, gw = torch.autograd.grad(out, (x, block.weight), g)
    return {"out": out.detach(), "gx": gx, "gw": gw}
