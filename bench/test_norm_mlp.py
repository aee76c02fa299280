"""MACE's RadialMLP in front of conv_tp: inference and training."""

from __future__ import annotations

from . import measure
from .radial_block import DIRECTIONS, NormCase
from .test_radial_mlp import PROVIDERS


def specs(size: str) -> list[measure.Spec]:
    if size == "tiny":
        return measure.specs([NormCase("small", 24, channels=8)], PROVIDERS, DIRECTIONS)
    atoms = {"quick": (1536,), "full": (192, 1536, 5184)}[size]
    chosen = [("e3nn", ("fp32",)), ("mace_triton", ("fp32", "bf16"))] if size == "quick" else PROVIDERS
    return measure.specs([NormCase("medium", n) for n in atoms], chosen, DIRECTIONS)


def test_norm_mlp(spec, bench_row):
    bench_row(spec)
