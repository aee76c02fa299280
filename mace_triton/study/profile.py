"""`mace-triton study profile`: where the time of energy and forces goes, by backend, precision and block.

Models have MACE-MP's hyperparameters and random weights; their features and harmonics go up to l = 1, 2 or 3. Backends:
e3nn, cuEquivariance, OpenEquivariance and this package's modules, each called as a model of MACE with the parameters
frozen, as for dynamics; and this package's engine, whose step searches neighbours and makes the stress, too. "bf16
linears" and "fp16 linears" are cuEquivariance's FP32 model with its linears cast, the policy of arXiv 2510.23621. A
model is timed only if its forces are those of e3nn in FP64.

Wall: a call among others like it, the device waited for at the end. Host: until Python has queued a call. GPU: the sum
of the kernels of a call, by PyTorch's profiler. Blocks run alone, on what they got inside the model: those of the
second interaction and of the product before it, where features of all l are there. e3nn's conv_tp is timed with the
gather and the sum over edges that others fuse.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mace  # noqa: F401  before e3nn, see mace_triton/__init__.py
import numpy as np
import torch
from mace.tools.scatter import scatter_sum
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ..certify import batch_of
from ..dev_engine import random_model
from ..doctor import gpu_time
from ..engine import Engine
from ..precision import PRESETS
from ..water import water_box
from . import backends
from .precision import milliseconds, wait_for
from .store import Row, relative_error, save

ELEMENTS = (1, 8)
ENGINE = "engine"
OFFERED = {
    "e3nn": ("fp64", "fp32"),
    "cueq": ("fp64", "fp32", "tf32", "bf16 linears", "fp16 linears"),
    "oeq": ("fp32",),
    "mace_triton": ("fp64", "fp32", "bf16"),
    ENGINE: tuple(PRESETS),
}
"""What is measured of each."""
TOLERANCE = {"fp64": 1e-9, "fp32": 1e-4, "tf32": 1e-2, "fp16": 1e-2, "bf16": 1e-1}
"""Relative error allowed of forces, whose sums cancel, by the precision's first word."""
BLOCKS = {
    "linear_up": "interactions.1.linear_up",
    "radial MLP": "interactions.1.conv_tp_weights",
    "conv_tp": "interactions.1.conv_tp",
    "linear": "interactions.1.linear",
    "skip_tp": "interactions.1.skip_tp",
    "symmetric contraction": "products.0.symmetric_contractions",
    "product's linear": "products.0.linear",
}
SPENT = 0.15
"""Seconds that one repeat of a timing should take, up to 20 calls."""


@dataclass(frozen=True)
class Size:
    """Levels l, molecules along the edges of the boxes, channels, cutoff in angstrom."""

    levels: tuple[int, ...] = (1, 2, 3)
    sides: tuple[int, ...] = (4, 8)
    channels: int = 128
    r_max: float = 5.0

    def model(self, level: int) -> torch.nn.Module:
        """In FP64 on the CPU."""
        hidden = "+".join(f"{{c}}x{n}{'eo'[n % 2]}" for n in range(level + 1))
        return random_model(hidden, self.channels, ELEMENTS, self.r_max, max_ell=level).eval()


QUICK = Size((1, 2), (2,), 8, 3.0)


class Cast(torch.nn.Module):
    """A linear in 16 bits inside a model in FP32."""

    def __init__(self, linear: torch.nn.Module, dtype: torch.dtype):
        super().__init__()
        self.linear, self.dtype = linear.to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.to(self.dtype)).to(x.dtype)


def with_cast_linears(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """cuEquivariance's model with its equivariant linears in 16 bits, readouts aside, in place."""
    names = [
        name
        for name, module in model.named_modules()
        if type(module).__module__.startswith("cuequivariance_torch")
        and type(module).__name__ == "Linear"
        and not name.startswith("readouts")
    ]
    for name in names:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, Cast(model.get_submodule(name), dtype))
    if not names:
        raise RuntimeError("there is no linear of cuEquivariance to cast")
    return model


