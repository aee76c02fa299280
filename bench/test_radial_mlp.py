"""The radial network in front of conv_tp: inference and training."""

from __future__ import annotations

from . import measure
from .radial_block import DIRECTIONS, RadialCase

PROVIDERS = [("e3nn", ("fp64", "fp32", "tf32")), ("mace_triton", ("fp64", "fp32", "tf32"))]


def specs(size: str) -> list[measure.Spec]:
    if size == "tiny":
        return measure.specs([RadialCase("small", 24, channels=8)], PROVIDERS, DIRECTIONS)
    atoms = {"quick": (1536,), "full": (192, 1536, 5184)}[size]
    cases = [RadialCase(name, n) for name in ("medium", "large") for n in atoms]
    chosen = [(name, ("fp32",)) for name, _ in PROVIDERS] if size == "quick" else PROVIDERS
    return measure.specs(cases, chosen, DIRECTIONS)


def test_radial_mlp(spec, bench_row):
    bench_row(spec)
