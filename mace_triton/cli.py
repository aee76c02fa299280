"""The command line: `mace-triton demo | md | certify | doctor | info | study | bench | dev`."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="MACE on Triton kernels: run it, look at it, time it, work on the kernels.",
)
console = Console()

Model = Annotated[
    str, typer.Argument(help="'water' or 'water-medium' (shipped), a .model file, or a foundation model's name.")
]
Structure = Annotated[Path, typer.Argument(help="Any file that ASE reads; its last frame.")]
Precision = Annotated[
    str | None, typer.Option(help="fp64, fp32, tf32, bf16, fp16, or a policy's .json file; default: the model's.")
]
Head = Annotated[str | None, typer.Option(help="Of a model with several.")]
Device = Annotated[str | None, typer.Option(help="cuda, cuda:N or cpu; default: a GPU if there is one.")]
"""What several commands ask for."""


def fail(message: object) -> typer.Exit:
    """Print one line to stderr; `raise fail(...)` ends with exit code 1."""
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"error: {message}")
    return typer.Exit(1)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can get wrong into one line and exit code 1; MACE_TRITON_TRACE=1 shows the traceback."""
    try:
        yield
    except KeyboardInterrupt:
        raise fail("interrupted") from None
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if os.environ.get("MACE_TRITON_TRACE") == "1":
            raise
        raise fail(" ".join(str(error).split())) from None


def quiet() -> None:
    """Silence what e3nn, TorchScript and MACE print at import and load; it says nothing about the user's run."""
    import logging
    import warnings

    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    logging.getLogger().setLevel(logging.ERROR)
    logging.getLogger("mace_triton").setLevel(logging.WARNING)


@app.command()
def demo(
    steps: Annotated[int, typer.Option(help="Steps of molecular dynamics.")] = 2000,
    model: Annotated[
        str, typer.Option(help="'water' or 'water-medium' (shipped), a .model file, or a foundation model's name.")
    ] = "water",
    precision: Precision = None,
    side: Annotated[int, typer.Option(help="Water molecules along an edge: 4 is 192 atoms, 8 is 1536.")] = 4,
    start: Annotated[Path | None, typer.Option(help="Start from this structure instead of a water box.")] = None,
    device: Device = None,
    temperature: Annotated[float, typer.Option(help="Kelvin.")] = 300.0,
    timestep: Annotated[float, typer.Option(help="Femtoseconds.")] = 0.5,
    friction: Annotated[float, typer.Option(help="Of the Langevin thermostat, 1/fs.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Of the box, the velocities and the thermostat.")] = 0,
    trajectory: Annotated[Path | None, typer.Option(help="Write frames (extended xyz).")] = None,
    log: Annotated[Path | None, typer.Option(help="Write energy, temperature and force of every step.")] = None,
    summary: Annotated[Path | None, typer.Option(help="Write a summary of the run (JSON).")] = None,
) -> None:
    """Molecular dynamics (NVT) of a water box, after a certificate against e3nn in FP64."""
    quiet()
    with one_line_errors():
        from .demo import Options, run

        options = Options(
            steps,
            model,
            precision,
            side,
            start,
            device,
            temperature,
            timestep,
            friction,
            seed,
            trajectory,
            log,
            summary,
        )
        run(options, console)


@app.command()
def md(
    model: Model,
    structure: Annotated[Path, typer.Argument(help="Any file that ASE reads; its last frame, with its velocities.")],
    steps: Annotated[int, typer.Option(help="Steps of the whole run, those before a restart included.")] = 10000,
    ensemble: Annotated[str, typer.Option(help="nve, nvt (Langevin) or npt (isotropic).")] = "nvt",
    out: Annotated[
        Path | None, typer.Option(help="Trajectory (extended xyz); table and restart file beside it.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the restart file beside --out.")] = False,
    temperature: Annotated[float, typer.Option(help="Kelvin; of new velocities, too.")] = 300.0,
    pressure: Annotated[float, typer.Option(help="Of npt, bar.")] = 1.0,
    timestep: Annotated[float, typer.Option(help="Femtoseconds.")] = 0.5,
    friction: Annotated[float, typer.Option(help="Of nvt, 1/fs.")] = 0.01,
    every: Annotated[int, typer.Option(help="Steps between frames, lines of the table and restart files.")] = 100,
    seed: Annotated[int, typer.Option(help="Of new velocities and the thermostat.")] = 0,
    precision: Precision = None,
    head: Head = None,
    device: Device = None,
    skin: Annotated[float, typer.Option(help="Angstrom beyond the cutoff in which neighbours are kept.")] = 1.5,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="The same bits on every run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Run although the certificate failed.")] = False,
) -> None:
    """Molecular dynamics of a structure, after a certificate against e3nn in FP64."""
    given = dict(locals())
    quiet()
    with one_line_errors():
        from .md import Options, run

        run(Options(**given), console)


@app.command()
def certify(
    model: Model,
    structure: Structure,
    precision: Precision = None,
    head: Head = None,
    device: Device = None,
) -> None:
    """Energy, forces and stress against e3nn in FP64, derivatives and symmetries; exit code 1 if something fails."""
    quiet()
    with one_line_errors():
        calculator, atoms = opened(model, structure, precision, head, device)
        certificate = calculator.certify(atoms)
        lines = [(certificate.passed, str(certificate))]
        lines += [(check.passed, str(check)) for check in calculator.check(atoms, certificate)]
    for passed, line in lines:
        verdict = "[green]passed[/]" if passed else "[bold red]FAILED[/]"
        console.print(f"{verdict} {line}", highlight=False, soft_wrap=True)
    if not all(passed for passed, _ in lines):
        raise typer.Exit(1)


