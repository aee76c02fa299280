"""How long the first use of a model takes: `python -m bench.first_use` in a fresh process prints one line of JSON.

The clock runs from the conversion to the end of the first energy and forces of the model; of an engine (`--what
engine`); or of the first step of ASE's Langevin dynamics (`--what ase`). Imports, the device's context and the making
of the e3nn model lie before it: any provider pays for them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from . import blocks, md_step, models, providers, timing
from .rows import Row


def first_use(name: str, atoms: int, provider: str, precision: str, channels: int, device: torch.device) -> Row:
    """Seconds for the conversion, the first and the second call; `seconds` is the first two together."""
    if provider == "mace_triton":
        import mace_triton.convert  # noqa: F401  an import, not a first use
    plain = providers.model_e3nn(models.mp_model(name, channels), "fp64", device)
    data = models.batch(atoms, models.ELEMENTS, providers.model_dtype(precision), device)
    torch.zeros(1, device=device)
    timing.synchronize(device)
    marks = [time.perf_counter()]
    model = providers.builder("model", provider)(plain, precision, device)
    model.requires_grad_(False)
    timing.synchronize(device)
    marks.append(time.perf_counter())
    for _ in range(2):
        models.energy_forces(model, data)
        timing.synchronize(device)
        marks.append(time.perf_counter())
    return _between(marks)


def first_step(name: str, atoms: int, provider: str, precision: str, channels: int, device: torch.device) -> Row:
    """The same for an engine, which only we have; the first call makes it and takes its first step."""
    from mace_triton import Engine, accelerate

    if provider != "mace_triton":
        raise ValueError(f"provider {provider!r} has no engine")
    water = md_step.StepCase(name, atoms).structure()
    plain = models.mp_model(name, channels).to(device)
    timing.synchronize(device)
    marks = [time.perf_counter()]
    fast = accelerate(plain, precision)
    marks.append(time.perf_counter())
    engine = Engine(fast, water)
    engine.step()
    marks.append(time.perf_counter())
    engine.step(water.positions + 0.01)
    marks.append(time.perf_counter())
    return _between(marks)


def first_ase_step(name: str, atoms: int, provider: str, precision: str, channels: int, device: torch.device) -> Row:
    """The same for ASE's Langevin dynamics with a provider's calculator; the first call is the first whole step."""
    import mace_triton  # noqa: F401  an import, not a first use

    water = md_step.StepCase(name, atoms).structure()
    models.mp_model(name, channels, models.ELEMENTS)
    torch.zeros(1, device=device)
    marks = [time.perf_counter()]
    water.calc = md_step.calculator(name, channels, models.ELEMENTS, provider, precision, device)
    timing.synchronize(device)
    marks.append(time.perf_counter())
    dynamics = md_step.langevin(water, np.random.default_rng(0))
    for _ in range(2):
        dynamics.run(1)
        marks.append(time.perf_counter())
    return _between(marks)


def _between(marks: list[float]) -> Row:
    """Seconds of conversion, first and second call, from the four times between which they lie."""
    convert, first, second = (b - a for a, b in itertools.pairwise(marks))
    return {"convert_s": convert, "first_call_s": first, "second_call_s": second, "seconds": convert + first}


WHAT = {
    "model": ("first use", first_use),
    "engine": ("first step", first_step),
    "ase": ("first Langevin step", first_ase_step),
}
"""What is asked for -> its name in the results, and the function."""


def in_fresh_process(cache: Path, name: str, atoms: int, provider: str, precision: str = "fp32", **options) -> Row:
    """Run one of `WHAT` (what="model") in a new process whose Triton cache is the folder `cache`.

    Raises RuntimeError with the end of its error output when it fails.
    """
    words = {"model": name, "atoms": atoms, "provider": provider, "precision": precision, **options}
    command = [sys.executable, "-m", "bench.first_use", *(f"--{key}={value}" for key, value in words.items())]
    env = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=Path(__file__).parents[1], timeout=180)
    if done.returncode != 0:
        raise RuntimeError(" / ".join(done.stderr.strip().splitlines()[-3:])[-300:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="medium", choices=sorted(blocks.HIDDEN))
    parser.add_argument("--atoms", type=int, default=192)
    parser.add_argument("--provider", default="mace_triton", choices=providers.NAMES)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--what", default="model", choices=sorted(WHAT))
    a = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps(WHAT[a.what][1](a.model, a.atoms, a.provider, a.precision, a.channels, device)))


if __name__ == "__main__":
    main()
