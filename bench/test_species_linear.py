"""skip_tp with the 89 species of MACE-MP: hidden to hidden irreps, and hidden irreps to scalars."""

from __future__ import annotations

from . import measure
from .species_blocks import DIRECTIONS, SpeciesLinearCase

QUICK = [("e3nn", ("fp32",)), ("cueq", ("fp32",)), ("mace_triton", ("fp32", "bf16"))]
ALL = [
    ("e3nn", ("fp64", "fp32", "tf32")),
    ("cueq", ("fp64", "fp32", "tf32")),
    ("mace_triton", ("fp64", "fp32", "tf32", "bf16", "fp16")),
]


def specs(size: str) -> list[measure.Spec]:
    if size == "tiny":
        return measure.specs([SpeciesLinearCase("up-medium", 24, channels=4, elements=8)], ALL, DIRECTIONS)
    atoms = {"quick": (1536,), "full": (192, 1536, 5184)}[size]
    cases = [SpeciesLinearCase(name, n) for name in ("last-medium", "up-large") for n in atoms]
    return measure.specs(cases, QUICK if size == "quick" else ALL, DIRECTIONS)


def test_species_linear(spec, bench_row):
    bench_row(spec)
