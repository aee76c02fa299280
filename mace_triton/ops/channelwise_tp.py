"""The channel-wise tensor product with gather and scatter as torch custom ops: forward, backward, double backward.

Each derivative is an op of its own whose backward calls the next. GPU tensors (and, under Triton's interpreter, CPU
tensors) run `kernels/channelwise_tp.py`, others `reference.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..problem import ChannelwiseTPProblem
from . import dispatch
from .graph import GraphPlan

STORAGE = {
    torch.float64: (torch.float64,),
    torch.float32: (torch.float32, torch.bfloat16, torch.float16),
    torch.bfloat16: (torch.bfloat16,),
    torch.float16: (torch.float16,),
}
"""dtype of the harmonics y, and of the sums -> dtypes that features x and weights w may be stored in."""


def _kernels():
    from ..kernels import channelwise_tp

    return channelwise_tp


@torch.library.custom_op("mace_triton::channelwise_tp", mutates_args=())
def _fwd(
    x: Tensor,
    y: Tensor,
    w: Tensor,
    edge_index: Tensor,
    receiver_ptr: Tensor,
    perm: Tensor,
    sender: Tensor,
    sender_ptr: Tensor,
    sender_perm: Tensor,
    problem: str,
) -> Tensor:
    spec, which = ChannelwiseTPProblem.from_key(problem), dispatch.backend(x)
    dispatch.count("channelwise_tp_fwd", which)
    if which == "reference":
        return reference.channelwise_tp_fwd(spec, x.to(y.dtype), y, w, edge_index, receiver_ptr.shape[0] - 1)
    plan = GraphPlan(edge_index, receiver_ptr, perm, sender, sender_ptr, sender_perm, x.shape[0])
    return _kernels().forward(spec, x.contiguous(), y.contiguous(), w.contiguous(), plan)


@_fwd.register_fake
def _(x, y, w, edge_index, receiver_ptr, perm, sender, sender_ptr, sender_perm, problem):
    return y.new_empty(receiver_ptr.shape[0] - 1, ChannelwiseTPProblem.from_key(problem).dim_out)


@torch.library.custom_op("mace_triton::channelwise_tp_bwd", mutates_args=())
def _bwd(
    g: Tensor,
    x: Tensor,
    y: Tensor,
    w: Tensor,
    edge_index: Tensor,
    receiver_ptr: Tensor,
    perm: Tensor,
    sender: Tensor,
    sender_ptr: Tensor,
    sender_perm: Tensor,
    problem: str,
    wrt_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    spec, which = ChannelwiseTPProblem.from_key(problem), dispatch.backend(x)
    dispatch.count("channelwise_tp_bwd", which)
    if which == "reference":
        gx, gy, gw = reference.channelwise_tp_bwd(spec, g, x.to(y.dtype), y, w, edge_index)
        gx = gx.to(x.dtype)
    else:
        plan = GraphPlan(edge_index, receiver_ptr, perm, sender, sender_ptr, sender_perm, x.shape[0])
        gx, gy, gw = _kernels().backward(spec, *(t.contiguous() for t in (g, x, y, w)), plan, wrt_x)
    return gx if wrt_x else x.new_empty(0), gy, gw


@_bwd.register_fake
def _(g, x, y, w, edge_index, receiver_ptr, perm, sender, sender_ptr, sender_perm, problem, wrt_x):
    return x.new_empty(x.shape if wrt_x else 0), y.new_empty(y.shape), w.new_empty(w.shape)


@torch.library.custom_op("mace_triton::channelwise_tp_bwd_bwd", mutates_args=())
def _bwd_bwd(
    g: Tensor,
    x: Tensor,
    y: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    q: Tensor,
    edge_index: Tensor,
    receiver_ptr: Tensor,
    perm: Tensor,
    sender: Tensor,
    sender_ptr: Tensor,
    sender_perm: Tensor,
    problem: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    spec, which = ChannelwiseTPProblem.from_key(problem), dispatch.backend(x)
    dispatch.count("channelwise_tp_bwd_bwd", which)
    if which == "reference":
        wide = (spec, g, x.to(y.dtype), y, w, a.to(y.dtype), b, q, edge_index)
        dg, dx, dy, dw = reference.channelwise_tp_bwd_bwd(*wide)
        return dg, dx.to(x.dtype), dy, dw
    plan = GraphPlan(edge_index, receiver_ptr, perm, sender, sender_ptr, sender_perm, x.shape[0])
    return _kernels().double_backward(spec, *(t.contiguous() for t in (g, x, y, w, a, b, q)), plan)


@_bwd_bwd.register_fake
def _(g, x, y, w, a, b, q, edge_index, receiver_ptr, perm, sender, sender_ptr, sender_perm, problem):
    return tuple(t.new_empty(t.shape) for t in (g, x, y, w))


def _setup_fwd(ctx, inputs, output):
    x, y, w, *plan, ctx.problem = inputs
    ctx.save_for_backward(x, y, w, *plan)


def _fwd_backward(ctx, g):
    x, y, w, *plan = ctx.saved_tensors
    wrt_x = ctx.needs_input_grad[0]  # not in the first layer of a frozen model: its features do not depend on positions
    gx, gy, gw = _bwd(g, x, y, w, *plan, ctx.problem, wrt_x)
    return gx if wrt_x else None, gy, gw, *(None,) * 7


def _setup_bwd(ctx, inputs, output):
    g, x, y, w, *plan, ctx.problem, ctx.wrt_x = inputs
    ctx.save_for_backward(g, x, y, w, *plan)


def _bwd_backward(ctx, a, b, q):
    g, x, y, w, *plan = ctx.saved_tensors
    a = a if ctx.wrt_x else None
    a, b, q = (torch.zeros_like(t) if c is None else c for c, t in ((a, x), (b, y), (q, w)))
    return *_bwd_bwd(g, x, y, w, a, b, q, *plan, ctx.problem), *(None,) * 8


_fwd.register_autograd(_fwd_backward, setup_context=_setup_fwd)
_bwd.register_autograd(_bwd_backward, setup_context=_setup_bwd)


def _check(problem: ChannelwiseTPProblem, x: Tensor, y: Tensor, w: Tensor, graph: GraphPlan) -> None:
    widths = ((x, "x", problem.dim_in1), (y, "y", problem.dim_in2), (w, "w", problem.weight_numel))
    for tensor, name, width in widths:
        if tensor.ndim != 2 or tensor.shape[1] != width:
            raise ValueError(f"{name} must have shape [rows, {width}] for this problem, got {list(tensor.shape)}")
        if tensor.device != graph.perm.device:
            raise ValueError(f"{name} is on {tensor.device}, the graph on {graph.perm.device}: move them together")
    if x.shape[0] != graph.n_in:
        raise ValueError(f"x has {x.shape[0]} rows, but the graph was planned for {graph.n_in} senders")
    for tensor, name in ((y, "y"), (w, "w")):
        if tensor.shape[0] != graph.n_edges:
            raise ValueError(f"{name} has {tensor.shape[0]} rows, but the graph has {graph.n_edges} edges")
    if y.dtype not in STORAGE:
        raise TypeError(f"y must be float64, float32, bfloat16 or float16, got {y.dtype}")
    for tensor, name in ((x, "x"), (w, "w")):
        if tensor.dtype not in STORAGE[y.dtype]:
            raise TypeError(f"{name} must be one of {STORAGE[y.dtype]} when y is {y.dtype}, got {tensor.dtype}")


def channelwise_tp(
    problem: ChannelwiseTPProblem, x: Tensor, y: Tensor, w: Tensor, graph: GraphPlan, *, deterministic: bool = False
) -> Tensor:
    """Gather by sender, Clebsch-Gordan product with y, weight per edge, path and channel, sum into the receiver.

    x: [N_in, problem.dim_in1] node features in problem.layout_in; y: [E, problem.dim_in2] spherical harmonics;
    w: [E, problem.weight_numel]; x and w in y's dtype, or in bfloat16 / float16 storage beside float32 y; graph: from
    `graph_plan(edge_index, N_in, N_out)`. Returns [N_out, problem.dim_out] in problem.layout_out and y's dtype; sums
    run in float32 (float64 for float64). Differentiable twice in x, y and w. The formula is that of MACE's conv_tp
    (e3nn TensorProduct with "uvu" instructions, then scatter_sum).

    deterministic: the same bits on every run, without atomics; the graph must have been planned with by_sender=True.

    Raises ValueError (shape, device, row count) or TypeError (dtype) naming the argument.
    """
    _check(problem, x, y, w, graph)
    if deterministic and graph.sender_ptr.shape[0] != x.shape[0] + 1:
        raise ValueError("graph: deterministic=True needs graph_plan(..., by_sender=True) made for x's node count")
    if not deterministic and graph.sender_ptr.shape[0] > 0:
        graph = graph._replace(sender_ptr=graph.perm[:0], sender_perm=graph.perm[:0])
    return _fwd(x, y, w, *graph.tensors, problem.key)
