"""A step of molecular dynamics as a user runs it, of water: in ASE, and on a state that stays on the device.

"Langevin step": ASE's Langevin dynamics with MACECalculator, the face of e3nn and cuEquivariance, or with ours.
"NPT step": the same with ASE's isotropic barostat, so that the cell is another one in every step, in a box that was
denser at first, as one that relaxes is: what was made for more neighbours than there are now must not cost.
"torch-sim step": what torch-sim asks of its model in every step, energy, forces and stress of a state; MACE's own model
for it, plain or compiled with CUDA graphs (variant "reduce-overhead"), or ours. `wall_ms` is what a step takes, the
median over steps; `gpu_ms` the sum of its kernels, `nodes` their number in our CUDA graph; `first_s` what the first
evaluation took, compilation included where nothing compiled before.
"""

from __future__ import annotations

import importlib.util
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import ase
import numpy as np
import torch

from mace_triton import md
from mace_triton.engine import SKIN

from . import blocks, models, providers, structures, timing
from .blocks import Prepared

DIRECTIONS = ("Langevin step", "torch-sim step", "NPT step")
TIME_STEP, TEMPERATURE, FRICTION = 0.5, 300.0, 0.01
"""fs, K, 1 / fs: for water, and for models whose random weights make of it what they will."""
DENSER = 0.98
"""Edges of the box in which an NPT run begins, over those in which it is timed."""
STEPS, FEW_STEPS, SLOW_MS = 21, 5, 300
"""Of so many steps the median is taken; of few where one takes longer than so many milliseconds."""
UNIT = 5184
"""Atoms of the largest box that is not copies of a smaller one."""


def unit_of(atoms: int) -> tuple[int, tuple[int, ...]]:
    """A box, and its copies along each edge, that make up so many atoms: a large system's forces are then those of the
    box, and plain e3nn need not fit on the card for it. Raises ValueError where there is none.
    """
    unit = next((n for n in (atoms, UNIT, 1536) if n <= UNIT and atoms % n == 0), atoms)
    copies, left = [1, 1, 1], atoms // unit
    for factor in (2, 3):
        while left % factor == 0:
            copies[copies.index(min(copies))] *= factor
            left //= factor
    if unit > UNIT or left > 1:
        raise ValueError(f"atoms: {atoms} are no few copies of a box of at most {UNIT}")
    return unit, tuple(copies)


@dataclass(frozen=True)
class StepCase:
    """A water box of so many atoms under one MACE-MP-shaped model ("small", "medium", "large")."""

    name: str
    atoms: int
    channels: int = 128
    elements: tuple[int, ...] = models.ELEMENTS
    block: str = "md step"

    def structure(self) -> ase.Atoms:
        unit, copies = unit_of(self.atoms)
        numbers, positions, cell = structures.water(unit)
        return ase.Atoms(numbers, positions, cell=cell, pbc=True).repeat(copies)

    def prepare(self, provider: str, precision: str, variant: str, device: torch.device, direction: str) -> Prepared:
        """Build calculator or model, gate its energy and forces, set the step up."""
        key = (self.name, self.channels, self.elements, provider, precision, device)
        ase_face = direction != DIRECTIONS[1]
        if ase_face:
            face, begin = calculator(*key), partial(_in_ase, direction)
        else:
            face, begin = torchsim_model(*key, variant), _torchsim
        made: list[tuple] = []

        def first() -> None:
            made[:] = begin(self.structure(), face, device)

        # A CUDA graph keeps what it needs to itself, so the peak is that of the first steps, when it is recorded.
        began = time.perf_counter()
        peak = timing.peak_mib(first, device)
        if peak is None:
            first()
        first_s = time.perf_counter() - began
        found, step, own = made
        unit, _ = unit_of(self.atoms)
        case = models.ModelCase(self.name, unit, self.channels, self.elements)
        expected, extra = models._reference(case, models.DIRECTIONS[0], device)
        copies = self.atoms // unit
        wanted = {
            "forces": expected["forces"].double().repeat(copies, 1),
            "energy": copies * expected["energy"].double(),
        }
        errors = blocks.gate(found, wanted, dict.fromkeys(wanted, models.TOLERANCE[precision]))
        kept = {"reference": extra, "first_s": first_s, "peak_mib": None if peak is None else peak - own / 2**20}
        if provider == "mace_triton":
            engines = face.engines if ase_face else [engine for _, engine in face._engines]
            kept |= {"nodes": _nodes(engines, device), "shares": max(engine.shares for engine in engines)}
        return Prepared({direction: [step]}, {}, {}, errors, kept)


