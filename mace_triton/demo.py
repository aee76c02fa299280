"""`mace-triton demo`: molecular dynamics of water (or the user's structure) on our kernels, certificate first."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import ase
import ase.io
import mace  # noqa: F401  before e3nn, see mace_triton/__init__.py
import numpy as np
import torch
from ase import units
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary
from ase.optimize import FIRE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .calculator import MACETritonCalculator, check_device
from .certify import Certificate, check_structure
from .ops import dispatch
from .precision import Precision
from .water import is_water_box, longest_bond, water_box

RELAXED = 0.3
"""Largest force (eV/angstrom) at which the relaxation stops: then the molecules have settled among each other."""

RELAX_STEPS = {"cuda": 50, "cpu": 8}  # a step takes seconds on a CPU, and the box is close to water anyway
WARM_UP = 5  # steps left out of the timing: they compile kernels and fill caches


@dataclass(frozen=True)
class Options:
    """What the command line offers; times in fs, temperature in K, friction in 1/fs."""

    steps: int = 2000
    model: str = "water"
    precision: str | None = None
    side: int = 4
    start: Path | None = None
    device: str | None = None
    temperature: float = 300.0
    timestep: float = 0.5
    friction: float = 0.01
    seed: int = 0
    trajectory: Path | None = None
    log: Path | None = None
    summary: Path | None = None

    def check(self) -> None:
        """Raise ValueError or FileNotFoundError naming the first option that cannot be."""
        if self.steps < 1:
            raise ValueError(f"--steps must be at least 1, got {self.steps}")
        if not 0 < self.timestep <= 5:
            raise ValueError(f"--timestep must lie in (0, 5] fs, got {self.timestep}")
        if not self.temperature > 0:
            raise ValueError(f"--temperature must be positive, got {self.temperature}")
        if not self.friction > 0:
            raise ValueError(f"--friction must be positive, got {self.friction}")
        if self.precision is not None:
            Precision.parse(self.precision)
        for name in ("trajectory", "log", "summary"):
            path = getattr(self, name)
            if path is not None and not path.absolute().parent.is_dir():
                raise FileNotFoundError(f"--{name}: the folder of {path} does not exist")


def run(options: Options, console: Console) -> dict:
    """Certificate, then Langevin dynamics. Returns the summary (also written to `options.summary`).

    Raises ValueError, TypeError or FileNotFoundError for bad options, and RuntimeError if the
    certificate fails or the dynamics blow up.
    """
    options.check()
    device = check_device(options.device)
    atoms = read_start(options)
    console.print(where(device), highlight=False)
    calculator = MACETritonCalculator(options.model, precision=options.precision, device=device)
    check_structure(atoms, calculator.z_table.zs)
    atoms.calc = calculator
    console.print(f"model {options.model}, {len(atoms)} atoms, box of {describe_cell(atoms)}", highlight=False)
    relax(atoms, device, options, console)
    certificate = calculator.certify(atoms)
    verdict = "[green]passed[/]" if certificate.passed else "[bold red]FAILED[/]"
    console.print(f"certificate {verdict}: {certificate}", highlight=False, soft_wrap=True)
    if not certificate.passed:
        raise RuntimeError("the certificate failed, so nothing is run: take a more exact --precision (fp64, fp32)")
    record = dynamics(atoms, options, console)
    summary = summarise(record, atoms, options, device, certificate)
    if options.summary is not None:
        options.summary.write_text(json.dumps(summary, indent=1) + "\n")
    console.print(closing(summary), highlight=False)
    return summary


def read_start(options: Options) -> ase.Atoms:
    """The water box, or the user's structure (last frame of the file)."""
    if options.start is None:
        return water_box(options.side, seed=options.seed)
    if not options.start.is_file():
        raise FileNotFoundError(f"--start: no such file: {options.start}")
    try:
        return ase.io.read(options.start)
    except Exception as error:  # every format of ASE fails in its own way
        raise ValueError(f"--start: {options.start} is no structure that ASE can read ({error})") from error


def where(device: str) -> str:
    """One line: what the run computes on."""
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, Triton kernels"
    if dispatch.interpreting():
        return "CPU, Triton kernels in the interpreter (TRITON_INTERPRET=1): right numbers, no speed"
    return f"no GPU in use: the CPU reference path in PyTorch, {torch.get_num_threads()} threads. Seconds per step"


def describe_cell(atoms: ase.Atoms) -> str:
    return " x ".join(f"{length:.2f}" for length in atoms.cell.lengths()) + " angstrom"


def relax(atoms: ase.Atoms, device: str, options: Options, console: Console) -> None:
    """A few FIRE steps so that the dynamics start without huge forces; none for a structure that brings velocities."""
    if np.any(atoms.get_momenta()):
        return
    optimiser = FIRE(atoms, logfile=None, maxstep=0.05)
    with console.status("relaxing the box"):
        optimiser.run(fmax=RELAXED, steps=RELAX_STEPS[torch.device(device).type])
    force = np.linalg.norm(atoms.get_forces(), axis=1).max()
    console.print(f"relaxed for {optimiser.nsteps} steps, largest force {force:.1f} eV/angstrom", highlight=False)
    MaxwellBoltzmannDistribution(atoms, temperature_K=options.temperature, rng=np.random.default_rng(options.seed))
    Stationary(atoms)


