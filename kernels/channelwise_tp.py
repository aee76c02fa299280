"""Channel-wise tensor product with gather by sender and sum into the receiver.

    out[i, p, m3, c] = sum_{e -> i} w[e, p, c] sum_{m1, m2} C_p[m1, m2, m3] x[s(e), m1, c] y[e, m2]

Forward. One program owns a receiver i and BLOCK_C channels, and walks the receiver's edges in sorted order. Sums run
*uncoupled*: A_p[m1, m2] += (w x[m1]) y[m2] costs one multiply-add a pair, and the Clebsch-Gordan tensor is applied once
a node, after the loop: out_p[m3] = sum C_p[m1, m2, m3] A_p[m1, m2]. No atomics: the result has the same bits every run.

Backward, on the same rows, with G_p[m1, m2] = sum_m3 C_p g[m3] held in registers for the whole row:

    u_p[m1] = sum_m2 G_p y[m2]      gw_p = sum_m1 u x      gx[m1] += w u      gy[m2] = sum_c sum_{p, m1} G_p (w x[m1])

gx goes to the sender and gy to the edge by atomic adds. In deterministic mode gy leaves as one partial sum per channel
block, and gx as one row per edge that a second kernel sums in the order of the sender's edges.

Double backward. The product is trilinear, so the cotangents (a, b, q) of (gx, gy, gw) act as tangents of (x, y, w):
with z = w x and its tangent z' = w a + q x, the forward becomes A += z' y + z b, and the backward uses
v = sum_m2 G b beside u:  dw = sum_m1 (v x + u a),  dx = w v + q u,  dy = sum_c G z'.

Forces. In molecular dynamics weights depend on an edge's length alone: instead of gw, of which there are thousands an
edge, the backward gives gr = sum_p,c (dw/dr) gw. An edge and its way back have the same weights and share their row.

The loops over paths and their nonzero coefficients are unrolled when the source is generated, by
`channelwise_tp_source.py`: Triton has no register arrays, and the coefficients become literals.
"""

from __future__ import annotations

from collections import Counter
from functools import cache

import torch
import triton
import triton.language as tl

from . import channelwise_tp_source as source
from . import tiles
from .generated import kernel_of
from .segments import segment_sum

_ACC = {torch.float64: (torch.float64, tl.float64)}


def _accumulate(dtype: torch.dtype) -> tuple[torch.dtype, tl.dtype]:
    return _ACC.get(dtype, (torch.float32, tl.float32))


@cache
def _forward_kernels(
    problem, budget: int, block_c: int, ahead: int | None, tangent: bool, paired: bool = False
) -> list:
    """(kernel, channel blocks) of every part of the forward."""
    return [
        (_jit(source.forward_source(problem, part, block_c, tangent, ahead, paired)), _blocks(problem, part, block_c))
        for part in source.partition(problem, budget)
    ]


@cache
def _forces_kernels(problem, budget: int, block_c: int, ahead: int | None, wrt_x: bool) -> list[tuple]:
    """(kernel, channel blocks) of every part of the backward to forces."""
    return [
        (_jit(source.forces_source(problem, part, block_c, wrt_x, ahead)), _blocks(problem, part, block_c))
        for part in source.partition(problem, budget)
    ]


@cache
def _backward_kernels(
    problem, budget: int, block_c: int, ahead: int | None, gx: str, deterministic: bool, tangent: bool
) -> tuple[list[tuple], int]:
    """(kernel, channel blocks) of every part of the backward, and how many rows of gy an edge has.

    Deterministic: a row for each channel block of each part. Otherwise one, to which they add by atomics.
    """
    parts = source.partition(problem, budget)
    gy_rows = sum(_blocks(problem, part, block_c) for part in parts) if deterministic else 1
    kernels, first, begun = [], 0, frozenset()
    for part in parts:
        rows = (first, gy_rows) if deterministic else None
        text = source.backward_source(problem, part, block_c, gx, rows, tangent, ahead, begun)
        kernels.append((_jit(text), _blocks(problem, part, block_c)))
        first += kernels[-1][1]
        begun |= {problem.paths[n].slot1 for n in part}
    return kernels, gy_rows


def _blocks(problem, part: tuple[int, ...], block_c: int) -> int:
    return triton.cdiv(problem.paths[part[0]].mul, block_c)


def _jit(text: str):
    return kernel_of("channelwise_tp", text)


@cache
def _pairs(problem) -> int:
    """Live (m1, m2) pairs of the multiplicity that has most: the sums a program would hold if it took all its paths."""
    size: Counter[int] = Counter()
    for path in problem.paths:
        size[path.mul] += len(source.pairs(path))
    return max(size.values(), default=0)


