"""What the thesis this grew from (arXiv 2510.23621) claims, what our studies measured of it, and what follows.

A claim that no study has measured says so; a verdict is worked out from results, never written down.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .dynamics import comparisons
from .store import Row, mean_interval

STILL = 1e-4
"""eV/angstrom: forces up to which a perfect crystal counts as free of them."""
FACTOR = 4.0
"""The speed-up that the thesis claims of 16-bit linears."""
CUEQ_FACTOR = 3.0
"""And of cuEquivariance."""
HURT = 0.05
"""Part of FP32's force error: a mode whose error is surely higher by more hurts, one surely not does not."""
PAYS = 1.05
"""Times faster than with FP32 sums, dense: less is not worth an error."""
OPEN = ("not measured yet", "open")

Line = tuple[str, str, str]


def verdicts(studies: dict[str, dict]) -> Iterator[Line]:
    """(claim, what was measured, verdict)."""
    yield ("cuEquivariance is 3 times faster than e3nn", *_backends(studies.get("profile")))
    sixteen = "BF16 or FP16 linears make a step 4 times faster still"
    yield (f"{sixteen}: on this engine", *_faster(studies.get("precision")))
    yield (f"{sixteen}: on cuEquivariance", *_cast(studies.get("profile")))
    yield ("observables of MD stay within run-to-run variability under low precision", *_dynamics(studies.get("md")))
    yield ("weights stored in half precision hurt training", *_weights(studies.get("training")))
    yield ("low precision leaves forces in a perfect crystal", *_crystals(studies.get("precision")))
    found = studies.get("accumulation")
    yield ("16-bit accumulators would make it faster still", *_accumulators(found))
    yield ("2:4 sparse linears would make it faster still", *_sparse(found))


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


def ratios(study: Row, one: tuple[str, str], other: tuple[str, str]) -> dict[tuple[int, int], tuple[float, ...]]:
    """(l, atoms) -> one's wall time over the other's, with the ends that the slowest and fastest
    repeats give, and the ratio of GPU times."""
    found = {}
    for row in study["wholes"]:
        if row["status"] == "ok":
            found[row["backend"], row["precision"], row["l"], row["atoms"]] = row
    both = {}
    for (backend, precision, level, atoms), row in found.items():
        partner = found.get((*other, level, atoms))
        if (backend, precision) == one and partner:
            (low, high), (least, most) = row["ends"], partner["ends"]
            gpu = row["gpu"] / partner["gpu"] if row["gpu"] and partner["gpu"] else float("nan")
            both[level, atoms] = row["wall"] / partner["wall"], low / most, high / least, gpu
    return both


def _factors(
    head: str, study: Row | None, one: tuple[str, str], other: tuple[str, str], wanted: float
) -> tuple[str, str]:
    """How often one takes the other's time, by l and size, behind a head; and where that comes to what is wanted."""
    found = ratios(study, one, other) if study else {}
    if not found:
        return OPEN
    said = [
        f"l = {level}, {atoms} atoms: {mean:.2f} [{low:.2f}, {high:.2f}] ({gpu:.2f})"
        for (level, atoms), (mean, low, high, gpu) in found.items()
    ]
    there = [f"l = {level}, {atoms} atoms" for (level, atoms), (_, _, high, _) in found.items() if high >= wanted]
    where = f"confirmed for {'; '.join(there)}" if there else "not confirmed"
    return head + "; ".join(said), "confirmed" if len(there) == len(found) else where


def _backends(study: Row | None) -> tuple[str, str]:
    head = "e3nn's wall time over cuEq's, both FP32 (and GPU time): "
    return _factors(head, study, ("e3nn", "fp32"), ("cueq", "fp32"), CUEQ_FACTOR)


def _cast(study: Row | None) -> tuple[str, str]:
    said, verdict = [], []
    for word in ("bf16", "fp16"):
        text, found = _factors(f"{word}: ", study, ("cueq", "fp32"), ("cueq", f"{word} linears"), FACTOR)
        if (text, found) == OPEN:
            return OPEN
        said.append(text)
        verdict.append(f"{word}: {found}")
    text = f"cuEq's FP32 wall time over that with its linears cast (and GPU time): {'; '.join(said)}"
    return text, "not confirmed" if all("not" in word for word in verdict) else "; ".join(verdict)


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
    found = list(comparisons(study["rows"])) if study else []
    if not any(row["p"] is not None for row in found):
        return OPEN
    said, verdict = [], []
    for policy in dict.fromkeys(row["policy"] for row in found if row["policy"] != "fp64"):
        rows = [row for row in found if row["policy"] == policy]
        equal = [row for row in rows if row["verdict"] == "equivalent"]
        apart = [f"{row['observable']} ({row['ensemble']})" for row in rows if row["verdict"] == "different"]
        unsure = [f"{row['observable']} ({row['ensemble']})" for row in rows if row["verdict"] == "undecided"]
        said.append(f"{policy} equivalent to FP64 in {len(equal)} of {len(rows)}")
        shown = f"undecided in {', '.join(unsure)}" if unsure else "confirmed"
        verdict.append(f"{policy}: " + (f"different in {', '.join(apart)}" if apart else shown))
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


def gains(study: Row, variant: str, beside: str) -> dict[str, tuple[float, float, float]]:
    """shape and operands -> (beside's time over the variant's, errors of both) where both were timed."""
    rows = {(row["shape"], row["operands"], row["variant"]): row for row in study["rows"] if row["ms"]}
    found = {}
    for (shape, operands, name), row in rows.items():
        other = rows.get((shape, operands, beside))
        if name == variant.format(operands) and other:
            found[f"{shape}, {operands}"] = other["ms"] / row["ms"], row["error"], other["error"]
    return found


def _accumulators(study: Row | None) -> tuple[str, str]:
    found: dict[str, tuple[float, float, float]] = {}
    for more in ("", ", two channels a lane") if study else ():
        faster = gains(study, f"this package's, {{}} sums{more}", "this package's, fp32 sums")
        found |= {f"{name}{more}": numbers for name, numbers in faster.items()}
    return _gained(found, "FP32 sums' time over 16-bit sums' (and their errors)")


def _sparse(study: Row | None) -> tuple[str, str]:
    found = gains(study, "PyTorch's, 2:4 sparse", "PyTorch's, fp32 sums") if study else {}
    text, verdict = _gained(found, "dense products' time over sparse ones' (and errors by pruning random weights)")
    trained = [row for row in (study or {}).get("trained", []) if row["status"] == "ok"]
    if verdict == "open" or not trained:
        return text, verdict
    force = {
        mode: np.array([r["force_rmse"] for r in trained if r["mode"] == mode]) for mode in ("fp32", "2:4 linears")
    }
    means = ", ".join(f"{mode} {values.mean():.1f}" for mode, values in force.items() if len(values))
    pruned = study["pruned"]["force_rmse"][0]
    return f"{text}; a trained model pruned: {pruned:.0f} meV/angstrom; pruned and trained on: {means}", verdict


def _gained(found: dict[str, tuple[float, float, float]], head: str) -> tuple[str, str]:
    if not found:
        return OPEN
    said = [f"{name}: {gain:.2f} ({error:.1g}, {other:.1g})" for name, (gain, error, other) in found.items()]
    paying = [name for name, (gain, _, _) in found.items() if gain >= PAYS]
    where = f"faster for {'; '.join(paying)}" if paying else "not confirmed"
    return f"{head}: {'; '.join(said)}", where
