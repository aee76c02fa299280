"""The bars this package set itself, measured in one run: `python -m bench.bars [--only conv,linear,model,...]`.

Every row is guarded: what fails is written down as failed and the next one is measured. The JSON file is written anew
after every row and keeps the sections of earlier runs that this one does not touch.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from . import blocks, edge_block, first_use, md_step, measure, models, rows, species_blocks, timing
from .rows import OURS, Row

FAST = ("cueq", "oeq", OURS)
MODELS = ("small", "medium", "large")


class Section:
    """The rows and bars of one part of the run, and the file they are flushed to."""

    def __init__(self, name: str, path: Path, device: torch.device):
        self.name, self.path, self.device = name, path, device
        self.started, self.rows, self.bars = time.perf_counter(), [], []
        self.header = rows.environment(device)

    def flush(self) -> None:
        document = json.loads(self.path.read_text()) if self.path.exists() else {"sections": {}}
        self.header["seconds"] = round(time.perf_counter() - self.started, 1)
        self.header["load_average"] = max(rows.load_average(), self.header["load_average"])
        document["sections"][self.name] = {"environment": self.header, "rows": self.rows, "bars": self.bars}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(document, indent=1) + "\n")

    def add(self, row: Row) -> Row:
        self.rows.append(row)
        rows.add_ratios(self.rows)
        self.flush()
        detail = f"{row['gpu_ms']:.4f} ms" if row["status"] == "ok" and "gpu_ms" in row else row["reason"] or ""
        words = [row[key] for key in ("block", "case", "atoms", "provider", "precision", "variant", "direction")]
        print("  ", *(str(word) for word in words if word), row["status"], detail, flush=True)
        return row

    def measure(self, specs: list[measure.Spec]) -> None:
        for spec in specs:
            self.add(measure.measure(spec, self.device))

    def value(self, key: str, case, direction: str, provider: str, precision: str, variant: str = "") -> float:
        """One number of a measured row; LookupError saying why when the row is not there or not ok."""
        spec = measure.Spec(case, provider, precision, direction, variant)
        wanted = measure.describe(spec)
        for row in self.rows:
            if all(row.get(name) == value for name, value in wanted.items()):
                if row["status"] != "ok":
                    raise LookupError(f"{provider} {precision} {row['status']}: {row['reason']}")
                return float(row[key])
        raise LookupError(f"{provider} {precision} was not measured")

    def ratio(self, text: str, case, direction: str, peer: str, precision: str, least: float | None, key="gpu_ms"):
        """A bar: the peer's FP32 figure over ours."""

        def quotient() -> float:
            return self.value(key, case, direction, peer, "fp32") / self.value(key, case, direction, OURS, precision)

        self.bar(f"{text}: {peer} fp32 / ours {precision}", quotient, least=least)

    def bar(self, text: str, value: Callable[[], float], *, least: float | None = None, most: float | None = None):
        """Write down a figure and whether it reaches its bar; a figure with neither limit is only reported."""
        entry: Row = {"bar": text, "value": None, "least": least, "most": most, "verdict": "not measured"}
        try:
            entry["value"] = round(value(), 4)
            entry["verdict"] = _verdict(entry["value"], least, most)
        except (LookupError, ZeroDivisionError, TypeError) as error:
            entry["reason"] = str(error)[:200]
        self.bars.append(entry)
        self.flush()

    def stopped(self, error: Exception) -> None:
        """Write down that the section ended early."""
        entry: Row = {"bar": f"{self.name}: stopped early", "value": None, "least": None, "most": None}
        self.bars.append(entry | {"verdict": "not measured", "reason": measure.reason(error)})


def _verdict(value: float, least: float | None, most: float | None) -> str:
    if least is None and most is None:
        return "reported"
    return "pass" if (least is None or value >= least) and (most is None or value <= most) else "FAIL"


