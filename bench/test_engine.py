"""A step of molecular dynamics on water: our faces on the engine, MACE's on e3nn and cuEquivariance."""

from __future__ import annotations

from . import measure
from .md_step import DIRECTIONS, StepCase

PROVIDERS = [("e3nn", ("fp32",)), ("cueq", ("fp32",)), ("mace_triton", ("fp32", "bf16"))]


def specs(size: str) -> list[measure.Spec]:
    if size == "tiny":
        return measure.specs([StepCase("small", 24, channels=4, elements=(1, 8))], PROVIDERS, DIRECTIONS)
    sizes = {"quick": (192, 1536), "full": (24, 192, 648, 1536, 5184, 13824)}[size]
    names = {"quick": ("medium",), "full": ("small", "medium", "large")}[size]
    return [
        spec
        for name in names
        for provider in PROVIDERS
        for spec in measure.specs([StepCase(name, n) for n in sizes], [provider], DIRECTIONS)
    ]


def test_engine(spec, bench_row):
    bench_row(spec)
