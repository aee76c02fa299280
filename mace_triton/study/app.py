"""The command line of the studies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..cli import one_line_errors
from .store import FOLDER

app = typer.Typer(help="What low precision costs and gives, one command a study.", no_args_is_help=True)
console = Console()

Out = Annotated[Path, typer.Option(help="Folder of results.")]
Device = Annotated[str | None, typer.Option(help="cuda, cuda:N or cpu; default: a GPU if there is one.")]
Data = Annotated[Path | None, typer.Option(help="The training data (npz): adds its held-out frames.")]
Shipped = Annotated[str, typer.Option(help="'water' or 'water-medium' (shipped).")]
Seeds = Annotated[str, typer.Option(help="Of the trainings, by commas.")]
Workers = Annotated[int, typer.Option(help="Trainings at a time; they share the GPUs.")]
Quick = Annotated[bool, typer.Option("--quick", help="Toy sizes, for a CPU: minutes, and no results to keep.")]


def check_water(model: str) -> None:
    """Raise ValueError for a model that does not ship: of these it is known what they were trained on."""
    from ..models import SHIPPED

    if model not in SHIPPED:
        raise ValueError(f"--model: this study is of water: one of {', '.join(SHIPPED)}, got {model!r}")


def seeds_of(words: str, workers: int) -> tuple[int, ...]:
    """Whole numbers between commas. Raises ValueError naming the option, also for no workers."""
    if workers < 1:
        raise ValueError(f"--workers must be at least 1, got {workers}")
    try:
        return tuple(int(word) for word in words.split(","))
    except ValueError:
        raise ValueError(f"--seeds takes whole numbers between commas, got {words!r}") from None


def told(path: Path) -> None:
    """Say where results are."""
    console.print(f"results: {path}; `mace-triton study report` turns them into a page", highlight=False)


def with_students(
    run: Callable[..., Path], model: str, seeds: str, workers: int, out: Path, device: str | None, quick: bool
) -> None:
    """A study that trains students of a shipped model."""
    from ..calculator import check_device

    check_water(model)
    told(run(model, out, check_device(device), seeds_of(seeds, workers), workers, quick, console))


@app.command()
def precision(
    model: Shipped = "water-medium",
    data: Data = None,
    out: Out = FOLDER,
    device: Device = None,
    quick: Quick = False,
) -> None:
    """Errors of every policy against FP64, and the time of its step."""
    with one_line_errors():
        from ..calculator import check_device
        from .precision import run

        check_water(model)
        if data is not None and not data.is_file():
            raise ValueError(f"--data: no such file: {data}")
        path = run(model, data, out, check_device(device), quick, console)
    told(path)


@app.command()
def profile(out: Out = FOLDER, device: Device = None, quick: Quick = False) -> None:
    """Time of energy and forces, and of each block, by backend and precision, on the host and on the GPU."""
    with one_line_errors():
        from ..calculator import check_device
        from .profile import run

        path = run(out, check_device(device), quick, console)
    told(path)


@app.command()
def md(
    model: Annotated[str, typer.Option(help="'water', 'water-medium' (shipped), a .model file of water.")] = "water",
    policies: Annotated[
        str, typer.Option(help="Names or files, by commas; fp64 among them.")
    ] = "fp64,fp32,tf32,bf16,fp16",
    ensembles: Annotated[str, typer.Option(help="Of nve, nvt, npt, by commas.")] = "nve,nvt,npt",
    replicas: Annotated[int, typer.Option(help="Of each policy and ensemble.")] = 5,
    steps: Annotated[int, typer.Option(help="Of each run, 0.5 fs each.")] = 40000,
    side: Annotated[int, typer.Option(help="Water molecules along an edge: 6 is 648 atoms.")] = 6,
    every: Annotated[int, typer.Option(help="Steps between frames.")] = 40,
    workers: Annotated[int, typer.Option(help="Runs at a time; they share the GPUs.")] = 8,
    runs: Annotated[Path, typer.Option(help="Folder of trajectories; a study that was cut off goes on there.")] = Path(
        "study-runs"
    ),
    out: Out = FOLDER,
    device: Device = None,
    quick: Quick = False,
) -> None:
    """NVE, NVT and NPT of water under several policies, several replicas each, compared with FP64."""
    with one_line_errors():
        from ..calculator import check_device
        from .dynamics import Plan, run

        if quick:
            policies, ensembles, replicas, steps, side, every, workers = "fp64,bf16", "nve,nvt", 2, 160, 2, 20, 1
        if workers < 1:
            raise ValueError(f"--workers must be at least 1, got {workers}")
        plan = Plan(model, tuple(policies.split(",")), tuple(ensembles.split(",")), replicas, steps, side, every)
        path = run(plan, runs, out, check_device(device), workers, quick, console)
    told(path)


@app.command()
def training(
    model: Shipped = "water-medium",
    seeds: Seeds = "1,2,3,4,5",
    workers: Workers = 1,
    out: Out = FOLDER,
    device: Device = None,
    quick: Quick = False,
) -> None:
    """The same toy training under several precisions of compute and of stored weights. Results of other seeds stay."""
    with one_line_errors():
        from .training import run

        with_students(run, model, "1,2" if quick else seeds, workers, out, device, quick)


@app.command()
def accumulation(
    model: Shipped = "water-medium",
    seeds: Seeds = "1,2,3,4,5",
    workers: Workers = 1,
    out: Out = FOLDER,
    device: Device = None,
    quick: Quick = False,
) -> None:
    """16-bit accumulators and 2:4 sparse linears: what they cost and what they give. None is in the product."""
    with one_line_errors():
        from .accumulation import run

        with_students(run, model, "1" if quick else seeds, workers, out, device, quick)


@app.command()
def search(
    model: Annotated[str, typer.Argument(help="A shipped model's name, a .model file, or a foundation model's name.")],
    structure: Annotated[Path, typer.Argument(help="Any file that ASE reads; errors over its last --frames frames.")],
    energy: Annotated[float, typer.Option(help="Allowed root-mean-square error of energies, meV/atom.")] = 0.5,
    force: Annotated[float, typer.Option(help="Allowed root-mean-square error of forces, meV/angstrom.")] = 10.0,
    policy: Annotated[Path, typer.Option(help="Where the policy goes; every --precision takes it.")] = Path(
        "policy.json"
    ),
    frames: Annotated[int, typer.Option(help="Of the structure's file.")] = 20,
    copies: Annotated[int, typer.Option(help="Steps are timed on the last frame, repeated so often each way.")] = 1,
    out: Out = FOLDER,
    device: Device = None,
    quick: Quick = False,
) -> None:
    """The fastest policy whose errors against FP64 stay within a budget."""
    with one_line_errors():
        import ase.io
        import torch

        from ..calculator import check_device, load
        from .search import Limits, run

        limits = Limits(energy, force)
        if policy.suffix != ".json":
            raise ValueError(f"--policy: a policy file ends in .json, got {policy}")
        read = ase.io.read(structure, index=f"-{2 if quick else frames}:")
        device = check_device(device)
        plain = load(model, device, torch.float64)[0].double().eval()
        found = run(plain, grouped(read), read[-1].repeat(copies), limits, policy, out, quick, console)
    console.print(f"{found}\nwritten to {policy}: use it as --precision {policy}", highlight=False, soft_wrap=True)


def grouped(frames: list) -> list[tuple]:
    """Frames of the same atoms together, in the order they first come."""
    found: dict[bytes, list] = {}
    for atoms in frames:
        found.setdefault(atoms.numbers.tobytes() + atoms.pbc.tobytes(), []).append(atoms)
    return [tuple(group) for group in found.values()]


@app.command()
def report(out: Out = FOLDER) -> None:
    """One page, Markdown and HTML, of all results in the folder."""
    with one_line_errors():
        from .report import write

        for path in write(out):
            console.print(str(path), highlight=False)