def conv(section: Section) -> None:
    """The convolution of the three models' second layers at 1536 atoms."""
    cases = {name: blocks.ConvCase(name, 1536) for name in ("large", "medium", "small")}
    for name, case in cases.items():
        section.measure(measure.specs([case], [(p, ("fp32",)) for p in FAST], blocks.DIRECTIONS))
        section.measure(measure.specs([case], [(OURS, ("bf16",))], blocks.DIRECTIONS))
        least = 1.5 if name == "large" else 1.3
        for direction in blocks.DIRECTIONS:
            section.ratio(f"conv_tp {name} {direction}", case, direction, "cueq", "fp32", least)
            bf16 = 2.0 if name == "large" else None
            section.ratio(f"conv_tp {name} {direction}", case, direction, "cueq", "bf16", bf16)
        oeq = 3.0 if name == "large" else None
        section.ratio(f"conv_tp {name} {blocks.DIRECTIONS[1]}", case, blocks.DIRECTIONS[1], "oeq", "fp32", oeq)
    section.measure(measure.specs([cases["large"]], [(OURS, ("fp32",))], blocks.DIRECTIONS, "deterministic"))
    section.measure(measure.specs([cases["large"]], [("e3nn", ("fp32",))], blocks.DIRECTIONS))


def linear(section: Section) -> None:
    """128x0e+128x1o+128x2e to itself at three sizes, and the 71 slots of layer 2 to 16."""
    for atoms, bf16, fp32 in ((5184, 2.5, 1.5), (41472, 2.5, 1.5), (1536, 1.3, 1.3)):
        case = blocks.LinearCase("up-large", atoms)
        section.measure(measure.specs([case], [("cueq", ("fp32", "tf32")), ("e3nn", ("fp32",))], blocks.DIRECTIONS))
        section.measure(measure.specs([case], [(OURS, ("fp32", "tf32", "bf16"))], blocks.DIRECTIONS))
        section.ratio(f"linear {atoms} forward", case, "forward", "cueq", "bf16", bf16)
        section.ratio(f"linear {atoms} forward", case, "forward", "cueq", "fp32", fp32)
        for precision in ("bf16", "fp32"):
            section.ratio(f"linear {atoms} forward+backward", case, "forward+backward", "cueq", precision, None)
    case = blocks.LinearCase("mid-large", 1536)
    section.measure(measure.specs([case], [("cueq", ("fp32",)), (OURS, ("fp32", "bf16"))], blocks.DIRECTIONS))
    for precision in ("bf16", "fp32"):
        for direction in blocks.DIRECTIONS:
            section.ratio(f"linear 71 to 16, 1536 {direction}", case, direction, "cueq", precision, None)


def species(section: Section) -> None:
    """The symmetric contraction behind layer 1, and skip_tp with 89 species."""
    directions = species_blocks.DIRECTIONS
    for name in ("medium", "large"):
        for atoms in (1536, 5184):
            case = species_blocks.ContractionCase(name, atoms)
            section.measure(measure.specs([case], [("cueq", ("fp32",)), (OURS, ("fp32",))], directions))
            for direction, least in zip(directions, (1.0, 1.3, 1.3), strict=True):
                section.ratio(f"contraction {name} {atoms} {direction}", case, direction, "cueq", "fp32", least)
    for name in ("last-medium", "up-large"):
        for atoms in (1536, 5184):
            case = species_blocks.SpeciesLinearCase(name, atoms)
            section.measure(measure.specs([case], [("e3nn", ("fp32",)), ("cueq", ("fp32",))], directions))
            section.measure(measure.specs([case], [(OURS, ("fp32", "bf16"))], directions))
            for direction in directions:
                for peer, least in (("e3nn", 5.0), ("cueq", 2.0)):
                    section.ratio(f"skip_tp {name} {atoms} {direction}", case, direction, peer, "fp32", least)
                section.ratio(f"skip_tp {name} {atoms} {direction}", case, direction, "cueq", "bf16", None)


def edges(section: Section) -> None:
    """Edge vectors; harmonics, radial features and radial network with the vectors' gradient: against eager MACE."""
    direction = edge_block.DIRECTIONS[1]
    vectors = edge_block.VectorsCase("vectors", 1536)
    section.measure(measure.specs([vectors], [("e3nn", ("fp32",)), (OURS, ("fp32",))], edge_block.DIRECTIONS))
    section.ratio(f"edges vectors {direction}", vectors, direction, "e3nn", "fp32", 3.0)
    for name in ("features", "medium", "large"):
        case = edge_block.EdgeCase(name, 1536)
        section.measure(measure.specs([case], [("e3nn", ("fp32",)), (OURS, ("fp32", "bf16"))], edge_block.DIRECTIONS))
        for precision in ("fp32", "bf16"):
            section.ratio(f"edges {name} {direction}", case, direction, "e3nn", precision, 3.0)