@app.command()
def doctor(
    model: Model,
    structure: Structure,
    precision: Precision = None,
    head: Head = None,
    device: Device = None,
) -> None:
    """This machine, block by block what runs the model, and what a step costs: host, GPU, launches, memory."""
    quiet()
    print_machine()
    with one_line_errors():
        from .doctor import diagnose, show

        calculator, atoms = opened(model, structure, precision, head, device)
        show(calculator.models[0], diagnose(calculator.models[0], atoms, calculator.head), console)


def opened(model: str, structure: Path, precision: str | None, head: str | None, device: str | None):
    """The calculator and the structure that a command is about. Raises what the library raises."""
    from .calculator import MACETritonCalculator
    from .certify import check_structure
    from .md import read_structure

    atoms = read_structure(structure)
    calculator = MACETritonCalculator(model, precision=precision, head=head, device=device)
    check_structure(atoms, calculator.z_table.zs)
    return calculator, atoms


@app.command()
def info() -> None:
    """Versions, cards, which kernels run, and known traps on this machine."""
    quiet()
    print_machine()


def print_machine() -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in [*versions(), *machine()]:
        table.add_row(name, value)
    console.print(table)
    for trap in traps():
        console.print(f"[yellow]note[/] {trap}", highlight=False)


def versions() -> list[tuple[str, str]]:
    """(package, version or "not installed")"""
    names = ("mace_triton", "torch", "triton", "mace-torch", "e3nn", "ase", "cuequivariance-torch")
    rows = [("python", platform.python_version())]
    rows += [(name, version_of(name) or "not installed") for name in names]
    ops = {name: version_of(name) for name in CUEQ_OPS}
    rows.append(("cuEquivariance kernels", ", ".join(f"{k} {v}" for k, v in ops.items() if v) or "not installed"))
    rows.append(("OpenEquivariance", version_of("openequivariance") or "not installed"))
    return rows


CUEQ_OPS = ("cuequivariance-ops-torch-cu12", "cuequivariance-ops-torch-cu13")


def version_of(package: str) -> str | None:
    if package == "mace_triton":
        from . import __version__

        return __version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> list[tuple[str, str]]:
    """(what, value): the cards, the backend, the kernels."""
    import torch

    from .ops import dispatch

    rows = []
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        rows.append((f"cuda:{i}", f"{card.name}, sm_{card.major}{card.minor}, {card.total_memory / 2**30:.0f} GiB"))
    if not rows:
        rows.append(("GPU", "none that torch can use"))
    if torch.cuda.is_available():
        backend = "Triton kernels on the GPU"
    elif dispatch.interpreting():
        backend = "Triton kernels in the interpreter, on the CPU"
    else:
        backend = "reference formulas in PyTorch, on the CPU"
    return [*rows, ("backend", backend), ("kernels", ", ".join(kernels()))]


def kernels() -> list[str]:
    """The ops that have a kernel."""
    spec = importlib.util.find_spec("mace_triton.ops")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.py"))
    folder = Path(importlib.import_module("mace_triton.kernels").__path__[0])
    return [file.stem for file in files if (folder / file.name).is_file()]


def traps() -> list[str]:
    """Things that are known to go wrong and are seen on this machine."""
    import torch

    from .ops import dispatch

    found = []
    if dispatch.interpreting():
        found.append("TRITON_INTERPRET=1: kernels run in Triton's interpreter, thousands of times slower")
    if version_of("e3nn") != "0.4.4":
        found.append(f"e3nn {version_of('e3nn')}: MACE needs exactly 0.4.4")
    if torch.get_float32_matmul_precision() != "highest":
        found.append("TF32 is on for torch's matrix products: MACE's own FP32 parts lose 13 bits of the operands")
    cuda = (torch.version.cuda or "").split(".")[0]
    wrong = [name for name in CUEQ_OPS if version_of(name) and cuda and not name.endswith(f"cu{cuda}")]
    if wrong:
        found.append(f"{', '.join(wrong)} is built for another CUDA than torch's ({torch.version.cuda})")
    if not any(version_of(name) for name in CUEQ_OPS):
        found.append("cuEquivariance's kernels are missing: its models run on plain PyTorch (mace_triton needs none)")
    if version_of("triton") is None:
        found.append("triton is not installed: only the CPU reference path can run")
    return found


PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=PASS_ON, add_help_option=False)
def bench(ctx: typer.Context) -> None:
    """Benchmarks: turn results into tables and plots."""
    hand_over("mace_triton.bench_report", "mace-triton bench", ctx.args)


@app.command(context_settings=PASS_ON, add_help_option=False)
def study(ctx: typer.Context) -> None:
    """Studies of precision: errors, dynamics, training, a search for the fastest policy, a report."""
    hand_over("mace_triton.study.app", "mace-triton study", ctx.args)


@app.command(context_settings=PASS_ON, add_help_option=False)
def dev(ctx: typer.Context) -> None:
    """For work on the kernels: compile, parity, time, tune."""
    hand_over("mace_triton.dev", "mace-triton dev", ctx.args)


def hand_over(module: str, name: str, arguments: list[str]) -> None:
    """Run another module's typer `app`; it is imported only now, so that the other commands do not need it."""
    quiet()
    if importlib.util.find_spec(module) is None:
        raise fail(f"{name}: this installation has no {module}")
    group = typer.main.get_group(importlib.import_module(module).app)
    with one_line_errors():
        group.main(args=arguments or ["--help"], prog_name=name)


if __name__ == "__main__":
    sys.exit(app())