BUILD = backends.MODELS | {ENGINE: backends.model_mace_triton}


def built(backend: str, precision: str, model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """A copy of the model, parameters frozen. Raises backends.MissingProviderError where a peer is not installed."""
    dtype = {"bf16 linears": torch.bfloat16, "fp16 linears": torch.float16}.get(precision)
    found = BUILD[backend](model, "fp32" if dtype else precision, device)
    if dtype:
        found = with_cast_linears(found, dtype)
    return found.requires_grad_(False)


@dataclass(frozen=True)
class Subject:
    """What is called and timed: energy and forces [N, 3] of one structure; blocks, of backends that have them."""

    call: Callable[[], Tensor]
    model: torch.nn.Module
    edge_index: Tensor | None = None

    @staticmethod
    def of(backend: str, precision: str, model: torch.nn.Module, side: int) -> Subject:
        atoms, first = water_box(side), next(model.parameters())
        if backend == ENGINE:
            engine = Engine(model, atoms)
            engine.step()
            return Subject(lambda: engine.step().forces, model)
        data = batch_of(model, atoms, None, backends.model_dtype(precision)).to(first.device).to_dict()

        def call() -> Tensor:
            with backends.matmul_precision(precision):
                return model(dict(data), training=False, compute_force=True)["forces"].detach()

        return Subject(call, model, data["edge_index"])


def on_gpu(call: Callable[[], object], calls: int) -> tuple[float | None, int | None]:
    """(ms of all kernels, their number) of one call; None on a CPU."""
    return gpu_time(call, calls) if torch.cuda.is_available() else (None, None)


def on_host(call: Callable[[], object], device: torch.device, calls: int = 7) -> float:
    """Median ms until Python has queued a call, the device idle before."""
    found = []
    for _ in range(calls):
        wait_for(device)
        began = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - began))
    wait_for(device)
    return float(np.median(found))


def timed(call: Callable[[], object], device: torch.device) -> Row:
    """ms on the wall with the least and most of its repeats, on the host and on the GPU, and the number of kernels."""
    for _ in range(3 if device.type == "cuda" else 1):  # TorchScript specialises in the second call
        call()
    once = max(on_host(lambda: (call(), wait_for(device)), device, 2), 1e-3)
    steps = int(np.clip(1e3 * SPENT / once, 1, 20)) if device.type == "cuda" else 1
    wall, *ends = milliseconds(call, device, steps)
    gpu, launches = on_gpu(call, min(steps, 5))
    return {"wall": wall, "ends": ends, "host": on_host(call, device), "gpu": gpu, "launches": launches}


def recorded(subject: Subject) -> dict[str, Callable[[], tuple[Tensor, list[Tensor]]]]:
    """For each block a function that runs it on what it got inside the model: (output, inputs that want gradients)."""
    inputs: dict[str, tuple] = {}
    names = {name: block for block, name in BLOCKS.items()}

    def keep(block: str) -> Callable:
        def hook(module, given):
            copies = (t.detach().clone().requires_grad_(t.requires_grad) if torch.is_tensor(t) else t for t in given)
            inputs[block] = module, tuple(copies)

        return hook

    modules = dict(subject.model.named_modules())
    found = [(block, modules[name]) for name, block in names.items() if name in modules]
    handles = [module.register_forward_pre_hook(keep(block)) for block, module in found]
    try:
        subject.call()
    finally:
        for handle in handles:
            handle.remove()
    return {block: _alone(module, given, inputs, subject) for block, (module, given) in inputs.items()}