FULL_MODELS = ("medium", "large")
"""Those that are also measured on plain e3nn, which is slow."""


def model(section: Section) -> None:
    """GPU time and launches of energy and forces, and the share of the blocks we replace."""
    direction = models.DIRECTIONS[0]
    for name in MODELS:
        cases = [models.ModelCase(name, atoms) for atoms in (1536, 5184)]
        peers = [("e3nn", ("fp32",))] if name in FULL_MODELS else []
        for provider, precisions in [*peers, ("cueq", ("fp32",)), (OURS, ("fp32", "bf16"))]:
            section.measure(measure.specs(cases, [(provider, precisions)], [direction]))
        for case in cases:
            text = f"model {name} {case.atoms} {direction}"
            if name in FULL_MODELS:
                section.ratio(text, case, direction, "e3nn", "fp32", 3.0)
                section.ratio(f"{text}, our blocks alone", case, direction, "cueq", "fp32", None, key="blocks_ms")
            for precision, most in (("fp32", 0.6), ("bf16", 0.45)):
                _of_peer(section, text, case, direction, "cueq", precision, most, "gpu_ms")
                launches = functools.partial(section.value, "launches", case, direction, OURS, precision)
                section.bar(f"{text}: launches of ours {precision}", launches, most=150)
                _share(section, case, direction, precision)
        measure.forget(section.device)


def _of_peer(
    section: Section,
    text: str,
    case,
    direction: str,
    peer: str,
    precision: str,
    most: float | None,
    key: str,
    theirs=None,
):
    """A bar: our figure over the peer's FP32 one. theirs: (case, direction) of the peer's row, if not ours."""

    def quotient() -> float:
        mine = section.value(key, case, direction, OURS, precision)
        return mine / section.value(key, *(theirs or (case, direction)), peer, "fp32")

    section.bar(f"{text}: ours {precision} / {peer} fp32", quotient, most=most)


def training(section: Section) -> None:
    """A training step on energies and forces: mp-medium, 8 boxes of 192 atoms."""
    case, direction = models.ModelCase("medium", 192, boxes=8), models.DIRECTIONS[1]
    section.measure(measure.specs([case], [("cueq", ("fp32",)), (OURS, ("fp32", "bf16"))], [direction]))
    section.ratio(f"model medium, 8 x 192 atoms, {direction}", case, direction, "cueq", "fp32", 1.5)
    section.ratio(f"model medium, 8 x 192 atoms, {direction}", case, direction, "cueq", "bf16", None)


def _share(section: Section, case: models.ModelCase, direction: str, precision: str) -> None:
    def share() -> float:
        blocks_ms, total = (section.value(k, case, direction, OURS, precision) for k in ("blocks_ms", "gpu_ms"))
        return blocks_ms / total

    section.bar(f"model {case.name} {case.atoms}: share of our blocks in our {precision} GPU time", share)


def memory(section: Section) -> None:
    """Peak memory of energy and forces, ours against OpenEquivariance's and cuEquivariance's."""
    direction = models.DIRECTIONS[0]
    for name in FULL_MODELS:
        cases = [models.ModelCase(name, atoms) for atoms in (1536, 5184)]
        for provider in FAST:
            for case in cases:
                section.add(_memory_row(measure.Spec(case, provider, "fp32", direction), section.device))
        for case in cases:
            for peer in ("oeq", "cueq"):
                _of_peer(section, f"memory {name} {case.atoms}, peak", case, direction, peer, "fp32", 1.0, "peak_mib")
        measure.forget(section.device)


def _memory_row(spec: measure.Spec, device: torch.device) -> Row:
    def work() -> Row:
        ready = measure.prepared(spec, device)
        return {"errors": ready.errors, "edges": ready.extra["edges"], "peak_mib": ready.extra["peak_mib"]}

    return measure.guarded(measure.describe(spec) | {"kind": "memory"}, work)


def compile_(section: Section) -> None:
    """First use of a model in a fresh process: without and with a warm Triton cache."""
    for name in ("medium", "large"):
        with tempfile.TemporaryDirectory() as cache:
            for state, most in (("cold", 30.0), ("warm", 3.0)):
                row = _first_use(section, Path(cache), name, OURS, state)
                section.bar(f"first use {name}, {state}: seconds", lambda row=row: _seconds(row), most=most)
            row = _first_use(section, Path(cache), name, "e3nn", "any cache")
            section.bar(f"first use {name}, plain e3nn: seconds", lambda row=row: _seconds(row))


