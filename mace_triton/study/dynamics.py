"""`mace-triton study md`: does the precision of forces show in what dynamics of water gives?

Every policy runs the same replicas (start, velocities and seed alike) of NVT and NPT (300 K, 1 bar) and of NVE, by
`mace-triton md`, whose integrators are ASE's. A replica gives one mean of each observable, its first part left out;
replicas are independent, so intervals are Student's t over them. A policy is equivalent to FP64 where two one-sided
Welch tests (TOST: Schuirmann, J. Pharmacokinet. Biopharm. 15, 657) reject, at 5 %, a difference beyond a margin that is
set beforehand, in `OBSERVABLES`; different where Welch's test of no difference rejects at 5 % divided by the number of
observables that a policy is compared in (Bonferroni), as of so many one seems different by chance.

Runs lie in a folder of their own; what an ended one gives is written beside it as RUN.json, behind which its trajectory
is not needed any more. A study that is started again takes from there, or from earlier results of the same plan, what
has ended, goes on with runs that were cut off, and runs the others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import ase.io
import mace  # noqa: F401  before e3nn, see mace_triton/__init__.py
import numpy as np
import torch
from ase import units
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from scipy import stats

from .. import md
from ..precision import Precision
from ..water import water_box
from .store import LEVEL, Row, earlier, mean_interval, save, write_whole

REFERENCE = "fp64"
DISCARD = 0.25
"""The part of a run that is left out."""
SHELL, BIN, STRIDE = 6.0, 0.05, 4
"""Angstrom: how far radial distribution functions go, and how finely; they are of each STRIDE-th frame."""
LAGS = (0.4, 0.9)
"""Parts of the longest lag between which a mean square displacement's slope is taken."""


@dataclass(frozen=True)
class Observable:
    """unit, and the margin within which a policy counts as FP64: what would matter, set before it was measured."""

    unit: str
    margin: float
    ensembles: tuple[str, ...]


OBSERVABLES = {
    "temperature": Observable("K", 5.0, ("nvt", "npt")),
    "energy": Observable("meV/atom", 2.0, ("nvt", "npt")),
    "pressure": Observable("bar", 1000.0, ("nvt",)),
    "density": Observable("g/cm^3", 0.02, ("npt",)),
    "O-O peak": Observable("", 0.15, ("nvt", "npt")),
    "O-O place": Observable("angstrom", 0.03, ("nvt", "npt")),
    "O-H peak": Observable("", 0.10, ("nvt", "npt")),
    "diffusion": Observable("1e-5 cm^2/s", 0.5, ("nvt",)),
    "drift": Observable("meV/atom/ns", 5.0, ("nve",)),
}
COMPARED = sum(len(observable.ensembles) for observable in OBSERVABLES.values())


@dataclass(frozen=True)
class Plan:
    """What is run. steps of 0.5 fs each, a frame after `every`; side: molecules along the box's edge."""

    model: str
    policies: tuple[str, ...]
    ensembles: tuple[str, ...] = md.ENSEMBLES
    replicas: int = 5
    steps: int = 40000
    side: int = 6
    every: int = 40

    def __post_init__(self):
        for policy in self.policies:
            Precision.parse(policy)
        if REFERENCE not in self.policies:
            raise ValueError(f"policies must hold {REFERENCE}, which the others are compared with, got {self.policies}")
        for ensemble in self.ensembles:
            if ensemble not in md.ENSEMBLES:
                raise ValueError(f"ensembles must be of {', '.join(md.ENSEMBLES)}, got {ensemble!r}")
        if self.replicas < 1 or self.steps < 8 * self.every:
            raise ValueError(
                f"replicas must be at least 1 and steps {8 * self.every}, got {self.replicas}, {self.steps}"
            )


@dataclass(frozen=True)
class Unit:
    """One run: ensemble, policy, and the seed of its start."""

    ensemble: str
    policy: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.ensemble}-{Path(self.policy).stem}-{self.seed}"

    @property
    def words(self) -> dict[str, str]:
        """What the policy is, block by block."""
        return Precision.parse(self.policy).words

    def options(self, plan: Plan, folder: Path, device: str) -> md.Options:
        """For `mace-triton md`; it goes on where a run of it was cut off."""
        out = folder / f"{self.name}.extxyz"
        found = md.Options(
            plan.model,
            folder / f"start-{self.seed}.extxyz",
            plan.steps,
            self.ensemble,
            out,
            every=plan.every,
            seed=self.seed,
            precision=self.policy,
            device=device,
            force=True,
        )
        return replace(found, resume=found.restart.is_file())


def units_of(plan: Plan) -> list[Unit]:
    """All runs; those of one seed together, so that a study that is cut short has whole comparisons."""
    seeds = range(1, plan.replicas + 1)
    return [Unit(ensemble, policy, seed) for seed in seeds for ensemble in plan.ensembles for policy in plan.policies]


