"""linear_up (hidden to hidden) and linear (the slots of conv_tp to the target) of mp-small, -medium and -large."""

from __future__ import annotations

from . import measure
from .blocks import DIRECTIONS, LinearCase

QUICK = [("e3nn", ("fp32",)), ("cueq", ("fp32",)), ("oeq", ("fp32",)), ("mace_triton", ("fp32", "bf16"))]
ALL = [
    ("e3nn", ("fp64", "fp32", "tf32")),
    ("cueq", ("fp64", "fp32", "tf32")),
    ("oeq", ("fp32",)),
    ("mace_triton", ("fp64", "fp32", "tf32", "bf16", "fp16")),
]


def specs(size: str) -> list[measure.Spec]:
    if size == "tiny":
        return measure.specs([LinearCase("up-large", 24, 8), LinearCase("mid-medium", 24, 8)], ALL, DIRECTIONS)
    if size == "quick":
        cases = [LinearCase("up-large", n) for n in (1536, 5184, 41472)] + [LinearCase("mid-large", 1536)]
        return measure.specs(cases, QUICK, DIRECTIONS)
    sizes = {"up": (192, 1536, 5184, 41472), "mid": (192, 1536, 5184)}
    cases = [LinearCase(f"{k}-{name}", n) for k, ns in sizes.items() for name in ("medium", "large") for n in ns]
    inside = [("mace_triton", ("fp32", "bf16"))]
    # The layouts these linears have inside an accelerated model.
    up, mid = ([c for c in cases if c.name.startswith(k)] for k in ("up", "mid"))
    return (
        measure.specs(cases, ALL, DIRECTIONS)
        + measure.specs(up, inside, DIRECTIONS, "mul_ir->ir_mul")
        + measure.specs(mid, inside, DIRECTIONS, "ir_mul->mul_ir")
    )


def test_linear(spec, bench_row):
    bench_row(spec)
