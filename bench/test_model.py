"""Whole models on water: energy and forces, and a training step (loss on energy and forces)."""

from __future__ import annotations

from . import measure
from .models import DIRECTIONS, ModelCase

QUICK = [("e3nn", ("fp32",)), ("cueq", ("fp32",)), ("oeq", ("fp32",)), ("mace_triton", ("fp32", "bf16"))]
ALL = [
    ("e3nn", ("fp64", "fp32")),
    ("cueq", ("fp64", "fp32", "tf32")),
    ("oeq", ("fp64", "fp32")),
    ("mace_triton", ("fp64", "fp32", "tf32", "bf16", "fp16")),
]


def specs(size: str) -> list[measure.Spec]:
    if size == "tiny":
        cases = [ModelCase("small", 24, channels=4, elements=(1, 8))]
        return measure.specs(cases, [(name, ("fp32",)) for name, _ in ALL], DIRECTIONS)
    names = {"quick": ("medium", "large"), "full": ("small", "medium", "large")}[size]
    inference = [ModelCase(name, n) for name in names for n in {"quick": (1536,), "full": (192, 1536, 5184)}[size]]
    training = [ModelCase(name, n) for name in names for n in {"quick": (192,), "full": (192, 1536)}[size]]
    chosen = QUICK if size == "quick" else ALL
    return measure.specs(inference, chosen, DIRECTIONS[:1]) + measure.specs(training, chosen, DIRECTIONS[1:])


def test_model(spec, bench_row):
    bench_row(spec)
