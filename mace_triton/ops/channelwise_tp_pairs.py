"""The channel-wise tensor product of edges that share their weights in pairs, and its way back to forces.

For the engine, which knows its edges sorted and its weights as functions of the length: the forward, and a backward
that gives the gradient of every length instead of that of every weight. Neither has a derivative. GPU tensors (and,
under Triton's interpreter, CPU tensors) run `kernels/channelwise_tp.py`, others `reference.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..problem import ChannelwiseTPProblem
from . import dispatch
from .channelwise_tp import STORAGE
from .graph import GraphPlan


def _plan(row_ptr: Tensor, sender: Tensor, pair: Tensor, n_in: int) -> GraphPlan:
    """What the kernels walk: rows of weights in the place of a permutation."""
    return GraphPlan(sender[:0], row_ptr, pair, sender, sender[:0], sender[:0], n_in)


def _rows(row_ptr: Tensor, sender: Tensor) -> tuple[slice, Tensor]:
    """Which edges the rows hold, and their edge_index."""
    held = slice(int(row_ptr[0]), int(row_ptr[-1]))
    receiver = torch.repeat_interleave(row_ptr.diff().long())
    return held, torch.stack((sender[held].long(), receiver))


@torch.library.custom_op("mace_triton::channelwise_tp_pairs", mutates_args=())
def _fwd(x: Tensor, y: Tensor, w: Tensor, row_ptr: Tensor, sender: Tensor, pair: Tensor, problem: str) -> Tensor:
    spec, which = ChannelwiseTPProblem.from_key(problem), dispatch.backend(x)
    dispatch.count("channelwise_tp_pairs_fwd", which)
    if which == "reference":
        held, edge_index = _rows(row_ptr, sender)
        wide, rows = x.to(y.dtype), pair[held].long()
        return reference.channelwise_tp_fwd(spec, wide, y[held], w[rows], edge_index, row_ptr.shape[0] - 1)
    from ..kernels import channelwise_tp as kernels

    tensors = (t.contiguous() for t in (x, y, w))
    return kernels.forward_of_pairs(spec, *tensors, _plan(row_ptr, sender, pair, x.shape[0]))


@_fwd.register_fake
def _(x, y, w, row_ptr, sender, pair, problem):
    return y.new_empty(row_ptr.shape[0] - 1, ChannelwiseTPProblem.from_key(problem).dim_out)


@torch.library.custom_op("mace_triton::channelwise_tp_pairs_bwd", mutates_args=("gx", "gy", "gr"))
def _bwd(
    g: Tensor,
    x: Tensor,
    y: Tensor,
    w: Tensor,
    d: Tensor,
    gx: Tensor | None,
    gy: Tensor,
    gr: Tensor,
    row_ptr: Tensor,
    sender: Tensor,
    pair: Tensor,
    problem: str,
) -> None:
    spec, which = ChannelwiseTPProblem.from_key(problem), dispatch.backend(x)
    dispatch.count("channelwise_tp_pairs_bwd", which)
    if which == "reference":
        held, edge_index = _rows(row_ptr, sender)
        rows = pair[held].long()
        wide = (x.to(y.dtype), y[held], w.to(y.dtype)[rows])
        more, own, gw = reference.channelwise_tp_bwd(spec, g, *wide, edge_index)
        if gx is not None:
            gx += more
        gy[held] += own
        gr[held] += (gw * d[rows]).sum(1, keepdim=True)
    else:
        from ..kernels import channelwise_tp as kernels

        tensors = (t.contiguous() for t in (g, x, y, w, d))
        kernels.add_forces(spec, *tensors, gx, gy, gr, _plan(row_ptr, sender, pair, x.shape[0]))


@_bwd.register_fake
def _(g, x, y, w, d, gx, gy, gr, row_ptr, sender, pair, problem):
    return None


def _check(problem: ChannelwiseTPProblem, x, y, w, row_ptr, sender, pair) -> None:
    widths = ((x, "x", problem.dim_in1), (y, "y", problem.dim_in2), (w, "w", problem.weight_numel))
    for tensor, name, width in widths:
        if tensor.ndim != 2 or tensor.shape[1] != width:
            raise ValueError(f"{name} must have shape [rows, {width}] for this problem, got {list(tensor.shape)}")
    edges = y.shape[0]
    if sender.shape != (edges,) or pair.shape != (edges,) or row_ptr.ndim != 1 or row_ptr.shape[0] == 0:
        shapes = [list(t.shape) for t in (sender, pair, row_ptr)]
        raise ValueError(f"sender, pair and row_ptr must be [{edges}], [{edges}] and [N + 1], got {shapes}")
    if {row_ptr.dtype, sender.dtype, pair.dtype} != {torch.int32}:
        raise TypeError("row_ptr, sender and pair must be int32")
    if y.dtype not in (torch.float64, torch.float32):
        raise TypeError(f"y must be float64 or float32, got {y.dtype}")
    for tensor, name in ((x, "x"), (w, "w")):
        if tensor.dtype not in STORAGE[y.dtype]:
            raise TypeError(f"{name} must be one of {STORAGE[y.dtype]} when y is {y.dtype}, got {tensor.dtype}")
    if len({t.device for t in (x, y, w, row_ptr, sender, pair)}) != 1:
        raise ValueError("x, y, w, row_ptr, sender and pair must be on one device")


def channelwise_tp_pairs(
    problem: ChannelwiseTPProblem, x: Tensor, y: Tensor, w: Tensor, row_ptr: Tensor, sender: Tensor, pair: Tensor
) -> Tensor:
    """`channelwise_tp` [N, problem.dim_out] of sorted edges with the weights w[pair[e]]; no derivative.

    y [E, problem.dim_in2], float64 or float32, whose dtype the result has; x [N_in, problem.dim_in1] and
    w [P, problem.weight_numel] in it too, or in 16 bits beside float32. The edges lie sorted by receiver: row_ptr
    [N + 1], sender [E] and pair [E] int32, as `edge_filter` gives them, whose range is not checked. row_ptr may be a
    stretch of the receivers': edges of others are left out.

    Raises ValueError (shape, device) or TypeError (dtype) naming the argument.
    """
    _check(problem, x, y, w, row_ptr, sender, pair)
    return _fwd(x, y, w, row_ptr, sender, pair, problem.key)


def add_forces(
    problem: ChannelwiseTPProblem,
    g: Tensor,
    x: Tensor,
    y: Tensor,
    w: Tensor,
    d: Tensor,
    gx: Tensor | None,
    gy: Tensor,
    gr: Tensor,
    row_ptr: Tensor,
    sender: Tensor,
    pair: Tensor,
) -> None:
    """Add to gx [N_in, dim_in1], unless it is None, gy [E, dim_in2] and gr [E, 1] the gradients of x, of y and of the
    edges' lengths. All three have y's dtype and are contiguous.

    g [N, problem.dim_out]: the gradient of `channelwise_tp_pairs`; d [P, problem.weight_numel], w's dtype: the slope of
    w with the length. Sums run in any order.

    Raises ValueError (shape, device) or TypeError (dtype) naming the argument.
    """
    _check(problem, x, y, w, row_ptr, sender, pair)
    for name, tensor, like in (("g", g, (row_ptr.shape[0] - 1, problem.dim_out)), ("d", d, tuple(w.shape))):
        if tensor.shape != like:
            raise ValueError(f"{name} must have shape {list(like)}, got {list(tensor.shape)}")
    sums = (("gy", gy, tuple(y.shape)), ("gr", gr, (y.shape[0], 1)))
    sums += () if gx is None else (("gx", gx, tuple(x.shape)),)
    for name, tensor, like in sums:
        if tensor.shape != like or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous {list(like)}, got {list(tensor.shape)}")
    if {g.dtype, *(tensor.dtype for _, tensor, _ in sums)} != {y.dtype} or d.dtype != w.dtype:
        raise TypeError(f"g, gx, gy and gr must have y's dtype {y.dtype}, and d that of w, {w.dtype}")
    if len({t.device for t in (x, g, d, *(tensor for _, tensor, _ in sums))}) != 1:
        raise ValueError("g, d, gx, gy and gr must be on x's device")
    _bwd(g, x, y, w, d, gx, gy, gr, row_ptr, sender, pair, problem.key)
