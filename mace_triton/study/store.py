"""What all studies share: where they ran, how sure a number is, and the JSON files that the report is made of."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from ..cli import version_of

FOLDER = Path("docs") / "studies"
"""Where results are kept in a checkout."""
PACKAGES = ("torch", "triton", "mace-torch", "e3nn", "ase")
DRAWS, LEVEL = 2000, 0.95
"""Of the bootstrap."""

Row = dict[str, object]


def environment(device: torch.device) -> Row:
    """Card, versions, revision, date and command of this run."""
    return {
        "card": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in PACKAGES},
        "revision": revision(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command(sys.argv[1:]),
    }


def command(arguments: list[str]) -> str:
    """What one types to repeat a run, without the place its results go to; files by their names alone."""
    pairs = zip([None, *arguments], arguments, strict=False)
    kept = [word for last, word in pairs if "--out" not in (last, word)]
    return shlex.join(["mace-triton", *(Path(word).name if "/" in word else word for word in kept)])


def revision() -> str:
    """The git revision of this checkout; MACE_TRITON_REVISION stands in where there is no .git folder."""
    given = os.environ.get("MACE_TRITON_REVISION")
    if given:
        return given
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def save(study: str, folder: Path, device: torch.device, **parts: object) -> Path:
    """Write FOLDER/STUDY.json, whole or not at all, and say where it is."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{study}.json"
    document = {"study": study, "environment": environment(device), **parts}
    write_whole(path, json.dumps(document, indent=1, default=float) + "\n")
    return path


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    scratch = path.with_suffix(".tmp")
    scratch.write_text(text)
    os.replace(scratch, path)


def earlier(path: Path, about: Row) -> list[Row]:
    """Rows of a study's results whose head is `about`; none where there are no such results."""
    found = json.loads(path.read_text()) if path.is_file() else {}
    return found["rows"] if found and all(found.get(key) == value for key, value in about.items()) else []


def load(folder: Path) -> dict[str, dict]:
    """The results in a folder, by study. Raises ValueError naming a file that is none."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            document = json.loads(path.read_text())
            found[document["study"]] = document
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"studies: {path} is no study's result ({error!r}); remove it or run it anew") from error
    return found


def interval(
    values: np.ndarray, of: Callable[[np.ndarray], np.ndarray], seed: int = 0
) -> tuple[float, float | None, float | None]:
    """(statistic, lower and upper end of its 95 % interval) of independent values, by the percentile bootstrap.

    of: maps [..., n] to [...]: values along the last axis to the statistic. One value has no interval: None. Efron and
    Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(of(values)), None, None
    drawn = np.random.default_rng(seed).integers(0, len(values), (DRAWS, len(values)))
    ends = np.quantile(of(values[drawn]), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(of(values)), float(ends[0]), float(ends[1])


def mean_interval(values: np.ndarray) -> tuple[float, float | None, float | None]:
    """(mean, lower and upper end of its 95 % interval) of a few independent values, by Student's t; see `interval`."""
    values = np.asarray(values, dtype=float)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, None, None
    half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return mean, mean - float(half), mean + float(half)


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """In the Frobenius norm, in FP64, where `exact` lies; NaN where anything is NaN."""
    exact = exact.to(torch.float64)
    difference = got.detach().to(exact.device, torch.float64) - exact
    return float(difference.norm() / exact.norm().clamp_min(1e-300))


def root_mean_square(values: np.ndarray) -> np.ndarray:
    """Of values along the last axis."""
    return np.sqrt(np.mean(np.square(values), axis=-1))