def _alone(module, given: tuple, inputs: dict, subject: Subject) -> Callable[[], tuple[Tensor, list[Tensor]]]:
    """See `recorded`. A tensor product of edges alone gets the gather and the sum that MACE puts around it."""
    sender, receiver = subject.edge_index
    if module is inputs.get("conv_tp", (None,))[0] and len(given) == 3:
        up, x = inputs["linear_up"]
        nodes = up(*x).detach().requires_grad_(True)

        def edges() -> tuple[Tensor, list[Tensor]]:
            messages = module(nodes[sender], *given[1:])
            wanted = [nodes, *(t for t in given[1:] if t.requires_grad)]
            return scatter_sum(messages, receiver, dim=0, dim_size=len(nodes)), wanted

        return edges
    wanted = [t for t in given if torch.is_tensor(t) and t.requires_grad]
    return lambda: (module(*given), wanted)


def blocks_of(subject: Subject, precision: str, device: torch.device) -> Iterator[Row]:
    """Forward and backward of each block, on the GPU and on the host, ms."""
    with backends.matmul_precision(precision):
        for block, run in recorded(subject).items():
            out, wanted = run()
            row: Row = {"block": block, "forward": timed(run, device), "backward": None}
            if wanted and out.requires_grad:
                g = torch.randn_like(out)

                def back(out=out, wanted=wanted, g=g) -> object:
                    return torch.autograd.grad(out, wanted, g, retain_graph=True)

                row["backward"] = timed(back, device)
            yield row


class Study:
    """Rows of whole models and of blocks as they are measured."""

    def __init__(self, size: Size, device: torch.device, console: Console):
        self.size, self.device, self.console = size, device, console
        self.wholes: list[Row] = []
        self.blocks: list[Row] = []

    def measure(
        self, level: int, plain: torch.nn.Module, exact: dict[int, Tensor], backend: str, precision: str
    ) -> None:
        """One backend in one precision, boxes of all sizes; blocks in the largest. What cannot be says why."""
        head = {"l": level, "backend": backend, "precision": precision}
        try:
            model = built(backend, precision, plain, self.device)
            for side in self.size.sides:
                subject = Subject.of(backend, precision, model, side)
                error = relative_error(subject.call(), exact[side])
                allowed = TOLERANCE[precision.split()[0]]
                if not error <= allowed:
                    raise RuntimeError(f"forces err by {error:.0e}, {allowed:.0e} allowed")
                row = head | {"atoms": 3 * side**3, "status": "ok", "force_error": error}
                self.wholes.append(row | timed(subject.call, self.device))
            if subject.edge_index is not None:
                atoms = {"atoms": 3 * side**3}
                self.blocks += (head | atoms | row for row in blocks_of(subject, precision, self.device))
        except (backends.MissingProviderError, RuntimeError, torch.OutOfMemoryError) as error:
            reason = str(error).splitlines()[0][:200]
            self.wholes.append(head | {"status": reason})
            self.console.print(f"l = {level}, {backend} {precision}: {reason}", highlight=False, soft_wrap=True)

    def exact(self, plain: torch.nn.Module) -> dict[int, Tensor]:
        """Forces of e3nn in FP64 by size of the box."""
        model = built("e3nn", "fp64", plain, self.device)
        return {side: Subject.of("e3nn", "fp64", model, side).call().cpu().double() for side in self.size.sides}


def run(folder: Path, device: str, quick: bool, console: Console) -> Path:
    """The study; see the head of this file. Returns where its results are."""
    where, size = torch.device(device), QUICK if quick else Size()
    study = Study(size, where, console)
    todo = [(level, backend, word) for level in size.levels for backend, words in OFFERED.items() for word in words]
    level = None
    for number, backend, word in track(todo, description="models", console=console):
        if number != level:
            level, plain = number, size.model(number)
            exact = study.exact(plain)
        study.measure(level, plain, exact, backend, word)
        gc.collect()
        if where.type == "cuda":
            torch.cuda.empty_cache()
        about = {"channels": size.channels, "r_max": size.r_max, "wholes": study.wholes, "blocks": study.blocks}
        path = save("profile", folder, where, quick=quick, **about)
    return path
