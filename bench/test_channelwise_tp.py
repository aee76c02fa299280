"""conv_tp with its gather and scatter: layer 2 of mp-small, -medium and -large ("small" is layer 1 of all three)."""

from __future__ import annotations

from . import measure
from .blocks import DIRECTIONS, ConvCase

PEERS = [("e3nn", ("fp32",)), ("cueq", ("fp32",)), ("oeq", ("fp32",))]
OURS = [("mace_triton", ("fp32", "bf16"))]
ALL = [
    ("e3nn", ("fp64", "fp32")),
    ("cueq", ("fp64", "fp32", "bf16")),
    ("oeq", ("fp64", "fp32")),
    ("mace_triton", ("fp64", "fp32", "bf16", "fp16")),
]


def specs(size: str) -> list[measure.Spec]:
    if size == "tiny":
        cases = [ConvCase("small", 24, channels=8), ConvCase("medium", 24, channels=8)]
        return measure.specs(cases, ALL, DIRECTIONS)
    atoms = {"quick": (1536,), "full": (192, 1536, 5184)}[size]
    cases = [ConvCase(name, n) for n in atoms for name in ("small", "medium", "large")]
    if size == "quick":
        return measure.specs(cases, PEERS + OURS, DIRECTIONS)
    deterministic = [("mace_triton", ("fp32",))]
    return measure.specs(cases, ALL, DIRECTIONS) + measure.specs(cases, deterministic, DIRECTIONS, "deterministic")


def test_channelwise_tp(spec, bench_row):
    bench_row(spec)
