"""`mace-triton md`: molecular dynamics of a structure with a MACE model, for people who only want to run.

NVE (velocity Verlet), NVT (Langevin) and isotropic NPT (Martyna, Tobias and Klein, J. Chem. Phys. 101, 4177) are ASE's;
energy and forces come from `MACETritonCalculator` on its engine. Beside the trajectory lie a table and a
restart file, which is written with every frame and replaced as a whole: a run that was cut off at any moment goes on
from its last frame, and what was written after it is cut off.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ase
import ase.io
import mace  # noqa: F401  before e3nn, see mace_triton/__init__.py
import numpy as np
from ase import units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.md.langevin import Langevin
from ase.md.md import MolecularDynamics
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary
from ase.md.verlet import VelocityVerlet
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .calculator import MACETritonCalculator, check_device
from .certify import check_structure
from .demo import describe_cell, where
from .engine import SKIN
from .precision import Precision

ENSEMBLES = ("nve", "nvt", "npt")
COLUMNS = "step time_ps potential_eV kinetic_eV temperature_K pressure_bar volume_A3 ns_per_day"
BAR = 1e5 * units.Pascal
THERMOSTAT, BAROSTAT = 100.0, 1000.0
"""Times (fs) of NPT's thermostat and barostat."""


@dataclass(frozen=True)
class Options:
    """What the command line offers; times in fs, temperature in K, friction in 1/fs, pressure in bar, skin in angstrom.

    steps: of the whole run, those before a restart included. every: steps from frame to frame. out: the trajectory.
    """

    model: str
    structure: Path
    steps: int = 10000
    ensemble: str = "nvt"
    out: Path | None = None
    resume: bool = False
    temperature: float = 300.0
    pressure: float = 1.0
    timestep: float = 0.5
    friction: float = 0.01
    every: int = 100
    seed: int = 0
    precision: str | None = None
    head: str | None = None
    device: str | None = None
    skin: float = SKIN
    deterministic: bool = False
    force: bool = False

    @property
    def trajectory(self) -> Path:
        return self.out or Path(f"{self.structure.stem}-{self.ensemble}.extxyz")

    @property
    def table(self) -> Path:
        return self.trajectory.with_suffix(".log")

    @property
    def restart(self) -> Path:
        return self.trajectory.with_suffix(".restart.npz")

    def check(self) -> None:
        """Raise ValueError or FileNotFoundError naming the first option that cannot be."""
        if self.ensemble not in ENSEMBLES:
            raise ValueError(f"--ensemble must be one of {', '.join(ENSEMBLES)}, got {self.ensemble!r}")
        for name in ("steps", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        for name in ("temperature", "friction", "skin"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} must be positive, got {getattr(self, name)}")
        if not 0 < self.timestep <= 5:
            raise ValueError(f"--timestep must lie in (0, 5] fs, got {self.timestep}")
        if self.precision is not None:
            Precision.parse(self.precision)
        if not self.structure.is_file():
            raise FileNotFoundError(f"no such structure: {self.structure}")
        if not self.trajectory.absolute().parent.is_dir():
            raise FileNotFoundError(f"--out: the folder of {self.trajectory} does not exist")
        if self.resume and not self.restart.is_file():
            raise FileNotFoundError(f"--resume: there is no {self.restart}")
        written = [path for path in (self.trajectory, self.table, self.restart) if path.exists()]
        if written and not self.resume:
            raise ValueError(f"--out: {written[0]} exists; take another name, or --resume to go on with that run")


@dataclass
class State:
    """Where a run stands: step, time (fs), how long its files are, and the policy it ran in, as JSON of its words."""

    step: int = 0
    time: float = 0.0
    trajectory_bytes: int = 0
    table_bytes: int = 0
    words: str = ""

    def ran_in(self, policy: Precision) -> bool:
        """Whether that was this policy, as far as a restart file tells: those of older versions do not."""
        return not self.words or policy.says(json.loads(self.words))


def run(options: Options, console: Console) -> State:
    """Certificate, then dynamics to `options.steps`. Returns where the run ended.

    Raises ValueError, TypeError or FileNotFoundError for bad options, and RuntimeError if the certificate fails or the
    dynamics blow up.
    """
    options.check()
    device = check_device(options.device)
    atoms, state = read(options)
    console.print(where(device), highlight=False)
    calculator = MACETritonCalculator(
        options.model,
        precision=options.precision,
        head=options.head,
        device=device,
        deterministic=options.deterministic,
        skin=options.skin,
    )
    policy = calculator.models[0].mace_triton.precision
    if not state.ran_in(policy):
        raise ValueError(
            f"--resume: {options.restart} is of a run in another --precision than {policy.name} ({state.words}); take "
            "that, or start a new run from the last frame by another --out"
        )
    state.words = json.dumps(policy.words)
    check_structure(atoms, calculator.z_table.zs)
    if options.ensemble == "npt" and not atoms.pbc.all():
        raise ValueError("--ensemble npt needs a structure that is periodic in all directions")
    if options.resume:
        cut_off(state, options)
    atoms.calc = calculator
    console.print(f"model {options.model}, {len(atoms)} atoms, box of {describe_cell(atoms)}", highlight=False)
    certificate = calculator.certify(atoms)
    verdict = "[green]passed[/]" if certificate.passed else "[bold red]FAILED[/]"
    console.print(f"certificate {verdict}: {certificate}", highlight=False, soft_wrap=True)
    if not certificate.passed and not options.force:
        raise RuntimeError("the certificate failed, so nothing is run: take a more exact --precision, or --force")
    if not np.any(atoms.get_momenta()):
        MaxwellBoltzmannDistribution(atoms, temperature_K=options.temperature, rng=np.random.default_rng(options.seed))
        Stationary(atoms)
    return dynamics(atoms, state, options, console)


def read(options: Options) -> tuple[ase.Atoms, State]:
    """The structure (last frame of its file) and a fresh state, or both from the restart file."""
    atoms = read_structure(options.structure)
    if not options.resume:
        return atoms, State()
    with np.load(options.restart) as kept:
        if not np.array_equal(kept["numbers"], atoms.numbers):
            raise ValueError(f"--resume: {options.restart} holds other atoms than {options.structure}")
        atoms.set_cell(kept["cell"])
        atoms.set_positions(kept["positions"])
        atoms.set_momenta(kept["momenta"])
        state = state_of(kept)
    if state.step >= options.steps:
        raise ValueError(f"--resume: the run has done {state.step} steps already; ask for more than that by --steps")
    return atoms, state


def state_of(kept: Mapping[str, np.ndarray]) -> State:
    """The state in an open restart file."""
    return State(**{name: kept[name].item() for name in vars(State()) if name in kept})


def cut_off(state: State, options: Options) -> None:
    """Cut off what an interrupted run wrote behind its restart file. Raises ValueError if even that is not there."""
    parts = ((options.trajectory, state.trajectory_bytes), (options.table, state.table_bytes))
    for path, size in parts:
        if not path.is_file() or path.stat().st_size < size:
            raise ValueError(f"--resume: {path} is shorter than when {options.restart} was written")
    for path, size in parts:
        os.truncate(path, size)


def read_structure(path: Path) -> ase.Atoms:
    """The last frame of a file. Raises ValueError for one that ASE cannot read."""
    try:
        return ase.io.read(path)
    except Exception as error:  # every format of ASE fails in its own way
        raise ValueError(f"{path} is no structure that ASE can read ({error})") from error


def integrator(atoms: ase.Atoms, state: State, options: Options) -> MolecularDynamics:
    """ASE's integrator of the ensemble. NPT's thermostat and barostat start at rest, after a restart too."""
    step = options.timestep * units.fs
    if options.ensemble == "nve":
        return VelocityVerlet(atoms, step)
    if options.ensemble == "nvt":
        rng = np.random.default_rng((options.seed, 1, state.step))
        friction = options.friction / units.fs
        return Langevin(atoms, step, temperature_K=options.temperature, friction=friction, rng=rng)
    return npt(atoms, options.timestep, options.temperature, options.pressure)


def npt(atoms: ase.Atoms, timestep: float, temperature: float, pressure: float) -> MolecularDynamics:
    """ASE's isotropic dynamics at a temperature (K) and a pressure (bar), in steps of so many fs."""
    try:
        from ase.md.nose_hoover_chain import IsotropicMTKNPT
    except ImportError as error:
        raise ValueError("--ensemble npt needs ase 3.25 or newer") from error
    damping = {"tdamp": THERMOSTAT * units.fs, "pdamp": BAROSTAT * units.fs}
    step, pressure = timestep * units.fs, pressure * BAR
    return IsotropicMTKNPT(atoms, step, temperature_K=temperature, pressure_au=pressure, **damping)


def pressure_of(atoms: ase.Atoms) -> float:
    """Bar, with the ideal gas."""
    return -float(np.mean(atoms.get_stress(include_ideal_gas=True)[:3])) / BAR


def dynamics(atoms: ase.Atoms, state: State, options: Options, console: Console) -> State:
    """Steps from where the state is, with a frame, a line and a restart file every so often."""
    integrate = integrator(atoms, state, options)
    if state.step == 0:
        options.table.write_text(COLUMNS + "\n")
        write(atoms, state, options, float("nan"))
    columns = (
        TextColumn(options.ensemble.upper()),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(options.ensemble, total=options.steps, completed=state.step, now="")
        while state.step < options.steps:
            steps = min(options.every - state.step % options.every, options.steps - state.step)
            began = time.perf_counter()
            integrate.run(steps)
            seconds = time.perf_counter() - began
            state.step += steps
            state.time += steps * options.timestep
            speed = steps * options.timestep * 1e-6 * 86400 / seconds
            check(atoms, state, options)
            write(atoms, state, options, speed)
            bar.update(task, completed=state.step, now=f"T {atoms.get_temperature():.0f} K  {speed:.3g} ns/day")
    console.print(f"{state.time * 1e-3:.6g} ps in {options.trajectory}", highlight=False)
    return state


def check(atoms: ase.Atoms, state: State, options: Options) -> None:
    """RuntimeError once the numbers show that the run has blown up; its files end before that."""
    temperature, energy = atoms.get_temperature(), atoms.get_potential_energy()
    if not temperature < 20 * options.temperature or not math.isfinite(energy):  # true for nan as well
        raise RuntimeError(
            f"the dynamics blew up before step {state.step} (temperature {temperature:.0f} K); the files end with the "
            "frame before. Try a smaller --timestep, --precision fp64, or another start"
        )


def write(atoms: ase.Atoms, state: State, options: Options, speed: float) -> None:
    """A frame, a line of the table, and the restart file, which is replaced only when the others are complete."""
    frame = atoms.copy()
    frame.info |= {"step": state.step, "time_fs": state.time}
    results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    pressure = volume = float("nan")
    if atoms.pbc.all():
        results["stress"], volume = atoms.get_stress(), atoms.get_volume()
        pressure = pressure_of(atoms)
    frame.calc = SinglePointCalculator(frame, **results)
    ase.io.write(options.trajectory, frame, format="extxyz", append=True)
    energies = results["energy"], atoms.get_kinetic_energy()
    numbers = (*energies, atoms.get_temperature(), pressure, volume, speed)
    with options.table.open("a") as table:
        line = " ".join(f"{value:.8g}" for value in numbers)
        table.write(f"{state.step} {state.time * 1e-3:.6f} {line}\n")
    state.trajectory_bytes, state.table_bytes = (p.stat().st_size for p in (options.trajectory, options.table))
    scratch = options.restart.with_suffix(".tmp")
    with scratch.open("wb") as file:
        arrays = {"numbers": atoms.numbers, "positions": atoms.positions, "momenta": atoms.get_momenta()}
        np.savez(file, **arrays, cell=atoms.cell.array, **vars(state))
    os.replace(scratch, options.restart)
