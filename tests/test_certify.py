"""The certificate finds differences, and the calculator runs on our ops."""

import functools

import ase
import mace  # noqa: F401  before e3nn
import mace_models
import numpy as np
import pytest
import torch
from mace.calculators import MACECalculator

from mace_triton import calculator as calculators
from mace_triton.calculator import MACETritonCalculator, check_device
from mace_triton.certify import BUDGETS, Budget, certify, piece, single_point
from mace_triton.convert import accelerate
from mace_triton.models import load_water
from mace_triton.ops import dispatch
from mace_triton.water import water_box

pytestmark = pytest.mark.usefixtures("reference_path")  # without a GPU: as users run it, not in the interpreter


@pytest.fixture(autouse=True)
def nan_filled_empties() -> None:
    """Not here: these tests build models, and TorchScript cannot compile the poisoned torch.empty of conftest.py."""


@pytest.fixture(scope="module")
def model():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return mace_models.build("residual", torch.float64, channels=8, elements=(1, 8), device=device)


@pytest.fixture
def atoms():
    return water_box(2)


@pytest.mark.parametrize("precision", sorted(BUDGETS))
def test_every_policy_keeps_its_budget(model, atoms, precision):
    before = dispatch.calls.copy()
    fast = accelerate(model, precision)
    certificate = certify(fast, model, atoms)
    assert certificate.passed, str(certificate)
    assert certificate.policy == precision
    assert sum((dispatch.calls - before).values()) > 0, "the accelerated path did not run"
    if precision == "bf16":
        assert certificate.force_rmse > 0.01 * certificate.force_scale * 2**-8, "nothing was rounded?"


def test_certificate_sees_a_wrong_model(model, atoms):
    fast = accelerate(model, "fp32")
    with torch.no_grad():
        fast.interactions[1].linear.weight.mul_(1.01)
    certificate = certify(fast, model, atoms)
    assert not certificate.passed
    assert "BEYOND" in str(certificate)
    assert certify(fast, None, atoms).passed  # against its own weights it is right


def test_certificate_measures_what_it_says(model, atoms):
    fast, exact = single_point(accelerate(model, "bf16"), atoms), single_point(model, atoms)
    certificate = certify(accelerate(model, "bf16"), model, atoms)
    error = 1e3 * (fast["forces"] - exact["forces"])
    any_order = torch.cuda.is_available()  # there sums run in any order, and BF16 rounds them then
    close = functools.partial(pytest.approx, rel=1e-3 if any_order else 1e-6)
    assert certificate.force_rmse == close(np.sqrt(np.mean(error**2)))
    assert certificate.force_max == close(np.abs(error).max())
    assert certificate.energy_error == close(1e3 * abs(fast["energy"] - exact["energy"]) / len(atoms))
    assert certificate.stress_error == close(1e3 * np.abs(fast["stress"] - exact["stress"]).max())


def test_nan_fails_the_certificate(model, atoms):
    fast = accelerate(model, "fp32")
    with torch.no_grad():
        fast.interactions[0].linear_up.weight[0] = float("nan")
    assert not certify(fast, model, atoms).passed


def test_certify_leaves_the_models_alone(model, atoms):
    fast = accelerate(model, "fp32")
    certify(fast, model, atoms)
    assert all(p.requires_grad and p.dtype == torch.float64 for p in model.parameters())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in fast.parameters())


