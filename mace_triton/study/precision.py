"""`mace-triton study precision`: how far each policy is from FP64, and how long its step takes.

The reference is the engine in FP64, which first has to agree with e3nn in FP64 on a frame of every sample. Beside the
presets stand policies with one block in 16 bits (what does each block cost?), everything in 16 bits, and e3nn in FP32,
which is what MACE users run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import ase
import mace  # noqa: F401  before e3nn, see mace_triton/__init__.py
import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from ..calculator import load
from ..certify import single_point
from ..convert import accelerate, restore
from ..dev_engine import random_model
from ..engine import Engine
from ..precision import PRESETS, Precision
from ..water import water_box
from . import structures
from .store import Row, interval, root_mean_square, save
from .structures import Sample

BLOCKS = {
    "linear": ("linear", "product"),
    "linear but product": ("linear",),
    **{block: (block,) for block in ("product", "radial", "tensor_product", "contraction", "features", "readout")},
}
"""What is put in 16 bits alone: name -> fields of a policy."""
AGREE = 1e-9
"""Relative difference of forces up to which FP64 agrees with e3nn's."""
E3NN = "e3nn fp32"
ELEMENTS = (31, 33)
"""Of the models with random weights: gallium and arsenic."""
REPEATS, STEPS = 5, 20
"""Of a timing: its median over REPEATS of a mean over STEPS."""


def policies(quick: bool = False) -> list[Precision]:
    """The presets, FP32 with one block in BF16 or FP16, and all blocks in 16 bits."""
    found = list(PRESETS.values())
    for word in ("bf16",) if quick else ("bf16", "fp16"):
        found += [
            replace(PRESETS["fp32"], name=f"{block} {word}", **dict.fromkeys(fields, word))
            for block, fields in BLOCKS.items()
        ]
        every = {field: word for fields in BLOCKS.values() for field in fields if field != "readout"}
        found.append(replace(PRESETS["fp32"], name=f"all {word}", **every))
    return found


@dataclass(frozen=True)
class Values:
    """Of each frame: energy per atom (eV), forces [N, 3] (eV/angstrom) and stress [3, 3] (eV/angstrom^3)."""

    energy: np.ndarray
    forces: np.ndarray
    stress: np.ndarray


def by_engine(model: torch.nn.Module, frames: tuple[ase.Atoms, ...]) -> Values:
    """What an accelerated model gives for frames of the same atoms."""
    engine, found = Engine(model, frames[0]), []
    for atoms in frames:
        engine.step(atoms.positions, atoms.cell.array[None])
        found.append(engine.on_host())
    keys = ("energy", "forces", "stress")
    energy, forces, stress = (np.array([getattr(results, key) for results in found]) for key in keys)
    return Values(energy[:, 0] / len(frames[0]), forces, stress[:, 0])


def by_e3nn(model: torch.nn.Module, frames: tuple[ase.Atoms, ...]) -> Values:
    """What MACE's own forward gives, one frame after another."""
    found = [single_point(model, atoms) for atoms in frames]
    energy = np.array([results["energy"] for results in found]) / len(frames[0])
    forces, stress = (np.array([results[key] for results in found]) for key in ("forces", "stress"))
    return Values(energy, forces, stress.reshape(-1, 3, 3))


def check_reference(model: torch.nn.Module, exact: Values, frames: tuple[ase.Atoms, ...]) -> float:
    """The relative difference of forces to e3nn in FP64 on the first frame; RuntimeError where it is no rounding."""
    want = by_e3nn(model, frames[:1]).forces
    scale = max(float(np.abs(want).max()), 1.0)
    found = float(np.abs(exact.forces[:1] - want).max()) / scale
    if not found <= AGREE:
        raise RuntimeError(f"study: the engine in FP64 differs from e3nn in FP64 by {found:.1e}, {AGREE} allowed")
    return found


def errors(got: Values, exact: Values, still: bool) -> Row:
    """Energy in meV/atom, forces in meV/angstrom, stress in meV/angstrom^3, each with its 95 % interval over frames.

    still: there are no forces, whose direction would mean something.
    """
    energy, force = 1e3 * (got.energy - exact.energy), 1e3 * (got.forces - exact.forces)
    per_frame = root_mean_square(force.reshape(len(force), -1))
    cosine = (got.forces * exact.forces).sum((1, 2)) / np.sqrt(
        (got.forces**2).sum((1, 2)) * (exact.forces**2).sum((1, 2)) + np.finfo(float).tiny
    )
    return {
        "energy_rmse": interval(energy, root_mean_square),
        "energy_max": float(np.abs(energy).max()),
        "energy_bias": interval(energy, lambda values: values.mean(axis=-1)),
        "force_rmse": interval(per_frame, root_mean_square),
        "force_max": float(np.abs(force).max()),
        "force_scale": float(root_mean_square(1e3 * exact.forces.ravel())),
        "one_minus_cosine": None if still else float((1 - cosine).max()),
        "stress_rmse": interval(1e3 * (got.stress - exact.stress).reshape(len(force), -1), _rms_of_frames),
        "largest_force": float(np.abs(got.forces).max()),
    }