def _nodes(engines: list, device: torch.device) -> int | None:
    """Kernels and copies in the engines' CUDA graphs; None on a CPU."""
    recorded = [engine._graph.replay for engine in engines if engine._graph is not None]
    found = timing.profile(recorded, device) if recorded else None
    return None if found is None else len(recorded) * found.launches


def _in_ase(direction: str, atoms: ase.Atoms, face, device: torch.device) -> tuple[dict, Callable[[], object], int]:
    """(energy and forces of the structure, a step of ASE's dynamics, bytes that others held before)."""
    atoms.calc, face.engines, face._asked = face, [], None  # as if these were its first atoms
    others = timing.free_memory(device)
    if direction == DIRECTIONS[2]:
        denser = atoms.copy()
        denser.set_cell(DENSER * denser.cell.array, scale_atoms=True)
        face.get_forces(denser)
    forces = torch.from_numpy(np.asarray(atoms.get_forces(), dtype=np.float64))
    energy = torch.tensor([atoms.get_potential_energy()], dtype=torch.float64)
    return {"forces": forces, "energy": energy}, _dynamics(atoms, direction), others


def _torchsim(atoms: ase.Atoms, face, device: torch.device) -> tuple[dict, Callable[[], object], int]:
    """The same with torch-sim's model: the step evaluates a state whose atoms have moved a little."""
    import torch_sim

    face._engines, face._last = [], None
    others = timing.free_memory(device)
    state = torch_sim.initialize_state(atoms, device=device, dtype=face.dtype)
    start, rng = state.positions.double(), np.random.default_rng(0)
    moves = [torch.tensor(rng.normal(0.0, 0.002, start.shape), device=start.device) for _ in range(8)]
    taken = itertools.count()

    def step():
        state.positions = (start + moves[next(taken) % len(moves)]).to(face.dtype)
        return face(state)

    found = face(state)
    return {key: found[key].double().cpu() for key in ("forces", "energy")}, step, others


@lru_cache(maxsize=1)
def torchsim_model(name: str, channels: int, elements: tuple, provider: str, precision: str, device, variant: str):
    """torch-sim's model of a provider; a conversion serves every size."""
    if importlib.util.find_spec("torch_sim") is None:
        raise providers.MissingProviderError("torch-sim is not installed")
    plain = models.mp_model(name, channels, elements)
    if provider == "mace_triton":
        from mace_triton.torchsim import MACETritonModel

        return MACETritonModel(plain, precision=precision, device=device, skin=SKIN)
    from mace.calculators.mace_torchsim import MaceTorchSimModel

    how = {"enable_cueq": provider == "cueq", "compile_mode": variant or None}
    return MaceTorchSimModel(plain, device=device, dtype=providers.model_dtype(precision), **how)


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


def _dynamics(atoms: ase.Atoms, direction: str) -> Callable[[], object]:
    """One step of Langevin or NPT dynamics, always from where the last one ended."""
    from ase.md.velocitydistribution import MaxwellBoltzmannDistribution

    rng = np.random.default_rng(0)
    MaxwellBoltzmannDistribution(atoms, temperature_K=TEMPERATURE, rng=rng)
    if direction == DIRECTIONS[0]:
        return langevin(atoms, rng).step
    # At the pressure that there is: at 1 bar a box under random weights would leave its size fast.
    return md.npt(atoms, TIME_STEP, TEMPERATURE, md.pressure_of(atoms)).step


def langevin(atoms: ase.Atoms, rng: np.random.Generator, friction: float = FRICTION):
    """ASE's Langevin dynamics at the temperature of all benches; friction in 1 / fs."""
    from ase import units
    from ase.md.langevin import Langevin

    step, friction = TIME_STEP * units.fs, friction / units.fs
    return Langevin(atoms, step, temperature_K=TEMPERATURE, friction=friction, rng=rng)
