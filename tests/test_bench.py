"""The benchmark machinery on a CPU: what it measures must be right, what fails must show, reports come from rows."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/ is not part of the installed package

from bench import (
    bars,
    blocks,
    edge_block,
    long_run,
    measure,
    models,
    providers,
    radial_block,
    rows,
    species_blocks,
    structures,
    timing,
)
from mace_triton import bench_report

CPU = torch.device("cpu")
CONV = blocks.ConvCase("small", 24, channels=2)
LINEAR = blocks.LinearCase("up-medium", 24, channels=4)
SKIP = species_blocks.SpeciesLinearCase("last-medium", 24, channels=4, elements=8)
CONTRACTION = species_blocks.ContractionCase("small", 24, channels=2, elements=8)
CASES = {"conv_tp": CONV, "linear": LINEAR, "species_linear": SKIP, "symmetric_contraction": CONTRACTION}
MODEL = models.ModelCase("small", 24, channels=2, elements=(1, 8))

pytestmark = pytest.mark.usefixtures("reference_path")


@pytest.fixture(autouse=True)
def nan_filled_empties():
    """e3nn compiles its products here, and TorchScript takes no patched torch.empty."""


@pytest.fixture(autouse=True)
def forget():
    yield
    measure.forget(CPU)


def row_of(case, provider="mace_triton", precision="fp32", direction="forward", variant="") -> dict:
    return measure.measure(measure.Spec(case, provider, precision, direction, variant), CPU)


@pytest.mark.parametrize("n_atoms", [24, 81])
def test_graph_holds_every_pair_within_the_cutoff(n_atoms):
    graph = structures.graph(n_atoms, r_max=4.0)
    images = np.array(np.meshgrid(*[[-1, 0, 1]] * 3)).reshape(3, -1).T @ graph.cell
    gaps = graph.positions[None, :, None] - graph.positions[:, None, None] + images
    assert graph.n_edges == (np.linalg.norm(gaps, axis=-1) < 4.0).sum() - n_atoms  # an atom is not its own neighbour
    sender, receiver = graph.edge_index
    lengths = np.linalg.norm(graph.positions[receiver] - graph.positions[sender] + graph.shifts, axis=1)
    assert lengths.min() > 0.9
    assert lengths.max() < 4.0


def test_water_has_the_density_and_edge_count_of_the_bars():
    graph = structures.graph(1536)
    grams = 512 * 18.01528 / 6.02214076e23
    assert grams / (np.linalg.det(graph.cell) * 1e-24) == pytest.approx(1.0, abs=1e-6)
    assert graph.n_edges == pytest.approx(129470, rel=0.01)


def test_water_refuses_other_sizes():
    with pytest.raises(ValueError, match="n_atoms must be three times a cube"):
        structures.water(100)


@pytest.mark.parametrize("provider", ["e3nn", "cueq", "mace_triton"])
@pytest.mark.parametrize(
    "case", [CONV, blocks.ConvCase("medium", 24, 2), LINEAR, blocks.LinearCase("mid-small", 24, 4)]
)
def test_providers_agree_in_fp64(case, provider):
    row = row_of(case, provider, "fp64", "forward+backward")
    assert row["status"] == "ok", row["reason"]
    assert set(row["errors"]) >= {"out", "gx", "gw"}
    assert row["gpu_ms"] > 0
    assert row["bytes"] > 0
    assert row["flops"] > 0
    assert row["roofline_percent"] is not None


@pytest.mark.parametrize("provider", ["e3nn", "cueq", "mace_triton"])
@pytest.mark.parametrize("case", [SKIP, CONTRACTION])
def test_providers_with_weights_of_each_species_agree_in_fp64(case, provider):
    row = row_of(case, provider, "fp64", "training")
    assert row["status"] == "ok", row["reason"]
    comparable = provider != "cueq" or case is SKIP  # cueq keeps the contraction's weights in a basis of its own
    assert ("gw" in row["errors"]) == comparable
    assert row["roofline_percent"] is not None


@pytest.mark.parametrize("provider", ["e3nn", "mace_triton"])
@pytest.mark.parametrize("kind", [radial_block.RadialCase, radial_block.NormCase])
def test_radial_networks_agree_in_fp64(kind, provider):
    row = row_of(kind("small", 24, channels=2), provider, "fp64", "training")
    assert row["status"] == "ok", row["reason"]
    assert set(row["errors"]) == {"out", "gx", "gw", "out in training", "gx in training"}
    assert row["flops"] > 0


@pytest.mark.parametrize("provider", ["e3nn", "mace_triton"])
@pytest.mark.parametrize("name", ["features", "small"])
def test_edge_embeddings_agree_in_fp64(name, provider):
    row = row_of(edge_block.EdgeCase(name, 24, channels=2), provider, "fp64", "forward+backward")
    assert row["status"] == "ok", row["reason"]
    assert set(row["errors"]) == {"harmonics", "weights", "gv"}
    assert row["bytes"] > 0


@pytest.mark.parametrize("provider", ["e3nn", "mace_triton"])
def test_edge_vectors_agree_in_fp64(provider):
    row = row_of(edge_block.VectorsCase("vectors", 24), provider, "fp64", "forward+backward")
    assert row["status"] == "ok", row["reason"]
    assert set(row["errors"]) == {"vectors", "lengths", "gx"}


@pytest.mark.parametrize("case", [edge_block.EdgeCase("small", 24, 2), radial_block.RadialCase("small", 24, 2)])
def test_edges_pass_their_gate_in_bf16(case):
    row = row_of(case, precision="bf16", direction="forward+backward")
    assert row["status"] == "ok", row["reason"]
    assert max(row["errors"].values()) > 1e-4, "nothing was rounded"


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_low_precision_linear_passes_its_gate(precision):
    assert row_of(LINEAR, precision=precision)["status"] == "ok"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_weights_pass_their_gate(precision):
    row = row_of(CONV, precision=precision)
    assert row["status"] == "ok"
    assert row["errors"]["out"] < 1e-5  # FP32 sums of the stored weights; only gw is rounded


def _spoiled(build, spoil):
    def builder(*arguments):
        block = build(*arguments)
        return providers.Block(lambda *x: spoil(block.call(*x)), block.layout_in, block.layout_out, block.weights)

    return builder


def _with_a_hole(out):
    hole = torch.zeros_like(out)
    hole[-1, -1] = torch.nan
    return out + hole


@pytest.mark.parametrize(
    "spoil", [lambda out: out * 1.0001, _with_a_hole, lambda out: out.flip(0), lambda out: out[:-1]]
)
@pytest.mark.parametrize("kind", CASES)
def test_gate_refuses_a_wrong_provider(monkeypatch, kind, spoil):
    wrong = _spoiled(providers.BUILDERS[kind]["mace_triton"], spoil)
    monkeypatch.setitem(providers.BUILDERS[kind], "mace_triton", wrong)
    row = row_of(CASES[kind])
    assert row["status"] in ("refused", "failed")  # a missing row breaks the backward pass before the gate sees it
    assert row["reason"]
    assert "gpu_ms" not in row


def test_gate_refuses_a_wrong_gradient(monkeypatch):
    def scaled(out):
        return out * 2 - out.detach()  # the right value, twice the gradient

    wrong = _spoiled(providers.BUILDERS["conv_tp"]["mace_triton"], scaled)
    monkeypatch.setitem(providers.BUILDERS["conv_tp"], "mace_triton", wrong)
    row = row_of(CONV)
    assert row["status"] == "refused"
    assert row["reason"].startswith("gx")


def test_gate_refuses_a_wrong_model(monkeypatch):
    def wrong(model, precision, device, variant):
        other = providers.model_e3nn(model, precision, device)
        with torch.no_grad():
            other.interactions[1].linear.weight.mul_(1.01)
        return other

    monkeypatch.setitem(providers.BUILDERS["model"], "mace_triton", wrong)
    for direction in models.DIRECTIONS:
        row = row_of(MODEL, direction=direction)
        assert row["status"] == "refused", direction


def test_gate_needs_the_parameter_gradients_it_compares():
    reference = {"interactions.0.linear_up.weight": torch.ones(3)}
    with pytest.raises(blocks.ParityError, match="no gradient"):
        models._comparable({}, reference)


def test_a_missing_provider_is_a_row(monkeypatch):
    row = row_of(CONV, "oeq")
    assert (row["status"], row["reason"]) == ("missing", "oeq runs on a GPU only")
    assert row_of(LINEAR, "oeq")["reason"] == "oeq has no linear"
    assert "not bf16" in row_of(LINEAR, "e3nn", "bf16")["reason"]
    monkeypatch.setitem(sys.modules, "cuequivariance_torch", None)
    row = row_of(CONV, "cueq")
    assert row["status"] == "missing"
    assert "cannot import cuequivariance_torch" in row["reason"]


def test_a_failing_provider_is_a_row(monkeypatch):
    def broken(*_):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setitem(providers.BUILDERS["conv_tp"], "oeq", broken)
    row = row_of(CONV, "oeq")
    assert (row["status"], row["reason"]) == ("failed", "RuntimeError: no kernel image")


def test_model_rows_time_every_block_we_replace():
    row = row_of(MODEL, direction="energy+forces")
    assert row["status"] == "ok", row["reason"]
    layer = ("linear_up", "conv_tp", "linear", "skip_tp")
    expected = {f"interactions.{i}.{name}" for i in (0, 1) for name in layer}
    expected |= {f"products.{i}.{name}" for i in (0, 1) for name in ("symmetric_contractions", "linear")}
    assert expected <= set(row["block_ms"])
    assert row["blocks_ms"] == pytest.approx(sum(row["block_ms"].values()))
    assert row["wall_ms"] > 0


def test_training_step_agrees_with_e3nn():
    row = row_of(MODEL, direction="training step")
    assert row["status"] == "ok", row["reason"]
    assert row["reference"] == "e3nn fp64"


def test_timing_rotates_all_inputs():
    seen = [0, 0, 0]

    def call(i):
        seen[i] += 1

    measured = timing.time_calls([lambda i=i: call(i) for i in range(3)], CPU)
    assert min(seen) > 0
    assert measured.gpu_ms == measured.wall_ms > 0
    assert timing.sets_beyond_cache(timing.CPU_CACHE_BYTES, CPU) == 2
    assert timing.sets_beyond_cache(100 * timing.CPU_CACHE_BYTES, CPU) == 1


@pytest.mark.parametrize(("needed_ms", "late"), [(5.0, False), (1e9, True)])
def test_a_burst_that_is_queued_too_late_is_taken_again(monkeypatch, needed_ms, late):
    """A fake device: its sleep is over in time unless it lasts `needed_ms`."""
    slept = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            pass

        def query(self):
            return slept[-1] < needed_ms

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 8.0

    monkeypatch.setattr(timing.torch.cuda, "Event", Event)
    monkeypatch.setattr(timing.torch.cuda, "_sleep", slept.append)
    monkeypatch.setattr(timing, "_cycles_per_ms", lambda: 1)
    assert timing._burst_ms([lambda: None], 4, 0, 0.2) == (2.0, late)
    assert slept[:3] == [1, 2, 5]  # whole cycles, of a millisecond here
    assert slept[-1] == (timing.MAX_SLEEP_MS if late else 5)


def _row(provider, precision, gpu_ms, status="ok", **changes) -> dict:
    spec = measure.Spec(blocks.ConvCase("large", 1536), provider, precision, "forward")
    row = measure.describe(spec) | {"gpu_ms": gpu_ms, "status": status, "reason": None, "error": 1e-7}
    row = row | {"roofline_percent": 50.0, "variant": ""}
    if status != "ok":
        row = {key: value for key, value in row.items() if key != "gpu_ms"} | {"reason": "no compiler"}
    return row | changes


def test_ratios_compare_the_same_work():
    found = [
        _row("cueq", "fp32", 3.0),
        _row("cueq", "fp64", 8.0),
        _row("e3nn", "fp32", 9.0, atoms=192),
        _row("oeq", "fp32", 0.0, status="failed"),
        *(_row("mace_triton", precision, 2.0) for precision in ("fp32", "bf16", "fp64")),
    ]
    rows.add_ratios(found)
    assert [row["ratio"] for row in found[-3:]] == [{"cueq": 1.5}, {"cueq": 1.5}, {"cueq": 4.0}]


def test_recorder_keeps_what_was_measured(tmp_path):
    recorder = rows.Recorder(tmp_path / "deep" / "run.json", {"card": "none"})
    for count in (1, 2):
        recorder.add(_row("cueq", "fp32", 1.0, atoms=count))
        assert len(json.loads(recorder.path.read_text())["rows"]) == count


@pytest.mark.parametrize(
    ("argv", "typed"),
    [
        (["/x/bench/bars.py", "--out", "/y/bars.json", "--only", "conv"], "python -m bench.bars --only conv"),
        (
            ["/x/pytest/__main__.py", "bench", "-k", "a or b", "--bench-results=/y"],
            "python -m pytest bench -k 'a or b'",
        ),
        (["/x/bin/pytest", "bench/", "--bench-results", "/y"], "pytest bench/"),
    ],
)
def test_the_command_can_be_repeated_elsewhere(argv, typed):
    assert rows.command(argv) == typed


def test_sections_of_one_revision_are_one_command():
    bar, other = "python -m bench.bars --only ", "python -m pytest bench"
    runs = [("a", bar + "conv"), ("a", bar + "conv"), ("a", other), ("b", bar + "edges"), ("a", bar + "linear,model")]
    found = list(bench_report._sources(runs))
    assert found == [
        f"revision a, `{bar}conv,linear,model`",
        f"revision a, `{other}`",
        f"revision b, `{bar}edges`",
    ]


def test_environment_names_the_revision(monkeypatch):
    monkeypatch.setenv("MACE_TRITON_REVISION", "abc123")
    found = rows.environment(CPU)
    assert found["revision"] == "abc123"
    assert torch.__version__.startswith(found["versions"]["torch"])  # which may leave out the local part, "+cu130"
    assert rows.results_file(found, Path("x")).name.startswith("cpu-")


def test_a_section_keeps_the_highest_load_of_the_machine(tmp_path, monkeypatch):
    """Beside other work the host's times are not those of the programs that are compared."""
    loads = iter([0.5, 7.0, 3.0])
    monkeypatch.setattr(rows.os, "getloadavg", lambda: (next(loads), 0.0, 0.0))
    section = bars.Section("conv", tmp_path / "bars.json", CPU)
    for _ in range(2):
        section.flush()
    assert (section.header["load_average"], section.header["processors"]) == (7.0, os.cpu_count())
    bench_report.write_report(tmp_path, tmp_path / "docs")
    assert f"| 7.0 of {os.cpu_count()} |" in (tmp_path / "docs" / "benchmarks.md").read_text()


