"""The symmetric contraction behind layer 1 of MACE-MP models, correlation 3: inference and training."""

from __future__ import annotations

from . import measure
from .species_blocks import DIRECTIONS, ContractionCase


def specs(size: str) -> list[measure.Spec]:
    if size == "tiny":
        cases, precisions = [ContractionCase("small", 24, channels=4, elements=8)], ("fp64", "fp32")
    else:
        atoms = {"quick": (1536,), "full": (192, 1536, 5184)}[size]
        cases, precisions = [ContractionCase(name, n) for name in ("medium", "large") for n in atoms], ("fp32",)
    return measure.specs(cases, [(name, precisions) for name in ("e3nn", "cueq", "mace_triton")], DIRECTIONS)


def test_symmetric_contraction(spec, bench_row):
    bench_row(spec)
