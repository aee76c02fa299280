"""`mace-triton bench`: run the benchmarks, and turn their JSON files into the tables and plots of docs/benchmarks.md.

Nothing in the report is typed by hand: every figure comes from bench/results/*.json.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("e3nn", "cueq", "oeq")
OURS = "mace_triton"
COLOURS = {"e3nn": "#9aa0a6", "cueq": "#4c8bf5", "oeq": "#f2a33a", OURS: "#d6336c"}
PLOT_PRECISIONS = ("fp32", "bf16")
IDENTITY = ("block", "case", "atoms", "channels", "direction", "provider", "precision", "variant", "kind", "run")

Row = dict[str, object]
app = typer.Typer(help="Run the benchmarks, or write docs/benchmarks.md from their results.", no_args_is_help=True)


def load(folder: Path) -> list[tuple[Row, list[Row], list[Row]]]:
    """(environment, rows, bars) of every run under `folder`, oldest first.

    Raises FileNotFoundError when there is none, ValueError naming a file that is no result.
    """
    runs = []
    for path in sorted(folder.glob("*.json")):
        try:
            document = json.loads(path.read_text())
            parts = document["sections"].values() if "sections" in document else [document]
            runs += [(part["environment"], _of_run(part), part.get("bars", [])) for part in parts]
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            raise ValueError(f"results: {path} is no benchmark result ({error}); remove it or measure anew") from error
    if not runs:
        raise FileNotFoundError(f"results: no *.json in {folder}; run `mace-triton bench run` first")
    return sorted(runs, key=lambda run: str(run[0]["date"]))


def _of_run(part: Row) -> list[Row]:
    """The rows of a run. Steps keep its date: their ratios are of wall times, which only one run can compare."""
    date = {"run": part["environment"]["date"]}
    return [row | date if row.get("kind") == "md step" else row for row in part["rows"]]


def by_card(runs) -> dict[str, list[tuple[Row, list[Row], list[Row]]]]:
    """The runs of each card; results of CPUs only where there are no others."""
    cards: dict[str, list] = {}
    for run in runs:
        cards.setdefault(str(run[0]["card"]), []).append(run)
    gpus = {card: found for card, found in cards.items() if not card.startswith("CPU")}
    return gpus or cards


def newest(rows: Iterable[Row]) -> list[Row]:
    """One row per piece of work, the one measured last; order of first appearance."""
    found: dict[tuple, Row] = {}
    for row in rows:
        found[tuple(row.get(key) for key in IDENTITY)] = row
    return list(found.values())


def number(value: object, digits: int = 3) -> str:
    """`digits` significant digits, or an empty cell."""
    return "" if value is None else f"{float(value):.{digits}g}" if float(value) < 1000 else f"{float(value):.0f}"


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> Iterator[str]:
    head = list(head)
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for line in lines:
        yield "| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |"
    yield ""


def _ratios(row: Row) -> str:
    ratio = row.get("ratio") or {}
    return ", ".join(f"{peer} {number(ratio[peer])}x" for peer in PEERS if peer in ratio)


def _name(row: Row) -> list[str]:
    label = f"{row['precision']} {row['variant']}".strip()
    return [str(row["case"]), str(row["atoms"]), str(row["provider"]), label]


def _block_cells(row: Row) -> list[str]:
    if row["status"] != "ok":
        return [str(row["status"]), "", "", str(row["reason"]), ""]
    share = "" if row["roofline_percent"] is None else f"{row['roofline_percent']:.0f}"
    time = number(row["gpu_ms"]) + (" (host)" if row.get("host_bound") else "")
    return [time, share, f"{row['error']:.0e}", _ratios(row), _longest_kernels(row)]


def _longest_kernels(row: Row, how_many: int = 2) -> str:
    """The kernels that take longest, with milliseconds: what a provider sorts or copies on the way shows here."""
    words = []
    for name, ms, _ in (row.get("kernels") or ())[:how_many]:
        short = "::".join(name.split("<")[0].split("::")[-2:])
        words.append(f"{short[:36]} {number(ms)}")
    return ", ".join(words)


def block_table(rows: list[Row]) -> Iterator[str]:
    """Time, percent of the copy roofline, parity error and ratios of one block's rows."""
    head = ("shape", "atoms", "provider", "precision", "direction", "ms", "% roofline", "error", "peer / ours")
    yield from table(
        (*head, "longest kernels, ms"), ([*_name(row), str(row["direction"]), *_block_cells(row)] for row in rows)
    )


