"""Train a water model within a fixed wall-clock budget: the small one that ships with the package, or a medium one.

python -m mace_triton.models.train_water DATA.npz --out DIR --minutes 10 [--size medium --precision fp32]

The model (on this package's kernels where a precision is named), the loss, the optimiser groups and the training step
are MACE's own; this file adds the data split and a schedule that follows the clock: stage one weights forces, stage two
(MACE's "stage two") weights energies at a low learning rate and always runs, however slow the card. Every minute the
averaged weights are written to DIR.
"""

from __future__ import annotations

import argparse
import copy
import math
import platform
import time
import warnings
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path

import ase
import e3nn
import mace
import numpy as np
import torch
from mace import modules
from mace.data import AtomicData, Configuration
from mace.tools import AtomicNumberTable, evaluate, set_seeds, torch_geometric
from mace.tools.scripts_utils import get_optimizer, get_params_options
from mace.tools.torch_tools import default_dtype
from mace.tools.train import take_step
from torch_ema import ExponentialMovingAverage

from mace_triton.convert import accelerate, restore
from mace_triton.models import build_model, load_card, load_stored, save_stored
from mace_triton.precision import PRESETS

TARGETS = {"energy": True, "forces": True, "virials": False, "stress": False, "dipoles": False}
SAME_FRAME = 0.05
"""Root-mean-square displacement (angstrom) below which a training frame counts as a copy of a held-out one."""

ARCHITECTURE = {
    "model": "ScaleShiftMACE",
    "r_max": 4.5,
    "num_bessel": 8,
    "num_polynomial_cutoff": 5,
    "radial_type": "bessel",
    "radial_MLP": [64, 64, 64],
    "max_ell": 3,
    "interaction": "RealAgnosticResidualInteractionBlock",
    "interaction_first": "RealAgnosticResidualInteractionBlock",
    "num_interactions": 2,
    "hidden_irreps": "64x0e + 64x1o",
    "MLP_irreps": "16x0e",
    "correlation": 3,
    "gate": "silu",
    "atomic_numbers": [1, 8],
}
SIZES = {
    "small": ARCHITECTURE,
    "medium": ARCHITECTURE | {"r_max": 6.0, "hidden_irreps": "128x0e + 128x1o"},
}
"""The medium one has the shape of MACE-MP's "medium"."""
QUICK = {"hidden_irreps": "8x0e + 8x1o", "max_ell": 1, "correlation": 2, "radial_MLP": [16]}


@dataclass
class Settings:
    """What shapes the training; stored in the model's JSON."""

    minutes: float = 10.0
    holdout: str = "data_3/set.000"
    batch_size: int = 4
    lr: float = 0.01
    lr_stage_two: float = 1e-3
    lr_final: float = 1e-5
    stage_two_at: float = 0.65  # fraction of the training time
    weights_stage_one: tuple[float, float] = (1.0, 100.0)  # energy (per atom), forces
    weights_stage_two: tuple[float, float] = (1000.0, 100.0)
    ema_decay: float = 0.99
    weight_decay: float = 5e-7
    clip_grad: float = 10.0
    seed: int = 1
    quick: bool = False
    size: str = "small"
    precision: str | None = None  # None: plain MACE

    @property
    def name(self) -> str:
        """Of the files: water, water-medium."""
        return "water" if self.size == "small" else f"water-{self.size}"


class Log:
    """Print at once and append to DIR/train.log."""

    def __init__(self, path: Path):
        self.file = path.open("w", buffering=1)
        self.start = time.monotonic()

    def __call__(self, text: str) -> None:
        line = f"[{time.monotonic() - self.start:6.1f} s] {text}"
        print(line, flush=True)
        self.file.write(line + "\n")


def near_copies(positions: np.ndarray, others: np.ndarray, box: float) -> np.ndarray:
    """Least root-mean-square displacement of each frame to any frame of `others`, nearest image. [F,N,3] -> [F]"""
    least = np.full(len(positions), np.inf)
    for other in others:
        d = positions - other
        d -= box * np.round(d / box)
        least = np.minimum(least, np.sqrt((d**2).sum(-1).mean(-1)))
    return least


