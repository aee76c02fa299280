"""The command line: a run from box to summary, and errors of one line."""

import dataclasses
import json
import sys
import types

import ase.io
import mace  # noqa: F401  before e3nn
import mace_models
import numpy as np
import pytest
import torch
import typer
from ase.calculators.singlepoint import SinglePointCalculator
from typer.testing import CliRunner

from mace_triton import cli, demo
from mace_triton.certify import Budget, certify
from mace_triton.ops import dispatch
from mace_triton.water import water_box

pytestmark = pytest.mark.usefixtures("reference_path")  # without a GPU: as users run it, not in the interpreter
runner = CliRunner()


@pytest.fixture(autouse=True)
def nan_filled_empties() -> None:
    """Not here: these tests build models, and TorchScript cannot compile the poisoned torch.empty of conftest.py."""


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "small.model"
    torch.save(mace_models.build("residual", torch.float32, channels=8, elements=(1, 8)), path)
    return path


def invoke(*arguments):
    return runner.invoke(cli.app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def test_demo_runs_and_reports(model_file, tmp_path):
    before = dispatch.calls.copy()
    out = {name: tmp_path / f"{name}.out" for name in ("summary", "log", "trajectory")}
    files = [part for name, path in out.items() for part in (f"--{name}", path)]
    result = invoke("demo", "--steps", 8, "--side", 2, "--model", model_file, *files)
    assert result.exit_code == 0, result.output
    assert "certificate passed" in result.output
    assert result.output.index("certificate passed") < result.output.index("ns/day")
    assert sum((dispatch.calls - before).values()) > 0
    summary = json.loads(out["summary"].read_text())
    assert summary["certificate"]["passed"]
    assert summary["atoms"] == 24
    assert summary["picoseconds"] == pytest.approx(0.004)
    assert summary["ns_per_day"] == pytest.approx(0.5e-6 * 86400 / (summary["ms_per_step"] * 1e-3))
    table = np.loadtxt(out["log"], skiprows=1)
    assert table.shape == (8, 5)
    assert summary["temperature_mean_K"] == pytest.approx(table[:, 2].mean(), rel=1e-5)
    frames = ase.io.read(out["trajectory"], ":", format="extxyz")
    assert len(frames) == 8
    assert np.abs(frames[-1].get_momenta()).max() > 0
    assert np.abs(frames[0].positions - frames[-1].positions).max() > 1e-4


def test_same_seed_same_run(model_file):
    options = demo.Options(steps=2, model=str(model_file), side=2)
    console = cli.Console(quiet=True)
    first, second = (demo.run(options, console)["potential_mean_eV"] for _ in range(2))
    other = demo.run(dataclasses.replace(options, seed=1), console)["potential_mean_eV"]
    assert second == pytest.approx(first, rel=1e-7)  # sums run in any order on a GPU
    assert abs(other - first) > 1e-5 * abs(first)


def test_demo_continues_from_a_file(model_file, tmp_path):
    atoms = water_box(2)
    atoms.set_momenta(np.full((24, 3), 0.1))
    ase.io.write(tmp_path / "start.xyz", atoms, format="extxyz")
    result = invoke("demo", "--steps", 1, "--model", model_file, "--start", tmp_path / "start.xyz")
    assert result.exit_code == 0, result.output
    assert "relaxed" not in result.output  # it brought velocities


def test_cpu_run_says_so(model_file):
    line = demo.where("cpu")
    assert "CPU" in line
    assert ("interpreter" in line) == dispatch.interpreting()


BAD = {
    "no such model": (["--model", "nowhere.model"], "nowhere.model"),
    "no such precision": (["--precision", "fp8"], "fp8"),
    "no such device": (["--device", "cuda:99"], "cuda:99"),
    "no steps": (["--steps", "0"], "--steps"),
    "no box": (["--side", "0"], "n_side"),
    "negative temperature": (["--temperature", "-3"], "--temperature"),
    "long timestep": (["--timestep", "50"], "--timestep"),
    "no such start": (["--start", "nowhere.xyz"], "--start"),
    "no such folder": (["--log", "nowhere/run.log"], "--log"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case):
    arguments, word = BAD[case]
    result = invoke("demo", *arguments)
    assert result.exit_code == 1
    assert word in result.output
    lines = [line for line in result.output.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "Traceback" not in result.output


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "x.model").write_text("hello")
    result = invoke("demo", "--model", tmp_path / "x.model")
    assert result.exit_code == 1
    assert "is no MACE model file" in result.output


def test_failed_certificate_stops_the_run(model_file, monkeypatch):
    monkeypatch.setitem(demo.MACETritonCalculator.certify.__globals__, "certify", certify_nothing)
    result = invoke("demo", "--steps", 1, "--side", 2, "--model", model_file)
    assert result.exit_code == 1
    assert "certificate FAILED" in result.output
    assert "ns/day" not in result.output


def certify_nothing(*arguments, **options):
    return certify(*arguments, **options, budget=Budget(0.0, 0.0, 0.0, "nothing is allowed"))


def test_blow_up_is_reported():
    record = demo.Record([], [], [], [])
    atoms = water_box(1)
    atoms.set_momenta(np.full((3, 3), 1e3) * [[1], [-1], [1]])
    atoms.calc = SinglePointCalculator(atoms, energy=0.0, forces=np.zeros((3, 3)))
    with pytest.raises(RuntimeError, match="blew up at step 7"):
        demo.observe(record, atoms, True, 7, demo.Options())


def test_info_names_versions_and_kernels():
    result = invoke("info")
    assert result.exit_code == 0
    for word in ("torch", "mace_triton", "channelwise_tp", "linear", "backend"):
        assert word in result.output


def test_traps_are_found(monkeypatch):
    monkeypatch.setattr(cli, "version_of", lambda name: "0.5.0" if name == "e3nn" else None)
    assert any("0.5.0" in trap for trap in cli.traps())


def test_missing_part_is_one_line(monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    result = invoke("dev")
    assert result.exit_code == 1
    assert result.output.startswith("error: mace-triton dev")


def test_parts_get_their_arguments(monkeypatch):
    seen = []
    part = typer.Typer()
    part.command("report")(lambda folder: seen.append(folder))
    module = types.ModuleType("mace_triton.bench_report")
    module.app, module.__spec__ = part, types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "mace_triton.bench_report", module)
    result = invoke("bench", "report", "results")
    assert result.exit_code == 0, result.output
    assert seen == ["results"]
