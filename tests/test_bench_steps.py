"""Benches of steps and first uses on a CPU: gates, comparisons with every peer, large boxes, the largest system."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/ is not part of the installed package

from bench import bars, first_use, md_step, measure, models

CPU = torch.device("cpu")

pytestmark = [pytest.mark.usefixtures("reference_path"), pytest.mark.torchscript]


@pytest.fixture(autouse=True)
def forget():
    """Nothing of one test is kept for the next."""
    yield
    measure.forget(CPU)


def test_first_step_times_conversion_and_engine():
    found = first_use.first_step("small", 24, "mace_triton", "fp32", 2, CPU)
    assert found["seconds"] == found["convert_s"] + found["first_call_s"]
    assert min(found.values()) > 0
    for provider in ("mace_triton", "e3nn"):
        found = first_use.first_ase_step("small", 24, provider, "fp32", 2, CPU)
        assert found["seconds"] == found["convert_s"] + found["first_call_s"]
        assert min(found.values()) > 0
    with pytest.raises(ValueError, match="has no engine"):
        first_use.first_step("small", 24, "e3nn", "fp32", 2, CPU)


def test_boxes_that_are_copies_of_smaller_ones():
    assert md_step.unit_of(24) == (24, (1, 1, 1))
    assert md_step.unit_of(13824) == (1536, (3, 3, 1))
    for boxes in bars.BOXES:
        unit, copies = md_step.unit_of(boxes * md_step.UNIT)
        assert unit * math.prod(copies) == boxes * md_step.UNIT
        assert max(copies) <= 4 * min(copies)  # no long needles
    for atoms in (5 * md_step.UNIT, 7000):
        with pytest.raises(ValueError, match=f"{atoms} are no few copies"):
            md_step.unit_of(atoms)


@pytest.fixture
def pretended(monkeypatch):
    """Nothing is measured: a step takes peers 40 ms and ours 1 ms, and fits up to so many atoms; cueq's go wrong."""
    fits, agree = {"cueq": 20 * md_step.UNIT, "mace_triton": 40 * md_step.UNIT}, {"cueq": 10 * md_step.UNIT}

    def measure_(spec, device):
        ms = 1.0 if spec.provider == "mace_triton" else 40.0
        row = measure.describe(spec) | {"kind": "md step", "gpu_ms": ms, "wall_ms": ms, "status": "ok", "reason": None}
        too_large = spec.case.atoms > fits.get(spec.provider, 0) and "largest" in fits
        if too_large:
            return row | {"status": "failed", "reason": "OutOfMemoryError"}
        wrong = "largest" in fits and spec.case.atoms > agree.get(spec.provider, spec.case.atoms)
        return row | ({"status": "refused", "reason": "energy"} if wrong else {})

    monkeypatch.setattr(measure, "measure", measure_)
    return fits


@pytest.mark.parametrize(("name", "asked"), [("steps-medium", 3), ("steps-large", 0), ("graphs-medium", 3), ("npt", 0)])
def test_steps_are_compared_with_every_peer(name, asked, pretended, tmp_path):
    section = bars.Section(name, tmp_path / "bars.json", CPU)
    bars.SECTIONS[name](section)
    limits = [bar for bar in section.bars if bar["least"] is not None]
    assert len(limits) == asked
    assert {bar["verdict"] for bar in section.bars} == ({"pass", "reported"} if asked else {"reported"})
    assert {bar["value"] for bar in section.bars} == ({40.0, 1.0} if name == "npt" else {40.0})
    peers = {"cueq"} if name.startswith("graphs") else {"cueq", "e3nn"}
    assert {row["provider"] for row in section.rows} == {*peers, "mace_triton"}
    for peer in peers:
        assert any(f": {peer} fp32" in bar["bar"] for bar in section.bars)


def test_the_largest_system_is_the_last_that_ran_and_may_be_wrong(pretended, tmp_path):
    pretended["largest"] = True
    section = bars.Section("largest", tmp_path / "bars.json", CPU)
    bars.largest(section)
    assert [bar["value"] for bar in section.bars] == [*(boxes * md_step.UNIT for boxes in (16, 8, 32, 32)), 2.0]
    assert [row["atoms"] // md_step.UNIT for row in section.rows] == [8, 12, 16, 24, 8, 12, 16, 24, 32, 48]
    assert {row["kind"] for row in section.rows} == {"largest"}


@pytest.mark.parametrize("direction", md_step.DIRECTIONS)
def test_a_step_is_gated_by_energy_and_forces(direction, monkeypatch):
    if direction == "torch-sim step":
        pytest.importorskip("torch_sim")
    case = md_step.StepCase("small", 24, channels=2, elements=(1, 8))
    row = measure.measure(measure.Spec(case, "mace_triton", "fp32", direction), CPU)
    assert (row["status"], row["kind"], row["nodes"]) == ("ok", "md step", None)
    assert set(row["errors"]) == {"energy", "forces"}
    assert row["wall_ms"] > 0
    right = models._reference
    for wrong in ("energy", "forces"):

        def reference(*arguments, wrong=wrong):
            found, extra = right(*arguments)
            return found | {wrong: 1.01 * found[wrong]}, extra

        monkeypatch.setattr(models, "_reference", reference)
        measure.forget(CPU)
        refused = measure.measure(measure.Spec(case, "mace_triton", "fp32", direction), CPU)
        assert refused["status"] == "refused"
        assert refused["reason"].startswith(f"{wrong}: relative error")


def test_first_use_times_conversion_and_first_call(tmp_path):
    here = first_use.first_use("small", 24, "mace_triton", "fp32", 2, CPU)
    for found in (here, first_use.in_fresh_process(tmp_path, "small", 24, "e3nn", channels=2)):
        assert found["seconds"] == pytest.approx(found["convert_s"] + found["first_call_s"])
        assert min(found.values()) > 0
