"""The package works from a wheel outside the checkout, and from a bare checkout in any working directory."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHIPPED = ("pyproject.toml", "README.md", "LICENSE", "kernels", "mace_triton")

PROBE = """
import mace_triton as mt, mace_triton.kernels.tiles as tiles, pathlib, sys
home = pathlib.Path(sys.argv[1]).resolve()
assert pathlib.Path(mt.__file__).resolve().is_relative_to(home), mt.__file__
assert pathlib.Path(tiles.__file__).resolve().is_relative_to(home), tiles.__file__
assert isinstance(tiles.table(), dict)
from mace_triton.problem import ChannelwiseTPProblem
from mace_triton.ops.channelwise_tp import channelwise_tp
from mace_triton.kernels import channelwise_tp as kernels
assert pathlib.Path(kernels.__file__).resolve().is_relative_to(home), kernels.__file__
assert callable(mt.accelerate)
import torch
assert ChannelwiseTPProblem.from_mace("8x0e", "0e+1o", "8x0e+8x1o").dim_out == 32
print("imported from", home)
"""


def probe(folder: Path, cwd: Path) -> subprocess.CompletedProcess:
    """Run PROBE in another directory, with `folder` first on the path, and after it only where MACE is installed."""
    installed = Path(importlib.util.find_spec("mace").origin).parent.parent
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(folder), str(installed)))}
    command = [sys.executable, "-c", PROBE, str(folder)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the tree, so that the checkout gets no build folder."""
    pytest.importorskip("setuptools", minversion="77")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SHIPPED:
        assert (ROOT / name).exists(), f"{name} is missing from the checkout"
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    run = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_holds_every_file(wheel: Path):
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"mace_triton/kernels/{path.name}" for path in (ROOT / "kernels").iterdir() if path.is_file()}
    for path in (ROOT / "mace_triton").rglob("*"):
        if path.is_file() and path.suffix in (".py", ".json", ".safetensors", ".md"):
            wanted.add(str(path.relative_to(ROOT)))
    assert not wanted - inside
    assert "mace_triton/kernels/tiles.json" in inside
    assert not any(name.startswith("kernels/") for name in inside)  # that import name belongs to another package


def test_the_wheel_imports_outside_the_checkout(wheel: Path, tmp_path: Path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    run = probe(site, elsewhere)
    assert run.returncode == 0, run.stderr


def test_the_wheel_has_the_command(wheel: Path):
    archive = zipfile.ZipFile(wheel)
    entry = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "mace-triton = mace_triton.cli:app" in archive.read(entry).decode()


def test_a_bare_checkout_imports_from_elsewhere(tmp_path: Path):
    run = probe(ROOT, tmp_path)
    assert run.returncode == 0, run.stderr