def test_molecule_has_no_stress(model):
    molecule = ase.Atoms("OHH", [[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
    assert certify(accelerate(model), model, molecule).stress_error is None


def test_own_budget(model, atoms):
    tight = Budget(1e-9, 1e-9, 0.0, "tighter than bf16 can be")
    assert not certify(accelerate(model, "bf16"), model, atoms, budget=tight).passed


def test_calculator_agrees_with_mace(model, atoms):
    calculator = MACETritonCalculator(model)
    plain = MACECalculator(
        models=mace_models.build("residual", channels=8, elements=(1, 8)),
        default_dtype="float64",
        device=calculator.device.type,
    )
    for key in ("energy", "forces", "stress", "energies"):
        ours, theirs = calculator.get_property(key, atoms), plain.get_property(key, atoms)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)
    assert calculator.certify(atoms).passed


def test_a_structure_too_large_for_e3nn_is_certified_by_a_piece(model, atoms, monkeypatch):
    whole, right = atoms.repeat((2, 2, 2)), calculators.certify

    def certify_small(ours, plain, structure, **how):
        if len(structure) > 30:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(ours, plain, structure, **how)

    monkeypatch.setattr(calculators, "certify", certify_small)
    monkeypatch.setattr(calculators, "PIECE", 30)
    calculator = MACETritonCalculator(model, precision="fp32")
    certificate = calculator.certify(whole)
    assert certificate.passed
    assert (certificate.atoms, certificate.cut_from) == (30, len(whole))
    assert f"30 atoms cut out of {len(whole)}" in str(certificate)
    assert "cut out" not in str(calculator.certify(atoms[:20]))
    monkeypatch.setattr(calculators, "PIECE", 40)
    with pytest.raises(torch.OutOfMemoryError):
        calculator.certify(whole)


def test_a_piece_is_what_lies_around_the_first_atom():
    crystal = ase.Atoms("NaCl", [[0.1, 0, 0], [2.8, 0, 0]], cell=5.6 * np.eye(3), pbc=True).repeat((4, 3, 3))
    crystal.info["charge"] = 1
    found = piece(crystal, 9)
    assert (len(found), found.pbc.any(), found.info["charge"]) == (9, False, 1)
    assert found.numbers[0] == crystal.numbers[0]
    away = np.sort(crystal.get_distances(0, range(len(crystal)), mic=True))[:9]
    np.testing.assert_allclose(np.linalg.norm(found.positions, axis=1), away)


def test_memory_too_small_for_maces_own_way_leaves_the_engine(model, atoms, monkeypatch):
    wanted = MACETritonCalculator(model, skin=None).get_property("forces", atoms)
    ours = MACETritonCalculator(model)
    ours.get_property("forces", atoms[:3])  # others than the first ones go MACE's way

    def too_large(self, *_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(MACECalculator, "calculate", too_large)
    np.testing.assert_allclose(ours.get_property("forces", atoms), wanted, rtol=0, atol=1e-9)
    assert len(ours.engines[0].structures[0]) == len(atoms)
    with pytest.raises(torch.OutOfMemoryError):
        MACETritonCalculator(model, skin=None).get_property("forces", atoms)


def test_shipped_model_in_fp64_is_exact(atoms):
    calculator = MACETritonCalculator(precision="fp64")
    exact = load_water(calculator.device, torch.float64)
    certificate = certify(calculator.models[0], exact, atoms)
    assert certificate.force_rmse < 1e-12 * certificate.force_scale
    assert certify(accelerate(exact, "fp32"), exact, atoms).force_rmse > certificate.force_rmse


def test_calculator_reads_files_and_committees(model, atoms, tmp_path):
    for name in ("one", "two"):
        torch.save(model, tmp_path / f"{name}.model")
    single = MACETritonCalculator(tmp_path / "one.model", precision="fp32")
    committee = MACETritonCalculator(str(tmp_path / "*.model"), precision="fp32")
    assert single.num_models == 1
    assert committee.num_models == 2
    assert single.default_dtype == "float32"
    # Not equal bit by bit on a GPU: atomic adds come in any order.
    np.testing.assert_allclose(single.get_forces(atoms), committee.get_forces(atoms), rtol=0, atol=1e-6)


def test_heads(atoms):
    two = mace_models.build("multi-head", channels=8, elements=(1, 8))
    energies = [MACETritonCalculator(two, head=head).get_potential_energy(atoms) for head in two.heads]
    assert abs(energies[0] - energies[1]) > 1e-3
    for head in ("three", None):
        with pytest.raises(ValueError, match="head"):
            MACETritonCalculator(two, head=head)


def test_errors_name_the_argument(model, tmp_path):
    with pytest.raises(ValueError, match="precision"):
        MACETritonCalculator(model, precision="fp8")
    with pytest.raises(FileNotFoundError, match="no file matches"):
        MACETritonCalculator(str(tmp_path / "*.model"))
    with pytest.raises(ValueError, match="He"):
        certify(accelerate(model), model, ase.Atoms("He", [[0, 0, 0]]))
    with pytest.raises(ValueError, match="empty"):
        certify(accelerate(model), model, ase.Atoms())
    with pytest.raises(ValueError, match="not finite"):
        certify(accelerate(model), model, ase.Atoms("H", [[0, 0, np.nan]]))


@pytest.mark.parametrize("device", ["cuda:99", "abacus", "mps"])
def test_device_must_be_there(device):
    with pytest.raises(ValueError, match="device"):
        check_device(device)