def table_of(path: Path) -> dict[str, np.ndarray]:
    """The columns of a run's table."""
    numbers = np.loadtxt(path, skiprows=1, ndmin=2)
    return dict(zip(md.COLUMNS.split(), numbers.T, strict=True))


def done(unit: Unit, plan: Plan, folder: Path) -> int:
    """Steps that a run has done, by its restart file, or by what it gave if it has ended."""
    if given(unit, plan, folder):
        return plan.steps
    return begun(unit, folder).step


def begun(unit: Unit, folder: Path) -> md.State:
    """Where a run stands by its restart file."""
    path = folder / f"{unit.name}.restart.npz"
    if not path.is_file():
        return md.State()
    with np.load(path) as kept:
        return md.state_of(kept)


def check_begun(units: list[Unit], folder: Path) -> None:
    """Raise ValueError for the first run that was begun under another policy of the same name."""
    for unit in units:
        state = begun(unit, folder)
        if not state.ran_in(Precision.parse(unit.policy)):
            raise ValueError(
                f"--runs: {folder / unit.name} is of another policy than {unit.policy} is now ({state.words}); take "
                "another folder, or move that run's files away"
            )


def given(unit: Unit, plan: Plan, folder: Path) -> Row | None:
    """What a run of the plan's length, under the policy as it is, gave: its observables and curves."""
    path = folder / f"{unit.name}.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    return found if (found.get("steps"), found.get("words")) == (plan.steps, unit.words) else None


def work_out(unit: Unit, plan: Plan, folder: Path) -> None:
    """Write what a run gives beside it."""
    values, curves = observables(unit, folder)
    note(unit, plan, folder, {"observables": values, "curves": curves})


def note(unit: Unit, plan: Plan, folder: Path, found: Row) -> None:
    """Write RUN.json, whole or not at all."""
    write_whole(folder / f"{unit.name}.json", json.dumps({"steps": plan.steps, "words": unit.words, **found}))


def recall(plan: Plan, runs: Path, results: Path, about: Row) -> None:
    """Take over what runs gave under the same policies from earlier results of a study whose head is the same."""
    rows = {(row["ensemble"], row["policy"], row["seed"]): row for row in earlier(results, about)}
    if not rows:
        return
    runs.mkdir(parents=True, exist_ok=True)
    for unit in units_of(plan):
        row = rows.get((unit.ensemble, Path(unit.policy).stem, unit.seed))
        if row and row.get("words") == unit.words and not given(unit, plan, runs):
            note(unit, plan, runs, {key: row[key] for key in ("observables", "curves")})


