"""The study of dynamics: what a run gives, equivalence, runs that go on, verdicts."""

import dataclasses
import json
import time
from concurrent.futures import ThreadPoolExecutor

import ase
import ase.io
import mace  # noqa: F401  before e3nn
import numpy as np
import pytest
import scipy.stats
from rich.console import Console

from mace_triton.precision import PRESETS
from mace_triton.study import claims, dynamics, report, store
from mace_triton.study.dynamics import Unit
from mace_triton.water import water_box

pytestmark = pytest.mark.torchscript


def test_an_ideal_gas_has_no_shells():
    rng = np.random.default_rng(0)
    frames = [
        ase.Atoms("O60H120", cell=[14.0] * 3, pbc=True, scaled_positions=rng.uniform(size=(180, 3))) for _ in range(40)
    ]
    for pair in (("O", "O"), ("O", "H")):
        curve = dynamics.distribution(frames, *pair)
        far = dynamics.centres() > 2
        assert curve[far].mean() == pytest.approx(1.0, abs=0.01)
        assert curve[far].std() < 0.1
    shifted = [ase.Atoms(a.numbers, a.positions + 100.3, cell=a.cell, pbc=True) for a in frames]
    np.testing.assert_allclose(dynamics.distribution(shifted, "O", "H"), curve, atol=0.02)
    small = [ase.Atoms("OH2", cell=[4.0] * 3, pbc=True, scaled_positions=rng.uniform(size=(3, 3)))]
    assert not dynamics.distribution(small, "O", "H")[dynamics.centres() > 2.0].any()


def test_a_peak_lies_between_its_bins():
    where = dynamics.centres()
    place, height = dynamics.peak(where, 3.0 - (where - 2.76) ** 2, 2.4, 3.3)
    assert (place, height) == pytest.approx((2.76, 3.0), abs=1e-9)


def test_diffusion_of_a_random_walk():
    rng = np.random.default_rng(0)
    steps = rng.normal(0, 0.1, (400, 2000, 3))
    drifting = np.cumsum(steps, axis=0) + np.arange(400)[:, None, None] * 0.05  # of the whole box
    frames = [ase.Atoms("O2000", positions=x) for x in drifting]
    # a mean square displacement of 3 x 0.01 angstrom^2 in 0.01 ps: D = 0.5 angstrom^2/ps
    assert dynamics.diffusion(frames, 0.01) == pytest.approx(5.0, rel=0.05)


def test_equivalence_needs_margin_and_replicas():
    exact = [300.0, 301.0, 299.0, 300.5, 299.5]
    near, off = [x + 0.2 for x in exact], [x + 4.0 for x in exact]
    assert dynamics.compared([x + 1.2 for x in exact], exact, 1.0)["verdict"] == "undecided"  # one in many by chance
    assert dynamics.compared(near, exact, 5.0)["verdict"] == "equivalent"
    assert dynamics.compared(off, exact, 1.0)["verdict"] == "different"
    assert dynamics.compared(near, exact, 0.3)["verdict"] == "undecided"
    assert dynamics.compared(near[:1], exact, 5.0)["verdict"] == "too few replicas"
    row = dynamics.compared(off, exact, 5.0)
    welch = scipy.stats.ttest_ind(off, exact, equal_var=False)
    ends = welch.confidence_interval(0.95)
    assert row["difference"] == pytest.approx((4.0, ends.low, ends.high))
    upper = scipy.stats.ttest_ind(np.array(off) - 5.0, exact, equal_var=False, alternative="less").pvalue
    assert row["p"] == pytest.approx(upper)
    assert dynamics.compared([1.0, 1.0], [1.0, 1.0], 0.1)["verdict"] == "equivalent"


