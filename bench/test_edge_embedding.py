"""Vectors of edges; their harmonics and radial features, alone and with the radial network behind them."""

from __future__ import annotations

from . import measure
from .blocks import DIRECTIONS
from .edge_block import EdgeCase, VectorsCase

PROVIDERS = [("e3nn", ("fp64", "fp32")), ("mace_triton", ("fp64", "fp32", "bf16"))]
VECTORS = [("e3nn", ("fp32",)), ("mace_triton", ("fp32",))]


def specs(size: str) -> list[measure.Spec]:
    if size == "tiny":
        cases = [EdgeCase(name, 24, channels=8) for name in ("features", "small")]
        vectors = measure.specs([VectorsCase("vectors", 24)], VECTORS, DIRECTIONS)
        return measure.specs(cases, PROVIDERS, DIRECTIONS) + vectors
    atoms = {"quick": (1536,), "full": (192, 1536, 5184)}[size]
    cases = [EdgeCase(name, n) for name in ("features", "medium", "large") for n in atoms]
    chosen = [("e3nn", ("fp32",)), ("mace_triton", ("fp32", "bf16"))] if size == "quick" else PROVIDERS
    vectors = measure.specs([VectorsCase("vectors", n) for n in atoms], VECTORS, DIRECTIONS)
    return measure.specs(cases, chosen, DIRECTIONS) + vectors


def test_edge_embedding(spec, bench_row):
    bench_row(spec)