def _tile(op: str, problem, y: torch.Tensor, w: torch.Tensor, nodes: int) -> tiles.Tile:
    # Few nodes are split over more programs to fill a GPU; the interpreter runs one program after another.
    nodes = nodes if y.is_cuda else 1 << 30
    return tiles.choose(op, dtype=tiles.TAGS[y.dtype], storage=tiles.TAGS[w.dtype], pairs=_pairs(problem), nodes=nodes)


def _ahead(tile: tiles.Tile, x: torch.Tensor) -> int | None:
    """How far the kernel prefetches; None where it cannot have NVIDIA's instructions."""
    return tile["AHEAD"] if x.is_cuda and torch.version.hip is None else None


def _covered(problem) -> bool:
    return {path.slot3 for path in problem.paths} == set(range(len(problem.slots3)))


def _launch(kernels: list[tuple], tile: tiles.Tile, acc: tl.dtype, plan, *tensors: torch.Tensor) -> None:
    """Run the parts one after another: a program for each receiver, channel block and share of the edges."""
    if plan.n_out == 0 or plan.n_edges == 0:
        return
    with torch.cuda.device_of(plan.perm):  # Triton launches on the current device
        for kernel, blocks in kernels:
            kernel[(plan.n_out * blocks * tile["SPLIT"],)](
                *tensors,
                plan.receiver_ptr,
                plan.perm,
                plan.sender,
                ACC=acc,
                BLOCK_C=tile["BLOCK_C"],
                SPLIT=tile["SPLIT"],
                num_warps=tile.num_warps,
            )


def _run_forward(
    problem, operands: tuple[torch.Tensor, ...], plan, tangent: bool, paired=False, sums=None
) -> torch.Tensor:
    x, y, w = operands[::2] if tangent else operands
    acc, acc_tl = sums or _accumulate(y.dtype)
    tile = _tile("channelwise_tp_fwd", problem, y, w, plan.n_out)
    splits = tile["SPLIT"]
    out = (torch.empty if _covered(problem) and plan.n_edges else torch.zeros)(
        (splits, plan.n_out, problem.dim_out), dtype=y.dtype if splits == 1 else acc, device=x.device
    )
    budget = tile["TANGENT_PAIRS" if tangent else "PAIRS"]
    kernels = _forward_kernels(problem, budget, tile["BLOCK_C"], _ahead(tile, x), tangent, paired)
    _launch(kernels, tile, acc_tl, plan, *operands, out)
    return out[0] if splits == 1 else out.sum(0).to(y.dtype)


def _run_backward(problem, g: torch.Tensor, operands: tuple[torch.Tensor, ...], plan, tangent: bool, wrt_x: bool):
    x, y, w = operands[::2] if tangent else operands
    acc, acc_tl = _accumulate(y.dtype)
    tile = _tile("channelwise_tp_bwd", problem, y, w, plan.n_out)
    deterministic = plan.sender_ptr.shape[0] > 0
    mode = "none" if not wrt_x else "edge" if deterministic else "atomic"
    budget = tile["TANGENT_PAIRS" if tangent else "PAIRS"]
    how = (problem, budget, tile["BLOCK_C"], _ahead(tile, x), mode, deterministic, tangent)
    kernels, gy_rows = _backward_kernels(*how)
    rows = {"edge": plan.n_edges, "atomic": x.shape[0], "none": 0}[mode]
    stored = mode == "edge" and {path.slot1 for path in problem.paths} == set(range(len(problem.slots1)))
    gx = (torch.empty if stored else torch.zeros)((rows, problem.dim_in1), dtype=acc, device=x.device)
    new = torch.empty if deterministic else torch.zeros
    gy = new((plan.n_edges, gy_rows, problem.dim_in2), dtype=acc, device=x.device)
    gw = torch.empty_like(w)
    _launch(kernels, tile, acc_tl, plan, g, *operands, gx, gy, gw)
    if mode == "edge":
        gx = segment_sum(gx, plan.sender_ptr, plan.sender_perm)
    gy = gy.sum(1) if deterministic else gy[:, 0]
    return gx.to(x.dtype) if wrt_x else None, gy.to(y.dtype), gw


def forward(problem, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor, plan) -> torch.Tensor:
    """out [plan.n_out, dim_out] in y's dtype for contiguous x [N, dim_in1], y [E, dim_in2], w [E, weight_numel]."""
    return _run_forward(problem, (x, y, w), plan, tangent=False)


def backward(problem, g: torch.Tensor, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor, plan, wrt_x: bool = True):
    """(gx, gy, gw) for the output gradient g; gx is None when `wrt_x` is False, which spares its atomics."""
    return _run_backward(problem, g, (x, y, w), plan, False, wrt_x)


