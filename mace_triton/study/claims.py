"""What the thesis this grew from (arXiv 2510.23621) claims, what our studies measured of it, and what follows.

A claim that no study has measured says so; a verdict is worked out from results, never written down.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .store import Row, mean_interval

STILL = 1e-4
"""eV/angstrom: forces up to which a perfect crystal counts as free of them."""
FACTOR = 4.0
"""The speed-up that the thesis claims of 16-bit linears."""
HURT = 0.05
"""Part of FP32's force error: a mode whose error is surely higher by more hurts, one surely not does not."""
OPEN = ("not measured yet", "open")

Line = tuple[str, str, str]


def verdicts(studies: dict[str, dict]) -> Iterator[Line]:
    """(claim, what was measured, verdict)."""
    yield ("cuEquivariance is 3 times faster than e3nn", *OPEN)
    yield ("BF16 or FP16 linears make a step 4 times faster still", *_faster(studies.get("precision")))
    yield ("observables of MD stay within run-to-run variability under low precision", *_dynamics(studies.get("md")))
    yield ("weights stored in half precision hurt training", *_weights(studies.get("training")))
    yield ("low precision leaves forces in a perfect crystal", *_crystals(studies.get("precision")))


def _faster(study: Row | None) -> tuple[str, str]:
    if study is None:
        return OPEN
    atoms = max(row["atoms"] for row in study["times"])
    found = {row["policy"]: row for row in study["times"] if row["atoms"] == atoms}
    said, most = [], 0.0
    for policy in ("linear bf16", "linear fp16", "bf16", "fp16"):
        if policy in found:
            (least, high), (low, top) = found["fp32"]["ms_ends"], found[policy]["ms_ends"]
            ratio = found["fp32"]["ms"] / found[policy]["ms"]
            said.append(f"{policy} {ratio:.2f} [{least / top:.2f}, {high / low:.2f}]")
            most = max(most, high / low)
    text = f"fp32's time over it, engine, {atoms} atoms (ends: slowest and fastest repeats): {', '.join(said)}"
    return text, "not confirmed" if most < FACTOR else "confirmed"


def above_fp32(rows: list[Row], mode: str) -> tuple[float, float | None, float | None]:
    """By which part a mode's force error is above FP32's: mean and 95 % interval over the seeds that both have.

    Raises LookupError where there is no such seed.
    """
    found = {(row["mode"], row["seed"]): row["force_rmse"] for row in rows if row["status"] == "ok"}
    seeds = [seed for name, seed in found if name == mode and ("fp32", seed) in found]
    if not seeds:
        raise LookupError(f"no seed of {mode!r} and of FP32")
    return mean_interval(np.array([found[mode, seed] / found["fp32", seed] - 1 for seed in seeds]))


def _weights(study: Row | None) -> tuple[str, str]:
    if study is None:
        return OPEN
    said, verdict = [], {}
    for mode in ("bf16 weights", "fp16 weights", "bf16 weights, stochastic rounding", "bf16 weights, fp32 masters"):
        try:
            mean, low, high = above_fp32(study["rows"], mode)
        except LookupError:
            return OPEN
        if low is None:
            return OPEN
        said.append(f"{mode} {100 * mean:+.1f} % [{100 * low:+.1f}, {100 * high:+.1f}]")
        verdict[mode] = "yes" if low > HURT else "no" if high < HURT else "undecided"
    seeds = len({row["seed"] for row in study["rows"]})
    text = f"force error above that with FP32 weights, {seeds} seeds: {'; '.join(said)}"
    return text, "; ".join(f"{mode}: {word}" for mode, word in verdict.items())


def _dynamics(study: Row | None) -> tuple[str, str]:
    """Equivalence with FP64 within the margins, and differences that the replicas show."""
    if study is None or not study["comparisons"] or study["comparisons"][0]["p"] is None:
        return OPEN
    said, verdict = [], []
    for policy in dict.fromkeys(row["policy"] for row in study["comparisons"] if row["policy"] not in ("fp64", "fp32")):
        rows = [row for row in study["comparisons"] if row["policy"] == policy]
        equal = [row for row in rows if row["verdict"] == "equivalent"]
        apart = [f"{row['observable']} ({row['ensemble']})" for row in rows if row["verdict"] == "different"]
        said.append(f"{policy} equivalent to FP64 in {len(equal)} of {len(rows)}")
        shown = (
            f"different in {', '.join(apart)}" if apart else "no" if len(equal) == len(rows) else "undecided in some"
        )
        verdict.append(f"{policy}: " + ("confirmed" if shown == "no" else shown))
    return "; ".join(said), "; ".join(verdict)


def _crystals(study: Row | None) -> tuple[str, str]:
    rows = [row for row in study["rows"] if row["still"]] if study else []
    if not rows:
        return OPEN
    largest: dict[str, float] = {}
    for row in rows:
        largest[row["policy"]] = max(largest.get(row["policy"], 0.0), row["largest_force"])
    over = [policy for policy, force in largest.items() if force > STILL]
    shown = [name for name in ("fp64", "e3nn fp32", "fp32", "tf32", "bf16", "fp16", "all bf16") if name in largest]
    crystals = len({row["sample"] for row in rows})
    text = f"largest force of {crystals} crystals, eV/angstrom: "
    text += ", ".join(f"{name} {largest[name]:.0e}" for name in shown)
    return text, f"confirmed for {', '.join(over)}" if over else f"not confirmed: all below {STILL:g}"
