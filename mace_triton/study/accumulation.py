"""`mace-triton study accumulation`: 16-bit accumulators and 2:4 sparse linears, explored as arXiv 2510.23621 proposes.

Products: the three kinds of a medium MACE-MP model's matrix products, in this package's tile shapes with sums in FP32,
FP16 or BF16 (`kernels/accumulation.py`), in PyTorch's with and without reduced sums, and in PyTorch's 2:4 sparse ones.
Tensor product: this package's kernel, forward, with FP32 or with 16-bit sums. Errors are relative, against FP64 on the
operands as they are rounded (what the sums cost) and as they were (all of it); times are the GPU's. On a CPU Triton's
kernels run in its interpreter alone (TRITON_INTERPRET=1) and are left out without it.

Pruned: a shipped model whose linears keep the larger two of each four weights along the inputs, against itself.
Trained: the student of the study of training, pruned half-way and trained on with the mask, beside one that is not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import mace  # noqa: F401  before e3nn, see mace_triton/__init__.py
import torch
from rich.console import Console
from torch import Tensor

from ..calculator import load
from ..convert import accelerate
from ..dev_cases import tp_problem
from ..ops import dispatch
from ..ops.graph import graph_plan
from . import structures, training
from .precision import by_engine, errors
from .profile import on_gpu
from .sparsity import prune_linears, pruned
from .store import Row, relative_error, save

WORDS = training.SIXTEEN
CALLS = 50
"""Of a timing; the inputs stay in the cache, for all variants alike."""


def shapes(atoms: int, edges: int) -> dict[str, tuple[int, int, int]]:
    """(rows, inputs, outputs) of linear_up, the linear behind conv_tp for l = 1, the radial network's last layer."""
    return {"linear_up": (4 * atoms, 128, 128), "linear, l = 1": (3 * atoms, 384, 128), "radial": (edges, 64, 1280)}


@contextmanager
def torch_sums(reduced: bool) -> Iterator[None]:
    """Whether PyTorch's FP16 and BF16 products may sum in 16 bits: whole sums (FP16), and parts of split sums."""
    flags = torch.backends.cuda.matmul
    names = (
        "allow_fp16_accumulation",
        "allow_fp16_reduced_precision_reduction",
        "allow_bf16_reduced_precision_reduction",
    )
    before = {name: getattr(flags, name) for name in names}
    for name in names:
        setattr(flags, name, reduced)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(flags, name, value)


def variants(x: Tensor, w: Tensor, word: str) -> Iterator[tuple[str, Callable[[], Tensor], Tensor]]:
    """(name, call, the weights it multiplies with) of each way to multiply 16-bit operands."""
    if x.is_cuda or dispatch.interpreting():
        from ..kernels import accumulation

        for sums in ("fp32", word):
            yield f"this package's, {sums} sums", lambda sums=sums: accumulation.product(x, w, sums), w
    for reduced, name in ((False, "fp32 sums"), (True, f"{word} sums allowed")):

        def call(reduced=reduced) -> Tensor:
            with torch_sums(reduced):
                return x @ w

        yield f"PyTorch's, {name}", call, w
    if x.is_cuda:
        from torch.sparse import to_sparse_semi_structured

        kept = pruned(w)
        packed = to_sparse_semi_structured(kept.t().contiguous())
        yield "PyTorch's, 2:4 sparse", lambda: torch.nn.functional.linear(x, packed), kept


def products(atoms: int, edges: int, device: torch.device) -> Iterator[Row]:
    """Rows of matrix products: shape, operands, variant, errors, ms."""
    for name, (rows, inputs, outputs) in shapes(atoms, edges).items():
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(rows, inputs, device=device, generator=generator)
        w = torch.randn(inputs, outputs, device=device, generator=generator) / inputs**0.5
        for word, dtype in WORDS.items():
            short = x.to(dtype), w.to(dtype)
            for variant, call, weights in variants(*short, word):
                head = {"shape": name, "operands": word, "variant": variant}
                yield head | measured(
                    f"{variant} of {name} in {word}",
                    call,
                    short[0].double() @ weights.double(),
                    x.double() @ w.double(),
                )