def _model_cells(row: Row) -> list[str]:
    if row["status"] != "ok":
        return [str(row["status"]), "", "", "", "", str(row["reason"])]
    figures = [number(row.get(key)) for key in ("gpu_ms", "wall_ms", "launches", "peak_mib")]
    return [*figures, f"{row['error']:.0e}", _ratios(row)]


def model_table(rows: list[Row]) -> Iterator[str]:
    """GPU and wall time, launches, peak memory of whole models."""
    head = ("model", "atoms", "provider", "precision", "what", "GPU ms", "wall ms", "launches", "peak MiB", "error")
    lines = ([*_name(row), str(row["direction"]), *_model_cells(row)] for row in rows)
    yield from table((*head, "peer / ours"), lines)


def first_use_table(rows: list[Row]) -> Iterator[str]:
    """Seconds until the first energy and forces, or until the first step is done, in a fresh process."""
    head = ("model", "atoms", "what", "provider", "cache", "seconds", "conversion", "first call", "second call")
    keys = ("seconds", "convert_s", "first_call_s", "second_call_s")
    lines = []
    for row in rows:
        figures = [number(row.get(key)) for key in keys] if row["status"] == "ok" else [str(row["reason"]), "", "", ""]
        lines.append([*(row[key] for key in ("case", "atoms", "direction", "provider", "variant")), *figures])
    yield from table(head, lines)


def memory_table(rows: list[Row]) -> Iterator[str]:
    """Peak memory of one call of a whole model, its weights included."""
    lines = []
    for row in rows:
        peak = number(row.get("peak_mib")) if row["status"] == "ok" else str(row["reason"])
        lines.append([*_name(row), row["direction"], peak])
    yield from table(("model", "atoms", "provider", "precision", "what", "peak MiB"), lines)


def bars_table(bars: list[Row]) -> Iterator[str]:
    """The bars of the newest run of each, with their limits."""
    latest = {bar["bar"]: bar for bar in bars}
    lines = []
    for bar in latest.values():
        limit = f"at least {bar['least']}" if bar["least"] is not None else ""
        limit = f"at most {bar['most']}" if bar["most"] is not None else limit
        verdict = ": ".join(str(bar[key]) for key in ("verdict", "reason") if key in bar)
        lines.append([bar["bar"], number(bar["value"], 4), limit, verdict])
    yield from table(("bar", "measured", "asked", "verdict"), lines)


