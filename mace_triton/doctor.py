"""`mace-triton doctor`: what runs a model on this machine, what a step of a structure costs, and what would fit."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import ase
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from .convert import report
from .engine import SKIN, Engine
from .engine.memory import USABLE, Footprint, footprint

STEPS = 15
MOVE = 0.005
"""Angstrom, by which atoms are moved between steps: little enough for the candidates to hold."""


@dataclass(frozen=True)
class Diagnosis:
    """A step of the engine: atoms, edges, how often what happened, milliseconds, bytes.

    wall: of a step with positions from the host, the median. gpu and launches: the sum of its kernels and their number,
    None on a CPU. predicted: None for models that take MACE's own forward. shares: in how many the weights of edges are
    made, 1 for all at once. peak: of device memory while the engine was made and ran, None on a CPU. memory: of the
    device, None on a CPU.
    """

    atoms: int
    edges: int
    first: float
    wall: float
    gpu: float | None
    launches: int | None
    because: str
    predicted: Footprint | None
    shares: int
    peak: int | None
    memory: int | None

    def rows(self) -> list[tuple[str, str]]:
        """(what, value) for people."""
        path = f"MACE's own forward and autograd: {self.because}" if self.because else "a chain of kernels, no autograd"
        found = [
            ("structure", f"{self.atoms} atoms, {self.edges} edges, {self.edges / self.atoms:.1f} an atom"),
            ("engine", path),
            ("first step", f"{self.first:.1f} s (compiles kernels where their cache is empty)"),
            ("a step", f"{self.wall:.3f} ms, {86.4 / self.wall:.1f} ns/day at 1 fs"),
        ]
        if self.gpu is not None:
            found.append(("of it the GPU", f"{self.gpu:.3f} ms in {self.launches} kernels and copies"))
            found.append(("of it the host", f"{max(self.wall - self.gpu, 0.0):.3f} ms"))
        if self.predicted is not None:
            how = f" ({self.shares} shares: too little for all weights at once)" if self.shares > 1 else ""
            found.append(("predicted memory", _gib(self.predicted.in_shares(self.shares)) + how))
        if self.peak is not None:
            found.append(("peak memory", f"{_gib(self.peak)} of {_gib(self.memory)}"))
        if self.predicted is not None and self.memory is not None:
            largest = self.predicted.largest(int(USABLE * self.memory))
            found.append(("would fit", f"about {largest} atoms as dense as these"))
        return found


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def diagnose(model: torch.nn.Module, atoms: ase.Atoms, head: str | None = None, skin: float = SKIN) -> Diagnosis:
    """Make an engine for `atoms` (which stay as they are), run some steps, measure them.

    Raises what `Engine` raises.
    """
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    engine = Engine(model, atoms, head=head, skin=skin)
    engine.step()
    first = time.perf_counter() - start
    rng, walls = np.random.default_rng(0), []
    for _ in range(STEPS):
        moved = atoms.positions + rng.uniform(-MOVE, MOVE, atoms.positions.shape)
        start = time.perf_counter()
        engine.step(moved)
        walls.append(1e3 * (time.perf_counter() - start))
    edges = engine.edges
    predicted = None if engine.autograd_because else footprint(model, len(atoms), edges, engine.candidates)
    gpu, launches = gpu_time(engine.step) if on_gpu else (None, None)
    peak = torch.cuda.max_memory_allocated(device) - before if on_gpu else None
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else None
    wall = statistics.median(walls)
    how = engine.autograd_because, predicted, engine.shares
    return Diagnosis(len(atoms), edges, first, wall, gpu, launches, *how, peak, memory)


def device_events(profile: torch.profiler.profile) -> list:
    """The kernels and copies that a profile has seen on a GPU."""
    found = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [event for event in found if not getattr(event, "is_user_annotation", False)]


def gpu_time(call: Callable[[], object], calls: int = 1) -> tuple[float, int]:
    """Milliseconds and number of the kernels and copies of a call on a GPU, the mean over so many calls."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    found = device_events(profile)
    return 1e-3 * sum(event.time_range.elapsed_us() for event in found) / calls, round(len(found) / calls)


def show(model: torch.nn.Module, diagnosis: Diagnosis, console: Console) -> None:
    """The block table of the model, then the diagnosis."""
    console.print(str(report(model)), highlight=False, markup=False, soft_wrap=True)
    table = Table(show_header=False, box=None, pad_edge=False)
    for what, value in diagnosis.rows():
        table.add_row(what, value)
    console.print(table)