def tensor_products(side: int, channels: int, cutoff: float, device: torch.device) -> Iterator[Row]:
    """The forward of conv_tp of a medium model's second layer on water, by storage of the weights and kind of sums.

    cutoff: angstrom. The interpreter has no sums in BF16.
    """
    if device.type != "cuda" and not dispatch.interpreting():
        return
    from ..kernels import channelwise_tp

    atoms = structures.displaced(side, 1).frames[0]
    index = edges_of(atoms, cutoff).to(device)
    problem = tp_problem("medium", channels)
    count, edges = len(atoms), index.shape[1]
    generator = torch.Generator(device).manual_seed(0)
    x, y, w = (
        torch.randn(shape, device=device, generator=generator)
        for shape in ((count, problem.dim_in1), (edges, problem.dim_in2), (edges, problem.weight_numel))
    )
    plan = graph_plan(index, count, count)
    exact = channelwise_tp.forward(problem, x.double(), y.double(), w.double(), plan)
    for word, dtype in WORDS.items():
        stored = w.to(dtype)
        rounded = channelwise_tp.forward(problem, x.double(), y.double(), stored.double(), plan)
        for sums, wide in (("fp32", False), (word, False), (word, True)):
            if sums == "bf16" and device.type != "cuda":
                continue

            def call(sums=sums, wide=wide, stored=stored, dtype=dtype) -> Tensor:
                if sums == "fp32":
                    return channelwise_tp.forward(problem, x, y, stored, plan)
                return channelwise_tp.forward_in_16_bits(problem, x, y, stored, plan, dtype, wide)

            name = f"this package's, {sums} sums{', two channels a lane' if wide else ''}"
            yield {"shape": "conv_tp, forward", "operands": word, "variant": name} | measured(
                f"{name} of conv_tp in {word}", call, rounded, exact
            )


def measured(what: str, call: Callable[[], Tensor], rounded: Tensor, exact: Tensor) -> Row:
    """Errors against FP64 on the operands as they are rounded and as they were, and ms.

    Raises RuntimeError naming `what` for a result that no rounding explains: it is not timed.
    """
    got = call()
    sums = relative_error(got, rounded)
    if not sums < 0.05:
        raise RuntimeError(f"study: {what} is wrong by {sums:.1e}")
    return {"error_of_sums": sums, "error": relative_error(got, exact), "ms": on_gpu(call, CALLS)[0]}


def edges_of(atoms, cutoff: float) -> Tensor:
    """edge_index [2, E], sender and receiver, sorted by receiver."""
    from mace.data import get_neighborhood

    index = get_neighborhood(atoms.positions, cutoff, tuple(atoms.pbc), atoms.cell.array)[0]
    found = torch.from_numpy(index)
    return found[:, torch.argsort(found[1], stable=True)]


def pruned_model(model: str, device: str, quick: bool) -> Row:
    """Errors of a shipped model with 2:4 linears, nothing trained after, against itself, both in FP64."""
    plain = load(model, device, torch.float64)[0].double().eval()
    side, count = (2, 2) if quick else (4, 20)
    sample = structures.of_a_run(model, device, side, count, *((2, 4) if quick else (100, 2000)))
    exact = by_engine(accelerate(plain, "fp64"), sample.frames)
    thin = prune_linears(copy.deepcopy(plain))
    got = by_engine(accelerate(thin, "fp64"), sample.frames)
    shifted = replace(got, energy=got.energy - (got.energy - exact.energy).mean())
    return {"model": model, "sample": sample.source} | errors(shifted, exact, False)


def run(
    model: str, folder: Path, device: str, seeds: tuple[int, ...], workers: int, quick: bool, console: Console
) -> Path:
    """The study; see the head of this file. Returns where its results are."""
    where = torch.device(device)
    atoms, edges = (24, 200) if quick else (1536, 64736)
    rows = [*products(atoms, edges, where), *tensor_products(*((2, 8, 3.0) if quick else (8, 128, 6.0)), where)]
    thin = pruned_model(model, device, quick)
    about = {"atoms": atoms, "rows": rows, "pruned": thin}
    save("accumulation", folder, where, quick=quick, **about, trained=[])
    console.print(f"pruned, not trained after: {thin['force_rmse'][0]:.1f} meV/angstrom", highlight=False)
    size = training.QUICK if quick else training.Size()
    data = training.taught(model, size, device, quick)
    architecture = training.architecture_of(data, size)
    todo = [(mode, seed) for seed in seeds for mode in training.SPARSE_MODES]
    trained: list[Row] = []
    about |= {"steps": size.steps, "data": data.source}
    for _, row in training.trainings(todo, workers, device, data, architecture, size):
        trained.append(row)
        path = save("accumulation", folder, where, quick=quick, **about, trained=trained)
    return path