def plot(rows: list[Row], title: str, path: Path) -> bool:
    """Grouped bars of GPU time, one group per shape, size and direction; False when there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in rows if r["status"] == "ok" and r["precision"] in PLOT_PRECISIONS and not r["variant"]]
    rows = [r for r in rows if r.get("gpu_ms") is not None]
    groups = list(dict.fromkeys((r["case"], r["atoms"], r["direction"]) for r in rows))
    series = list(dict.fromkeys((r["provider"], r["precision"]) for r in rows))
    if not rows:
        return False
    height = {((r["case"], r["atoms"], r["direction"]), (r["provider"], r["precision"])): r["gpu_ms"] for r in rows}
    figure, axes = pyplot.subplots(figsize=(max(6.0, 1.1 * len(groups) + 2), 4.0))
    width = 0.8 / len(series)
    for i, (provider, precision) in enumerate(series):
        values = [height.get((group, (provider, precision)), 0.0) for group in groups]
        places = [g + (i - (len(series) - 1) / 2) * width for g in range(len(groups))]
        hatch = None if precision == "fp32" else "//"
        axes.bar(places, values, width, label=f"{provider} {precision}", color=COLOURS.get(str(provider)), hatch=hatch)
    axes.set_xticks(range(len(groups)), [f"{case}\n{atoms} atoms\n{way}" for case, atoms, way in groups], fontsize=7)
    axes.set_yscale("log")
    axes.set_ylabel("GPU time (ms)")
    axes.set_title(title.replace("`", ""), fontsize=10)
    axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    matplotlib.rcParams["svg.hashsalt"] = "mace_triton"  # the same figures give the same file
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    return True


def _environment_lines(runs) -> Iterator[str]:
    head = ("date", "revision", "driver", "copy GB/s", "load of processors", "versions", "command")
    lines = []
    for env, _, _ in runs:
        versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
        bandwidth = number(env.get("copy_bandwidth_gb_per_s"))
        load = f"{env['load_average']} of {env['processors']}" if "processors" in env else ""
        known = env["date"], env["revision"], env["driver"] or "", bandwidth, load, versions
        lines.append([*known, f"`{env['command']}`"])
    yield from table(head, lines)


SECTIONS = (
    ("conv_tp", "The channel-wise tensor product with its gather and scatter (`conv_tp`)"),
    ("linear_up", "Linear, hidden to hidden (`linear_up`)"),
    ("linear", "Linear behind `conv_tp`"),
    ("species_linear", "Linear with weights of each species (`skip_tp`)"),
    ("symmetric_contraction", "Symmetric contraction"),
    ("edge_vectors", "Edges: vectors and lengths from positions"),
    ("edge_embedding", "Edges: harmonics, radial features and the radial network"),
    ("radial_mlp", "Radial network"),
    ("norm_mlp", "Radial network with layer norms"),
    ("model", "Whole models"),
    ("model, batch of 8", "Whole models, training on a batch"),
)


def step_table(rows: list[Row]) -> Iterator[str]:
    """A step of molecular dynamics: what a user waits for, and what of it the GPU works; ratios are of wall times."""

    def place(row: Row, provider: str) -> tuple:
        return row.get("run"), row["case"], row["atoms"], row["direction"], provider

    walls = {place(r, r["provider"]): r["wall_ms"] for r in rows if r["precision"] == "fp32" and _ok(r)}
    lines = []
    for row in rows:
        peers = [] if row["provider"] != OURS or not _ok(row) else PEERS
        found = {peer: walls.get(place(row, peer)) for peer in peers}
        ratios = ", ".join(f"{peer} {number(ms / row['wall_ms'])}x" for peer, ms in found.items() if ms)
        keys = ("wall_ms", "gpu_ms", "launches", "peak_mib")
        figures = [number(row.get(key)) for key in keys] if _ok(row) else [""] * len(keys)
        error = f"{row['error']:.0e}" if _ok(row) else f"{row['status']}: {row['reason']}"
        lines.append([*_name(row), str(row["direction"]), *figures, error, ratios])
    head = ("model", "atoms", "provider", "precision", "what", "wall ms", "GPU ms", "launches", "peak MiB", "error")
    yield from table((*head, "peer / ours"), lines)


def long_run_table(rows: list[Row]) -> Iterator[str]:
    """Long dynamics: drift and scatter of the total energy, temperature, memory of the GPU from first to last step."""
    head = ("run", "atoms", "steps", "drift, meV/atom/ns", "scatter, meV/atom", "temperature, K", "MiB", "searches")
    lines = []
    for row in rows:
        name = [row["case"], row["atoms"]]
        if not _ok(row):
            lines.append([*name, f"{row['status']}: {row['reason']}", *[""] * 6])
            continue
        held = (row["memory_bytes"][when]["device"] / 2**20 for when in ("start", "end"))
        temperature = f"{row['temperature_K']:.1f} +- {row['temperature_error_K'] or 0.0:.1f}"
        figures = [number(row[key]) for key in ("drift_meV_per_atom_ns", "scatter_meV_per_atom")]
        figures[0] = figures[0] if row["direction"] == "nve" else ""  # a thermostat's energy goes where it will
        memory = " to ".join(f"{mib:.0f}" for mib in held)
        steps = f"{row['steps']} of {row['asked']}"
        lines.append([*name, steps, *figures, temperature, memory, row["rebuilds"], f"`{row['digest']}`"])
    yield from table((*head, "digest of the end"), lines)


def _ok(row: Row) -> bool:
    return row["status"] == "ok"


KINDS = {
    "md step": ("Steps of molecular dynamics, in ASE and on the device", step_table),
    "largest": ("The largest system that fits", step_table),
    "long run": ("Long dynamics of the water model that ships, several at once on a card", long_run_table),
    "memory": ("Peak memory of whole models", memory_table),
    "first use": ("First use of a model, in a fresh process", first_use_table),
}


def card_section(card: str, runs, images: Path) -> Iterator[str]:
    """Everything measured on one card."""
    rows = newest(row for _, found, _ in runs for row in found)
    bars = [bar for _, _, found in runs for bar in found]
    yield f"## {card}\n"
    yield from _environment_lines(runs)
    if bars:
        yield "### Bars\n"
        yield from bars_table(bars)
    for block, title in SECTIONS:
        timed = [r for r in rows if r["block"] == block and "kind" not in r]
        if not timed:
            continue
        yield f"### {title}\n"
        image = images / f"{'-'.join(card.lower().split())}-{'-'.join(re.findall(r'[a-z0-9_]+', block))}.svg"
        if plot(timed, f"{title}, {card}", image):
            yield f"![{title}](img/{image.name})\n"
        yield from (model_table if block.startswith("model") else block_table)(timed)
    for kind, (title, render) in KINDS.items():
        found = [r for r in rows if r.get("kind") == kind]
        if found:
            yield f"### {title}\n"
            yield from render(found)


SUMMARY = (
    ("tensor product, forward", "conv_tp", "large", 1536, "forward"),
    ("tensor product, forward + backward", "conv_tp", "large", 1536, "forward+backward"),
    ("linear, forward", "linear_up", "up-large", 5184, "forward"),
    ("linear, forward + backward", "linear_up", "up-large", 5184, "forward+backward"),
    ("symmetric contraction, forward + backward", "symmetric_contraction", "large", 1536, "forward+backward"),
    ("`skip_tp`, 89 species, forward + backward", "species_linear", "up-large", 1536, "forward+backward"),
    ("edges and radial network, forward + backward", "edge_embedding", "medium", 1536, "forward+backward"),
    ("whole model, energy + forces", "model", "medium", 1536, "energy+forces"),
    ("whole model, energy + forces", "model", "large", 5184, "energy+forces"),
)
"""Rows of the README's table: text, block, case, atoms, direction."""
COLUMNS = (("e3nn", "fp32"), ("oeq", "fp32"), ("cueq", "fp32"), (OURS, "fp32"), (OURS, "bf16"))
MARKERS = ("<!-- bench:start -->", "<!-- bench:end -->")