def split_frames(raw: dict, settings: Settings, log: Log) -> tuple[np.ndarray, np.ndarray, dict]:
    """Indices of training and held-out frames: the held-out folder is kept whole, near copies of it are dropped."""
    folders = raw["split"].astype(str)
    if settings.holdout not in folders:
        raise SystemExit(f"--holdout {settings.holdout!r} is not in the data; folders: {sorted(set(folders))}")
    held = np.flatnonzero(folders == settings.holdout)
    train = np.flatnonzero(folders != settings.holdout)
    positions = raw["positions"].astype(np.float64)
    distance = near_copies(positions[train], positions[held], float(raw["cell"][0, 0, 0]))
    exact, near = int((distance < 1e-4).sum()), int((distance < SAME_FRAME).sum())
    train = train[distance >= SAME_FRAME]
    if settings.quick:
        train, held = train[:8], held[:2]
    counts = {
        "train": len(train),
        "held_out": len(held),
        "held_out_folder": settings.holdout,
        "train_folders": sorted(set(folders[train])),
        "dropped_identical_to_held_out": exact,
        "dropped_within_0.05_angstrom_rms_of_held_out": near,
    }
    log(f"frames: {counts}")
    return train, held, counts


def make_graphs(raw: dict, frames: np.ndarray, zero: float, architecture: dict) -> list[AtomicData]:
    """MACE graphs in the default dtype. `zero` (eV per molecule) is subtracted from the energies."""
    table = AtomicNumberTable(architecture["atomic_numbers"])
    molecules = int((raw["numbers"] == 8).sum())
    graphs = []
    for i in frames:
        targets = {
            "energy": float(raw["energy"][i]) - molecules * zero,
            "forces": raw["forces"][i].astype(np.float64),
        }
        config = Configuration(
            atomic_numbers=raw["numbers"],
            positions=raw["positions"][i].astype(np.float64),
            properties=targets,
            property_weights={"energy": 1.0, "forces": 1.0},
            cell=raw["cell"][i].astype(np.float64),
            pbc=(True, True, True),
        )
        graphs.append(AtomicData.from_config(config, z_table=table, cutoff=architecture["r_max"]))
    return graphs


def loader(graphs: list[AtomicData], batch_size: int, shuffle: bool) -> torch_geometric.dataloader.DataLoader:
    return torch_geometric.dataloader.DataLoader(graphs, batch_size=batch_size, shuffle=shuffle, drop_last=shuffle)


def make_optimizer(model: torch.nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """MACE's Adam (amsgrad) with MACE's parameter groups."""
    args = Namespace(
        optimizer="adam",
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        amsgrad=True,
        beta=0.9,
        freeze=None,
        lr_params_factors="{}",
    )
    return get_optimizer(args, get_params_options(args, model))


def learning_rate(progress: float, settings: Settings) -> float:
    """Stage one: flat for a third, then cosine down to the stage-two rate. Stage two: cosine to the final rate."""
    if progress < settings.stage_two_at:
        high, low, x = settings.lr, settings.lr_stage_two, progress / settings.stage_two_at
        x = max(0.0, (x - 1 / 3) * 1.5)
    else:
        high, low = settings.lr_stage_two, settings.lr_final
        x = (progress - settings.stage_two_at) / (1 - settings.stage_two_at)
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * min(x, 1.0)))


def make_loss(weights: tuple[float, float]) -> torch.nn.Module:
    return modules.WeightedEnergyForcesLoss(energy_weight=weights[0], forces_weight=weights[1])


