"""Imports point one way: kernels <- ops <- nn <- convert <- certify, calculator <- everything that a user calls."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BASE = (
    "problem",
    "linear_problem",
    "symmetric_contraction_problem",
    "layout",
    "compiling",
    "coverage",
    "precision",
    "reference",
    "reference_edge_embedding",
    "reference_edge_filter",
    "reference_edge_forces",
    "reference_linear",
    "reference_radial_table",
    "reference_readout",
    "reference_radial_mlp",
    "reference_norm_mlp",
    "reference_symmetric_contraction",
)
LEVELS = dict.fromkeys((*BASE, "kernels"), 0) | {"ops": 1, "nn": 2, "convert": 3}
LEVELS |= dict.fromkeys(("models", "certify", "checks", "engine", "calculator"), 4)
TOP = 5  # demo, cli, dev, bench_report, ...: nothing below may import them
FILES = sorted([*(ROOT / "mace_triton").rglob("*.py"), *(ROOT / "kernels").glob("*.py")])


def module_name(path: Path) -> list[str]:
    """Dotted name below mace_triton, in parts; empty for the package itself."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = parts if parts[0] == "kernels" else parts[1:]
    return parts[:-1] if parts[-1] == "__init__" else parts


def package_of(path: Path) -> list[str]:
    """The package that the file's relative imports start from."""
    return module_name(path) if path.name == "__init__.py" else module_name(path)[:-1]


def imported(source: str, package: list[str]) -> set[str]:
    """First name below mace_triton of all that `source` imports, at any depth of the code."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            dotted = [alias.name.split(".") for alias in node.names]
            found |= {parts[1] for parts in dotted if parts[0] == "mace_triton" and len(parts) > 1}
        elif isinstance(node, ast.ImportFrom):
            base = node.module.split(".") if node.module else []
            if node.level:
                base = ["mace_triton", *package[: len(package) - node.level + 1], *base]
            if base[0] == "mace_triton":
                found |= {base[1]} if len(base) > 1 else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path):
    own = module_name(path)
    if not own:
        return  # the package's __init__ names everything, lazily
    level = LEVELS.get(own[0], TOP)
    wrong = {name for name in imported(path.read_text(), package_of(path)) if LEVELS.get(name, TOP) > level}
    assert not wrong, f"{'.'.join(own)} (level {level}) imports {wrong} from above"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.name)
def test_kernels_know_neither_the_package_nor_mace(path: Path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    roots = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    roots |= {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    assert not roots & {"mace_triton", "mace", "e3nn"}
    assert not imported(path.read_text(), package_of(path)) - {"kernels"}


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("from ..convert import accelerate", "convert"),
        ("from .. import convert", "convert"),
        ("def f():\n    from mace_triton.nn.conv import ConvTP", "nn"),
        ("import mace_triton.cli", "cli"),
        ("from mace_triton import demo", "demo"),
        ("from .graph import graph_plan", "ops"),
    ],
)
def test_the_check_sees_every_way_to_import(line: str, name: str):
    assert imported(line, ["ops"]) == {name}


PUBLIC = "accelerate restore report load_model Precision certify Certificate MACETritonCalculator"


@pytest.mark.parametrize("first", ["", "import mace_triton.calculator", "from mace_triton.certify import certify"])
def test_public_names_in_a_fresh_interpreter(first: str):
    lines = [first, "import mace_triton as mt", f"assert all(callable(getattr(mt, n)) for n in {PUBLIC.split()})"]
    lines += ["assert 'accelerate' in dir(mt)", "print(mt.__version__)"]
    run = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()


def test_unknown_name_is_an_attribute_error():
    import mace_triton

    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        mace_triton.nonsense  # noqa: B018