def _summary_cells(rows: list[Row], key: tuple) -> list[str]:
    """The times of every column that one run has for one line of the README's table."""
    times = {
        (row["provider"], row["precision"]): row["gpu_ms"]
        for row in rows
        if row["status"] == "ok" and "kind" not in row and not row["variant"] and row.get("gpu_ms") is not None
        if key == tuple(row[name] for name in ("block", "case", "atoms", "direction"))
    }
    return [number(times.get(column)) for column in COLUMNS]


def _sources(runs: list[tuple[str, str]]) -> Iterator[str]:
    """Revisions and commands, once each; sections of the bars that one revision ran are one command."""
    sections: dict[tuple[str, str], dict[str, None]] = {}
    for revision, command in runs:
        start, only, names = command.partition(" --only ")
        sections.setdefault((revision, start + only), {}).update(dict.fromkeys(names.split(",")))
    for (revision, start), names in sections.items():
        yield f"revision {revision}, `{start}{','.join(names)}`"


def summary(card: str, runs) -> Iterator[str]:
    """The README's table: GPU milliseconds of every provider, side by side, and where the figures come from.

    A line comes from one run: the one that has most of its columns, the bars before others, the newest of those.
    """
    lines, sources = [], []
    for text, *key in SUMMARY:
        found = [(_summary_cells(rows, tuple(key)), environment) for environment, rows, _ in runs]
        cells, environment = max(
            reversed(found), key=lambda pair: (sum(map(bool, pair[0])), "bench.bars" in pair[1]["command"])
        )
        if any(cells):
            lines.append([text, key[1], key[2], *cells])
            sources.append((environment["revision"], environment["command"]))
    yield f"GPU milliseconds on one {card}, {'; '.join(_sources(sources))}:\n"
    head = [f"{'ours' if provider == OURS else provider} {precision}" for provider, precision in COLUMNS]
    yield from table(["what", "shape", "atoms", *head], lines)
    yield "All shapes, errors, memory and versions: [docs/benchmarks.md](docs/benchmarks.md)."