def test_bars_judge_what_was_measured(tmp_path):
    section = bars.Section("conv", tmp_path / "bars.json", CPU)
    case = blocks.ConvCase("large", 1536)
    for row in (_row("cueq", "fp32", 3.0), _row("oeq", "fp32", 0, "failed"), _row("mace_triton", "fp32", 2.0)):
        section.add(row)
    section.ratio("conv", case, "forward", "cueq", "fp32", 1.5)
    section.ratio("conv", case, "forward", "cueq", "fp32", 1.6)
    section.ratio("conv", case, "forward", "oeq", "fp32", 3.0)
    section.ratio("conv", case, "forward", "cueq", "bf16", None)
    section.bar("memory", lambda: 0.9, most=1.0)
    section.stopped(RuntimeError("out of luck"))
    stored = json.loads(section.path.read_text())["sections"]["conv"]
    verdicts = [bar["verdict"] for bar in section.bars]
    assert verdicts == ["pass", "FAIL", "not measured", "not measured", "pass", "not measured"]
    assert "failed: no compiler" in stored["bars"][2]["reason"]
    assert any("out of luck" in line for line in bars.table(section.bars))


def test_bars_keep_other_sections_and_go_on_after_a_failure(tmp_path, monkeypatch):
    path = tmp_path / "bars.json"
    bars.Section("linear", path, CPU).flush()

    def broken(section):
        raise RuntimeError("lost the card")

    monkeypatch.setitem(bars.SECTIONS, "conv", broken)
    monkeypatch.setitem(bars.SECTIONS, "model", lambda section: section.bar("fine", lambda: 2.0, least=1.0))
    found = bars.run(["conv", "model"], path, CPU)
    assert [bar["verdict"] for bar in found] == ["not measured", "pass"]
    assert set(json.loads(path.read_text())["sections"]) == {"linear", "conv", "model"}