@dataclass
class Record:
    """What the dynamics leave: one entry per step, and the time of the steps after the warm-up."""

    potential: list[float]  # eV
    temperature: list[float]  # K
    force: list[float]  # largest, eV/angstrom
    bond: list[float]  # longest O-H bond, angstrom; empty unless it is water
    seconds: float = 0.0
    timed: int = 0

    def ns_per_day(self, timestep: float) -> float:
        return self.timed * timestep * 1e-6 * 86400 / self.seconds if self.seconds else float("nan")


def dynamics(atoms: ase.Atoms, options: Options, console: Console) -> Record:
    """Langevin (NVT) steps with a progress bar, the energy, the temperature and the speed."""
    md = Langevin(
        atoms,
        timestep=options.timestep * units.fs,
        temperature_K=options.temperature,
        friction=options.friction / units.fs,
        rng=np.random.default_rng(options.seed + 1),
    )
    record, water = Record([], [], [], []), is_water_box(atoms)
    outputs = Outputs(options, atoms)
    columns = (TextColumn("NVT"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"))
    lines = max(1, options.steps // 10)
    with outputs, Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("NVT", total=options.steps, state="")
        for step in range(1, options.steps + 1):
            began = time.perf_counter()
            md.run(1)
            if step > WARM_UP or options.steps <= WARM_UP:
                record.seconds += time.perf_counter() - began
                record.timed += 1
            observe(record, atoms, water, step, options)
            state = describe(record, options)
            bar.update(task, advance=1, state=state)
            outputs.write(step, atoms, record)
            if step % lines == 0 and step < options.steps:
                bar.console.print(f"step {step:7d}  {state}", highlight=False)
    return record


def observe(record: Record, atoms: ase.Atoms, water: bool, step: int, options: Options) -> None:
    """Append this step's numbers; RuntimeError once they show that the run has blown up."""
    record.potential.append(float(atoms.get_potential_energy()))
    record.temperature.append(float(atoms.get_temperature()))
    record.force.append(float(np.linalg.norm(atoms.get_forces(), axis=1).max()))
    if water:
        record.bond.append(longest_bond(atoms))
    hot = not record.temperature[-1] < 20 * options.temperature  # true for nan as well
    if hot or not math.isfinite(record.potential[-1]):
        raise RuntimeError(
            f"the dynamics blew up at step {step}: temperature {record.temperature[-1]:.0f} K, largest force "
            f"{record.force[-1]:.1f} eV/angstrom. Try a smaller --timestep, --precision fp64, or another start"
        )


def describe(record: Record, options: Options) -> str:
    speed = f"{record.ns_per_day(options.timestep):.3g} ns/day" if record.timed else "warming up"
    return f"E {record.potential[-1]:.3f} eV  T {record.temperature[-1]:.0f} K  {speed}"


class Outputs:
    """The optional files: a table of every step, and every 100th frame with its velocities."""

    def __init__(self, options: Options, atoms: ase.Atoms):
        self.options, self.table = options, None
        self.every = max(1, min(100, options.steps // 10))

    def __enter__(self) -> Outputs:
        if self.options.log is not None:
            self.table = self.options.log.open("w", buffering=1)
            self.table.write("time_fs potential_eV temperature_K largest_force_eV_per_A longest_OH_A\n")
        if self.options.trajectory is not None:
            self.options.trajectory.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self.table is not None:
            self.table.close()

    def write(self, step: int, atoms: ase.Atoms, record: Record) -> None:
        if self.table is not None:
            bond = record.bond[-1] if record.bond else float("nan")
            row = (record.potential[-1], record.temperature[-1], record.force[-1], bond)
            self.table.write(f"{step * self.options.timestep:.2f} " + " ".join(f"{value:.6f}" for value in row) + "\n")
        if self.options.trajectory is not None and (step % self.every == 0 or step == self.options.steps):
            ase.io.write(self.options.trajectory, atoms, format="extxyz", append=True)


def summarise(record: Record, atoms: ase.Atoms, options: Options, device: str, certificate: Certificate) -> dict:
    """Everything worth keeping of a run, for a JSON file. The first tenth counts as equilibration."""
    skip = len(record.potential) // 10
    temperature, potential = np.array(record.temperature[skip:]), np.array(record.potential[skip:])
    picoseconds = options.timestep * 1e-3 * np.arange(len(potential))
    slope = float(np.polyfit(picoseconds, potential, 1)[0]) if len(potential) > 2 else float("nan")
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(options).items()}
    return {
        "options": settings,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU reference path",
        "torch": torch.__version__,
        "atoms": len(atoms),
        "picoseconds": options.steps * options.timestep * 1e-3,
        "equilibration_steps": skip,
        "temperature_mean_K": float(temperature.mean()),
        "temperature_std_K": float(temperature.std()),
        "potential_mean_eV": float(potential.mean()),
        "potential_drift_meV_per_atom_per_ps": 1e3 * slope / len(atoms),
        "largest_force_eV_per_angstrom": max(record.force),
        "longest_OH_bond_angstrom": max(record.bond, default=None),
        "molecules_intact": max(record.bond) < 1.5 if record.bond else None,
        "ms_per_step": 1e3 * record.seconds / record.timed,
        "ns_per_day": record.ns_per_day(options.timestep),
        "certificate": asdict(certificate) | {"passed": certificate.passed},
    }


def closing(summary: dict) -> str:
    mean, spread = summary["temperature_mean_K"], summary["temperature_std_K"]
    return (
        f"{summary['picoseconds']:.3g} ps at {mean:.0f} +- {spread:.0f} K, "
        f"{summary['ms_per_step']:.4g} ms per step, {summary['ns_per_day']:.3g} ns/day"
    )
