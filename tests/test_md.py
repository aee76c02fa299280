"""`mace-triton md`: ensembles, files, restarts after any interruption, errors of one line."""

import inspect

import ase.build
import ase.io
import mace  # noqa: F401  before e3nn
import mace_models
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import mace_triton as mt
from mace_triton import cli, md, torchsim
from mace_triton.certify import Certificate
from mace_triton.doctor import diagnose
from mace_triton.engine import SKIN
from mace_triton.water import water_box

# Without a GPU: as users run it, not in the interpreter.
pytestmark = [pytest.mark.usefixtures("reference_path"), pytest.mark.torchscript]
runner = CliRunner()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(model, structure) of a tiny model in FP64 and 24 atoms of water."""
    folder = tmp_path_factory.mktemp("md")
    torch.save(mace_models.build("residual", channels=8, elements=(1, 8)), folder / "small.model")
    ase.io.write(folder / "start.xyz", water_box(2))
    return folder / "small.model", folder / "start.xyz"


def invoke(*arguments):
    return runner.invoke(cli.app, ["md", *(str(a) for a in arguments)], env={"COLUMNS": "200"})


def table_of(path) -> np.ndarray:
    return np.loadtxt(path.with_suffix(".log"), skiprows=1, ndmin=2)


@pytest.mark.parametrize("ensemble", md.ENSEMBLES)
def test_a_run_leaves_frames_and_a_table(ensemble, files, tmp_path):
    out = tmp_path / "run.extxyz"
    result = invoke(*files, "--ensemble", ensemble, "--steps", 10, "--every", 4, "--timestep", 0.2, "--out", out)
    assert result.exit_code == 0, result.output
    assert "certificate passed" in result.output
    frames, table = ase.io.read(out, ":"), table_of(out)
    assert [frame.info["step"] for frame in frames] == [0, 4, 8, 10]
    assert table[:, 0].tolist() == [0, 4, 8, 10]
    np.testing.assert_allclose(table[:, 1], 1e-3 * 0.2 * table[:, 0])
    for frame, line in zip(frames, table, strict=True):
        assert frame.get_potential_energy() == pytest.approx(line[2], abs=1e-5)
        assert frame.get_kinetic_energy() == pytest.approx(line[3], rel=1e-5)
        assert frame.get_temperature() == pytest.approx(line[4], rel=1e-5)
        assert frame.get_volume() == pytest.approx(line[6], rel=1e-5)
        assert np.isfinite(frame.get_forces()).all()
    volumes = {frame.get_volume() for frame in frames}
    assert (len(volumes) > 1) == (ensemble == "npt")
    total = table[:, 2] + table[:, 3]
    if ensemble == "nve":
        assert np.ptp(total) < 1e-3 * table[:, 3].max()
    assert frames[0].get_temperature() == pytest.approx(300, rel=0.5)


def test_deterministic_runs_are_alike(files, tmp_path, caplog):
    tables = []
    for name in ("one", "two"):
        out = tmp_path / f"{name}.extxyz"
        done = invoke(*files, "--deterministic", "--steps", 4, "--every", 2, "--precision", "fp32", "--out", out)
        assert done.exit_code == 0, done.output
        assert "order of sums" in caplog.text
        tables.append(np.load(out.with_suffix(".restart.npz"))["momenta"])
    np.testing.assert_array_equal(*tables)


def test_nve_forces_are_the_models(files, tmp_path):
    """A frame's forces are those of plain MACE on its positions."""
    from mace.calculators import MACECalculator

    out = tmp_path / "run.extxyz"
    assert invoke(*files, "--ensemble", "nve", "--steps", 5, "--every", 5, "--out", out).exit_code == 0
    frame = ase.io.read(out)
    calculator = MACECalculator(model_paths=[str(files[0])], device="cpu", default_dtype="float64")
    again = frame.copy()
    again.calc = calculator
    np.testing.assert_allclose(frame.get_forces(), again.get_forces(), atol=1e-7)  # the file holds 8 digits
    assert frame.get_potential_energy() == pytest.approx(again.get_potential_energy(), abs=1e-6)


def test_a_run_cut_off_goes_on_as_if_it_were_not(files, tmp_path):
    """NVE is the same to the last digits; what was written after the last restart file is cut off."""
    whole, parts = tmp_path / "whole.extxyz", tmp_path / "parts.extxyz"
    common = ("--ensemble", "nve", "--every", 3)
    assert invoke(*files, *common, "--steps", 12, "--out", whole).exit_code == 0
    assert invoke(*files, *common, "--steps", 6, "--out", parts).exit_code == 0
    with parts.open("a") as file:
        file.write("24\nhalf a fra")
    with parts.with_suffix(".log").open("a") as file:
        file.write("7 0.0")
    result = invoke(*files, *common, "--steps", 12, "--out", parts, "--resume")
    assert result.exit_code == 0, result.output
    one, two = (ase.io.read(path, ":") for path in (whole, parts))
    assert [frame.info["step"] for frame in two] == [0, 3, 6, 9, 12]
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a.positions, b.positions, atol=1e-7)
        np.testing.assert_allclose(a.get_momenta(), b.get_momenta(), atol=1e-7)
    np.testing.assert_allclose(table_of(whole)[:, :7], table_of(parts)[:, :7], rtol=1e-7)