def _rms_of_frames(values: np.ndarray) -> np.ndarray:
    return np.sqrt(np.mean(np.square(values), axis=(-2, -1)))


def milliseconds(call: Callable[[], object], device: torch.device, steps: int = STEPS) -> tuple[float, float, float]:
    """(median, least, most) wall time of a call among others like it, the device waited for at the end."""
    call()
    found = []
    for _ in range(REPEATS):
        wait_for(device)
        began = time.perf_counter()
        for _ in range(steps):
            call()
        wait_for(device)
        found.append(1e3 * (time.perf_counter() - began) / steps)
    return float(np.median(found)), min(found), max(found)


def wait_for(device: torch.device) -> None:
    """Until it has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rows_of(
    name: str, plain: torch.nn.Module, samples: list[Sample], chosen: list[Precision], progress: Console
) -> Iterator[Row]:
    """A row for each policy and sample: model, policy, sample, errors. `plain`: in FP64."""
    exact = {}
    fast = accelerate(plain, "fp64")
    for sample in samples:
        exact[sample.name] = by_engine(fast, sample.frames)
        agreed = check_reference(plain, exact[sample.name], sample.frames)
        progress.print(f"{name}, {sample.name}: FP64 agrees with e3nn to {agreed:.0e} of the forces", highlight=False)
    for policy in track([*chosen, None], description=name, console=progress):
        model = restore(plain).float() if policy is None else accelerate(plain, policy)
        for sample in samples:
            got = by_e3nn(model, sample.frames) if policy is None else by_engine(model, sample.frames)
            row = {"model": name, "policy": E3NN if policy is None else policy.name, "sample": sample.name}
            words = {} if policy is None else asdict(policy)
            row |= {"frames": len(sample.frames), "still": sample.still, "words": words}
            yield row | errors(got, exact[sample.name], sample.still)


def times_of(
    name: str, plain: torch.nn.Module, sides: tuple[int, ...], chosen: list[Precision], device: torch.device
) -> Iterator[Row]:
    """Milliseconds of the engine's step of water boxes under each policy; what the engine cannot write out says so."""
    for policy in chosen:
        model = accelerate(plain, policy)
        for side in sides:
            engine = Engine(model, water_box(side))
            engine.step()
            ms, *ends = milliseconds(engine.step, device, STEPS if device.type == "cuda" else 1)
            row = {"model": name, "policy": policy.name, "atoms": engine.atoms, "ms": ms, "ms_ends": ends}
            yield row | {"by_autograd": engine.autograd_because}


def samples_of_water(model: str, data: Path | None, device: str, quick: bool) -> list[Sample]:
    """Held-out frames where the data are there, frames of a run, displaced molecules, crystals."""
    side, count = (2, 2) if quick else (4, 20)
    found = [structures.held_out(data, model, 2 if quick else 80)] if data else []
    every, start = (2, 4) if quick else (100, 2000)
    found.append(structures.of_a_run(model, device, side, count, every, start))
    return [*found, structures.displaced(side, count), *structures.crystals(1 if quick else 3)]


def run(model: str, data: Path | None, folder: Path, device: str, quick: bool, console: Console) -> Path:
    """The study; see the head of this file. Returns where its results are.

    Raises ValueError for data without held-out frames, RuntimeError where FP64 does not agree with e3nn's.
    """
    chosen, where = policies(quick), torch.device(device)
    plain = load(model, device, torch.float64)[0].double().eval()
    samples = samples_of_water(model, data, device, quick)
    rows, times, sources = [], [], {sample.name: sample.source for sample in samples}

    def keep(found: Iterator[Row], where_to: list[Row]) -> Path:
        for row in found:  # what was measured stays, whatever happens to the next policy
            where_to.append(row)
            path = save("precision", folder, where, quick=quick, samples=sources, rows=rows, times=times)
        return path

    keep(rows_of(model, plain, samples, chosen, console), rows)
    keep(times_of(model, plain, (2,) if quick else (4, 8), chosen, where), times)
    for shape in ("small",) if quick else ("medium", "large"):
        made = random_model(shape, 8 if quick else 128, ELEMENTS, 4.0 if quick else 6.0).to(device).eval()
        other = structures.other_elements(ELEMENTS, 1 if quick else 2, 2 if quick else 10)
        sources[other.name] = other.source
        presets = [policy for policy in chosen if policy.name in PRESETS]
        path = keep(rows_of(f"{shape}, random weights", made, [other], presets, console), rows)
    return path
