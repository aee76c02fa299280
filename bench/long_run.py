"""Long dynamics with the water model that ships: `python -m bench.long_run` runs all cases side by side.

Where there are several cards, each gets its share of them.

NVE (velocity Verlet) and NVT (Langevin) of 192 and 1536 atoms, NPT of 648, which begins in a box that is too dense, and
NVT in deterministic mode twice. For each: drift of the total energy, temperature, memory at the beginning and at the
end, what a step takes in the first and in the last tenth of the run, whether every number was finite, and a digest of
where the atoms ended.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from mace_triton import md

from . import rows
from .md_step import FRICTION, TEMPERATURE, TIME_STEP, langevin
from .rows import Row

PRESSURE = 1.0
"""Bar."""
RELAX, EQUILIBRATE, EVERY = 200, 4000, 50
"""Steps before the run, and from sample to sample."""
BLOCKS = 10
"""Of the samples, for the error of a mean."""


@dataclass(frozen=True)
class Run:
    """One run: "nve", "nvt" or "npt", `side` molecules along an edge of the box."""

    ensemble: str
    side: int
    deterministic: bool = False
    copy: int = 0

    @property
    def name(self) -> str:
        return f"{self.ensemble}-{self.atoms}{'-deterministic' * self.deterministic}-{self.copy}"

    @property
    def atoms(self) -> int:
        return 3 * self.side**3

    def row(self) -> Row:
        """The part of its row that is known before it runs."""
        names = {"kind": "long run", "block": "long run", "case": self.name, "provider": rows.OURS, "variant": ""}
        return asdict(self) | names | {"atoms": self.atoms, "precision": "fp32", "direction": self.ensemble}


RUNS = (
    *(Run(ensemble, side) for ensemble in ("nve", "nvt") for side in (4, 8)),
    Run("npt", 6),
    *(Run("nvt", 4, True, copy) for copy in range(2)),
)


def long_run(run: Run, steps: int, device: str, seconds: float = math.inf, precision: str = "fp32") -> Row:
    """The row of a run of so many steps, or of as many as so many seconds allow, its preparation included."""
    from ase import units
    from ase.md.verlet import VelocityVerlet

    until = time.perf_counter() + seconds
    atoms = _water(run, device, precision)
    if run.ensemble == "nve":
        dynamics = VelocityVerlet(atoms, TIME_STEP * units.fs)
    elif run.ensemble == "npt":
        dynamics = md.npt(atoms, TIME_STEP, TEMPERATURE, PRESSURE)
    else:
        dynamics = langevin(atoms, np.random.default_rng(2))
    samples, memory, taken, each = [_sample(atoms)], [_memory(device)], 0, []
    began = time.perf_counter()
    while taken < steps and time.perf_counter() < until:
        some, now = min(EVERY, steps - taken), time.perf_counter()
        dynamics.run(some)
        each.append(1e3 * (time.perf_counter() - now) / some)
        taken += some
        samples.append(_sample(atoms))
        if len(samples) == max(1, steps // EVERY // 10):
            memory.append(_memory(device))
    elapsed = time.perf_counter() - began
    memory.append(_memory(device))
    engines = atoms.calc.engines
    return run.row() | {
        **{"precision": precision, "asked": steps, "steps": taken, "time_step_fs": TIME_STEP},
        **_figures(np.array(samples), len(atoms)),
        "memory_bytes": dict(zip(("start", "tenth", "end"), (memory[0], memory[-2], memory[-1]), strict=True)),
        "rebuilds": sum(engine.rebuilds for engine in engines),
        "captures": sum(engine.captures for engine in engines),
        "ms_of_a_step": _ends(each),
        "ns_per_day": taken * TIME_STEP * 1e-6 * 86400 / elapsed,
        "digest": hashlib.sha256(atoms.positions.tobytes() + atoms.get_momenta().tobytes()).hexdigest()[:16],
    }


def _ends(each: list[float]) -> tuple[float, float] | None:
    """Medians over the first and the last tenth."""
    tenth = -(-len(each) // 10)
    return (float(np.median(each[:tenth])), float(np.median(each[-tenth:]))) if each else None


def _water(run: Run, device: str, precision: str):
    """Liquid water at the temperature of the run, from nothing but a seed."""
    from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary
    from ase.optimize import FIRE

    from mace_triton import MACETritonCalculator
    from mace_triton.water import water_box

    atoms = water_box(run.side)
    atoms.calc = MACETritonCalculator("water", precision=precision, device=device, deterministic=run.deterministic)
    FIRE(atoms, logfile=None, maxstep=0.05).run(fmax=0.5, steps=RELAX)
    rng = np.random.default_rng(1)
    MaxwellBoltzmannDistribution(atoms, temperature_K=TEMPERATURE, rng=rng)
    langevin(atoms, rng, 5 * FRICTION).run(EQUILIBRATE)
    Stationary(atoms)
    return atoms


def _sample(atoms) -> tuple[float, float, float]:
    """Total energy (eV), temperature (K), largest force (eV/angstrom)."""
    return atoms.get_total_energy(), atoms.get_temperature(), float(np.abs(atoms.get_forces()).max())


def _memory(device: str) -> dict[str, int]:
    """Bytes: the largest that this process had on the host, and what torch holds on the device."""
    held = torch.cuda.memory_reserved(device) if device.startswith("cuda") else 0
    return {"host": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "device": held}


def _figures(samples: np.ndarray, atoms: int) -> Row:
    """Drift of the total energy (meV an atom and ns, slope of a straight line), its scatter, and temperatures."""
    energy, temperature, _ = samples.T
    time_ns = 1e-6 * TIME_STEP * EVERY * np.arange(len(samples))
    per_atom = 1e3 * (energy - energy[0]) / atoms
    slope, start = np.polyfit(time_ns, per_atom, 1) if len(samples) > 1 else (math.nan, math.nan)
    means = [part.mean() for part in np.array_split(temperature, min(BLOCKS, len(temperature)))]
    return {
        "finite": bool(np.isfinite(samples).all()),
        "drift_meV_per_atom_ns": float(slope),
        "scatter_meV_per_atom": float(np.std(per_atom - (start + slope * time_ns))),
        "temperature_K": float(temperature.mean()),
        "temperature_error_K": float(np.std(means, ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None,
        "largest_force": float(samples[:, 2].max()),
    }


def side_by_side(runs: tuple[Run, ...], steps: dict[bool, int], seconds: float, path: Path, device: str) -> list[Row]:
    """All runs at once, a process each; their rows are written as they come. steps: by whether it is deterministic."""
    recorder = rows.Recorder(path, rows.environment(torch.device(device)))
    env = {"OMP_NUM_THREADS": "1"} | os.environ  # or each would have as many threads as there are processors

    def started(run: Run) -> subprocess.Popen:
        where = card_of(run, device, torch.cuda.device_count())
        words = {"run": run.name, "steps": steps[run.deterministic], "seconds": seconds, "device": where}
        command = [sys.executable, "-m", "bench.long_run", *(f"--{key}={value}" for key, value in words.items())]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

    with ThreadPoolExecutor(len(runs)) as pool:  # a row is written when its run ends, whichever does first
        waiting = {pool.submit(started(run).communicate): run for run in runs}
        for future in as_completed(waiting):
            recorder.add(_row_of(waiting[future], *future.result()))
    return recorder.rows


def card_of(run: Run, device: str, cards: int) -> str:
    """The device of a run: of several cards the one with fewest atoms when runs are dealt out, the largest first.

    Processes that share a card wait for each other's turns.
    """
    if device != "cuda" or cards < 2:
        return device
    atoms = [0] * cards
    for other in sorted(RUNS, key=lambda other: -other.atoms):
        card = atoms.index(min(atoms))
        if other == run:
            break
        atoms[card] += other.atoms
    return f"cuda:{card}"


def _row_of(run: Run, out: str, err: str) -> Row:
    """What a run printed, or why there is nothing."""
    try:
        row = json.loads(out.strip().splitlines()[-1]) | {"status": "ok"}
    except (IndexError, json.JSONDecodeError):
        row = run.row() | {"status": "failed", "reason": (err.strip().splitlines() or ["no word"])[-1][:300]}
    print(json.dumps(row), flush=True)
    return row


def same_bits(found: list[Row]) -> bool | None:
    """Whether deterministic runs of one kind ended alike; None without two of them of the same length."""
    ended = [(row["steps"], row["digest"]) for row in found if row["deterministic"] and row["status"] == "ok"]
    if len(ended) < 2 or len({steps for steps, _ in ended}) > 1:
        return None
    return len(set(ended)) == 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--deterministic-steps", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which a run ends early")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--run", choices=[run.name for run in RUNS], help="this one alone, in this process")
    parser.add_argument("--out", type=Path, default=rows.RESULTS / "long-runs.json")
    a = parser.parse_args()
    if a.run:
        run = next(run for run in RUNS if run.name == a.run)
        print(json.dumps(long_run(run, a.steps, a.device, a.seconds)))
        return 0
    found = side_by_side(RUNS, {False: a.steps, True: a.deterministic_steps}, a.seconds, a.out, a.device)
    print(f"deterministic runs ended with the same bits: {same_bits(found)}")
    return int(any(row["status"] != "ok" or not row["finite"] for row in found) or same_bits(found) is not True)


if __name__ == "__main__":
    sys.exit(main())
