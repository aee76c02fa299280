"""The doctor's figures on a structure, and the prediction of memory."""

from __future__ import annotations

import ase.io
import mace_models as mm
import pytest
import torch
from test_mace_parity import SMALL, e3nn_model, fast_model
from typer.testing import CliRunner

from mace_triton import cli, doctor
from mace_triton.engine import Engine
from mace_triton.engine.memory import Footprint, footprint
from mace_triton.water import water_box

pytestmark = [pytest.mark.torchscript, pytest.mark.usefixtures("reference_path")]


@pytest.mark.parametrize(("name", "written_out"), [("mp-medium", True), ("nonlinear", False)])
def test_figures_of_a_step(name, written_out, device):
    plain, fast = e3nn_model(name, device), fast_model(name, device, "fp32")
    atoms = mm.random_structures(SMALL["elements"], seed=1, n_atoms=8)[0]
    before = atoms.copy()
    found = doctor.diagnose(fast, atoms)
    assert before == atoms
    moved = [atoms.copy() for _ in range(2)]
    moved[0].set_cell(atoms.cell.array * 0.99, scale_atoms=True)
    moved[1].set_cell(atoms.cell.array * 1.01, scale_atoms=True)
    most, least = (mm.batch_of(plain, [one])["edge_index"].shape[1] for one in moved)
    assert least <= found.edges <= most  # the last step's atoms are not quite where they were
    assert min(found.wall, found.first) > 0
    assert found.shares == 1
    assert (found.because == "") == written_out == (found.predicted is not None)
    shown = dict(found.rows())
    assert ("would fit" in shown) == (written_out and device.type == "cuda")
    if device.type == "cuda":
        assert found.gpu > 0
        assert 10 < found.launches < (75 if written_out else 1000)
        assert 0 < found.peak < found.memory


def test_memory_follows_edges_atoms_and_storage(device):
    fp32, bf16 = (fast_model("mp-medium", device, policy) for policy in ("fp32", "bf16"))
    one, two = (footprint(fp32, n, 80 * n, 120 * n) for n in (1000, 2000))
    assert two.weights == 2 * one.weights
    assert two.rest == 2 * one.rest
    assert two.model == one.model > 0
    assert footprint(bf16, 1000, 80000, 120000).weights * 2 == one.weights
    conv = fp32.interactions[1].conv_tp
    assert one.weights == 2 * 40000 * conv.weight_numel * 4  # weights and slopes, of pairs


def test_largest_system():
    found = Footprint(atoms=10, weights=600, apart=2560, rest=390, model=50)
    assert found.total == found.in_shares(1) == 1040
    assert found.shares(1040) == 1
    for memory in (1039, 700, 460, 451, 10):
        number = found.shares(memory)
        assert number > 1
        assert found.in_shares(number) <= max(memory, 450)
    assert found.largest(450) == 10
    assert found.largest(4050) == 100
    assert found.largest(20) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has no peak to compare with")
def test_prediction_is_near_the_peak(device):
    fast = fast_model("mp-medium", device, "fp32", channels=64)
    structures = water_box(6)
    found = doctor.diagnose(fast, structures)
    assert 0.7 * found.peak < found.predicted.total < 1.4 * found.peak


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has no peak to compare with")
@pytest.mark.parametrize("number", [8, 32])
def test_a_step_in_shares_takes_what_was_predicted(number, device):
    fast, atoms = fast_model("mp-medium", device, "fp32", channels=64), water_box(6)
    whole = Engine(fast, atoms)
    whole.step()
    expected = footprint(fast, len(atoms), whole.capacity, whole.candidates)
    found = Engine(fast, atoms, memory=expected.in_shares(number))
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    found.step()
    assert number <= found.shares <= number + 1
    peak = torch.cuda.max_memory_allocated(device) - before
    assert 0.5 * expected.in_shares(found.shares) < peak < 1.15 * expected.in_shares(found.shares) < expected.total


def test_command(tmp_path):
    path = tmp_path / "water.xyz"
    ase.io.write(path, water_box(2))
    done = CliRunner().invoke(cli.app, ["doctor", "water", str(path)])
    assert done.exit_code == 0, done.output
    for words in ("torch", "channelwise_tp", "a step", "first step", "predicted memory", "24 atoms"):
        assert words in done.output
    done = CliRunner().invoke(cli.app, ["doctor", "water", str(tmp_path / "none.xyz")])
    assert done.exit_code == 1