def forward_in_16_bits(problem, x, y, w, plan, dtype: torch.dtype, wide: bool = False) -> torch.Tensor:
    """`forward` with operands, products and sums in BF16 or FP16. Explored in docs/studies, not in the product.

    wide: a lane owns twice the channels that it has in the product, so that its products can be two at a time.
    """
    sums = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
    tile = _tile("channelwise_tp_fwd", problem, y, w, plan.n_out)
    if wide:
        block = dict(tile.block)
        tile = tiles.Tile.of(tile.num_warps, tile.num_stages, **block | {"BLOCK_C": 2 * block["BLOCK_C"]})
    with tiles.forced("channelwise_tp_fwd", tile):
        return _run_forward(problem, (x, y, w), plan, tangent=False, sums=(dtype, sums))


def forward_of_pairs(problem, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor, plan) -> torch.Tensor:
    """`forward` for sorted edges whose weights w [pairs, weight_numel] are those of pair plan.perm[e]."""
    return _run_forward(problem, (x, y, w), plan, tangent=False, paired=True)


def add_forces(problem, g, x, y, w, d, gx: torch.Tensor | None, gy: torch.Tensor, gr: torch.Tensor, plan) -> None:
    """Add the gradients of x, y and of the lengths to gx [N, dim_in1] (unless None), gy [E, dim_in2] and gr [E].

    d [pairs, weight_numel]: the slopes of w with the length. gx, gy and gr have the accumulator's type, which is y's.
    """
    _, acc_tl = _accumulate(y.dtype)
    tile = _tile("channelwise_tp_forces", problem, y, w, plan.n_out)
    kernels = _forces_kernels(problem, tile["PAIRS"], tile["BLOCK_C"], _ahead(tile, x), gx is not None)
    _launch(kernels, tile, acc_tl, plan, g, x, y, w, d, gy if gx is None else gx, gy, gr)


def double_backward(problem, g, x, y, w, a, b, q, plan):
    """(dg, dx, dy, dw) for cotangents (a, b, q) of (gx, gy, gw)."""
    operands = (x, a, y, b, w, q)
    return _run_forward(problem, operands, plan, tangent=True), *_run_backward(problem, g, operands, plan, True, True)


def offline_cases(
    problem, target: str = "sm_90", storages: tuple[str, ...] = ("fp64", "fp32", "bf16"), features: str | None = None
) -> list:
    """Every kernel of `problem` with the tiles in use, for `offline.compile_case`; a case's module is a generated file.

    storages: of the weights; the rest is FP32 beside 16-bit weights, the node features in `features` if it is given.
    AMD: neither prefetches nor loads by assembly, which are NVIDIA instructions.
    """
    cases = []
    for storage in storages:
        call = {"dtype": "fp64" if storage == "fp64" else "fp32", "storage": storage}
        for op in ("channelwise_tp_fwd", "channelwise_tp_bwd", "channelwise_tp_forces"):
            tile = tiles.choose(op, arch=target, **call, pairs=_pairs(problem), nodes=5184)
            ahead = None if target.startswith("gfx") else tile["AHEAD"]
            for kernels in _offline_kernels(op, problem, tile, ahead):
                for number, (kernel, _) in enumerate(kernels):
                    part = f"{number + 1}/{len(kernels)}"
                    cases.append(_offline_case(kernel.fn, part, tile, **call, features=features))
    return cases


def _offline_kernels(op: str, problem, tile: tiles.Tile, ahead: int | None) -> list[list]:
    """What `op` launches, and its relatives for tangents and pairs."""
    plain, tangent = ((problem, tile[key], tile["BLOCK_C"], ahead) for key in ("PAIRS", "TANGENT_PAIRS"))
    if op == "channelwise_tp_forces":
        return [_forces_kernels(*plain, True)]
    if op == "channelwise_tp_bwd":
        return [_backward_kernels(*how, "atomic", False, how is tangent)[0] for how in (plain, tangent)]
    return [_forward_kernels(*plain, False), _forward_kernels(*tangent, True), _forward_kernels(*plain, False, True)]


def _offline_case(function, part: str, tile: tiles.Tile, dtype: str, storage: str, features: str | None):
    """The specialisation of one generated kernel that a launch with `tile` compiles."""
    import inspect

    from .offline import Case

    words = dict.fromkeys(("w_ptr", "q_ptr", "d_ptr", "gw_ptr"), storage)
    words |= dict.fromkeys(("x_ptr", "a_ptr"), features or dtype)
    words |= dict.fromkeys(("receiver_ptr", "perm_ptr", "sender_ptr"), "i32")
    names = [name for name in inspect.signature(function).parameters if name.endswith("_ptr")]
    signature = {name: f"*{words.get(name, dtype)}" for name in names}
    acc = tl.float64 if dtype == "fp64" else tl.float32
    constants = {"ACC": acc, "BLOCK_C": tile["BLOCK_C"], "SPLIT": tile["SPLIT"]}
    name = f"{function.__name__.removesuffix('_kernel')} {storage} {part}"
    launch = (constants, tile.num_warps, tile.num_stages, tuple(names))
    return Case(name, inspect.getfile(function), function.__name__, signature, *launch)