def update_readme(readme: Path, text: str) -> None:
    """Replace what stands between MARKERS. Raises ValueError when the README lacks them."""
    start, end = MARKERS
    before, found, rest = readme.read_text().partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"readme: {readme} lacks the lines {start} and {end}")
    readme.write_text(f"{before}{start}\n{text.rstrip()}\n{end}{after}")


HEADER = """# Benchmarks

Written by `mace-triton bench report` from `bench/results/*.json`; do not edit.

Structures are water at 1 g/cc, cutoff 6 angstrom. Models have the shapes of MACE-MP small, medium and large with
random weights. Times are medians on a warm GPU with inputs rotated through more memory than the L2 cache holds, and
each provider first had to agree with e3nn in FP64 on the same inputs ("error" is its largest relative error).
Percent of roofline: the fewest bytes the operation must move, over the measured copy bandwidth, over the time.
"peer / ours" divides a peer's time by ours, both from the same run: FP32 peers beside every precision of
ours but FP64, which is set beside FP64. "(host)": the calls could not be queued ahead of the GPU, so the time holds its
waiting for Python too. Whole models: "GPU ms" is the sum of all kernels, "wall ms" what Python waits.
"""


def write_report(results: Path, docs: Path) -> Path:
    """Write docs/benchmarks.md, docs/img/*.svg and the README's table beside docs; the page's path.

    Raises what `load` and `update_readme` raise.
    """
    runs = by_card(load(results))
    lines = [HEADER]
    for card, found in runs.items():
        lines += card_section(card, found, docs / "img")
    path = docs / "benchmarks.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines).rstrip() + "\n")
    readme = docs.parent / "README.md"
    if readme.is_file():
        card = next(iter(runs))
        update_readme(readme, "\n".join(summary(card, runs[card])))
    return path


@app.command()
def report(
    results: Annotated[Path, typer.Option(help="Folder with the JSON files.")] = ROOT / "bench" / "results",
    docs: Annotated[Path, typer.Option(help="Folder that benchmarks.md and img/ go to.")] = ROOT / "docs",
) -> None:
    """Write docs/benchmarks.md and the README's table from bench/results/*.json."""
    try:
        typer.echo(f"wrote {write_report(results, docs)}")
    except (FileNotFoundError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(context: typer.Context) -> None:
    """Run `pytest bench/ --benchmark-only`; further arguments go to pytest (-k conv, --bench-size full)."""
    if not (ROOT / "bench" / "conftest.py").is_file():
        typer.echo("error: bench/ is part of the repository, not of the installed package: run this there", err=True)
        raise typer.Exit(2)
    command = [sys.executable, "-m", "pytest", "bench/", "--benchmark-only", *context.args]
    raise typer.Exit(subprocess.call(command, cwd=ROOT))
