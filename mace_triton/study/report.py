"""`mace-triton study report`: README.md and report.html of the results in a folder. No figure is typed by hand."""

from __future__ import annotations

import html
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .claims import above_fp32, verdicts
from .dynamics import comparisons
from .precision import BLOCKS, E3NN
from .search import CHOICES
from .store import Row, load, mean_interval

HEADS = {
    "models": "The medium water model, three seeds",
    "profile": "Energy and forces by backend",
    "blocks": "Blocks by backend",
    "search": "The fastest policy within a budget",
    "training": "The same training under several precisions",
    "accumulation": "16-bit accumulators and 2:4 sparsity",
    "sparse": "2:4 sparse linears in a model",
    "md": "Dynamics of water",
}

Section = tuple[str, list[str], list[list[str]], str]
"""Title, head of a table, its lines, and what is to be said below."""


def write(folder: Path) -> list[Path]:
    """Write FOLDER/README.md, report.html and their pictures. Raises ValueError where the folder holds no results."""
    studies = load(folder)
    if not studies:
        raise ValueError(f"studies: no results in {folder}; run `mace-triton study precision` first")
    parts = list(sections(studies))
    pages = {"README.md": markdown(parts)}
    if "precision" in studies:
        pages["pareto.svg"] = pareto(studies["precision"])
    if "profile" in studies:
        pages["profile.svg"] = bars(studies["profile"])
    if "training" in studies:
        pages["training.svg"] = curves(studies["training"])
    if "md" in studies:
        pages["md.svg"] = distributions(studies["md"])
    pages["report.html"] = page(parts, [text for name, text in pages.items() if name.endswith(".svg")])
    for name, text in pages.items():
        (folder / name).write_text(text)
    return [folder / name for name in pages]


def sections(studies: dict[str, dict]) -> Iterator[Section]:
    """The report's tables."""
    yield "Claims", ["claim", "measured", "verdict"], [list(line) for line in verdicts(studies)], ""
    if "models" in studies:
        yield _seeds(studies["models"])
    if "precision" in studies:
        yield from _errors(studies["precision"])
        yield _times(studies["precision"])
    if "profile" in studies:
        yield from _wholes(studies["profile"])
        yield _blocks(studies["profile"])
    if "search" in studies:
        yield _search(studies["search"])
    if "training" in studies:
        yield _training(studies["training"])
    if "accumulation" in studies:
        yield from _accumulation(studies["accumulation"])
    if "md" in studies:
        yield from _dynamics(studies["md"])
    lines = [[name, *(str(part) for part in _where(study["environment"]))] for name, study in studies.items()]
    yield "Where and how", ["study", "card", "revision", "date", "versions", "command"], lines, ""


def _where(found: Row) -> tuple[object, ...]:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return found["card"], found["revision"], str(found["date"])[:10], versions, f"`{found['command']}`"


def _seeds(study: Row) -> Section:
    keys = ("energy_rmse_meV_per_atom", "force_rmse_meV_per_angstrom")
    lines = [[str(row["seed"]), *(f"{row[key]:.3g}" for key in keys), str(row["steps"])] for row in study["rows"]]
    head = ["seed", "energy rmse, meV/atom", "force rmse, meV/angstrom", "training steps"]
    return HEADS["models"], head, lines, "On the held-out folder, FP64, e3nn. The first seed is the one that ships."


