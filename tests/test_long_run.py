"""The bench of long runs on a CPU: figures of known samples, rows of short runs and of those that broke off."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/ is not part of the installed package

from bench import long_run

pytestmark = [pytest.mark.usefixtures("reference_path"), pytest.mark.torchscript]


@pytest.mark.parametrize("run", [long_run.Run("nve", 2), long_run.Run("npt", 2), long_run.Run("nvt", 2, True)])
def test_a_long_run_reports_what_it_did(run, monkeypatch):
    for name, value in (("RELAX", 1), ("EQUILIBRATE", 2), ("EVERY", 2)):
        monkeypatch.setattr(long_run, name, value)
    found = long_run.long_run(run, 5, "cpu")
    assert (found["steps"], found["atoms"], found["finite"]) == (5, 24, True)
    assert found["rebuilds"] >= 1
    assert all(ms > 0 for ms in found["ms_of_a_step"])
    assert found["memory_bytes"]["end"]["host"] >= found["memory_bytes"]["start"]["host"] > 0
    again = long_run.long_run(run, 5, "cpu")
    assert long_run.same_bits([row | {"status": "ok"} for row in (found, again)]) == (
        True if run.deterministic else None
    )
    assert long_run.long_run(run, 5, "cpu", seconds=0.0)["steps"] == 0


def test_a_run_that_gets_slower_shows():
    assert long_run._ends([1.0] * 10 + [5.0] * 80 + [2.0] * 10) == (1.0, 2.0)
    assert long_run._ends([3.0]) == (3.0, 3.0)
    assert long_run._ends([]) is None


def test_drift_and_temperature_of_known_samples():
    step = 1e-6 * long_run.TIME_STEP * long_run.EVERY  # ns
    count = np.arange(200)
    energy = 7.0 + 24 * 1e-3 * (3.0 * step * count + 0.01 * (-1.0) ** count)  # 3 meV an atom and ns, and a scatter
    samples = np.stack((energy, 300 + 5 * (-1.0) ** count, np.ones(200)), axis=1)
    found = long_run._figures(samples, 24)
    assert found["drift_meV_per_atom_ns"] == pytest.approx(3.0, rel=0.03)  # the scatter itself leans a little
    assert found["scatter_meV_per_atom"] == pytest.approx(0.01, rel=0.02)
    assert found["temperature_K"] == pytest.approx(300)
    assert found["temperature_error_K"] == pytest.approx(0, abs=1e-9)
    assert not long_run._figures(np.where(np.eye(200, 3) > 0, np.nan, samples), 24)["finite"]


def test_a_run_that_broke_off_is_a_row_too(tmp_path, monkeypatch):
    run = long_run.RUNS[0]
    assert long_run._row_of(run, 'a warning\n{"steps": 3}\n', "") == {"steps": 3, "status": "ok"}
    failed = long_run._row_of(run, "", "Traceback\nRuntimeError: lost the card\n")
    assert (failed["status"], failed["reason"], failed["side"]) == ("failed", "RuntimeError: lost the card", 4)
    asked = []

    class Process:
        def __init__(self, command, **_):
            asked.append(dict(word.removeprefix("--").split("=") for word in command[3:]))

        def communicate(self):
            return json.dumps({"run": "x", "gpu": 1}), ""

    monkeypatch.setattr(long_run.rows, "environment", lambda device: {"card": str(device)})
    monkeypatch.setattr(long_run.subprocess, "Popen", Process)
    found = long_run.side_by_side(long_run.RUNS, {False: 7, True: 5}, 9.0, tmp_path / "long.json", "cpu")
    assert len(found) == len(long_run.RUNS) == len(json.loads((tmp_path / "long.json").read_text())["rows"])
    assert {(words["run"], words["steps"]) for words in asked} >= {("nve-192-0", "7"), ("nvt-192-deterministic-1", "5")}


@pytest.mark.parametrize(("cards", "most"), [(2, 1536 + 4 * 192), (3, 1536), (4, 1536)])
def test_cards_share_the_atoms(cards: int, most: int):
    atoms: dict[str, int] = {}
    for run in long_run.RUNS:
        card = long_run.card_of(run, "cuda", cards)
        atoms[card] = atoms.get(card, 0) + run.atoms
    assert max(atoms.values()) == most
    assert set(atoms) == {f"cuda:{card}" for card in range(cards)}
    assert {long_run.card_of(run, "cuda", 1) for run in long_run.RUNS} == {"cuda"}
    assert {long_run.card_of(run, "cpu", cards) for run in long_run.RUNS} == {"cpu"}


def test_same_bits_of_runs_that_differ():
    one = {"deterministic": True, "status": "ok", "steps": 5, "digest": "a"}
    assert long_run.same_bits([one, one]) is True
    assert long_run.same_bits([one, one | {"digest": "b"}]) is False
    for other in (one | {"steps": 4}, one | {"status": "failed"}, one | {"deterministic": False}):
        assert long_run.same_bits([one, other]) is None
