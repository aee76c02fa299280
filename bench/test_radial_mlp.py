"""The radial network in front of conv_tp: inference and training."""

from __future__ import annotations

from . import measure
from .radial_block import DIRECTIONS, RadialCase

PROVIDERS = [("e3nn", ("fp64", "fp32", "tf32")), ("mace_triton", ("fp64", "fp32", "tf32", "bf16", "fp16"))]


def specs(size: str) -> list[measure.Spec]:
    if size == "tiny":
        return measure.specs([RadialCase("small", 24, channels=8)], PROVIDERS, DIRECTIONS)
    atoms = {"quick": (1536,), "full": (192, 1536, 5184)}[size]
    cases = [RadialCase(name, n) for name in ("medium", "large") for n in atoms]
    chosen = [("e3nn", ("fp32",)), ("mace_triton", ("fp32", "bf16"))] if size == "quick" else PROVIDERS
    return measure.specs(cases, chosen, DIRECTIONS)


def test_radial_mlp(spec, bench_row):
    bench_row(spec)
