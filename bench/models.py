"""Whole MACE-MP-shaped models with random weights on a water box: energy and forces, and a training step."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from . import blocks, providers, structures, timing
from .blocks import Prepared
from .rows import Row

ELEMENTS = tuple(z for z in range(1, 95) if z not in (84, 85, 86, 87, 88))  # the 89 of MACE-MP-0
DIRECTIONS = ("energy+forces", "training step")
OUR_BLOCKS = re.compile(
    r"interactions\.\d+\.(linear_up|conv_tp|linear|skip_tp)|products\.\d+\.(symmetric_contractions|linear)|"
    r"readouts\.\d+\.linear\w*"
)
TOLERANCE = {"fp64": 1e-9, "fp32": 1e-4, "tf32": 1e-2, "fp16": 1e-2, "bf16": 1e-1}
"""Relative error allowed in forces and parameter gradients, whose sums cancel; certify() holds the physical budgets."""
FORCE_WEIGHT = 100.0


@lru_cache(maxsize=2)
def mp_model(name: str, channels: int = 128, elements: tuple[int, ...] = ELEMENTS, seed: int = 0) -> torch.nn.Module:
    """A ScaleShiftMACE in FP64 on the CPU with MACE-MP-0's hyperparameters and random weights."""
    from mace_triton.dev_engine import random_model

    return random_model(name, channels, elements, 6.0, seed)


def batch(
    n_atoms: int, elements: tuple[int, ...], dtype: torch.dtype, device: torch.device, seeds: tuple[int, ...] = (0,)
) -> dict[str, Tensor]:
    """MACE's input dictionary of water boxes, one of n_atoms for each seed; positions and cells in angstrom."""
    graphs = [structures.graph(n_atoms, seed=seed) for seed in seeds]
    index = torch.tensor([elements.index(z) for graph in graphs for z in graph.numbers.tolist()])

    def joined(name: str) -> Tensor:
        return torch.cat([torch.from_numpy(getattr(graph, name)) for graph in graphs])

    floats = {name: joined(name) for name in ("positions", "shifts", "unit_shifts", "cell")}
    floats["node_attrs"] = torch.nn.functional.one_hot(index, len(elements))
    edges = [torch.from_numpy(graph.edge_index) + number * n_atoms for number, graph in enumerate(graphs)]
    integers = {
        "edge_index": torch.cat(edges, dim=1),
        "batch": torch.arange(len(graphs)).repeat_interleave(n_atoms),
        "ptr": n_atoms * torch.arange(len(graphs) + 1),
        "head": torch.zeros(len(graphs), dtype=torch.int64),
    }
    return {k: v.to(device=device, dtype=dtype) for k, v in floats.items()} | {
        k: v.to(device) for k, v in integers.items()
    }