def _errors(study: Row) -> Iterator[Section]:
    """A table for each model and sample."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in study["rows"]:
        groups.setdefault((row["model"], row["sample"]), []).append(row)
    for (model, sample), rows in groups.items():
        head = ["policy", "energy, meV/atom", "force, meV/angstrom", "largest", "1 - cos", "stress, meV/angstrom^3"]
        if rows[0]["still"]:
            head = ["policy", "energy, meV/atom", "largest force, eV/angstrom", "stress, meV/angstrom^3"]
        lines = [_line(row) for row in rows]
        yield f"{model}: {sample}", head, lines, f"{study['samples'][sample]}. Root mean squares, 95 % intervals."


def _line(row: Row) -> list[str]:
    energy, stress = _with_ends(row["energy_rmse"]), _with_ends(row["stress_rmse"])
    if row["still"]:
        return [row["policy"], energy, f"{row['largest_force']:.1e}", stress]
    cosine = row["one_minus_cosine"]
    return [row["policy"], energy, _with_ends(row["force_rmse"]), f"{row['force_max']:.2g}", f"{cosine:.0e}", stress]


def _with_ends(found: list, digits: int = 2) -> str:
    value, *ends = (None if number is None else f"{number:.{digits}g}" for number in found)
    return value if ends[0] is None else f"{value} [{ends[0]}, {ends[1]}]"


def _times(study: Row) -> Section:
    sizes = sorted({row["atoms"] for row in study["times"]})
    found = {(row["policy"], row["atoms"]): row for row in study["times"]}
    lines = []
    for policy in dict.fromkeys(row["policy"] for row in study["times"]):
        cells = [found[policy, atoms] for atoms in sizes]
        slower = [f"{found['fp32', row['atoms']]['ms'] / row['ms']:.2f}" for row in cells]
        lines.append([policy, *(f"{row['ms']:.3g}" for row in cells), *slower, cells[0]["by_autograd"]])
    head = ["policy", *(f"{n} atoms, ms" for n in sizes), *(f"fp32's over it, {n}" for n in sizes), "not on the engine"]
    return "Steps of the engine, water", head, lines, "Wall time of a step among others like it, forces and stress."


def _wholes(study: Row) -> Iterator[Section]:
    """A table for each l."""
    done = [row for row in study["wholes"] if row["status"] == "ok"]
    sizes = sorted({row["atoms"] for row in done})
    each = ("wall, ms", "host", "GPU", "launches", "e3nn's over it")
    for level in dict.fromkeys(row["l"] for row in study["wholes"]):
        found = {(row["backend"], row["precision"], row["atoms"]): row for row in done if row["l"] == level}
        plain = {atoms: found.get(("e3nn", "fp32", atoms)) for atoms in sizes}
        failed = {(r["backend"], r["precision"]): r for r in study["wholes"] if r["l"] == level and r["status"] != "ok"}
        keys = dict.fromkeys((row["backend"], row["precision"]) for row in study["wholes"] if row["l"] == level)
        lines = []
        for key in keys:
            cells = [c for atoms in sizes for c in _whole(found.get((*key, atoms)), plain[atoms])]
            lines.append([*key, *cells, failed[key]["status"] if key in failed else ""])
        head = ["backend", "precision", *(f"{name} ({atoms})" for atoms in sizes for name in each), "failed"]
        said = (
            f"Water of {' and '.join(map(str, sizes))} atoms, {study['channels']} channels, features and harmonics to "
        )
        said += f"l = {level}, r_max {study['r_max']:g} angstrom. Forces gated by e3nn FP64. Last column of a size: "
        said += "e3nn's FP32 wall time over this one."
        yield f"{HEADS['profile']}, l = {level}", head, lines, said


def _whole(row: Row | None, plain: Row | None) -> list[str]:
    if row is None:
        return [""] * 5
    gpu = ["", ""] if row["gpu"] is None else [f"{row['gpu']:.3g}", str(row["launches"])]
    ratio = "" if plain is None else f"{plain['wall'] / row['wall']:.2f}"
    return [f"{row['wall']:.3g}", f"{row['host']:.3g}", *gpu, ratio]


def _blocks(study: Row) -> Section:
    levels = list(dict.fromkeys(row["l"] for row in study["blocks"]))
    found = {(row["block"], row["backend"], row["precision"], row["l"]): row for row in study["blocks"]}
    lines = []
    for key in sorted({key[:3] for key in found}, key=lambda key: [*found].index((*key, levels[0]))):
        cells = [_block(found.get((*key, level)), side) for level in levels for side in ("forward", "backward")]
        lines.append([*key, *cells])
    lines.sort(key=lambda line: [*dict.fromkeys(row["block"] for row in study["blocks"])].index(line[0]))
    head = ["block", "backend", "precision", *(f"{side}, l = {n}" for n in levels for side in ("forward", "backward"))]
    atoms = max((row["atoms"] for row in study["blocks"]), default=0)
    said = (
        f"ms on the GPU / on the host until queued, {atoms} atoms, each block alone on what it gets inside the model."
    )
    return HEADS["blocks"], head, lines, said


def _block(row: Row | None, side: str) -> str:
    if row is None or row[side] is None:
        return ""
    gpu = row[side]["gpu"]
    return f"{'' if gpu is None else f'{gpu:.3g}'} / {row[side]['host']:.2g}"


def _search(study: Row) -> Section:
    words = tuple(field for field in CHOICES if field in study["found"]["words"])  # older results lack some
    rows = sorted(study["rows"], key=lambda row: row["ms"])
    best = study["found"]["words"]
    same = [field for field in best if field != "name"]
    lines = []
    for row in rows:
        mark = " (found)" if all(row["words"][field] == best[field] for field in same) else ""
        numbers = [f"{row['ms']:.3g}{mark}", f"{row['energy_rmse']:.2g}", f"{row['force_rmse']:.2g}"]
        lines.append([*(row["words"][field] for field in words), *numbers])
    limits = study["limits"]
    said = f"Allowed: {limits['energy']:g} meV/atom and {limits['force']:g} meV/angstrom; {study['atoms']} atoms."
    return HEADS["search"], [*words, "ms", "energy rmse", "force rmse"], lines, said


def _training(study: Row) -> Section:
    head = ["mode", "force rmse, meV/angstrom", "spread", "above fp32's, %", "energy rmse, meV/atom", "seeds"]
    lines = []
    for mode in dict.fromkeys(row["mode"] for row in study["rows"]):
        rows = [row for row in study["rows"] if row["mode"] == mode]
        done = [row for row in rows if row["status"] == "ok"]
        if not done:
            lines.append([mode, f"failed: {rows[0]['reason']}", "", "", "", "0"])
            continue
        force, energy = (np.array([row[key] for row in done]) for key in ("force_rmse", "energy_rmse"))
        spread = f"{force.std(ddof=1):.2g}" if len(force) > 1 else ""
        above = _with_ends([None if v is None else 100 * v for v in above_fp32(study["rows"], mode)])
        lines.append([mode, f"{force.mean():.4g}", spread, above, f"{energy.mean():.3g}", str(len(done))])
    shape = study["architecture"]["hidden_irreps"]
    said = (
        f"{study['steps']} steps of {study['batch']} frames, {shape}; {study['data']}. Errors of the last step in FP64."
    )
    return HEADS["training"], head, lines, said


def _accumulation(study: Row) -> Iterator[Section]:
    head = ["product", "operands", "variant", "ms", "error of sums", "whole error"]
    lines = []
    for row in study["rows"]:
        ms = "" if row["ms"] is None else f"{row['ms']:.3g}"
        errors = (f"{row[key]:.1e}" for key in ("error_of_sums", "error"))
        lines.append([row["shape"], row["operands"], row["variant"], ms, *errors])
    said = (
        f"Shapes of a medium model, {study['atoms']} atoms of water; random numbers. Errors relative to FP64, of the "
    )
    said += "operands as they are rounded (and pruned), and as they were."
    yield HEADS["accumulation"], head, lines, said
    thin = study["pruned"]
    lines = [[f"{thin['model']}, pruned", _with_ends(thin["force_rmse"]), _with_ends(thin["energy_rmse"]), ""]]
    done = [row for row in study["trained"] if row["status"] == "ok"]
    for mode in dict.fromkeys(row["mode"] for row in done):
        rows = [row for row in done if row["mode"] == mode]
        force, energy = (mean_interval(np.array([r[key] for r in rows])) for key in ("force_rmse", "energy_rmse"))
        lines.append([f"student, {mode}", _with_ends(force, 3), _with_ends(energy), str(len(rows))])
    head = ["model", "force rmse, meV/angstrom", "energy rmse, meV/atom", "seeds"]
    said = "Pruned: against itself, a shift of all energies left out, nothing trained after."
    if done:
        said += f" Students: against their teacher, {study['steps']} steps, pruned half-way."
    yield HEADS["sparse"], head, lines, said


def _dynamics(study: Row) -> Iterator[Section]:
    """A table for each ensemble."""
    found = list(comparisons(study["rows"]))
    for ensemble in dict.fromkeys(row["ensemble"] for row in found):
        lines = []
        for row in (row for row in found if row["ensemble"] == ensemble):
            name = f"{row['observable']}, {row['unit']}" if row["unit"] else row["observable"]
            cells = [name, row["policy"], str(row["replicas"]), _with_ends(row["mean"], 4)]
            if row["policy"] != "fp64":
                p = "" if row["p"] is None else f"{row['p']:.1g}"
                cells += [_with_ends(row["difference"]), f"{row['margin']:g}", p, row["verdict"]]
            lines.append([*cells, *[""] * (8 - len(cells))])
        head = ["observable", "policy", "replicas", "mean", "less FP64's", "margin", "p of TOST", "verdict"]
        runs = f"replicas of {study['steps']} steps of 0.5 fs"
        said = f"{study['model']}, {study['atoms']} atoms, {runs}. 95 % intervals."
        yield f"{HEADS['md']}: {ensemble.upper()}", head, lines, said


def markdown(parts: list[Section]) -> str:
    """The page for a reader of the repository."""
    lines = ["# Studies of precision", "", "<!-- Made by `mace-triton study report`. Do not edit. -->", ""]
    for title, head, rows, below in parts:
        lines += [f"## {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
        lines += ["", *([below, ""] if below else [])]
    pictures = {"## Steps of the engine": ("pareto.svg", "error against time of a step")}
    pictures[f"## {HEADS['blocks']}"] = ("profile.svg", "time on the wall and on the GPU by backend")
    pictures[f"## {HEADS['training']}"] = ("training.svg", "learning curves")
    pictures[f"## {HEADS['md']}: NVT"] = ("md.svg", "radial distribution functions")
    for start, (name, alt) in pictures.items():
        for at in [i for i, line in enumerate(lines) if line.startswith(start)]:
            lines[at:at] = [f"![{alt}]({name})", ""]
    return "\n".join(lines).rstrip() + "\n"


def page(parts: list[Section], pictures: list[str]) -> str:
    """The same as one HTML file."""
    style = "body{font:15px sans-serif;max-width:70em;margin:2em auto}td,th{padding:.2em .7em;text-align:left}"
    found = ["<!doctype html><meta charset=utf-8><title>Studies of precision</title>", f"<style>{style}</style>"]
    found.append("<h1>Studies of precision</h1>")
    found += [picture[picture.find("<svg") :] for picture in pictures]
    for title, head, rows, below in parts:
        cells = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
        top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        found.append(f"<h2>{html.escape(title)}</h2><table><tr>{top}</tr>")
        found += [f"<tr>{row}</tr>" for row in cells]
        found.append(f"</table><p>{html.escape(below)}</p>")
    return "\n".join(found) + "\n"


def pareto(study: Row) -> str:
    """An SVG: force error of the first sample against the time of a step of the largest box, each policy a point."""
    pyplot = _pyplot()
    first = study["rows"][0]
    error = {
        row["policy"]: row["force_rmse"]
        for row in study["rows"]
        if (row["model"], row["sample"]) == (first["model"], first["sample"])
    }
    atoms = max(row["atoms"] for row in study["times"])
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for row in study["times"]:
        if row["atoms"] != atoms or row["policy"] in ("fp64", E3NN) or row["by_autograd"]:
            continue
        value, low, high = error[row["policy"]]
        ends = None if low is None else [[value - low], [high - value]]
        block = row["policy"].rpartition(" ")[0] in BLOCKS
        axes.errorbar(row["ms"], value, yerr=ends, fmt="o", color="#4c8bf5" if block else "#d6336c")
        axes.annotate(row["policy"], (row["ms"], value), textcoords="offset points", xytext=(5, 3), fontsize=8)
    axes.set(xlabel=f"step of {atoms} atoms, ms", ylabel="force error, meV/angstrom (rms)", yscale="log")
    axes.set_title(f"{first['model']}, {first['sample']}", fontsize=10)
    return _svg(pyplot, figure)


def bars(study: Row) -> str:
    """An SVG: wall and GPU time of the largest box by backend and precision, a panel for each l."""
    pyplot = _pyplot()
    done = [row for row in study["wholes"] if row["status"] == "ok"]
    atoms, levels = max(row["atoms"] for row in done), list(dict.fromkeys(row["l"] for row in done))
    figure, panels = pyplot.subplots(1, len(levels), figsize=(4.5 * len(levels), 5), squeeze=False)
    for axes, level in zip(panels[0], levels, strict=True):
        rows = [row for row in done if row["l"] == level and row["atoms"] == atoms][::-1]
        names = [f"{row['backend']} {row['precision']}" for row in rows]
        axes.barh(names, [row["wall"] for row in rows], color="#c9d6ea", label="wall")
        axes.barh(names, [row["gpu"] or 0.0 for row in rows], height=0.4, color="#4c8bf5", label="GPU")
        axes.set(xscale="log", xlabel="ms", title=f"l = {level}, {atoms} atoms")
        axes.tick_params(axis="y", labelsize=8)
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    return _svg(pyplot, figure)


def curves(study: Row) -> str:
    """An SVG: the force error on held-out frames as trainings go on, the mean over seeds of each mode."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for mode in dict.fromkeys(row["mode"] for row in study["rows"] if row["status"] == "ok"):
        rows = [row["curve"] for row in study["rows"] if row["mode"] == mode and row["status"] == "ok"]
        steps = [point["step"] for point in rows[0]]
        force = np.array([[point["force_rmse"] for point in curve] for curve in rows])
        axes.plot(steps, force.mean(0), marker=".", label=mode)
    axes.set(xlabel="step", ylabel="force error on held-out frames, meV/angstrom (rms)", yscale="log")
    axes.legend(fontsize=8)
    return _svg(pyplot, figure)


def distributions(study: Row) -> str:
    """An SVG: radial distribution functions of NVT, the mean over replicas of each policy."""
    pyplot = _pyplot()
    figure, both = pyplot.subplots(1, 2, figsize=(10, 4))
    for axes, pair in zip(both, ("O-O", "O-H"), strict=True):
        rows = [row for row in study["rows"] if row["ensemble"] == "nvt"]
        for policy in dict.fromkeys(row["policy"] for row in rows):
            found = np.array([row["curves"][pair] for row in rows if row["policy"] == policy])
            axes.plot(study["bins"], found.mean(0), label=policy, linewidth=1)
        axes.set(xlabel="r, angstrom", ylabel=f"g(r), {pair}", ylim=(0, 4))
        axes.legend(fontsize=8)
    return _svg(pyplot, figure)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "mace_triton"  # the same figures give the same file
    return pyplot


def _svg(pyplot, figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)
    return out.getvalue()
