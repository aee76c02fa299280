"""Rows of results: the environment they were taken in, ratios between providers of one run, and the JSON files."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

from mace_triton.study.store import revision

RESULTS = Path(__file__).with_name("results")
OURS = "mace_triton"
PACKAGES = {
    "torch": ("torch",),
    "triton": ("triton",),
    "mace": ("mace-torch",),
    "e3nn": ("e3nn",),
    "cueq": ("cuequivariance-torch",),
    "cueq_ops": ("cuequivariance-ops-torch-cu13", "cuequivariance-ops-torch-cu12"),
    "oeq": ("openequivariance",),
}

Row = dict[str, object]


def _version(distributions: tuple[str, ...]) -> str:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed as a package"


def _output(command: list[str]) -> str:
    """What a command prints, or an empty string when it cannot run here."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def command(argv: list[str]) -> str:
    """What one types in the checkout to repeat this run, without the place its results go to."""
    script, arguments = Path(argv[0]), argv[1:]
    module = script.parent.name if script.stem == "__main__" else f"{script.parent.name}.{script.stem}"
    words = ["python", "-m", module] if script.suffix == ".py" else [script.name]
    for place in ("--out", "--bench-results"):
        if place in arguments[:-1]:
            i = arguments.index(place)
            arguments = arguments[:i] + arguments[i + 2 :]
    return shlex.join([*words, *(word for word in arguments if not word.startswith(("--out=", "--bench-results=")))])


def environment(device: torch.device) -> Row:
    """Card, driver, versions, revision, date and command of this run."""
    on_gpu = device.type == "cuda"
    driver = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).splitlines()
    return {
        "card": torch.cuda.get_device_name(device) if on_gpu else f"CPU {platform.machine()}",
        "driver": driver[0] if on_gpu and driver else None,
        "python": platform.python_version(),
        "versions": {name: _version(distributions) for name, distributions in PACKAGES.items()},
        "revision": revision(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command(sys.argv),
        "processors": os.cpu_count(),
        "load_average": load_average(),
    }


def load_average() -> float:
    """Processes that want a processor, a mean over a minute: far more than one and the host's times are not ours."""
    return round(os.getloadavg()[0], 1)


def same_work(row: Row) -> tuple:
    """Rows with equal keys did the same work on the same input."""
    return tuple(row[key] for key in ("block", "case", "atoms", "channels", "direction"))


def add_ratios(rows: list[Row]) -> None:
    """Write into each of our rows how many times slower each peer was on the same work in this run.

    The peer's row is its FP64 one beside our FP64 and its FP32 one beside everything else: a peer offers no lower
    precision, so that is what a user would run instead.
    """
    timed = [row for row in rows if row["status"] == "ok" and "gpu_ms" in row]
    for ours in (row for row in timed if row["provider"] == OURS):
        precision = "fp64" if ours["precision"] == "fp64" else "fp32"
        ours["ratio"] = {
            str(row["provider"]): round(float(row["gpu_ms"]) / float(ours["gpu_ms"]), 3)
            for row in timed
            if row["provider"] != OURS and row["precision"] == precision and same_work(row) == same_work(ours)
        }


class Recorder:
    """Collects rows and writes the file anew after each, so that a run that is cut short keeps what it measured."""

    def __init__(self, path: Path, header: Row):
        self.path, self.header, self.rows = path, header, []

    def add(self, row: Row) -> Row:
        self.rows.append(row)
        add_ratios(self.rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({"environment": self.header, "rows": self.rows}, indent=1) + "\n")
        return row


def results_file(header: Row, folder: Path = RESULTS) -> Path:
    """A name per card and moment: nvidia-h200-20250101-120000.json."""
    card = "-".join(str(header["card"]).lower().split())
    stamp = str(header["date"])[:19].replace("-", "").replace(":", "").replace("T", "-")
    return folder / f"{card}-{stamp}.json"