def test_the_median_call_counts_in_a_profile():
    calls = [[("a", 1.0), ("b", 2.0)], [("a", 9.0), ("b", 9.0)], [("a", 1.1), ("b", 2.0)]]
    found = [(10.0 * i + k, name, ms) for i, call in enumerate(calls) for k, (name, ms) in enumerate(call)]
    profile = timing._kernel_profile(found[::-1], 3)
    assert (profile.kernel_ms, profile.launches) == (pytest.approx(3.1), 2)
    assert profile.top == [("b", pytest.approx(4.3333), 1), ("a", pytest.approx(3.7), 1)]
    assert timing._kernel_profile(found[:5], 3).kernel_ms == pytest.approx(22.1 / 3)  # calls cannot be told apart
    assert timing._kernel_profile([], 3).launches == 0


def test_sections_of_a_word():
    assert bars.chosen(["conv"]) == ["conv"]
    assert bars.chosen(["engine", "largest"]) == ["engine-small", "engine-medium", "engine-large", "largest"]
    with pytest.raises(LookupError, match="unknown section eng;"):
        bars.chosen(["eng"])


def _results(folder: Path, card: str) -> None:
    recorder = rows.Recorder(folder / f"{card}.json", rows.environment(CPU) | {"card": card})
    for row in (_row("cueq", "fp32", 3.21), _row("oeq", "fp32", 0, "failed"), _row("mace_triton", "fp32", 2.0)):
        recorder.add(row)


