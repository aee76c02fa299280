"""`mace-triton dev`: what someone needs who works on a kernel. docs/kernel-development.md walks through it.

compile: registers, stack, shared memory and instructions of every kernel, for GPUs that are not there.
parity: all derivatives of one op, or steps of the engine, against FP64, on a GPU or in Triton's interpreter.
sanitize: all of that under NVIDIA's compute-sanitizer; needs a GPU.
time, tune: milliseconds and share of the roofline, and the search for tiles; both need a GPU and check parity first.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Work on the kernels: compile without a GPU, parity, time, tune.",
)
console = Console(width=None if sys.stdout.isatty() else 120)

OPS = (
    "channelwise_tp",
    "linear",
    "linear_scalars",
    "radial_mlp",
    "norm_mlp",
    "edge_embedding",
    "species_linear",
    "symmetric_contraction",
)
ARCHS = ("sm_80", "sm_90", "gfx942")
SHAPES = ("small", "medium", "large")
DTYPES = ("fp64", "fp32", "bf16")
MODES = {"fp64": ("fp64",), "fp32": ("tf32x3", "tf32", "ieee"), "bf16": ("bf16", "fp16")}
"""Modes of the linear map that belong to a dtype."""

SIZES = ("nodes", "edges", "rows")
"""By what the tables of tiles count the size of a call."""

Shape = Annotated[str, typer.Option(help="Second layer of MACE-MP small, medium or large.")]
Dtype = Annotated[str, typer.Option(help="fp64, fp32, or bf16 (weights, operands of products; sums are FP32).")]


def check(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """`value` if it is allowed, else ValueError naming the argument."""
    if value not in allowed:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(allowed)}")
    return value


def check_arguments(op: str, ops: tuple[str, ...], shape: str, dtype: str) -> None:
    check("OP", op, ops)
    check("--shape", shape, SHAPES)
    check("--dtype", dtype, DTYPES)


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def need_gpu(command: str) -> None:
    if not has_gpu():
        raise RuntimeError(f"dev {command} needs a GPU, and torch sees none; without one: dev compile, dev parity")


# ---------------------------------------------------------------------------------------------------------- compile


@app.command("compile")
def compile_command(
    op: Annotated[str, typer.Argument(help=f"{', '.join(OPS)} or all.")] = "all",
    arch: Annotated[list[str] | None, typer.Option(help="sm_80, sm_90, gfx942; may be repeated.")] = None,
    shape: Shape = "large",
    dtype: Annotated[list[str] | None, typer.Option(help="Only these; may be repeated.")] = None,
    source: Annotated[bool, typer.Option("--source", help="Print the generated channel-wise sources instead.")] = False,
) -> None:
    """Registers, stack, shared memory and instructions of every kernel; needs no GPU. Exit code 1 if one spills."""
    ops = OPS if check("OP", op, (*OPS, "all")) == "all" else (op,)
    archs = [check("--arch", name, ARCHS) for name in arch or ARCHS]
    check("--shape", shape, SHAPES)
    dtypes = tuple(check("--dtype", name, DTYPES) for name in dtype or DTYPES)
    jobs = [(case, target) for target in archs for name in ops for case in cases_of(name, target, shape, dtypes)]
    if source:
        print_sources(jobs)
        return
    table = Table("kernel", "for", "registers", "stack", "spills", "shared", "instructions", box=None, pad_edge=False)
    spilled = 0
    for (case, target), stats in zip(jobs, compile_jobs(jobs), strict=True):
        counts = " ".join(f"{name} {n}" for name, n in sorted(stats.instructions.items()))
        bad = stats.stack > 0 or stats.spills > 0
        spilled += bad
        numbers = (str(n) for n in (stats.registers, stats.stack, stats.spills, stats.shared))
        table.add_row(case.name, target, *numbers, counts, style="red" if bad else None)
    console.print(table)
    console.print(f"{len(jobs)} kernels compiled, {spilled} with spilled registers", highlight=False)
    if spilled:
        raise typer.Exit(1)


def cases_of(op: str, target: str, shape: str, dtypes: tuple[str, ...]) -> list:
    """The specialisations of `op` to compile for `target`, those of `dtypes` only."""
    if op == "channelwise_tp":
        from .dev_cases import tp_problem
        from .kernels import channelwise_tp

        return channelwise_tp.offline_cases(tp_problem(shape, 128), target, dtypes)
    if op == "symmetric_contraction":
        from .dev_cases import contraction_problem
        from .kernels import symmetric_contraction

        if target.startswith("gfx") and shape != "small":
            return []  # it would take the compiler many minutes, see docs/symmetric_contraction.md
        kept = tuple(name for name in dtypes if name != "bf16")  # 16-bit features run the FP32 kernels
        return symmetric_contraction.offline_cases(contraction_problem(shape, 128), target, kept)
    if op == "edge_embedding":
        from .kernels import edge_filter, edge_forces, edge_harmonics, edge_radial, edge_vectors, radial_table, readout

        kept = tuple(name for name in dtypes if name != "bf16")
        files = (edge_vectors, edge_harmonics, edge_radial, edge_filter, edge_forces, radial_table, readout)
        return [case for file in files for case in file.offline_cases(target, kept)]
    from .kernels import linear, linear_scalars, norm_mlp, radial_mlp, species_linear

    files = (linear, linear_scalars, norm_mlp, radial_mlp, species_linear)
    kernels = {file.__name__.rpartition(".")[2]: file for file in files}[op]
    modes = {mode for name in dtypes for mode in MODES[name]}
    return [case for case in kernels.offline_cases(target) if case.name.split()[1] in modes]


def print_sources(jobs: list[tuple]) -> None:
    """The generated files of the cases, each once; kernels written by hand are named instead."""
    for module in dict.fromkeys(case.module for case, _ in jobs):
        path = Path(module)
        print(f"# {path}\n{path.read_text()}" if path.is_absolute() else f"# kernels/{module}.py is not generated\n")


def compile_jobs(jobs: list[tuple]) -> list:
    """Statistics of every (case, target), compiled on all cores. Raises RuntimeError naming what does not compile."""
    from .kernels import offline

    workers = os.cpu_count() or 1
    targets = dict.fromkeys(target for _, target in jobs)
    cases = {target: [case for case, other in jobs if other == target] for target in targets}
    shares = [(share, target) for target in targets for i in range(workers) if (share := cases[target][i::workers])]
    with ThreadPoolExecutor(workers) as pool:  # each share runs in a process of its own
        found = list(pool.map(lambda share: offline.compile_cases(*share), shares))
    stats = {(name, target): one for (_, target), some in zip(shares, found, strict=True) for name, one in some.items()}
    return [stats[case.name, target] for case, target in jobs]


def sized(op: str, shape: str, dtype: str):
    """A case for parity that takes seconds; in the interpreter a few atoms with 40 channels, the last block masked."""
    from .dev_cases import CASES

    sizes = (48, 24, 128, "cuda") if has_gpu() else (3, 2, 40, "cpu")
    return CASES[op](shape, dtype, *sizes)


# ------------------------------------------------------------------------------------------------------------ parity


WHOLE = "engine"  # which has parity beside the ops


@app.command()
def parity(
    op: Annotated[str, typer.Argument(help=f"One of {', '.join(OPS)}, {WHOLE}.")],
    shape: Shape = "large",
    dtype: Dtype = "fp32",
) -> None:
    """One op's forward, backward and double backward, or steps of the engine, against FP64. Exit code 1 if off."""
    check_arguments(op, (*OPS, WHOLE), shape, dtype)
    from .dev_cases import compare, wrong
    from .ops import dispatch

    if not has_gpu() and not dispatch.interpreting():
        raise typer.Exit(in_interpreter("parity", op, "--shape", shape, "--dtype", dtype))
    where = "on the GPU" if has_gpu() else "in Triton's interpreter on the CPU, at a small size"
    console.print(f"{op} {shape} {dtype}: kernels {where}", highlight=False)
    if op == WHOLE:
        from . import dev_engine

        rows = dev_engine.compare(shape, dtype)
    else:
        rows = compare(sized(op, shape, dtype))
    table = Table("result", "error", "allowed", "", box=None, pad_edge=False)
    for name, error, allowed in rows:
        table.add_row(name, f"{error:.1e}", f"{allowed:.1e}", "ok" if error <= allowed else "[red]WRONG[/]")
    console.print(table)
    if wrong(rows):
        raise typer.Exit(1)