def simulate(
    plan: Plan, folder: Path, device: str, workers: int, console: Console, keep: Callable[[dict[Unit, str]], object]
) -> dict[Unit, str]:
    """Run what is missing, several at a time, dealt out to all GPUs; why those that failed did.

    keep: called with these whenever a run has ended, so that a study that is cut off leaves its results.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(1, plan.replicas + 1):
        start = folder / f"start-{seed}.extxyz"
        if not start.is_file():
            ase.io.write(start, water_box(plan.side, seed=seed))
    todo = [unit for unit in units_of(plan) if not given(unit, plan, folder)]
    check_begun(todo, folder)
    columns = (TextColumn("steps"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    total = plan.steps * len(units_of(plan))
    # Working out is Python's, so it takes processes; this one only waits.
    processes = ProcessPoolExecutor(workers, mp_context=get_context("spawn")) if workers > 1 else None

    def whole(unit: Unit, number: int) -> str:
        reason = ""
        if done(unit, plan, folder) < plan.steps:
            reason = run_one(unit.options(plan, folder, device), number, workers)
        if not reason:
            apart(processes, work_out, unit, plan, folder)
        return reason

    with Progress(*columns, console=console) as bar, ThreadPoolExecutor(workers) as pool:
        task = bar.add_task("steps", total=total)
        jobs = {unit: pool.submit(whole, unit, number) for number, unit in enumerate(todo)}
        open_jobs = set(jobs.values())
        while open_jobs:
            bar.update(task, completed=sum(done(unit, plan, folder) for unit in units_of(plan)))
            ended, open_jobs = wait(open_jobs, timeout=2, return_when=FIRST_COMPLETED)
            if ended and open_jobs:
                keep(_reasons(jobs))
        bar.update(task, completed=sum(done(unit, plan, folder) for unit in units_of(plan)))
    if processes:
        processes.shutdown()
    return _reasons(jobs)


def _reasons(jobs: dict[Unit, Future]) -> dict[Unit, str]:
    """Of the runs that have failed by now."""
    return {unit: job.result() for unit, job in jobs.items() if job.done() and job.result()}


def apart(processes: Executor | None, call: Callable[..., None], *arguments: object) -> None:
    """Call in another process, if there are any."""
    if processes is None:
        call(*arguments)
    else:
        processes.submit(call, *arguments).result()


def one_of(cards: int, visible: str | None, number: int) -> str:
    """The name, for CUDA_VISIBLE_DEVICES, of the card that a run of this number takes out of those that are visible."""
    names = visible.split(",") if visible else [str(card) for card in range(cards)]
    return names[number % cards]


def run_one(options: md.Options, number: int, workers: int) -> str:
    """One run, in this process if there is only one worker; what went wrong, or an empty string."""
    if workers == 1:
        try:
            md.run(options, Console(quiet=True))
        except (ValueError, RuntimeError, OSError) as error:
            return str(error)
        return ""
    words = ["md", options.model, str(options.structure), "--force", *(["--resume"] if options.resume else [])]
    for name in ("steps", "ensemble", "out", "every", "seed", "precision", "device"):
        words += [f"--{name}", str(getattr(options, name))]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if options.device == "cuda" and torch.cuda.device_count() > 1:
        env["CUDA_VISIBLE_DEVICES"] = one_of(torch.cuda.device_count(), env.get("CUDA_VISIBLE_DEVICES"), number)
    time.sleep(0.2 * min(number, workers))  # not all read the same files at once
    command = [sys.executable, "-m", "mace_triton.cli", *words]
    ended = subprocess.run(command, env=env, capture_output=True, text=True)
    return "" if ended.returncode == 0 else (ended.stderr.strip().splitlines() or ["ended by a signal"])[-1]


# What a run gives


def observables(unit: Unit, folder: Path) -> tuple[Row, Row]:
    """(means of a run behind its first part, radial distribution functions {"O-O": [...], "O-H": [...]})."""
    table = table_of(folder / f"{unit.name}.log")
    kept = slice(int(DISCARD * len(table["step"])), None)
    if unit.ensemble == "nve":
        atoms = len(ase.io.read(folder / f"{unit.name}.extxyz", index=0))
        total = 1e3 * (table["potential_eV"] + table["kinetic_eV"])[kept] / atoms
        return {"drift": float(np.polyfit(1e-3 * table["time_ps"][kept], total, 1)[0])}, {}
    frames = ase.io.read(folder / f"{unit.name}.extxyz", index=":")[kept]
    found = {
        "temperature": float(table["temperature_K"][kept].mean()),
        "energy": 1e3 * float(table["potential_eV"][kept].mean()) / len(frames[0]),
        "pressure": float(table["pressure_bar"][kept].mean()),
        "density": float(frames[0].get_masses().sum() / units.kg * 1e3 / (table["volume_A3"][kept] * 1e-24).mean()),
        "diffusion": diffusion(frames, 1e-3 * (frames[1].info["time_fs"] - frames[0].info["time_fs"])),
    }
    curves = {pair: distribution(frames[::STRIDE], *pair.split("-")) for pair in ("O-O", "O-H")}
    where = centres()
    found["O-O place"], found["O-O peak"] = peak(where, curves["O-O"], 2.4, 3.3)
    found["O-H peak"] = peak(where, curves["O-H"], 1.5, 2.4)[1]
    wanted = [name for name, observable in OBSERVABLES.items() if unit.ensemble in observable.ensembles]
    return {name: found[name] for name in wanted}, {pair: list(curve) for pair, curve in curves.items()}


def centres() -> np.ndarray:
    """Middles of the bins of a radial distribution function, angstrom."""
    return BIN * (np.arange(round(SHELL / BIN)) + 0.5)


def distribution(frames: list[ase.Atoms], one: str, other: str) -> np.ndarray:
    """g(r) between two elements in periodic boxes, up to SHELL or half the box; zero after."""
    counts, shells = np.zeros(round(SHELL / BIN)), 4 * np.pi * centres() ** 2 * BIN
    for atoms in frames:
        symbols = np.array(atoms.get_chemical_symbols())
        a, b = (atoms.positions[symbols == element] for element in (one, other))
        fractions = (a[:, None] - b[None]) @ np.linalg.inv(atoms.cell.array)
        away = np.linalg.norm((fractions - fractions.round()) @ atoms.cell.array, axis=-1)
        pairs = away[away > 1e-6]
        found, _ = np.histogram(pairs, bins=len(counts), range=(0, SHELL))
        counts += found * atoms.get_volume() / len(pairs)
    counts[centres() > 0.5 * min(frames[0].cell.lengths())] = 0.0
    return counts / shells / len(frames)


def peak(where: np.ndarray, curve: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """(place, height) of a maximum between two distances, by a parabola through the highest bin and its neighbours."""
    inside = np.flatnonzero((where > low) & (where < high))
    at = int(inside[np.argmax(curve[inside])])
    left, middle, right = curve[at - 1 : at + 2]
    bend = left - 2 * middle + right
    shift = 0.0 if bend == 0 else 0.5 * (left - right) / bend
    return float(where[at] + shift * BIN), float(middle - 0.25 * (left - right) * shift)


def diffusion(frames: list[ase.Atoms], picoseconds: float) -> float:
    """Of oxygens, in 1e-5 cm^2/s: a sixth of the slope of the mean square displacement, all frames as origins.

    picoseconds: between frames. Displacements are those of the box's centre left out; it is not corrected for the size
    of the box (Yeh and Hummer, J. Phys. Chem. B 108, 15873).
    """
    oxygens = frames[0].numbers == 8
    paths = np.array([atoms.positions[oxygens] - atoms.get_center_of_mass() for atoms in frames])
    longest = len(paths) // 2
    lags = np.unique(np.linspace(LAGS[0] * longest, LAGS[1] * longest, 8).round().astype(int).clip(1))
    squares = [float(((paths[lag:] - paths[:-lag]) ** 2).sum(-1).mean()) for lag in lags]
    slope = np.polyfit(lags * picoseconds, squares, 1)[0] if len(lags) > 1 else squares[0] / (lags[0] * picoseconds)
    return float(slope) / 6 * 10  # 1 angstrom^2/ps is 10 of 1e-5 cm^2/s


# Comparison


def compared(values: np.ndarray, exact: np.ndarray, margin: float) -> Row:
    """A policy's replicas beside FP64's: mean and interval, difference and interval, TOST's p, verdict.

    margin: see `Observable`. Intervals are of 95 %, whatever they are many of.
    """
    values, exact = np.asarray(values, dtype=float), np.asarray(exact, dtype=float)
    difference = float(values.mean() - exact.mean())
    row: Row = {"mean": mean_interval(values), "difference": (difference, None, None)}
    if min(len(values), len(exact)) < 2:
        return row | {"p": None, "verdict": "too few replicas"}
    spread = [v.var(ddof=1) / len(v) for v in (values, exact)]
    error = max(float(np.sqrt(sum(spread))), np.finfo(float).tiny)
    freedom = sum(spread) ** 2 / max(
        sum(s**2 / (len(v) - 1) for s, v in zip(spread, (values, exact), strict=True)), np.finfo(float).tiny
    )
    freedom = max(freedom, 1.0)
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    p = max(stats.t.sf((margin + side * difference) / error, freedom) for side in (1, -1))
    row["difference"] = (difference, difference - half, difference + half)
    chance = 2 * float(stats.t.sf(abs(difference) / error, freedom))
    open_verdict = "different" if chance < (1 - LEVEL) / COMPARED else "undecided"
    return row | {"p": float(p), "verdict": "equivalent" if p < 1 - LEVEL else open_verdict}


def comparisons(rows: list[Row]) -> Iterator[Row]:
    """For each ensemble, observable and policy: its replicas beside FP64's."""
    for ensemble in dict.fromkeys(row["ensemble"] for row in rows):
        own = [row for row in rows if row["ensemble"] == ensemble]
        for name, observable in OBSERVABLES.items():
            if ensemble not in observable.ensembles:
                continue
            values: dict[str, list[float]] = {}
            for row in own:
                values.setdefault(row["policy"], []).append(row["observables"][name])
            for policy, found in values.items():
                if REFERENCE in values:
                    head = {"ensemble": ensemble, "observable": name, "unit": observable.unit, "policy": policy}
                    more = compared(found, values[REFERENCE], observable.margin)
                    yield head | {"margin": observable.margin, "replicas": len(found)} | more


def run(plan: Plan, runs: Path, folder: Path, device: str, workers: int, quick: bool, console: Console) -> Path:
    """The study; see the head of this file. Returns where its results are."""
    about = {"model": plan.model, "steps": plan.steps, "every": plan.every, "atoms": 3 * plan.side**3}
    about |= {"quick": quick, "bins": list(centres())}

    def keep(failed: dict[Unit, str]) -> Path:
        rows: list[Row] = []
        for unit in units_of(plan):
            head = {"ensemble": unit.ensemble, "policy": Path(unit.policy).stem, "seed": unit.seed}
            found = given(unit, plan, runs)
            if found:
                rows.append(head | {key: found[key] for key in ("words", "observables", "curves")})
        more = {"failed": {unit.name: reason for unit, reason in failed.items()}}
        return save("md", folder, torch.device(device), **about, **more, rows=rows)

    recall(plan, runs, folder / "md.json", about)
    failed = simulate(plan, runs, device, workers, console, keep)
    for unit, reason in failed.items():
        console.print(f"{unit.name} failed: {reason}", highlight=False, soft_wrap=True)
    return keep(failed)
