"""`mace-triton study search`: the fastest policy within a budget of errors, by measured times and errors.

Coordinate descent from the fastest preset within the budget: of all policies that differ in one block, the fastest one
whose errors are within it takes over, until none is faster by more than GAIN. Each policy is measured once; as times
minutes apart differ by more than that, one takes over only if it is faster side by side, turn and turn about, too. In
the end words that gain nothing become exact again.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import ase
import mace  # noqa: F401  before e3nn, see mace_triton/__init__.py
import numpy as np
import torch
from rich.console import Console

from ..convert import accelerate
from ..engine import Engine
from ..precision import PRESETS, Precision
from .precision import Values, by_engine, check_reference, milliseconds
from .store import Row, root_mean_square, save

CHOICES = {
    "linear": ("tf32x3", "tf32", "bf16", "fp16"),
    "product": ("tf32x3", "tf32", "bf16", "fp16"),
    "radial": ("tf32x3", "tf32", "bf16", "fp16"),
    "tensor_product": ("fp32", "bf16", "fp16"),
    "contraction": ("fp32", "bf16", "fp16"),
    "features": ("fp32", "bf16", "fp16"),
}
"""What is tried, the exact word first. Readouts in low precision leave the engine and cost nothing beside the rest."""
GAIN = 0.01
"""Part of a step's time; for less, no bit is given away."""
TURNS = 3
"""Of each of two policies that are timed side by side."""


@dataclass(frozen=True)
class Limits:
    """Root-mean-square errors allowed: energy in meV/atom, forces in meV/angstrom."""

    energy: float
    force: float

    def __post_init__(self):
        for name in ("energy", "force"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} limit must be positive, got {getattr(self, name)}")

    def allow(self, row: Row) -> bool:
        return bool(row["energy_rmse"] <= self.energy and row["force_rmse"] <= self.force)


class Trials:
    """Measures policies of a model on some frames, each once."""

    def __init__(self, plain: torch.nn.Module, groups: list[tuple[ase.Atoms, ...]], timed: ase.Atoms, console: Console):
        self.plain, self.groups, self.timed, self.console = plain, groups, timed, console
        self.device = next(plain.parameters()).device
        self.rows: dict[tuple, Row] = {}
        fast = accelerate(plain, "fp64")
        self.exact: list[Values] = [by_engine(fast, frames) for frames in groups]
        for exact, frames in zip(self.exact, groups, strict=True):
            check_reference(plain, exact, frames)

    def measure(self, policy: Precision, steps: int = 20) -> Row:
        """policy's words, errors over all frames, and milliseconds of a step of `timed`."""
        key = tuple(word for field, word in asdict(policy).items() if field != "name")
        if key not in self.rows:
            model = accelerate(self.plain, policy)
            energy, force = [], []
            for exact, frames in zip(self.exact, self.groups, strict=True):
                got = by_engine(model, frames)
                energy.append(1e3 * (got.energy - exact.energy))
                force.append(1e3 * (got.forces - exact.forces).ravel())
            engine = Engine(model, self.timed)
            engine.step()
            ms, *ends = milliseconds(engine.step, self.device, steps)
            row = {
                "words": asdict(policy),
                "energy_rmse": float(root_mean_square(np.concatenate(energy))),
                "force_rmse": float(root_mean_square(np.concatenate(force))),
                "ms": ms,
                "ms_ends": ends,
            }
            self.rows[key] = row
            words = ", ".join(f"{field} {getattr(policy, field)}" for field in CHOICES)
            told = f"{row['ms']:.3f} ms, {row['energy_rmse']:.4f} meV/atom, {row['force_rmse']:.3f} meV/A"
            self.console.print(f"{told}: {words}", highlight=False, soft_wrap=True)
        return self.rows[key]

    def faster(self, policy: Precision, than: Precision, steps: int) -> bool:
        """Whether a policy's step is faster than another's by more than GAIN, both timed by turns."""
        engines = [Engine(accelerate(self.plain, each), self.timed) for each in (policy, than)]
        for engine in engines:
            engine.step()
        turns = [[milliseconds(engine.step, self.device, steps)[0] for engine in engines] for _ in range(TURNS)]
        ratio = float(np.median([one / other for one, other in turns]))
        self.console.print(f"side by side: {ratio:.3f} of the time", highlight=False)
        return ratio < 1 - GAIN


def neighbours(policy: Precision) -> list[Precision]:
    """The policies that differ from `policy` in one block."""
    return [
        replace(policy, name="found", **{field: word})
        for field, words in CHOICES.items()
        for word in words
        if word != getattr(policy, field)
    ]


def descend(trials: Trials, limits: Limits, steps: int) -> Precision:
    """The fastest policy found. Raises ValueError where not even FP32 is within the limits."""
    presets = [policy for policy in PRESETS.values() if policy.dtype == "fp32"]
    measured = {policy: trials.measure(policy, steps) for policy in presets}
    allowed = [policy for policy in presets if limits.allow(measured[policy])]
    if not allowed:
        found = measured[PRESETS["fp32"]]
        raise ValueError(
            f"limits: {limits.energy:g} meV/atom and {limits.force:g} meV/angstrom are less than the errors of fp32, "
            f"{found['energy_rmse']:.2g} and {found['force_rmse']:.2g}: allow more, or run in fp64"
        )
    best = min(allowed, key=lambda policy: measured[policy]["ms"])
    while True:
        rows = {policy: trials.measure(policy, steps) for policy in neighbours(best)}
        allowed = [policy for policy, row in rows.items() if limits.allow(row)]
        own = trials.measure(best, steps)["ms"]
        promising = sorted((p for p in allowed if rows[p]["ms"] < (1 - GAIN) * own), key=lambda p: rows[p]["ms"])
        winner = next((policy for policy in promising if trials.faster(policy, best, steps)), None)
        if winner is None:
            return given_back(trials, best, limits, steps)
        best = winner


def given_back(trials: Trials, best: Precision, limits: Limits, steps: int) -> Precision:
    """The policy with each word exact again that does not make its step faster by more than GAIN."""
    for field, words in CHOICES.items():
        exact = replace(best, name="found", **{field: words[0]})
        if getattr(best, field) == words[0] or not limits.allow(trials.measure(exact, steps)):
            continue
        if not trials.faster(best, exact, steps):
            best = exact
    return best


def run(
    plain: torch.nn.Module,
    groups: list[tuple[ase.Atoms, ...]],
    timed: ase.Atoms,
    limits: Limits,
    out: Path,
    folder: Path,
    quick: bool,
    console: Console,
) -> Precision:
    """Search, write the policy to `out` and all trials to FOLDER/search.json.

    plain: in FP64. groups: frames of the same atoms each, for the errors. timed: the structure whose step is timed.
    """
    trials = Trials(plain, groups, timed, console)
    steps = 20 if trials.device.type == "cuda" else 1
    best = descend(trials, limits, steps)
    if best != PRESETS.get(best.name):
        best = replace(best, name=out.stem)
    best.save(out)
    row = trials.measure(best)
    save(
        "search",
        folder,
        trials.device,
        quick=quick,
        limits=asdict(limits),
        atoms=len(timed),
        found=row | {"words": asdict(best)},
        rows=list(trials.rows.values()),
    )
    return best