def energy_forces(model: torch.nn.Module, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """Energy [1] in eV and forces [N, 3] in eV/angstrom, as MACECalculator asks for them."""
    out = model(dict(data), training=False, compute_force=True)
    return {"energy": out["energy"].detach(), "forces": out["forces"].detach()}


def training_gradients(model: torch.nn.Module, data: dict[str, Tensor], atoms: int | None = None) -> dict[str, Tensor]:
    """Gradients by parameter name of sum(energy^2) / N + weight x sum(forces^2) / 3N, the double backward included.

    N: the number of atoms, or `atoms` where data is a part of the batch that the loss is of.
    """
    out = model(dict(data), training=True, compute_force=True)
    n = atoms or len(data["positions"])
    loss = out["energy"].square().sum() / n + FORCE_WEIGHT * out["forces"].square().sum() / (3 * n)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {name: g for (name, _), g in zip(named, gradients, strict=True) if g is not None}


STEPS: dict[str, Callable] = {"energy+forces": energy_forces, "training step": training_gradients}


def _comparable(results: dict[str, Tensor], reference: dict[str, Tensor]) -> tuple[dict, dict]:
    """Both sides over the parameters that both know by name (cueq packs the contraction's weights otherwise)."""
    if "forces" in reference:
        return results, reference
    names = [n for n in reference if n in results and results[n].numel() == reference[n].numel()]
    lacking = [n for n in reference if n.startswith("interactions") and n not in names]
    if lacking:
        raise blocks.ParityError(f"{lacking[0]} has no gradient, or another size than in plain MACE")
    return {n: results[n].reshape(-1) for n in names}, {n: reference[n].reshape(-1) for n in names}


@dataclass(frozen=True)
class ModelCase:
    """One MACE-MP-shaped model ("small", "medium", "large") on a water box, or on a batch of `boxes` such boxes."""

    name: str
    atoms: int
    channels: int = 128
    elements: tuple[int, ...] = ELEMENTS
    boxes: int = 1

    @property
    def block(self) -> str:
        return "model" if self.boxes == 1 else f"model, batch of {self.boxes}"

    def data(self, precision: str, device: torch.device, box: int | None = None) -> dict[str, Tensor]:
        """The batch, or one box of it."""
        seeds = tuple(range(self.boxes)) if box is None else (box,)
        return batch(self.atoms, self.elements, providers.model_dtype(precision), device, seeds)

    def build(self, provider: str, precision: str, variant: str, device: torch.device) -> torch.nn.Module:
        return built(self.name, self.channels, self.elements, provider, precision, variant, device)

    def prepare(self, provider: str, precision: str, variant: str, device: torch.device, direction: str) -> Prepared:
        """Build, gate one direction, take the memory. Inference freezes the parameters, as MACECalculator does."""
        model = self.build(provider, precision, variant, device)
        others = timing.free_memory(device) - _bytes(model)
        model.requires_grad_(direction == "training step")
        step, data = STEPS[direction], self.data(precision, device)

        def call():
            with providers.matmul_precision(precision):
                return step(model, data)

        timing.warm_up([call], device)
        peak, result = timing.peak_mib(call, device), call()
        extra = {"edges": data["edge_index"].shape[1]}
        extra["peak_mib"] = None if peak is None else peak - others / 2**20
        reference, extra["reference"] = _reference(self, direction, device)
        result, expected = _comparable({k: v.cpu() for k, v in result.items()}, reference)
        errors = blocks.gate(result, expected, dict.fromkeys(expected, TOLERANCE[precision]))
        extra["blocks"] = (model, data) if direction == "energy+forces" else None
        return Prepared({direction: [call]}, {}, {}, errors, extra)


@lru_cache(maxsize=4)
def built(name, channels, elements, provider, precision, variant, device) -> torch.nn.Module:
    """Conversions take long, so a model serves several structures and both directions."""
    plain = mp_model(name, channels, elements)
    return providers.builder("model", provider)(plain, precision, device, variant)


def _bytes(model: torch.nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


@lru_cache(maxsize=8)
def _reference(case: ModelCase, direction: str, device: torch.device) -> tuple[dict[str, Tensor], str]:
    """Result of plain e3nn on the CPU, and its precision: FP64, or FP32 where FP64 does not fit on the card."""
    for precision in ("fp64", "fp32"):
        try:
            model = case.build("e3nn", precision, "", device)
            result = _result(case, model, direction, precision, device)
            return {name: value.cpu() for name, value in result.items()}, f"e3nn {precision}"
        except torch.cuda.OutOfMemoryError:
            timing.free_memory(device)
    raise blocks.ParityError("e3nn does not fit on this card, not even in FP32: nothing to compare with")


def _result(case: ModelCase, model, direction: str, precision: str, device: torch.device) -> dict[str, Tensor]:
    """The step's result; a training loss is a sum over the boxes, which are taken one by one to fit on the card."""
    if case.boxes == 1 or direction != "training step":
        return STEPS[direction](model, case.data(precision, device))
    total: dict[str, Tensor] = {}
    for box in range(case.boxes):
        part = training_gradients(model, case.data(precision, device, box), case.boxes * case.atoms)
        total = {name: value + total.get(name, 0) for name, value in part.items()}
    return total


def _recorded_inputs(model: torch.nn.Module, data: dict[str, Tensor]) -> dict[str, tuple[torch.nn.Module, tuple]]:
    """The inputs every module of OUR_BLOCKS gets in one call of the model, with their requires_grad."""
    seen: dict[str, tuple[torch.nn.Module, tuple]] = {}

    def keep(name):
        def hook(module, inputs):
            copies = (t.detach().clone().requires_grad_(t.requires_grad) if torch.is_tensor(t) else t for t in inputs)
            seen[name] = module, tuple(copies)

        return hook

    named = [(name, m) for name, m in model.named_modules() if OUR_BLOCKS.fullmatch(name)]
    handles = [m.register_forward_pre_hook(keep(name)) for name, m in named]
    try:
        energy_forces(model, data)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def block_times(model: torch.nn.Module, data: dict[str, Tensor], device: torch.device) -> Row:
    """Device time (ms) of every block we replace, forward and the backward that forces need, on the model's own inputs.

    Each block runs alone on what it got inside the model. Plain e3nn's conv_tp is called without its gather and
    scatter, so the sum is fair only between providers that fuse them.
    """
    times: Row = {}
    for name, (module, inputs) in _recorded_inputs(model, data).items():
        wanted = [t for t in inputs if torch.is_tensor(t) and t.requires_grad]
        g = torch.randn_like(module(*inputs))

        def call(module=module, inputs=inputs, wanted=wanted, g=g):
            out = module(*inputs)
            return out, torch.autograd.grad(out, wanted, g) if wanted else None

        times[name] = round(timing.time_calls([call], device).gpu_ms, 5)
    return times