def train(model, train_graphs, held_graphs, settings: Settings, deadline: float, log: Log, save) -> dict:
    """Run until `deadline` (monotonic seconds). Returns a summary; leaves the averaged weights in `model`."""
    device = next(model.parameters()).device
    optimizer = make_optimizer(model, settings)
    ema = ExponentialMovingAverage(model.parameters(), decay=settings.ema_decay)
    stages = [make_loss(w).to(device) for w in (settings.weights_stage_one, settings.weights_stage_two)]
    batches = loader(train_graphs, settings.batch_size, shuffle=True)
    peek = loader(held_graphs[:8], settings.batch_size, shuffle=False)
    start, saved, steps, epochs, steps_two = time.monotonic(), time.monotonic(), 0, 0, 0
    while time.monotonic() < deadline:
        losses = []
        for batch in batches:
            progress = (time.monotonic() - start) / (deadline - start)
            if progress >= 1:
                break
            lr = learning_rate(progress, settings)
            for group in optimizer.param_groups:
                group["lr"] = lr
            stage = int(progress >= settings.stage_two_at)
            loss, _ = take_step(model, stages[stage], batch, optimizer, ema, TARGETS, settings.clip_grad, device)
            steps, steps_two = steps + 1, steps_two + stage
            losses.append(loss.detach())
        epochs += 1
        mean = torch.stack(losses).mean().item() if losses else float("nan")
        if losses and not math.isfinite(mean):
            raise SystemExit(f"the loss became {mean} at step {steps}; the last saved weights are in the output folder")
        if epochs == 1 or time.monotonic() - saved > 45:
            saved = time.monotonic()
            with ema.average_parameters():
                errors = measure(model, peek, stages[1])
                save(model, {"steps": steps, "epochs": epochs, "finished": False, "peek": errors})
            log(f"epoch {epochs} step {steps} stage {stage + 1} lr {lr:.1e} loss {mean:.4f} held-out(8) {errors}")
    ema.copy_to(model.parameters())
    seconds = time.monotonic() - start
    return {
        "steps": steps,
        "steps_in_stage_two": steps_two,
        "epochs": epochs,
        "finished": True,
        "seconds": round(seconds, 1),
        "ms_per_step": round(1e3 * seconds / max(steps, 1), 2),
    }


def measure(model: torch.nn.Module, batches, loss: torch.nn.Module) -> dict:
    """Root-mean-square and mean absolute errors by MACE's own `evaluate`, in meV/atom and meV/angstrom."""
    device = next(model.parameters()).device
    _, aux = evaluate(model, loss, batches, TARGETS, device)
    names = {
        "energy_rmse_meV_per_atom": "rmse_e_per_atom",
        "energy_mae_meV_per_atom": "mae_e_per_atom",
        "force_rmse_meV_per_angstrom": "rmse_f",
        "force_mae_meV_per_angstrom": "mae_f",
    }
    return {name: round(1e3 * float(aux[key]), 3) for name, key in names.items()}


def measure_stored(stem: Path, raw: dict, held: np.ndarray, zero: float, device: str) -> dict:
    """Held-out errors of the files just written, in float64 with e3nn, and the spread of the data beside them."""
    model = load_stored(stem, device, torch.float64)
    with default_dtype(torch.float64):
        graphs = make_graphs(raw, held, zero, load_card(stem)["architecture"])
        errors = measure(model, loader(graphs, 4, shuffle=False), make_loss((1.0, 1.0)).to(device))
    energy = raw["energy"][held].astype(np.float64)
    errors["spread_energy_meV_per_atom"] = round(1e3 * float(energy.std()) / len(raw["numbers"]), 3)
    errors["spread_force_meV_per_angstrom"] = round(1e3 * float(np.sqrt(np.mean(raw["forces"][held] ** 2))), 3)
    return errors


def versions(device: str) -> dict:
    card = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mace": mace.__version__,
        "e3nn": e3nn.__version__,
        "ase": ase.__version__,
        "device": card,
    }


