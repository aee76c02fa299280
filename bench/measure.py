"""One row: build, gate, time. Whatever goes wrong becomes a row that says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from . import blocks, edge_block, md_step, models, radial_block, species_blocks, timing
from .providers import MissingProviderError
from .rows import OURS, Row

Case = blocks.ConvCase | blocks.LinearCase | species_blocks.SpeciesCase | models.ModelCase
Case |= edge_block.WaterEdges | radial_block.RadialCase | md_step.StepCase


@dataclass(frozen=True)
class Spec:
    """What to measure. variant: "deterministic", or layouts such as "mul_ir->ir_mul"; empty for the usual."""

    case: Case
    provider: str
    precision: str
    direction: str
    variant: str = ""

    def __str__(self) -> str:
        parts = (self.case.name, self.case.atoms, self.provider, self.precision, self.direction, self.variant)
        return "-".join(str(part).replace(" ", "_") for part in parts if part)


def specs(cases, providers, directions, variant: str = "") -> list[Spec]:
    """Every combination; `providers` are (name, precisions) pairs. Directions of one provider follow each other."""
    return [
        Spec(case, provider, precision, direction, variant)
        for case in cases
        for provider, precisions in providers
        for precision in precisions
        for direction in directions
    ]


_kept: dict[tuple, blocks.Prepared] = {}


def prepared(spec: Spec, device: torch.device) -> blocks.Prepared:
    """The gated provider of a spec. The newest one is kept: both directions of a block share it."""
    arguments = (spec.provider, spec.precision, spec.variant, device)
    if isinstance(spec.case, (models.ModelCase, md_step.StepCase)):
        arguments = (*arguments, spec.direction)
    key = (spec.case, *arguments)
    if key not in _kept:
        # The one before goes first, or its memory would stand beside this one's.
        _kept.clear()
        timing.free_memory(device)
        _kept[key] = spec.case.prepare(*arguments)
    return _kept[key]


def forget(device: torch.device) -> None:
    """Let go of everything kept between rows."""
    _kept.clear()
    references = (module.reference for module in (edge_block, radial_block, species_blocks))
    for kept in (blocks.conv_reference, *references, models.built, md_step.calculator, md_step.torchsim_model):
        kept.cache_clear()
    timing.free_memory(device)


def _roofline(row: Row, device: torch.device) -> None:
    seconds, moved, flops = row["gpu_ms"] * 1e-3, row["bytes"], row["flops"]
    bandwidth = timing.copy_bandwidth(device)
    row["roofline_percent"] = round(100 * moved / bandwidth / seconds, 2) if moved else None
    row["gigabytes_per_s"] = round(moved / seconds / 1e9, 1) if moved else None
    row["tflop_per_s"] = round(flops / seconds / 1e12, 3) if flops else None


def _time_block(spec: Spec, ready: blocks.Prepared, device: torch.device) -> Row:
    measured = timing.time_calls(ready.calls[spec.direction], device)
    row = {"bytes": ready.bytes.get(spec.direction), "flops": ready.flops.get(spec.direction), **asdict(measured)}
    row["input_sets"] = len(ready.calls[spec.direction])
    _roofline(row, device)
    return row | _kernels(timing.profile(ready.calls[spec.direction], device))


def _kernels(found: timing.KernelProfile | None) -> Row:
    if found is None:
        return {"kernel_ms": None, "launches": None, "kernels": []}
    return {"kernel_ms": found.kernel_ms, "launches": found.launches, "kernels": found.top}


def _time_whole(call: Callable[[], object], device: torch.device, repeats: int = 7) -> Row:
    """Wall time, and the sum of the kernels."""
    row = {"wall_ms": timing.time_wall(call, device, repeats)} | _kernels(timing.profile([call], device))
    return row | {"gpu_ms": row["kernel_ms"] or row["wall_ms"]}


def _time_model(spec: Spec, ready: blocks.Prepared, device: torch.device) -> Row:
    (call,) = ready.calls[spec.direction]
    row = _time_whole(call, device)
    share = ready.extra["blocks"]
    if share and spec.provider != "e3nn":
        row["block_ms"] = models.block_times(*share, device)
        row["blocks_ms"] = sum(row["block_ms"].values())
    return row


def _time_step(spec: Spec, ready: blocks.Prepared, device: torch.device) -> Row:
    (call,) = ready.calls[spec.direction]
    slow = timing.time_wall(call, device, 1) > md_step.SLOW_MS
    return {"kind": "md step"} | _time_whole(call, device, md_step.FEW_STEPS if slow else md_step.STEPS)


TIMED: dict[type, Callable] = {models.ModelCase: _time_model, md_step.StepCase: _time_step}
"""How cases are timed; blocks as `_time_block` does."""


def describe(spec: Spec) -> Row:
    """The part of a row that is known before anything runs."""
    return {
        "block": spec.case.block,
        "case": spec.case.name,
        "atoms": spec.case.atoms,
        "channels": spec.case.channels,
        "direction": spec.direction,
        "provider": spec.provider,
        "precision": spec.precision,
        "variant": spec.variant,
    }


def reason(error: BaseException) -> str:
    """Type and first line of an error, short enough for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def guarded(row: Row, work: Callable[[], Row]) -> Row:
    """`row` with what `work` returns; or with status "missing", "refused" (parity) or "failed" and the reason."""
    try:
        return row | work() | {"status": "ok", "reason": None}
    except MissingProviderError as error:
        return row | {"status": "missing", "reason": str(error)[:300]}
    except blocks.ParityError as error:
        return row | {"status": "refused", "reason": str(error)}
    except Exception as error:  # a peer may fail in ways of its own, and the other rows still want measuring
        return row | {"status": "failed", "reason": reason(error)}


def measure(spec: Spec, device: torch.device) -> Row:
    """The row of a spec: parity first, then time. Never raises for what a provider does wrong."""

    def work() -> Row:
        ready = prepared(spec, device)
        row = TIMED.get(type(spec.case), _time_block)(spec, ready, device)
        extra = {key: value for key, value in ready.extra.items() if key != "blocks"}
        return extra | {"errors": ready.errors, "error": max(ready.errors.values())} | row

    row = guarded(describe(spec), work)
    if row["status"] != "ok":
        _kept.clear()
        timing.free_memory(device)
    return row


def is_ours(row: Row) -> bool:
    return row["provider"] == OURS