def first(section: Section) -> None:
    """First step of an engine, and of ASE's dynamics, in a fresh process: without and with a warm Triton cache."""
    for name in ("medium", "large"):
        for what in ("engine", "ase"):
            with tempfile.TemporaryDirectory() as cache:
                for state, most in (("cold", 20.0), ("warm", 3.0)):
                    row = _first_use(section, Path(cache), name, OURS, state, what)
                    text = f"{row['direction']} {name}, {state}: seconds"
                    section.bar(text, lambda row=row: _seconds(row), most=most)
    for provider in ("cueq", "e3nn"):
        with tempfile.TemporaryDirectory() as cache:
            row = _first_use(section, Path(cache), "medium", provider, "any cache", "ase")
        section.bar(f"{row['direction']} medium, {provider}: seconds", lambda row=row: _seconds(row))


def _first_use(section: Section, cache: Path, name: str, provider: str, state: str, what: str = "model") -> Row:
    direction = first_use.WHAT[what][0]
    row = measure.describe(measure.Spec(models.ModelCase(name, 192), provider, "fp32", direction, state))
    row["kind"] = "first use"
    return section.add(measure.guarded(row, lambda: first_use.in_fresh_process(cache, name, 192, provider, what=what)))


def _seconds(row: Row) -> float:
    if row["status"] != "ok":
        raise LookupError(f"{row['status']}: {row['reason']}")
    return float(row["seconds"])


SIZES = (24, 81, 192, 648, 1536, 5184, 13824, 41472)
E3NN_SIZES = SIZES[:5]
"""Plain e3nn takes half a second a step there, and the card's memory soon after."""
STEPS_LEAST = dict.fromkeys((192, 1536, 5184), 25.0)
"""Atoms -> how many times longer MACECalculator with cuEquivariance takes for a step of mp-medium."""


def steps(name: str, section: Section) -> None:
    """A step of ASE's Langevin dynamics at every size, beside MACECalculator's with cuEquivariance and with e3nn."""
    direction = md_step.DIRECTIONS[0]
    cases = {atoms: md_step.StepCase(name, atoms) for atoms in SIZES}
    compared = {"cueq": SIZES, "e3nn": E3NN_SIZES}
    for provider, precision in (("cueq", "fp32"), *((OURS, p) for p in ("fp32", "bf16", "tf32")), ("e3nn", "fp32")):
        atoms = compared.get(provider, SIZES)
        section.measure(measure.specs([cases[n] for n in atoms], [(provider, (precision,))], [direction]))
        measure.forget(section.device)
        mine, peer = (precision, "cueq") if provider == OURS else ("fp32", provider)
        for n in atoms if (provider, precision) != ("cueq", "fp32") else ():
            least = STEPS_LEAST.get(n) if (name, peer, mine) == ("medium", "cueq", "fp32") else None
            section.ratio(f"step {name} {n}, wall time", cases[n], direction, peer, mine, least, key="wall_ms")


def npt(section: Section) -> None:
    """A step in a cell that changes, of ASE's NPT dynamics, beside MACECalculator's with cuEquivariance and e3nn."""
    directions = md_step.DIRECTIONS[0], md_step.DIRECTIONS[2]
    cases = {atoms: md_step.StepCase("medium", atoms) for atoms in (192, 648, 1536)}
    for provider, precision in ((OURS, "fp32"), (OURS, "bf16"), ("cueq", "fp32"), ("e3nn", "fp32")):
        section.measure(measure.specs(cases.values(), [(provider, (precision,))], directions))
        measure.forget(section.device)
    for atoms, case in cases.items():
        for peer, precision in (("cueq", "fp32"), ("cueq", "bf16"), ("e3nn", "fp32")):
            text = f"NPT step medium {atoms}, wall time"
            section.ratio(text, case, directions[1], peer, precision, None, key="wall_ms")
        for precision in ("fp32", "bf16"):

            def quotient(case=case, precision=precision) -> float:
                langevin, strained = (section.value("wall_ms", case, each, OURS, precision) for each in directions)
                return strained / langevin

            section.bar(f"step medium {atoms}, ours {precision}, wall time: NPT / Langevin", quotient)


