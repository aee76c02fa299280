"""The water box, the stored-model format, and the training script's parts."""

import json

import mace  # noqa: F401  before e3nn
import numpy as np
import pytest
import torch
from ase.neighborlist import neighbor_list

from mace_triton import models
from mace_triton.models import build_model, card, load_stored, save_stored, train_water
from mace_triton.ops import dispatch
from mace_triton.water import SPACING, is_water_box, longest_bond, water_box

SMALL = train_water.ARCHITECTURE | train_water.QUICK
SMALL |= {"atomic_energies": [-1.0, -2.0], "avg_num_neighbors": 37.8}
SMALL |= {"atomic_inter_scale": 0.8, "atomic_inter_shift": 0.0}


@pytest.fixture(autouse=True)
def nan_filled_empties() -> None:
    """Not here: these tests build models, and TorchScript cannot compile the poisoned torch.empty of conftest.py."""


@pytest.mark.parametrize("n_side", [1, 2, 4, 5])
def test_box_has_density_and_molecules(n_side):
    atoms = water_box(n_side)
    assert len(atoms) == 3 * n_side**3
    assert is_water_box(atoms)
    assert atoms.get_volume() == pytest.approx((n_side * SPACING) ** 3)
    i, j, d = neighbor_list("ijd", atoms, 1.2)
    inside = i // 3 == j // 3
    np.testing.assert_allclose(d[inside & (atoms.numbers[i] == 8)], 0.97, atol=1e-9)
    assert longest_bond(atoms) == pytest.approx(0.97)


def test_molecules_keep_apart():
    atoms = water_box(6, seed=3)
    i, j, d = neighbor_list("ijd", atoms, 3.0)
    apart = i // 3 != j // 3
    oxygens = (atoms.numbers[i] == 8) & (atoms.numbers[j] == 8)
    assert d[apart].min() > 1.3
    assert d[apart & oxygens].min() > 2.4


def test_box_depends_on_the_seed_alone():
    np.testing.assert_array_equal(water_box(3, seed=5).positions, water_box(3, seed=5).positions)
    assert np.abs(water_box(3, seed=5).positions - water_box(3, seed=6).positions).max() > 0.1


@pytest.mark.parametrize(("arguments", "word"), [({"n_side": 0}, "n_side"), ({"jitter": 0.9}, "jitter")])
def test_box_refuses(arguments, word):
    with pytest.raises(ValueError, match=word):
        water_box(**arguments)


def test_longest_bond_sees_a_broken_molecule():
    atoms = water_box(2)
    atoms.positions[1] += [3.0, 0, 0]
    assert longest_bond(atoms) > 1.5
    atoms.wrap()
    assert longest_bond(atoms) > 1.5
    assert not is_water_box(atoms[[1, 0, 2]])


def test_stored_model_round_trip(tmp_path):
    torch.manual_seed(3)
    model = build_model(SMALL)
    save_stored(model, {"architecture": SMALL}, tmp_path / "m")
    same = load_stored(tmp_path / "m")
    for name, value in model.state_dict().items():
        assert torch.equal(value, same.state_dict()[name]), name
    exact = load_stored(tmp_path / "m", dtype=torch.float64)
    assert {p.dtype for p in exact.parameters()} == {torch.float64}
    for name, value in model.named_parameters():
        assert torch.equal(value.double(), exact.get_parameter(name)), name
    assert exact.atomic_energies_fn.atomic_energies.tolist() == [[-1.0, -2.0]]


def test_stored_model_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json is missing"):
        load_stored(tmp_path / "none")
    save_stored(build_model(SMALL), {"architecture": SMALL}, tmp_path / "m")
    (tmp_path / "m.json").write_text(json.dumps({"architecture": SMALL | {"hidden_irreps": "4x0e + 4x1o"}}))
    with pytest.raises(ValueError, match="does not fit"):
        load_stored(tmp_path / "m")


def test_near_copies_uses_the_nearest_image():
    rng = np.random.default_rng(0)
    frames = rng.uniform(0, 12, (3, 5, 3))
    moved = frames[:1] + 12.0
    moved[0, 0, 0] += 0.5
    distance = train_water.near_copies(frames, moved, 12.0)
    assert distance[0] == pytest.approx(0.5 / np.sqrt(5))
    assert distance[1:].min() > 1.0


