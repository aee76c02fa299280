"""`mace-triton dev parity engine` and `dev sanitize`: steps of an engine, and all kernels under NVIDIA's sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mace  # noqa: F401  before e3nn, see mace_triton/__init__.py
import numpy as np
import torch
from e3nn import o3
from mace import modules
from mace.tools.torch_tools import default_dtype

from .calculator import MACETritonCalculator
from .certify import BUDGETS
from .dev_cases import HIDDEN
from .engine import Engine
from .ops import dispatch
from .water import water_box

WAYS = {"": (False, None), " in shares": (False, 1), " deterministic": (True, None)}
"""How a step is taken: (deterministic, bytes of memory that weights of edges may take)."""
OPTIONS = {"memcheck": ["--report-api-errors", "no"]}
"""Of tools: PyTorch asks the driver for what may fail, and parity itself tells where an error matters."""
SUMMARY = re.compile(r"SUMMARY: (\d+) (?:error|hazard)")
"""What each tool of compute-sanitizer says in the end."""


def random_model(
    shape: str, channels: int, elements: tuple[int, ...], r_max: float, seed: int = 0, max_ell: int = 3
) -> torch.nn.Module:
    """A ScaleShiftMACE in FP64 on the CPU with MACE-MP-0's hyperparameters and random weights.

    shape: "small", "medium", "large", or hidden irreps with {c} for the channels.
    """
    block = modules.RealAgnosticResidualInteractionBlock
    with default_dtype(torch.float64), torch.random.fork_rng():
        torch.manual_seed(seed)
        return modules.ScaleShiftMACE(
            r_max=r_max,
            num_bessel=10,
            num_polynomial_cutoff=5,
            max_ell=max_ell,
            interaction_cls=block,
            interaction_cls_first=block,
            num_interactions=2,
            num_elements=len(elements),
            hidden_irreps=o3.Irreps(HIDDEN.get(shape, shape).format(c=channels)),
            MLP_irreps=o3.Irreps("16x0e"),
            atomic_energies=np.linspace(-3.0, 2.0, len(elements)),
            avg_num_neighbors=10.0,  # root of the number of neighbours: random messages add up to features of order 1
            atomic_numbers=list(elements),
            correlation=3,
            gate=torch.nn.functional.silu,
            atomic_inter_scale=0.8,
            atomic_inter_shift=0.1,
        )


def compare(shape: str, dtype: str) -> list[tuple[str, float, float]]:
    """(result, error, allowed) of steps against e3nn in FP64; the budget is the certificate's.

    Its part that grows with forces here grows with energies, too: those of random weights have no usual size. Energies
    in meV an atom, forces (root mean square) in meV/angstrom. In Triton's interpreter all is small.
    """
    device, channels, r_max, count = ("cuda", 64, 5.0, 24) if torch.cuda.is_available() else ("cpu", 8, 1.7, 6)
    model, atoms, rows = random_model(shape, channels, (1, 8), r_max), water_box(2)[:count], []
    for way, (deterministic, memory) in WAYS.items():
        calculator = MACETritonCalculator(model, precision=dtype, device=device, deterministic=deterministic)
        calculator.engines = [Engine(calculator.models[0], atoms, memory=memory)]
        before = dispatch.calls.copy()
        found = calculator.certify(atoms)
        ran = dispatch.calls - before
        if any(which != "triton" for _, which in ran) or ("edge_filter", "triton") not in ran:
            raise RuntimeError(f"parity: the kernels did not run, but {dict(ran)}")
        if memory and calculator.engines[0].shares == 1:
            raise RuntimeError("parity: the weights were made all at once")
        scale = 1e3 * float(np.sqrt(np.mean(calculator.get_property("node_energy", atoms) ** 2)))
        rows.append((f"energy{way}", found.energy_error, found.energy_limit + BUDGETS[dtype].relative * scale))
        rows.append((f"forces{way}", found.force_rmse, found.force_limit))
    return rows


def child(*arguments: str, **more: str) -> tuple[list[str], dict[str, str]]:
    """`mace-triton dev ...` for another process, and an environment, `more` in it, that lets it find this package."""
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    return [sys.executable, "-m", "mace_triton.cli", "dev", *arguments], {**os.environ, "PYTHONPATH": path, **more}


def sanitize(jobs: list[list[str]], tool: str, workers: int) -> Iterator[tuple[bool, str]]:
    """(clean, what was reported) of each `mace-triton dev ...` under a tool of compute-sanitizer, several at a time.

    They come in the order of the jobs, each as soon as it has ended.

    Raises RuntimeError where compute-sanitizer, a part of the CUDA toolkit, is not installed.
    """
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise RuntimeError("dev sanitize: compute-sanitizer is not on the PATH; it comes with NVIDIA's CUDA toolkit")
    # Memory that PyTorch keeps for later use would hide what is read behind the end of a tensor.
    more = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
    under = [program, "--tool", tool, *OPTIONS.get(tool, [])]

    def run(words: list[str]) -> tuple[bool, str]:
        command, env = child(*words, **more)
        done = subprocess.run([*under, *command], env=env, capture_output=True, text=True)
        return verdict(done.stdout + done.stderr, done.returncode)

    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(run, jobs)


def verdict(output: str, code: int) -> tuple[bool, str]:
    """Whether a run under compute-sanitizer ended well and without a report, and the first lines of what it says."""
    counts = [int(count) for count in SUMMARY.findall(output)]
    if code == 0 and counts and not any(counts):
        return True, ""
    lines = [line.removeprefix("=========").strip() for line in output.splitlines() if line.strip("= ")]
    told = [line for line in lines if re.search("error|hazard|race|invalid|WRONG", line, re.IGNORECASE)] or lines[-3:]
    return False, " / ".join(told[:4])[:300] or f"exit code {code} without a word"
