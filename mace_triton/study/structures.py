"""What a policy is judged on: held-out frames, frames of a run, displaced molecules, perfect crystals."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import ase
import mace  # noqa: F401  before e3nn, see mace_triton/__init__.py
import numpy as np
from ase import units
from ase.build import bulk
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary

from ..calculator import MACETritonCalculator
from ..models import FOLDER, load_card
from ..water import water_box


@dataclass(frozen=True)
class Sample:
    """Structures of the same atoms in the same order.

    still: their symmetry leaves no force on any atom. source: where they come from, a sentence for the report.
    """

    name: str
    frames: tuple[ase.Atoms, ...]
    source: str
    still: bool = False


def held_out(data: Path, model: str, most: int) -> Sample:
    """Frames of the training data's held-out folder, evenly spread. Raises ValueError where there are none."""
    folder = load_card(FOLDER / model)["frames"]["held_out_folder"]
    with np.load(data) as file:
        kept = np.flatnonzero(file["split"].astype(str) == folder)
        if len(kept) == 0:
            raise ValueError(f"data: {data} has no frames of {folder}, which the model was not trained on")
        kept = kept[np.linspace(0, len(kept) - 1, min(most, len(kept))).round().astype(int)]
        numbers, cells, positions = file["numbers"], file["cell"], file["positions"]
        frames = [ase.Atoms(numbers, positions[i].astype(float), cell=cells[i], pbc=True) for i in kept]
    return Sample("held-out water", tuple(frames), f"{len(frames)} frames of {folder}, which was kept out of training")


def of_a_run(model: str, device: str, side: int, count: int, every: int, start: int) -> Sample:
    """Frames of Langevin dynamics at 300 K (0.5 fs, 0.01 / fs) of a water box, under the model in FP32."""
    atoms = water_box(side)
    atoms.calc = MACETritonCalculator(model, precision="fp32", device=device)
    rng = np.random.default_rng(0)
    MaxwellBoltzmannDistribution(atoms, temperature_K=300, rng=rng)
    Stationary(atoms)
    run = Langevin(atoms, 0.5 * units.fs, temperature_K=300, friction=0.01 / units.fs, rng=rng)
    run.run(start)
    frames = []
    for _ in range(count):
        run.run(every)
        frames.append(ase.Atoms(atoms.numbers, atoms.get_positions(), cell=atoms.cell, pbc=True))
    source = f"{count} frames, {every * 0.5:g} fs apart, of NVT at 300 K of {len(atoms)} atoms after {start * 0.5:g} fs"
    return Sample("water of a run", tuple(frames), source)


def displaced(side: int, count: int, by: float = 0.05) -> Sample:
    """A water box whose atoms are displaced at random, by `by` angstrom along each axis (standard deviation)."""
    frames = [water_box(side) for _ in range(count)]
    for seed, atoms in enumerate(frames):
        atoms.positions += by * np.random.default_rng(seed).normal(size=atoms.positions.shape)
    return Sample("displaced water", tuple(frames), f"{count} boxes, atoms displaced at random by {by} angstrom")


def crystals(copies: int) -> list[Sample]:
    """Crystals of H and O each of whose atoms is a centre of inversion: by symmetry no force acts on any."""
    found = []
    for structure, formula, a in (("rocksalt", "OH", 4.0), ("fcc", "O", 3.8), ("cesiumchloride", "OH", 2.6)):
        atoms = bulk(formula, structure, a=a, cubic=True).repeat(copies)
        source = f"{structure} lattice of {formula}, a = {a} angstrom, {len(atoms)} atoms"
        found.append(Sample(f"crystal, {structure}", (atoms,), source, still=True))
    return found


def other_elements(elements: tuple[int, int], copies: int, count: int, by: float = 0.1) -> Sample:
    """A zincblende crystal of two elements whose atoms are displaced at random, for models with random weights."""
    symbols = "".join(ase.Atoms(numbers=elements).get_chemical_symbols())
    frames = [bulk(symbols, "zincblende", a=5.6, cubic=True).repeat(copies) for _ in range(count)]
    for seed, atoms in enumerate(frames):
        atoms.positions += by * np.random.default_rng(seed).normal(size=atoms.positions.shape)
    source = f"{count} zincblende crystals of {symbols}, {len(frames[0])} atoms displaced at random by {by} angstrom"
    return Sample(f"displaced {symbols}", tuple(frames), source)