def test_velocities_of_the_structure_are_kept(files, tmp_path):
    atoms = ase.io.read(files[1])
    atoms.set_momenta(0.01 * np.random.default_rng(0).normal(size=(len(atoms), 3)))
    start, out = tmp_path / "moving.extxyz", tmp_path / "run.extxyz"
    ase.io.write(start, atoms)
    assert invoke(files[0], start, "--ensemble", "nve", "--steps", 1, "--out", out).exit_code == 0
    np.testing.assert_allclose(ase.io.read(out, 0).get_momenta(), atoms.get_momenta(), atol=1e-7)


def test_a_molecule_without_a_cell(files, tmp_path):
    start, out = tmp_path / "molecule.xyz", tmp_path / "run.extxyz"
    ase.io.write(start, ase.build.molecule("H2O"))
    result = invoke(files[0], start, "--steps", 2, "--timestep", 0.1, "--out", out)
    assert result.exit_code == 0, result.output
    assert np.isnan(table_of(out)[:, 5:7]).all()
    assert "periodic" in invoke(files[0], start, "--ensemble", "npt", "--out", tmp_path / "npt.extxyz").output


def test_a_failed_certificate_stops_the_run_unless_forced(files, tmp_path, monkeypatch):
    failed = Certificate("fp64", 24, 9.0, 9.0, 9.0, 1.0, None, 1.0, 1.0)
    monkeypatch.setattr("mace_triton.calculator.MACETritonCalculator.certify", lambda self, atoms: failed)
    out = tmp_path / "run.extxyz"
    result = invoke(*files, "--steps", 1, "--out", out)
    assert (result.exit_code, out.exists()) == (1, False)
    assert "certificate failed" in result.output
    assert invoke(*files, "--steps", 1, "--out", out, "--force").exit_code == 0


def test_a_run_that_blows_up_ends_with_the_frame_before(files, tmp_path):
    out = tmp_path / "run.extxyz"
    hasty = ("--ensemble", "nve", "--steps", 40, "--every", 5, "--timestep", 5, "--temperature", 1)
    result = invoke(*files, *hasty, "--out", out)
    assert result.exit_code == 1
    assert "blew up" in result.output
    frames = ase.io.read(out, ":")
    assert len(frames) == len(table_of(out))
    assert all(frame.get_temperature() < 20 for frame in frames)


def test_what_exists_is_not_overwritten(files, tmp_path):
    out = tmp_path / "run.extxyz"
    assert invoke(*files, "--steps", 1, "--out", out).exit_code == 0
    before = out.read_bytes()
    result = invoke(*files, "--steps", 1, "--out", out)
    assert result.exit_code == 1
    assert "exists" in result.output
    assert out.read_bytes() == before
    result = invoke(*files, "--steps", 1, "--out", out, "--resume")
    assert "has done 1 steps already" in result.output
    other = tmp_path / "other.xyz"
    ase.io.write(other, ase.build.molecule("H2O"))
    assert "other atoms" in invoke(files[0], other, "--steps", 2, "--out", out, "--resume").output
    assert out.read_bytes() == before
    result = invoke(*files, "--steps", 2, "--out", out, "--resume", "--precision", "fp32")
    assert "in another --precision than fp32" in result.output
    assert out.read_bytes() == before
    out.write_bytes(before[:10])
    assert "is shorter" in invoke(*files, "--steps", 2, "--out", out, "--resume").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ensemble", "nph"), "--ensemble must be one of"),
        (("--steps", 0), "--steps must be at least 1"),
        (("--every", 0), "--every must be at least 1"),
        (("--temperature", 0), "--temperature must be positive"),
        (("--skin", 0), "--skin must be positive"),
        (("--timestep", 50), "--timestep must lie in"),
        (("--precision", "fp8"), "fp8"),
        (("--out", "no/such/folder/run.extxyz"), "does not exist"),
        (("--out", "nothing.extxyz", "--resume"), "there is no nothing.restart.npz"),
    ],
)
def test_bad_options_are_named(arguments, message, files):
    result = invoke(*files, *arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_what_is_no_structure_is_named(files, tmp_path):
    assert "no such structure" in invoke(files[0], tmp_path / "none.xyz").output
    wrong = tmp_path / "wrong.xyz"
    wrong.write_text("not a structure")
    assert "no structure that ASE can read" in invoke(files[0], wrong).output


def test_every_face_has_the_same_skin():
    faces = (mt.Engine, mt.MACETritonCalculator, torchsim.MACETritonModel, diagnose, md.Options, cli.md)
    assert {inspect.signature(face).parameters["skin"].default for face in faces} == {SKIN}