GRAPHS_LEAST = {192: 7.0, 1536: 5.0, 5184: 4.0}
"""Atoms -> how many times longer cuEquivariance with CUDA graphs takes for a torch-sim step of mp-medium."""


def graphs(name: str, section: Section) -> None:
    """A step on a state that stays on the device: ours against cuEquivariance compiled with CUDA graphs."""
    direction, compiled = md_step.DIRECTIONS[1], "reduce-overhead"
    cases = {atoms: md_step.StepCase(name, atoms) for atoms in (GRAPHS_LEAST if name == "medium" else (1536,))}
    for precision in ("fp32", "bf16"):
        section.measure(measure.specs(cases.values(), [(OURS, (precision,))], [direction]))
        measure.forget(section.device)
    for atoms, case in cases.items():
        section.measure(measure.specs([case], [("cueq", ("fp32",))], [direction], compiled))
        measure.forget(section.device)
        for precision in ("fp32", "bf16"):

            def quotient(case=case, precision=precision) -> float:
                theirs = section.value("wall_ms", case, direction, "cueq", "fp32", compiled)
                return theirs / section.value("wall_ms", case, direction, OURS, precision)

            text = f"torch-sim step {name} {atoms}, wall time: cueq fp32 with CUDA graphs / ours {precision}"
            least = GRAPHS_LEAST[atoms] if (name, precision) == ("medium", "fp32") else None
            section.bar(text, quotient, least=least)


ENGINE_MOST = {"fp32": 1 / 3, "bf16": 1 / 4.5}
"""Our GPU time of a step over cuEquivariance's of energy and forces in FP32."""


def engine(name: str, section: Section) -> None:
    """GPU time, graph nodes, memory and time per atom of a step, against cuEquivariance's energy and forces."""
    direction, theirs = md_step.DIRECTIONS[1], models.DIRECTIONS[0]
    peers = {atoms: models.ModelCase(name, atoms) for atoms in (1536, 5184)}
    section.measure(measure.specs(peers.values(), [("cueq", ("fp32",))], [theirs]))
    measure.forget(section.device)
    ours = {atoms: md_step.StepCase(name, atoms) for atoms in (24, 192, 1536, 5184, 13824, 41472)}
    for precision in ENGINE_MOST:
        sizes = ours if precision == "fp32" else (192, 1536, 5184)
        section.measure(measure.specs([ours[atoms] for atoms in sizes], [(OURS, (precision,))], [direction]))
        measure.forget(section.device)
    for atoms, peer in peers.items():
        limits = [("GPU time", "gpu_ms", precision, most) for precision, most in ENGINE_MOST.items()]
        for what, key, precision, most in (*limits, ("peak memory", "peak_mib", "fp32", 0.5)):
            text, row = f"engine {name} {atoms}, {what}", (peer, theirs)
            _of_peer(section, text, ours[atoms], direction, "cueq", precision, most, key, row)
    for atoms in (24, 192):
        for key, most in (("gpu_ms", 1.0), ("nodes", 60), ("launches", None)):
            value = functools.partial(section.value, key, ours[atoms], direction, OURS, "fp32")
            section.bar(f"engine {name} {atoms}, fp32: {key}", value, most=most)
    _per_atom(section, name, ours, direction)


def _per_atom(section: Section, name: str, cases: dict, direction: str) -> None:
    """Microseconds of GPU time an atom; from 5184 atoms on it should stay the same."""

    def cost(atoms: int) -> float:
        return 1e3 * section.value("gpu_ms", cases[atoms], direction, OURS, "fp32") / atoms

    large = (5184, 13824, 41472)
    for atoms in large:
        text = f"engine {name} {atoms}, fp32: microseconds an atom"
        section.bar(text, functools.partial(cost, atoms), most=2.0 if name == "large" else None)
    text = f"engine {name}, fp32: most over least time an atom, 5184 to 41472 atoms"
    section.bar(text, lambda: max(map(cost, large)) / min(map(cost, large)), most=1.2)


