"""`mace-triton study training`: the same toy training under several precisions of compute and of stored weights.

Data: frames of dynamics under a shipped water model, with its energies and forces in FP64 as targets, so that every
error is the student's. The step, the loss and the optimiser groups are MACE's own (`mace_triton.models.train_water`),
without averaging of weights, which would hide how they are stored.

Modes: FP64, FP32, TF32, BF16 and FP16 compute with FP32 weights; FP32 compute with weights that are stored in 16 bits,
rounded to nearest, rounded at random so that the mean is right (Croci et al., R. Soc. Open Sci. 9, 211631), or kept in
FP32 beside the 16-bit copy that is used (Micikevicius et al., arXiv 1710.03740); and plain MACE under torch.autocast,
but for its symmetric contraction, which does not run under it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import mace  # noqa: F401  before e3nn, see mace_triton/__init__.py
import numpy as np
import torch
from mace.data import AtomicData
from mace.modules import compute_avg_num_neighbors
from mace.tools import set_seeds
from mace.tools.torch_tools import default_dtype
from mace.tools.train import take_step
from rich.console import Console
from rich.progress import track

from ..calculator import load
from ..convert import accelerate, restore
from ..models import build_model, train_water
from ..precision import PRESETS
from . import structures
from .precision import by_engine
from .sparsity import linear_masks, prune_linears
from .store import Row, earlier, save

SIXTEEN = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Mode:
    """How one training computes and stores its weights.

    compute: a preset, or "autocast", which is plain MACE. weights: "fp32", or "bf16", "fp16"; stochastic: how they are
    rounded; masters: whether FP32 ones are kept beside them. sparse: linears are pruned 2:4 half-way, for good.
    """

    name: str
    compute: str = "fp32"
    weights: str = "fp32"
    stochastic: bool = False
    masters: bool = False
    sparse: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and graphs."""
        return torch.float64 if self.compute == "fp64" else torch.float32

    @property
    def words(self) -> dict[str, str]:
        """The policy that computes, block by block; none of plain MACE."""
        return PRESETS[self.compute].words if self.compute in PRESETS else {}


MODES = (
    *(Mode(name, compute=name) for name in PRESETS),
    *(Mode(f"{word} weights", weights=word) for word in SIXTEEN),
    Mode("bf16 weights, stochastic rounding", weights="bf16", stochastic=True),
    Mode("bf16 weights, fp32 masters", weights="bf16", masters=True),
    Mode("autocast bf16", compute="autocast"),
)
SPARSE_MODES = (Mode("fp32"), Mode("2:4 linears", sparse=True))
"""Of the study of accumulation."""


@dataclass(frozen=True)
class Size:
    """How large a study is: steps of each training, frames, and the architecture's differences from the small model."""

    steps: int = 2000
    batch: int = 4
    train: int = 160
    held: int = 40
    every: int = 200
    side: int = 4
    shape: tuple[tuple[str, object], ...] = (
        ("hidden_irreps", "32x0e + 32x1o"),
        ("max_ell", 2),
        ("radial_MLP", [32, 32]),
    )


QUICK = Size(12, 2, 4, 2, 6, 2, tuple(train_water.QUICK.items()))