def test_report_renders_rows_and_failures(tmp_path):
    _results(tmp_path, "Some GPU")
    _results(tmp_path, "CPU x86_64")
    (tmp_path / "README.md").write_text("before\n<!-- bench:start -->\nold\n<!-- bench:end -->\nafter\n")
    section = bars.Section("memory", tmp_path / "bars.json", CPU)
    section.header["card"] = "Some GPU"
    section.bar("memory large: peak ours / oeq", lambda: 0.87, most=1.0)
    section.rows += [_row("oeq", "fp32", 1.0, kind="memory", peak_mib=4321.0)]
    times = {"seconds": 7.5, "convert_s": 2.5, "first_call_s": 5.0, "second_call_s": 0.25}
    section.add(_row("mace_triton", "fp32", 1.0, kind="first use", **times) | {"variant": "cold"})
    long = rows.Recorder(tmp_path / "long-runs.json", rows.environment(CPU) | {"card": "Some GPU"})
    runs = (long_run.Run("nve", 4), long_run.Run("nvt", 8))
    figures = {"steps": 90, "asked": 100, "drift_meV_per_atom_ns": 0.125, "scatter_meV_per_atom": 0.5, "rebuilds": 7}
    figures |= {"temperature_K": 301.25, "temperature_error_K": 2.0, "digest": "abc", "status": "ok", "reason": None}
    memory = {"memory_bytes": {when: {"device": 2**21, "host": 1} for when in ("start", "end")}}
    long.add(runs[0].row() | figures | memory)
    long.add(long_run._row_of(runs[1], "", "RuntimeError: lost the card"))
    result = CliRunner().invoke(
        bench_report.app, ["report", "--results", str(tmp_path), "--docs", str(tmp_path / "docs")]
    )
    assert result.exit_code == 0, result.output
    text = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "| large | 1536 | cueq | fp32 | forward | 3.21 | 50 |" in text
    assert "| failed |  |  | no compiler |" in text
    assert "cueq 1.6x" in text
    assert "| memory large: peak ours / oeq | 0.87 | at most 1.0 | pass |" in text
    assert "| large | 1536 | oeq | fp32 | forward | 4321 |" in text
    assert "| large | 1536 | forward | mace_triton | cold | 7.5 | 2.5 | 5 | 0.25 |" in text
    assert "| nve-192-0 | 192 | 90 of 100 | 0.125 | 0.5 | 301.2 +- 2.0 | 2 to 2 | 7 | `abc` |" in text
    assert "| nvt-1536-0 | 1536 | failed: RuntimeError: lost the card |" in text
    assert "CPU x86_64" not in text
    readme = (tmp_path / "README.md").read_text()
    assert "| tensor product, forward | large | 1536 |  |  | 3.21 | 2 |  |" in readme
    assert readme.startswith("before\n")
    assert readme.endswith("<!-- bench:end -->\nafter\n")
    assert "old" not in readme
    assert (tmp_path / "docs" / "img" / "some-gpu-conv_tp.svg").read_text().count("cueq") >= 1


def test_report_does_not_touch_a_readme_without_its_markers(tmp_path):
    _results(tmp_path, "Some GPU")
    (tmp_path / "README.md").write_text("mine\n")
    arguments = ["report", "--results", str(tmp_path), "--docs", str(tmp_path / "docs")]
    assert "lacks the lines" in CliRunner().invoke(bench_report.app, arguments).output
    assert (tmp_path / "README.md").read_text() == "mine\n"


def test_report_takes_the_newest_row():
    old, new = _row("cueq", "fp32", 3.0), _row("cueq", "fp32", 2.0)
    assert bench_report.newest([old, new]) == [new]


@pytest.mark.parametrize(("content", "message"), [(None, "no *.json"), ("{", "is no benchmark result")])
def test_report_says_what_is_wrong_with_results(tmp_path, content, message):
    if content is not None:
        (tmp_path / "bad.json").write_text(content)
    result = CliRunner().invoke(bench_report.app, ["report", "--results", str(tmp_path)])
    assert result.exit_code == 2
    assert message in result.output


def test_run_needs_the_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_report, "ROOT", tmp_path)
    result = CliRunner().invoke(bench_report.app, ["run"])
    assert result.exit_code == 2
    assert "repository" in result.output