BOXES = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Of 5184 atoms in the systems that are tried."""


def largest(section: Section) -> None:
    """The largest system of mp-medium that a step fits on this card for, and the largest for which it is right."""
    found = {provider: _largest(section, "medium", provider) for provider in ("cueq", OURS)}
    for provider, (fits, agrees) in found.items():
        section.bar(f"largest system, medium, {provider} fp32: atoms", lambda fits=fits: fits)
        section.bar(f"largest system, medium, {provider} fp32, near e3nn FP64: atoms", lambda agrees=agrees: agrees)
    section.bar("largest system, medium: ours / cueq", lambda: found[OURS][0] / found["cueq"][0])


def _largest(section: Section, name: str, provider: str) -> tuple[int, int]:
    """Atoms of the largest system that a step ran for, and for which it agreed with e3nn; they grow until one fails."""
    fits, agrees, direction = 0, 0, md_step.DIRECTIONS[1]
    for boxes in BOXES:
        spec = measure.Spec(md_step.StepCase(name, boxes * md_step.UNIT), provider, "fp32", direction)
        row = section.add(measure.measure(spec, section.device) | {"kind": "largest"})
        if row["status"] not in ("ok", "refused"):
            break
        fits, agrees = spec.case.atoms, spec.case.atoms if row["status"] == "ok" else agrees
    measure.forget(section.device)
    return fits, agrees


SECTIONS: dict[str, Callable[[Section], None]] = {
    "conv": conv,
    "linear": linear,
    "species": species,
    "edges": edges,
    "model": model,
    "training": training,
    "memory": memory,
    "compile": compile_,
    "first": first,
    **{
        f"{word}-{name}": functools.partial(section, name)
        for word, section in (("engine", engine), ("steps", steps), ("graphs", graphs))
        for name in MODELS
    },
    "npt": npt,
    "largest": largest,
}


def table(bars: list[Row]) -> Iterator[str]:
    """One line per bar: verdict, figure, limit, text."""
    for bar in bars:
        limit = "" if bar["least"] is None else f">= {bar['least']}"
        limit = limit if bar["most"] is None else f"<= {bar['most']}"
        value = "" if bar["value"] is None else f"{bar['value']:.3f}"
        yield f"{bar['verdict']:>12} {value:>9} {limit:>8}  {bar['bar']}  {bar.get('reason', '')[:90]}".rstrip()


def run(names: list[str], path: Path, device: torch.device) -> list[Row]:
    """Measure the named sections one after another; the bars of all of them."""
    bars: list[Row] = []
    for name in names:
        section = Section(name, path, device)
        print(f"{name}:", flush=True)
        try:
            section.header["copy_bandwidth_gb_per_s"] = round(timing.copy_bandwidth(device) / 1e9, 1)
            SECTIONS[name](section)
        except Exception as error:  # one section must not take the others with it
            section.stopped(error)
        section.flush()
        measure.forget(device)
        bars += section.bars
        print("\n".join(table(section.bars)), f"\n{name}: {section.header['seconds']} s", flush=True)
    return bars


def chosen(words: list[str]) -> list[str]:
    """The sections of these names, or that begin with one and a hyphen. LookupError for a word that means none."""
    found = []
    for word in words:
        meant = [name for name in SECTIONS if name == word or name.startswith(f"{word}-")]
        if not meant:
            raise LookupError(f"unknown section {word}; there are {', '.join(SECTIONS)}")
        found += meant
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    of = f"comma-separated, of: {', '.join(SECTIONS)}; engine means engine-small and all that begin so"
    parser.add_argument("--only", default=",".join(SECTIONS), help=of)
    parser.add_argument("--out", type=Path, default=rows.RESULTS / "bars.json")
    arguments = parser.parse_args()
    try:
        names = chosen(arguments.only.split(","))
    except LookupError as error:
        parser.error(f"--only: {error}")
    if not torch.cuda.is_available():
        parser.error("the bars are for a GPU, and torch sees none here; `pytest bench/ --benchmark-only` runs anywhere")
    bars = run(names, arguments.out, torch.device("cuda"))
    asked = [bar for bar in bars if bar["least"] is not None or bar["most"] is not None]
    short = [bar for bar in asked if bar["verdict"] != "pass"]
    print(f"{torch.cuda.get_device_name()}, revision {rows.revision()}: {len(asked) - len(short)} of {len(asked)} pass")
    print("\n".join(table(short)))
    return int(bool(short))


if __name__ == "__main__":
    sys.exit(main())