def nearest(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounded to nearest, even on a tie."""
    return values.to(dtype).to(values.dtype)


def at_random(values: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """FP32 values rounded to one of the two neighbours in BF16, each with the chance that makes the mean right."""
    if dtype != torch.bfloat16 or values.dtype != torch.float32:
        raise TypeError(f"stochastic rounding is of float32 to bfloat16, got {values.dtype} to {dtype}")
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, generator=generator, device=bits.device, dtype=torch.int32)
    return ((bits + noise) & -65536).view(torch.float32)  # adding to the magnitude carries into the bits that stay


class Storage:
    """Keeps a model's parameters as a mode stores them, from one step of the optimiser to the next."""

    def __init__(self, mode: Mode, model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int):
        self.mode, self.parameters = mode, [p for p in model.parameters() if p.requires_grad]
        self.generator = torch.Generator(self.parameters[0].device).manual_seed(seed)
        self.masters: list[torch.Tensor] = []
        if mode.weights != "fp32":
            if mode.masters:
                optimizer.register_step_pre_hook(lambda *_: self.before())
            optimizer.register_step_post_hook(lambda *_: self.after())
            self.after()

    @torch.no_grad()
    def before(self) -> None:
        """The optimiser moves the masters."""
        for p, master in zip(self.parameters, self.masters, strict=True):
            p.copy_(master)

    @torch.no_grad()
    def after(self) -> None:
        dtype = SIXTEEN[self.mode.weights]
        if self.mode.masters:
            self.masters = [p.clone() for p in self.parameters]
        for p in self.parameters:
            p.copy_(at_random(p, dtype, self.generator) if self.mode.stochastic else nearest(p, dtype))


class Autocast(torch.nn.Module):
    """Plain MACE under torch.autocast, its symmetric contractions in FP32; so are the results."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model
        self.interactions, self.products = model.interactions, model.products  # the optimiser's groups look for these
        self.node_embedding, self.readouts = model.node_embedding, model.readouts
        for product in model.products:
            contraction = product.symmetric_contractions
            contraction.forward = partial(_in_fp32, contraction.forward)

    def forward(self, data: dict, **options) -> dict:
        with torch.autocast(next(self.model.parameters()).device.type, torch.bfloat16):
            found = self.model(data, **options)
        return {key: value.float() if torch.is_tensor(value) else value for key, value in found.items()}


def _in_fp32(forward: Callable, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return forward(x.float(), y.float())


@dataclass(frozen=True)
class Data:
    """Frames [F, N, 3] with energies [F] (eV) and forces [F, N, 3] (eV/angstrom) in FP64, training ones first."""

    numbers: np.ndarray
    cell: np.ndarray
    positions: np.ndarray
    energy: np.ndarray
    forces: np.ndarray
    train: int
    source: str

    def graphs(self, architecture: dict, dtype: torch.dtype) -> list[AtomicData]:
        """MACE's graphs in `dtype`."""
        frames = len(self.positions)
        raw = {"numbers": self.numbers, "cell": np.tile(self.cell, (frames, 1, 1)), "positions": self.positions}
        raw |= {"energy": self.energy, "forces": self.forces}
        with default_dtype(dtype):
            return train_water.make_graphs(raw, np.arange(frames), 0.0, architecture)


def taught(model: str, size: Size, device: str, quick: bool) -> Data:
    """Frames of a run of a shipped model, labelled by it in FP64."""
    every, start = (2, 4) if quick else (40, 2000)
    sample = structures.of_a_run(model, device, size.side, size.train + size.held, every, start)
    teacher = accelerate(load(model, device, torch.float64)[0].double(), "fp64")
    values = by_engine(teacher, sample.frames)
    order = np.random.default_rng(0).permutation(len(sample.frames))
    atoms = sample.frames[0]
    energy = values.energy * len(atoms)
    return Data(
        atoms.numbers,
        atoms.cell.array,
        np.stack([sample.frames[i].positions for i in order]),
        (energy - energy[order[: size.train]].mean())[order],
        values.forces[order],
        size.train,
        f"{sample.source}, labelled by {model} in FP64; {size.train} to train on",
    )


def architecture_of(data: Data, size: Size) -> dict:
    """The small water model's, smaller, with the numbers that come from the data."""
    found = train_water.ARCHITECTURE | dict(size.shape) | {"atomic_energies": [0.0, 0.0], "atomic_inter_shift": 0.0}
    found["atomic_inter_scale"] = float(np.sqrt(np.mean(data.forces[: data.train] ** 2)))
    batches = train_water.loader(data.graphs(found, torch.float64)[:8], 4, shuffle=False)
    return found | {"avg_num_neighbors": compute_avg_num_neighbors(batches)}


def train(mode: Mode, seed: int, data: Data, architecture: dict, size: Size, device: torch.device) -> Row:
    """One training: its learning curve, and errors on the held-out frames in FP64, of the weights as they are stored.

    Errors are root mean squares, in meV/atom and meV/angstrom.
    """
    set_seeds(seed)
    graphs = data.graphs(architecture, mode.dtype)
    held = data.graphs(architecture, torch.float64)[data.train :]
    plain = build_model(architecture, mode.dtype).to(device)
    model = Autocast(plain) if mode.compute == "autocast" else accelerate(plain, mode.compute)
    settings = train_water.Settings()
    with default_dtype(mode.dtype):
        optimizer = train_water.make_optimizer(model, settings)
        Storage(mode, model, optimizer, seed)  # lives on in the optimiser's hooks
        loss = train_water.make_loss(settings.weights_stage_one).to(device)
        curve, began = [], time.perf_counter()
        batches = _forever(train_water.loader(graphs[: data.train], size.batch, shuffle=True))
        masks: dict[str, torch.Tensor] = {}
        for step, batch in zip(range(1, size.steps + 1), batches, strict=False):
            lr = train_water.learning_rate(step / size.steps, settings)
            for group in optimizer.param_groups:
                group["lr"] = lr
            take_step(model, loss, batch, optimizer, None, train_water.TARGETS, settings.clip_grad, device)
            if mode.sparse and 2 * step >= size.steps:
                masks = masks or linear_masks(model)
                prune_linears(model, masks)
            if step % size.every == 0:
                curve.append({"step": step, **errors_of(_plain(model, architecture), held, device)})
    seconds = time.perf_counter() - began
    return _row(mode, seed, "ok") | {"curve": curve, **curve[-1], "seconds": seconds}


def _row(mode: Mode, seed: int, status: str) -> Row:
    return {"mode": mode.name, "words": mode.words, "seed": seed, "status": status}


def _forever(batches) -> Iterator:
    while True:
        yield from batches


def _plain(model: torch.nn.Module, architecture: dict) -> torch.nn.Module:
    """MACE on e3nn with the weights that a training has come to."""
    if not isinstance(model, Autocast):
        return restore(model)
    found = build_model(architecture).to(next(model.parameters()).device)
    found.load_state_dict(model.model.state_dict())
    return found


def errors_of(plain: torch.nn.Module, held: list[AtomicData], device: torch.device) -> Row:
    """Root-mean-square errors of a model's weights in FP64: energy in meV/atom, forces in meV/angstrom."""
    exact, energy, forces = accelerate(plain, "fp64"), [], []
    for batch in train_water.loader(held, 8, shuffle=False):
        batch = batch.to(device)
        found = exact(batch.to_dict())
        count = batch.ptr[1:] - batch.ptr[:-1]
        energy.append((found["energy"].detach() - batch.energy) / count)
        forces.append((found["forces"].detach() - batch.forces).ravel())
    means = (torch.cat(parts).square().mean().sqrt().item() for parts in (energy, forces))
    return dict(zip(("energy_rmse", "force_rmse"), (1e3 * mean for mean in means), strict=True))


def attempt(mode: Mode, seed: int, data: Data, architecture: dict, size: Size, device: str) -> Row:
    """A training, or why there is none: autocast reaches code that was not written for it."""
    try:
        return train(mode, seed, data, architecture, size, torch.device(device))
    except (RuntimeError, TypeError) as error:
        return _row(mode, seed, "failed") | {"reason": str(error).splitlines()[0][:200]}


def trainings(todo: list[tuple[Mode, int]], workers: int, device: str, *common: object) -> Iterator[tuple[int, Row]]:
    """(place in todo, row) of each training as it ends, `workers` at a time in processes of their own, on all GPUs."""
    if workers == 1:
        for place, (mode, seed) in enumerate(todo):
            yield place, attempt(mode, seed, *common, device)
        return
    cards = torch.cuda.device_count() if device == "cuda" else 0
    places = [f"cuda:{place % cards}" if cards > 1 else device for place in range(len(todo))]
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        jobs = {
            pool.submit(attempt, mode, seed, *common, where): place
            for place, ((mode, seed), where) in enumerate(zip(todo, places, strict=True))
        }
        for job in as_completed(jobs):
            yield jobs[job], job.result()


def of_another_policy(row: Row) -> bool:
    """Whether a mode computes otherwise than when this row was made; rows of older versions do not tell."""
    now = {mode.name: mode.words for mode in MODES}.get(row["mode"])
    return row.get("words", now) != now


def run(
    model: str, folder: Path, device: str, seeds: tuple[int, ...], workers: int, quick: bool, console: Console
) -> Path:
    """The study; see the head of this file. Rows of other seeds, of a study like this one, stay in the results, unless
    their mode computes otherwise by now, which is told.

    Returns where these are.
    """
    size = QUICK if quick else Size()
    data = taught(model, size, device, quick)
    architecture = architecture_of(data, size)
    todo = [(mode, seed) for seed in seeds for mode in MODES]
    about = {"model": model, "steps": size.steps, "batch": size.batch, "quick": quick}
    kept = []
    for row in earlier(folder / "training.json", about):
        if of_another_policy(row):
            console.print(f"left out: {row['mode']}, seed {row['seed']}, of another policy than it is now")
        elif row["seed"] not in seeds:
            kept.append(row)
    rows: dict[int, Row] = {}
    ended = trainings(todo, workers, device, data, architecture, size)
    for place, row in track(ended, description="trainings", total=len(todo), console=console):
        rows[place] = row
        told = f"{row['force_rmse']:.2f} meV/angstrom" if row["status"] == "ok" else row["reason"]
        console.print(f"{row['mode']}, seed {row['seed']}: {told}", highlight=False, soft_wrap=True)
        found = kept + [rows[place] for place in sorted(rows)]
        more = {"data": data.source, "architecture": architecture, "rows": found}
        path = save("training", folder, torch.device(device), **about, **more)
    return path
