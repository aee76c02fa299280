"""A step of molecular dynamics as a user runs it: ASE's Langevin dynamics of water with each package's calculator.

MACECalculator is the face of e3nn and cuEquivariance, MACETritonCalculator ours. `wall_ms` is what a step takes, the
median over steps; `gpu_ms` the sum of its kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import ase
import numpy as np
import torch

from . import blocks, models, providers, structures
from .blocks import Prepared

DIRECTIONS = ("Langevin step",)
TIME_STEP, TEMPERATURE, FRICTION = 0.5, 300.0, 0.01
"""fs, K, 1 / fs: for water, and for models whose random weights make of it what they will."""
SKIN = 1.0
"""Angstrom, of our calculator's engine."""
STEPS = 21
"""Of which the median is taken."""


@dataclass(frozen=True)
class StepCase:
    """A water box of so many atoms under one MACE-MP-shaped model ("small", "medium", "large")."""

    name: str
    atoms: int
    channels: int = 128
    elements: tuple[int, ...] = models.ELEMENTS
    block: str = "md step"

    def structure(self) -> ase.Atoms:
        numbers, positions, cell = structures.water(self.atoms)
        return ase.Atoms(numbers, positions, cell=cell, pbc=True)

    def prepare(self, provider: str, precision: str, variant: str, device: torch.device, direction: str) -> Prepared:
        """Build the calculator, gate its forces, set the dynamics up."""
        atoms = self.structure()
        atoms.calc = calculator(self.name, self.channels, self.elements, provider, precision, device)
        forces = {"forces": torch.from_numpy(np.asarray(atoms.get_forces(), dtype=np.float64))}
        case = models.ModelCase(self.name, self.atoms, self.channels, self.elements)
        expected, extra = models._reference(case, models.DIRECTIONS[0], device)
        tolerance = {"forces": models.TOLERANCE[precision]}
        errors = blocks.gate(forces, {"forces": expected["forces"].double()}, tolerance)
        step = _dynamics(atoms)
        return Prepared({direction: [step]}, {}, {}, errors, {"reference": extra})


@lru_cache(maxsize=1)
def calculator(name: str, channels: int, elements: tuple, provider: str, precision: str, device: torch.device):
    """A conversion takes long, and a calculator serves every size."""
    from mace.calculators import MACECalculator

    from mace_triton import MACETritonCalculator

    if provider == "mace_triton":
        plain = models.mp_model(name, channels, elements)
        return MACETritonCalculator(plain, precision=precision, device=device.type, skin=SKIN)
    model = models.built(name, channels, elements, provider, precision, "", device)
    dtype = str(providers.model_dtype(precision)).removeprefix("torch.")
    return MACECalculator(models=model, device=device.type, default_dtype=dtype)


def _dynamics(atoms: ase.Atoms) -> Callable[[], object]:
    """One step of Langevin dynamics, always from where the last one ended."""
    from ase import units
    from ase.md.langevin import Langevin
    from ase.md.velocitydistribution import MaxwellBoltzmannDistribution

    rng = np.random.default_rng(0)
    MaxwellBoltzmannDistribution(atoms, temperature_K=TEMPERATURE, rng=rng)
    friction = FRICTION / units.fs
    dynamics = Langevin(atoms, TIME_STEP * units.fs, temperature_K=TEMPERATURE, friction=friction, rng=rng)
    return dynamics.step