def fit_architecture(raw: dict, train_frames: np.ndarray, settings: Settings) -> tuple[dict, float]:
    """The architecture with the numbers that come from the data, and the zero of energy (eV per molecule)."""
    architecture = copy.deepcopy(SIZES[settings.size]) | (QUICK if settings.quick else {})
    zero = float(raw["energy"][train_frames].astype(np.float64).mean()) / int((raw["numbers"] == 8).sum())
    architecture["atomic_energies"] = [0.0, 0.0]  # one composition: E0 is only an offset, taken out by `zero`
    sample = make_graphs(raw, train_frames[:20], zero, architecture)
    architecture["avg_num_neighbors"] = modules.compute_avg_num_neighbors(loader(sample, 4, shuffle=False))
    architecture["atomic_inter_scale"] = float(np.sqrt(np.mean(raw["forces"][train_frames].astype(np.float64) ** 2)))
    architecture["atomic_inter_shift"] = 0.0
    return architecture, zero


def make_card(architecture: dict, zero: float, counts: dict, settings: Settings, device: str) -> dict:
    return {
        "name": settings.name,
        "architecture": architecture,
        "units": {"energy": "eV", "length": "angstrom", "force": "eV/angstrom"},
        "energy_zero_eV_per_molecule": zero,
        "data": "64 water molecules, DFT, deepmd-kit examples/water (LGPL-3.0); not part of this package",
        "frames": counts,
        "settings": asdict(settings),
        "versions": versions(device),
    }


def run(data: Path, out: Path, settings: Settings, device: str) -> dict:
    """Train, save, reload what was saved and measure it. Returns the card, written to out/water[-SIZE].json."""
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    log = Log(out / "train.log")
    set_seeds(settings.seed)
    with np.load(data) as file:
        raw = {name: file[name] for name in file.files}
    train_frames, held, counts = split_frames(raw, settings, log)
    architecture, zero = fit_architecture(raw, train_frames, settings)
    card = make_card(architecture, zero, counts, settings, device)
    log(f"versions: {card['versions']}")
    model = build_model(architecture).to(device)
    if settings.precision:
        model = accelerate(model, settings.precision)
    log(f"model: {sum(p.numel() for p in model.parameters())} parameters, {architecture}")
    train_graphs = make_graphs(raw, train_frames, zero, architecture)
    held_graphs = make_graphs(raw, held, zero, architecture)

    def save(model, summary: dict) -> None:
        save_stored(restore(model), card | {"training": summary}, out / settings.name)

    reserve = min(45.0, 12.0 * settings.minutes)  # seconds kept for the final float64 measurement
    deadline = started + 60 * settings.minutes - reserve
    card["training"] = train(model, train_graphs, held_graphs, settings, deadline, log, save)
    model = restore(model)
    save_stored(model, card, out / settings.name)
    log(f"trained: {card['training']}")
    card["held_out_errors"] = measure_stored(out / settings.name, raw, held, zero, device)
    save_stored(model, card, out / settings.name)
    log(f"held out, float64, e3nn: {card['held_out_errors']}")
    return card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="npz with positions, cell, energy, forces, numbers, split")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=Settings.minutes)
    parser.add_argument("--holdout", default=Settings.holdout, help="folder (value of `split`) kept out of training")
    parser.add_argument("--batch-size", type=int, default=Settings.batch_size)
    parser.add_argument("--size", choices=SIZES, default=Settings.size)
    parser.add_argument("--precision", choices=PRESETS, help="train on this package's kernels; default: plain MACE")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--quick", action="store_true", help="a toy model on a few frames, to try the script")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if not args.data.is_file():
        raise SystemExit(f"no such data file: {args.data}")
    warnings.filterwarnings("ignore", category=UserWarning)  # TorchScript notes from e3nn, hundreds of lines
    torch.jit.set_fusion_strategy([("DYNAMIC", 2)])  # every batch has another edge count: do not compile for each
    if args.precision == "fp64":
        parser.error("--precision fp64: the weights that are stored are FP32")
    shape = {"size": args.size, "precision": args.precision, "quick": args.quick}
    settings = Settings(args.minutes, args.holdout, args.batch_size, seed=args.seed, **shape)
    run(args.data, args.out, settings, args.device)


if __name__ == "__main__":
    main()
