"""The checks on a user's structure: right models pass in every policy, and each check sees what it is for."""

from __future__ import annotations

import ase
import ase.io
import mace_models as mm
import numpy as np
import pytest
from test_mace_parity import SMALL, e3nn_model
from typer.testing import CliRunner

import mace_triton as mt
from mace_triton import checks, cli
from mace_triton.water import water_box

pytestmark = [pytest.mark.torchscript, pytest.mark.usefixtures("reference_path")]
CUTOFF = 3.0
NAMES = [
    "forces are the energy's derivative",
    "stress is the energy's derivative",
    *(f"{what} under {how}" for how in ("translation", "rotation", "permutation") for what in ("energy", "forces")),
    "no jump at the cutoff",
]


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("skin", [1.0, None])
def test_right_models_pass(precision, skin, device):
    calculator = mt.MACETritonCalculator(
        e3nn_model("mp-medium", device), precision=precision, device=device.type, skin=skin
    )
    for atoms in mm.random_structures(SMALL["elements"], seed=3, n_atoms=6):
        before = atoms.copy()
        certificate = calculator.certify(atoms)
        found = calculator.check(atoms, certificate)
        assert all(check.passed for check in found), [str(check) for check in found]
        assert [check.name for check in found] == [n for n in NAMES if atoms.pbc.all() or "stress" not in n]
        assert before == atoms


class Pairs:
    """A pair potential with a smooth cutoff, exact in FP64, that can be made wrong in one way at a time."""

    def __init__(self, wrong: str = ""):
        self.wrong = wrong

    def __call__(self, atoms: ase.Atoms) -> dict:
        from ase.neighborlist import neighbor_list

        i, _, r, v = neighbor_list("ijdD", atoms, CUTOFF)
        inside = 1.0 - (r / CUTOFF) ** 2
        energy, slope = 0.5 * (inside**3).sum(), -3.0 * r / CUTOFF**2 * inside**2  # of half of each pair
        pull = slope[:, None] * v / r[:, None]  # twice half: an atom has its pairs both ways
        forces = np.zeros((len(atoms), 3))
        np.add.at(forces, i, 2.0 * pull)
        stress = (v[:, :, None] * pull[:, None, :]).sum(0) / atoms.get_volume()
        if self.wrong == "forces":
            forces *= 1.01
        if self.wrong == "stress":
            stress = 1.01 * stress
        if self.wrong == "translation":
            energy += 1e-3 * np.sin(atoms.positions[:, 0]).sum()
            forces[:, 0] -= 1e-3 * np.cos(atoms.positions[:, 0])
        if self.wrong == "rotation":
            energy += 1e-3 * (v[:, 0] * inside**3).sum() + 1e-3 * np.abs(v[:, 0]).sum()
        if self.wrong == "permutation":
            energy += 1e-3 * (forces[0] ** 2).sum()
        if self.wrong == "jump":
            energy += 1e-2 * len(r)
        return {"energy": energy, "forces": forces, "stress": stress}


LIMITS = mt.Certificate("fp64", 8, 0.0, 0.0, 0.0, 1.0, None, 1e-4, 1e-4)
EXPECTED = {
    "": None,
    "forces": "forces are",
    "stress": "stress is",
    "translation": "energy under translation",
    "rotation": "energy under rotation",
    "permutation": "energy under permutation",
    "jump": "no jump",
}


@pytest.mark.parametrize("wrong", EXPECTED)
def test_each_check_sees_what_it_is_for(wrong):
    atoms = ase.Atoms("Ar8", np.random.default_rng(0).uniform(0, 6.4, (8, 3)), cell=[6.4, 6.5, 6.6], pbc=True)
    failed = [check.name for check in checks.run(Pairs(wrong), atoms, CUTOFF, LIMITS) if not check.passed]
    if not wrong:
        assert failed == []
    else:
        assert any(name.startswith(EXPECTED[wrong]) for name in failed), failed


def test_a_lone_atom_has_no_neighbour_to_lose():
    found = checks.run(Pairs(), ase.Atoms("Ar", cell=[9, 9, 9]), CUTOFF, LIMITS)
    assert found[-1].error is None
    assert found[-1].passed
    assert "nothing to test" in str(found[-1])
    assert not checks.Check("x", float("nan"), 1.0, "meV").passed


def test_command(tmp_path, monkeypatch):
    path = tmp_path / "water.xyz"
    ase.io.write(path, water_box(2))
    done = CliRunner().invoke(cli.app, ["certify", "water", str(path), "--precision", "fp32"])
    assert done.exit_code == 0, done.output
    assert done.output.count("passed") == 1 + len(NAMES)
    monkeypatch.setattr(checks, "STEP", float("nan"))
    done = CliRunner().invoke(cli.app, ["certify", "water", str(path)])
    assert done.exit_code == 1
    done = CliRunner().invoke(cli.app, ["certify", "water", str(tmp_path / "none.xyz")])
    assert done.exit_code == 1
    assert "no structure that ASE can read" in done.output