def in_interpreter(*arguments: str) -> int:
    """Run `mace-triton dev ...` in a process where Triton interprets the kernels; its exit code."""
    from .dev_engine import child

    command, env = child(*arguments, TRITON_INTERPRET="1")
    return subprocess.run(command, env=env).returncode


# ---------------------------------------------------------------------------------------------------------- sanitize

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


@app.command()
def sanitize(
    op: Annotated[str, typer.Argument(help=f"{', '.join(OPS)}, {WHOLE} or all.")] = "all",
    tool: Annotated[str, typer.Option(help=f"{', '.join(TOOLS)}.")] = "memcheck",
    shape: Shape = "large",
    dtype: Annotated[list[str] | None, typer.Option(help="Only these; may be repeated.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="How many at a time.")] = 4,
) -> None:
    """Parity of every op and of the engine under NVIDIA's compute-sanitizer. Exit code 1 if it reports anything."""
    check("OP", op, (*OPS, WHOLE, "all"))
    check("--tool", tool, TOOLS)
    check("--shape", shape, SHAPES)
    dtypes = [check("--dtype", name, DTYPES) for name in dtype or DTYPES]
    need_gpu("sanitize")
    from . import dev_engine

    ops = (WHOLE, *OPS) if op == "all" else (op,)  # the longest first
    jobs = [["parity", name, "--shape", shape, "--dtype", kind] for name in ops for kind in dtypes]
    found, bad = dev_engine.sanitize(jobs, tool, workers), 0
    for (_, name, _, _, _, kind), (clean, told) in zip(jobs, found, strict=True):
        console.print(f"{name} {shape} {kind}: " + ("[green]nothing reported[/]" if clean else f"[red]{told}[/]"))
        bad += not clean
    console.print(f"{tool}: {len(jobs)} runs, {bad} with reports", highlight=False)
    if bad:
        raise typer.Exit(1)


# -------------------------------------------------------------------------------------------------------- time, tune


@app.command("time")
def time_command(
    op: Annotated[str, typer.Argument(help=f"One of {', '.join(OPS)}.")],
    shape: Shape = "large",
    dtype: Dtype = "fp32",
    nodes: Annotated[int, typer.Option(min=1, help="Atoms; the tensor product has 84 neighbours each.")] = 1536,
) -> None:
    """Milliseconds and share of the roofline of one op on this GPU, after parity with the tiles that are timed."""
    check_arguments(op, OPS, shape, dtype)
    need_gpu("time")
    from .dev_cases import compare, wrong
    from .kernels import tiles

    cases = rotation(op, shape, dtype, nodes)
    used = {name: tiles.choose(name, **call) for name, call in tile_calls(cases[0]).items()}
    with ExitStack() as stack:
        for name, tile in used.items():
            stack.enter_context(tiles.forced(name, tile))
            console.print(f"{name}: {describe(tile)}", highlight=False)
        off = wrong(compare(sized(op, shape, dtype)))
    if off:
        raise RuntimeError(f"parity: {', '.join(off)} wrong with these tiles, nothing is timed; see dev parity {op}")
    bandwidth = copy_bandwidth()
    table = Table("stage", "ms", "GB/s", "% of copy bandwidth", "TFLOP/s", box=None, pad_edge=False)
    stages = [case.stages() for case in cases]
    for stage in stages[0]:
        seconds = 1e-3 * milliseconds([calls[stage] for calls in stages])
        rate, flops = (work.get(stage, math.nan) / seconds for work in (cases[0].bytes, cases[0].flops))
        numbers = (1e3 * seconds, rate / 1e9, 100 * rate / bandwidth, flops / 1e12)
        table.add_row(stage, *("" if math.isnan(n) else f"{n:.3g}" for n in numbers))
    console.print(table)
    console.print(f"roofline: {bandwidth / 1e9:.0f} GB/s, measured by copying 1 GiB", highlight=False)


def rotation(op: str, shape: str, dtype: str, nodes: int) -> list:
    """Cases on different inputs, enough of them that the inputs do not stay in the L2 cache."""
    import torch

    from .dev_cases import CASES

    first = CASES[op](shape, dtype, nodes, 84, 128, "cuda")
    count = math.ceil(3 * torch.cuda.get_device_properties(0).L2_cache_size / first.bytes["forward"])
    return [first, *(CASES[op](shape, dtype, nodes, 84, 128, "cuda", seed) for seed in range(1, min(count, 16)))]


def milliseconds(calls: list[Callable[[], object]]) -> float:
    """Median GPU time of one call. They are queued behind a short sleep, so that the GPU never waits for Python."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    samples = []
    calls = calls * math.ceil(5 / len(calls))
    for _ in range(12):
        torch.cuda._sleep(1_000_000 * len(calls))  # about half a millisecond a call
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / len(calls))
    return statistics.median(samples[2:])  # the first ones warm up


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 1 GiB."""
    import torch

    source = torch.ones(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / (1e-3 * milliseconds([lambda: target.copy_(source)]))


def tile_calls(case) -> dict[str, dict]:
    """What the launches of a case ask the table of tiles: table -> the description of the call."""
    from .kernels import tiles

    seen, choose = {}, tiles.choose

    def noting(op: str, **call):
        seen.setdefault(op, call)
        return choose(op, **call)

    tiles.choose = noting
    try:
        for stage in case.stages().values():
            stage()
    finally:
        tiles.choose = choose
    return seen


def describe(tile) -> str:
    blocks = " ".join(f"{name}={value}" for name, value in tile.block)
    return f"{blocks} num_warps={tile.num_warps} num_stages={tile.num_stages}"


_ROWS = {"PAIRS": (60, 95, 190, 400), "BLOCK_C": (32, 64), "AHEAD": (0, 1, 2, 3, 4), "SPLIT": (1, 2, 4, 8)}
_MAP = {
    "BLOCK_M": (32, 64, 128),
    "BLOCK_N": (32, 64, 128),
    "BLOCK_K": (16, 32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (1, 2, 3),
    "LANES": (4, 8, 32),
}
_WEIGHTS = {
    "BLOCK_R": (16, 32, 64),
    "BLOCK_U": (32, 64, 128),
    "BLOCK_W": (32, 64, 128),
    "num_warps": (4, 8),
    "PARTS": (32, 64, 128),
}
_SCALARS = {
    "BLOCK_M": (32, 64, 128),
    "BLOCK_N": (32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (1, 2, 3),
}
_EDGES = {"BLOCK_E": (16, 32, 64, 128), "num_warps": (4, 8)}
CANDIDATES: dict[str, dict[str, tuple[int, ...]]] = {
    "channelwise_tp_fwd": _ROWS,
    "channelwise_tp_bwd": _ROWS,
    "linear_fwd": _MAP,
    "species_linear_fwd": _MAP,
    "species_linear_wgrad": _WEIGHTS,
    "symmetric_contraction_fwd": {"NODES": (1, 2, 4)},
    "symmetric_contraction_bwd": {"NODES": (1, 2)},
    "symmetric_contraction_weights": {
        "PRODUCTS": (0, 1),
        "REGISTERS": (64, 128, 256),
        "PARTS": (128, 256, 512, 1024),
    },
    "linear_wgrad": _WEIGHTS,
    "linear_scalars_fwd": _SCALARS | {"PER_PROCESSOR": (1, 2, 3, 4, 6)},
    "linear_scalars_bwd": _SCALARS,
    "radial_mlp_fwd": _EDGES,
    "radial_mlp_bwd": _EDGES,
    "norm_mlp_fwd": _EDGES,
    "norm_mlp_bwd": _EDGES,
    "edge_vectors": {"BLOCK_E": (64, 128, 256), "num_warps": (2, 4, 8)},
    "edge_harmonics": {"BLOCK_E": (64, 128, 256), "num_warps": (2, 4, 8)},
    "edge_radial": _EDGES,
}
"""Table -> what `tune` tries, one key after another, each from the best tile so far."""


@app.command()
def tune(
    op: Annotated[str, typer.Argument(help="An op, or one of its tables, such as channelwise_tp_bwd.")],
    shape: Shape = "large",
    dtype: Dtype = "fp32",
    nodes: Annotated[int, typer.Option(min=1, help="Atoms; a stored rule holds up to this size.")] = 1536,
    write: Annotated[bool, typer.Option("--write", help="Store the winner in kernels/tiles.json.")] = False,
) -> None:
    """Try tiles on this GPU, each after parity, and print the ranking; --write stores the winner."""
    check_arguments(op, (*OPS, *CANDIDATES), shape, dtype)
    need_gpu("tune")
    from .dev_cases import CASES
    from .kernels import tiles

    path = writable_table() if write else None
    op, tables = (op, CASES[op].TABLES) if op in OPS else (next(o for o in OPS if op in CASES[o].TABLES), (op,))
    cases, small = rotation(op, shape, dtype, nodes), sized(op, shape, dtype)
    asked = tile_calls(cases[0])
    for name in tables:
        calls = [case.stages()[case.STAGE_OF[name]] for case in cases]
        before = tiles.choose(name, **asked[name])
        best = rank(name, before, calls, small)
        if write and best != before:
            sizes = asked[name] | {"nodes": nodes} if "nodes" in asked[name] else asked[name]
            size = next(key for key in SIZES if key in sizes)
            when = {key: value for key, value in sizes.items() if key != size}
            when |= {"arch": tiles.current_arch(), f"{size}_max": sizes[size]}
            store(path, name, when, best)
            console.print(f"stored in {path}: {name} {json.dumps(when)}", highlight=False)


def rank(name: str, tile, calls: list, small):
    """Try the candidates of one table, print them by time, return the fastest right one.

    Raises RuntimeError when not even the stored tile is right.
    """
    for key, values in CANDIDATES[name].items():
        console.print(f"{name}: {key} in {values}", highlight=False)
    found = {tile: trial(name, tile, calls, small)}
    for key, values in CANDIDATES[name].items():
        best = fastest(found)
        for candidate in (changed(best, key, value) for value in values):
            if candidate not in found:
                found[candidate] = trial(name, candidate, calls, small)
    table = Table("ms", "tile", "", box=None, pad_edge=False)
    for candidate, (ms, note) in sorted(found.items(), key=lambda item: item[1][0]):
        table.add_row(f"{ms:.4f}", describe(candidate), note or ("in use" if candidate == tile else ""))
    console.print(table)
    return fastest(found)


def fastest(found: dict):
    tile = min(found, key=lambda candidate: found[candidate][0])
    if math.isinf(found[tile][0]):
        raise RuntimeError(f"tune: no tile gives right results; the one in use: {found[tile][1]}")
    return tile


def changed(tile, key: str, value: int):
    """The tile with one block size, num_warps or num_stages changed."""
    if key in ("num_warps", "num_stages"):
        return replace(tile, **{key: value})
    return replace(tile, block=tuple(sorted((dict(tile.block) | {key: value}).items())))


def trial(name: str, tile, calls: list, small) -> tuple[float, str]:
    """(ms, "") of one tile, or (inf, why not)."""
    from .dev_cases import compare, wrong
    from .kernels import tiles

    with tiles.forced(name, tile):
        try:
            off = wrong(compare(small))
            return (math.inf, f"wrong: {', '.join(off)}") if off else (milliseconds(calls), "")
        except Exception as error:  # Triton has many ways to refuse a tile; the others go on
            return math.inf, (str(error) or type(error).__name__).splitlines()[0][:60]


def writable_table() -> Path:
    """kernels/tiles.json of a checkout. Raises RuntimeError elsewhere: an installed package is not edited."""
    from .kernels import tiles

    path = tiles.TABLE
    if not (path.parent.parent / "pyproject.toml").is_file() or not os.access(path, os.W_OK):
        raise RuntimeError(f"--write: {path} is not in a writable checkout; clone the project, `pip install -e .`")
    return path


def store(path: Path, name: str, when: dict, tile) -> None:
    """Put a rule in front of the others of its table, but behind rules for smaller graphs that are otherwise alike."""
    from .kernels import tiles

    table = json.loads(path.read_text())
    rules = [rule for rule in table.get(name, []) if rule["when"] != when]
    size = next(f"{key}_max" for key in SIZES if f"{key}_max" in when)
    alike = [i for i, rule in enumerate(rules) if {**rule["when"], size: when[size]} == when]
    place = max((i + 1 for i in alike if rules[i]["when"].get(size, math.inf) < when[size]), default=0)
    rule = {"when": when, "block": dict(tile.block), "num_warps": tile.num_warps, "num_stages": tile.num_stages}
    table[name] = [*rules[:place], rule, *rules[place:]]
    lines = (f" {json.dumps(k)}: [\n" + ",\n".join(f"  {json.dumps(r)}" for r in v) + "\n ]" for k, v in table.items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    tiles.table.cache_clear()