def test_learning_rate_ends_low_in_stage_two():
    settings = train_water.Settings()
    rates = [train_water.learning_rate(x, settings) for x in np.linspace(0, 1, 101)]
    assert rates[0] == pytest.approx(settings.lr)
    assert rates[-1] == pytest.approx(settings.lr_final)
    assert max(rates[66:]) <= settings.lr_stage_two * 1.0001
    assert rates == pytest.approx(sorted(rates, reverse=True))


def fake_data(path, frames=6):
    """A few boxes in the format of the training data, two folders, the last frame nearly that of the held-out one."""
    boxes = [water_box(2, seed=s) for s in range(frames - 1)]
    boxes.append(boxes[0].copy())
    folders = np.array(["a"] + ["b"] * (frames - 1))
    order = np.argsort(-boxes[0].numbers, kind="stable")
    rng = np.random.default_rng(0)
    np.savez(
        path,
        positions=np.array([b.positions[order] for b in boxes], dtype=np.float32),
        cell=np.array([b.cell.array for b in boxes], dtype=np.float32),
        energy=(-100.0 + rng.normal(size=frames)).astype(np.float32),
        forces=rng.normal(size=(frames, 24, 3)).astype(np.float32),
        numbers=boxes[0].numbers[order],
        split=folders,
    )


@pytest.mark.usefixtures("reference_path")
@pytest.mark.parametrize(("size", "precision"), [("small", None), ("medium", "fp32")])
def test_training_writes_a_model_and_its_card(size, precision, tmp_path):
    fake_data(tmp_path / "data.npz")
    settings = train_water.Settings(minutes=0.1, holdout="a", quick=True, size=size, precision=precision)
    before = dispatch.calls["channelwise_tp_bwd", "reference"]
    result = train_water.run(tmp_path / "data.npz", tmp_path / "out", settings, "cpu")
    assert (dispatch.calls["channelwise_tp_bwd", "reference"] > before) == bool(precision)
    stored = json.loads((tmp_path / "out" / f"{settings.name}.json").read_text())
    assert stored == json.loads(json.dumps(result))
    assert stored["architecture"]["r_max"] == (6.0 if size == "medium" else 4.5)
    assert stored["frames"]["train"] == 4
    assert stored["frames"]["dropped_identical_to_held_out"] == 1
    assert stored["training"]["finished"]
    assert 0 < stored["training"]["steps_in_stage_two"] < stored["training"]["steps"]
    load_stored(tmp_path / "out" / settings.name)
    text = card.render(stored)
    assert f"{stored['held_out_errors']['force_rmse_meV_per_angstrom']:.2f}" in text


def test_parts_of_a_run_are_merged():
    rng = np.random.default_rng(0)
    temperatures = [rng.normal(300, 10, 400), rng.normal(310, 10, 400)]
    parts = [
        {
            "device": f"card {drift:g}",
            "ms_per_step": 30.0,
            "picoseconds": 10.0,
            "potential_mean_eV": drift,
            "temperature_mean_K": t.mean(),
            "temperature_std_K": t.std(),
            "potential_drift_meV_per_atom_per_ps": drift,
            "largest_force_eV_per_angstrom": 5.0 + drift,
            "longest_OH_bond_angstrom": 1.2,
            "molecules_intact": drift < 0.5,
        }
        for t, drift in zip(temperatures, (0.0, 1.0), strict=True)
    ]
    whole = card.merge(parts)
    assert whole["picoseconds"] == 20.0
    assert whole["device"] == "10 ps on card 0, 10 ps on card 1"
    assert whole["potential_mean_eV"] == 0.5
    assert "ms_per_step" not in whole
    assert card.merge(parts[:1])["device"] == "card 0"
    assert whole["temperature_mean_K"] == pytest.approx(np.concatenate(temperatures).mean())
    assert whole["temperature_std_K"] == pytest.approx(np.concatenate(temperatures).std())
    assert whole["potential_drift_meV_per_atom_per_ps"] == 0.5
    assert whole["largest_force_eV_per_angstrom"] == 6.0
    assert not whole["molecules_intact"]
    assert card.merge([]) is None


def test_shipped_model_is_as_good_as_its_card_says():
    stored = models.load_card()
    assert stored["held_out_errors"]["force_rmse_meV_per_angstrom"] <= 50
    assert stored["frames"]["held_out_folder"] not in stored["frames"]["train_folders"]
    model = models.load_water()
    assert sorted(model.atomic_numbers.tolist()) == [1, 8]