def test_a_small_study_of_dynamics_goes_on(tmp_path, monkeypatch, reference_path):
    plan = dynamics.Plan("water", ("fp64", "fp32"), ("nvt",), 1, 16, 2, 2)
    runs, first = tmp_path / "runs", dynamics.Unit("nvt", "fp64", 1)
    quiet = Console(quiet=True)
    runs.mkdir()
    ase.io.write(runs / "start-1.extxyz", water_box(2, seed=1))
    cut = dynamics.replace(plan, steps=16).steps // 2
    options = dynamics.replace(first.options(plan, runs, "cpu"), steps=cut)
    assert dynamics.run_one(options, 0, 1) == ""
    assert dynamics.done(first, plan, runs) == cut
    path = dynamics.run(plan, runs, tmp_path, "cpu", 1, True, quiet)
    assert dynamics.done(first, plan, runs) == 16
    found = store.load(tmp_path)["md"]
    assert not found["failed"]
    assert [(row["policy"], row["seed"]) for row in found["rows"]] == [("fp64", 1), ("fp32", 1)]
    exact, single = (row["observables"] for row in found["rows"])
    table, other = (dynamics.table_of(runs / f"nvt-{name}-1.log") for name in ("fp64", "fp32"))
    for column in (
        "potential_eV",
        "temperature_K",
    ):  # up to the cut the same random numbers, and nearly the same forces
        np.testing.assert_allclose(table[column][:5], other[column][:5], rtol=1e-4)
    assert single["temperature"] == pytest.approx(other["temperature_K"][2:].mean())
    assert list(table["step"]) == list(range(0, 17, 2))
    assert exact["energy"] == pytest.approx(1e3 * table["potential_eV"][2:].mean() / 24)
    assert {row["verdict"] for row in dynamics.comparisons(found["rows"])} == {"too few replicas"}
    before = (runs / "nvt-fp32-1.log").stat().st_mtime_ns
    assert dynamics.run(plan, runs, tmp_path, "cpu", 1, True, quiet) == path
    assert (runs / "nvt-fp32-1.log").stat().st_mtime_ns == before  # what has ended is not run again
    for trajectory in runs.glob("*.extxyz"):
        trajectory.unlink()  # what it gave is written down
    dynamics.run(plan, runs, tmp_path, "cpu", 1, True, quiet)
    assert store.load(tmp_path)["md"]["rows"] == found["rows"]
    monkeypatch.setattr(dynamics, "run_one", lambda *_: pytest.fail("what the results hold is run again"))
    dynamics.run(plan, tmp_path / "empty", tmp_path, "cpu", 1, True, quiet)
    assert store.load(tmp_path)["md"]["rows"] == found["rows"]
    longer = {"model": "water", "steps": 32}
    dynamics.recall(dynamics.replace(plan, steps=32), tmp_path / "longer", tmp_path / "md.json", longer)
    assert not (tmp_path / "longer").exists()
    monkeypatch.setitem(PRESETS, "fp32", dataclasses.replace(PRESETS["fp32"], readout="bf16"))
    assert dynamics.given(Unit("nvt", "fp32", 1), plan, runs) is None  # it was another policy
    with pytest.raises(ValueError, match="nvt-fp32-1 is of another policy than fp32 is now"):
        dynamics.run(plan, runs, tmp_path / "again", "cpu", 1, True, quiet)
    dynamics.recall(plan, tmp_path / "changed", tmp_path / "md.json", {"model": "water", "steps": 16})
    assert [found.name for found in (tmp_path / "changed").iterdir()] == ["nvt-fp64-1.json"]
    report.write(tmp_path)
    assert "Dynamics of water: NVT" in (tmp_path / "README.md").read_text()


def test_what_has_ended_is_kept_while_others_run(tmp_path, monkeypatch):
    plan = dynamics.Plan("water", ("fp64", "fp32", "bf16"), ("nve",), 1, 16, 1, 2)
    seen = []

    def pretended(options, number, workers):
        if options.precision == "bf16":  # the last: by then the others are in the results
            seen.extend(wait_for_rows(tmp_path / "md.json", 1))
        return "no luck" if options.precision == "fp32" else ""

    def worked_out(unit, plan, folder):
        dynamics.note(unit, plan, folder, {"observables": {"drift": 1.0}, "curves": {}})

    monkeypatch.setattr(dynamics, "ProcessPoolExecutor", lambda workers, **_: ThreadPoolExecutor(workers))
    monkeypatch.setattr(dynamics, "run_one", pretended)
    monkeypatch.setattr(dynamics, "work_out", worked_out)
    dynamics.run(plan, tmp_path / "runs", tmp_path, "cpu", 2, True, Console(quiet=True))
    assert [row["policy"] for row in seen] == ["fp64"]
    found = store.load(tmp_path)["md"]
    assert [row["policy"] for row in found["rows"]] == ["fp64", "bf16"]
    assert found["failed"] == {"nve-fp32-1": "no luck"}


def wait_for_rows(path, count):
    """Rows of a study's results once there are so many; fails after ten seconds."""
    for _ in range(1000):
        rows = json.loads(path.read_text())["rows"] if path.is_file() and path.stat().st_size else []
        if len(rows) >= count:
            return rows
        time.sleep(0.01)
    pytest.fail("no results were kept")


def test_runs_are_dealt_out_to_the_cards_that_are_visible():
    assert [dynamics.one_of(3, None, number) for number in range(5)] == ["0", "1", "2", "0", "1"]
    assert [dynamics.one_of(2, "5,3", number) for number in range(3)] == ["5", "3", "5"]


def test_a_run_that_fails_is_named(tmp_path):
    options = dynamics.Unit("nvt", "fp64", 1).options(dynamics.Plan("water", ("fp64",)), tmp_path, "cpu")
    assert "no such structure" in dynamics.run_one(options, 0, 1)
    assert "no such structure" in dynamics.run_one(options, 0, 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"policies": ("fp32",)}, "must hold fp64"),
        ({"policies": ("fp64", "fp8")}, "precision must be one of"),
        ({"ensembles": ("nvt", "muvt")}, "got 'muvt'"),
        ({"replicas": 0}, "replicas must be at least 1"),
        ({"steps": 3}, "steps 320"),
    ],
)
def test_plans_that_cannot_be(words, message):
    with pytest.raises(ValueError, match=message):
        dynamics.Plan(**{"model": "water", "policies": ("fp64",)} | words)


def test_the_verdict_on_dynamics(monkeypatch):
    def verdict_of(*verdicts):
        rows = [
            {"policy": "bf16", "observable": "energy", "ensemble": "nvt", "p": 0.01, "verdict": verdict}
            for verdict in verdicts
        ]
        monkeypatch.setattr(claims, "comparisons", lambda _: rows)
        lines = claims.verdicts({"md": {"rows": []}})
        return next(line for line in lines if line[0].startswith("observables"))[1:]

    assert verdict_of("equivalent", "equivalent") == ("bf16 equivalent to FP64 in 2 of 2", "bf16: confirmed")
    assert verdict_of("equivalent", "different")[1] == "bf16: different in energy (nvt)"
    assert verdict_of("equivalent", "undecided")[1] == "bf16: undecided in energy (nvt)"
