"""The formulas of the kernels in plain PyTorch: any device, any dtype. The CPU path and the oracle of the tests.

Low-precision inputs are raised to the accumulation dtype first and results are rounded once, at the end.
"""

from __future__ import annotations

import torch

from .problem import ChannelwiseTPProblem, Slot, cg_nonzeros

_cg_cache: dict[tuple, torch.Tensor] = {}


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """FP64 for FP64, FP32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cg(l1: int, l2: int, l3: int, like: torch.Tensor) -> torch.Tensor:
    """Dense sqrt(2 l3 + 1) w3j(l1, l2, l3), [2 l1 + 1, 2 l2 + 1, 2 l3 + 1], dtype and device of `like`."""
    key = (l1, l2, l3, like.dtype, like.device)
    if key not in _cg_cache:
        dense = torch.zeros(2 * l1 + 1, 2 * l2 + 1, 2 * l3 + 1, dtype=torch.float64)
        for m1, m2, m3, value in cg_nonzeros(l1, l2, l3):
            dense[m1, m2, m3] = value
        _cg_cache[key] = dense.to(dtype=like.dtype, device=like.device)
    return _cg_cache[key]


def slot_view(x: torch.Tensor, slot: Slot) -> torch.Tensor:
    """The view [rows, 2 l + 1, mul] of one slot of x [rows, dim], whatever the layout."""
    part = x[:, slot.offset : slot.offset + slot.mul * slot.dim]
    if slot.layout == "ir_mul":
        return part.reshape(-1, slot.dim, slot.mul)
    return part.reshape(-1, slot.mul, slot.dim).transpose(1, 2)


def channelwise_tp_fwd(
    problem: ChannelwiseTPProblem,
    x: torch.Tensor,
    y: torch.Tensor,
    w: torch.Tensor,
    edge_index: torch.Tensor,
    n_out: int,
) -> torch.Tensor:
    """out[i, p, m3, c] = sum_{e -> i} w[e, p, c] sum_{m1, m2} C_p[m1, m2, m3] x[s(e), m1, c] y[e, m2].

    x [N_in, dim_in1], y [E, dim_in2], w [E, weight_numel] -> [N_out, dim_out], in x's dtype.
    """
    dtype = accumulate_dtype(x.dtype)
    sent, y, w = x.to(dtype).index_select(0, edge_index[0]), y.to(dtype), w.to(dtype)
    out = torch.zeros(n_out, problem.dim_out, dtype=dtype, device=x.device)
    for path in problem.paths:
        s1, s2, s3 = problem.slots1[path.slot1], problem.slots2[path.slot2], problem.slots3[path.slot3]
        coupling = torch.einsum("eb,abk->eak", slot_view(y, s2)[..., 0], cg(path.l1, path.l2, path.l3, y))
        weighted = slot_view(sent, s1) * w[:, None, path.weight : path.weight + path.mul]
        message = torch.bmm(coupling.transpose(1, 2), weighted)  # [E, 2 l3 + 1, mul]
        slot_view(out, s3).index_add_(0, edge_index[1], message)
    return out.to(x.dtype)


def channelwise_tp_bwd(
    problem: ChannelwiseTPProblem,
    g: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    w: torch.Tensor,
    edge_index: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients (gx, gy, gw) of `channelwise_tp_fwd` for the output gradient g [N_out, dim_out].

    With u[e, p, m1, c] = sum_{m2, m3} C_p g[r(e), m3, c] y[e, m2]:  gw = sum_m1 u x,  gx += w u summed over the edges
    of a sender,  gy[e, m2] = sum_{c, p, m1, m3} C_p w x g.
    """
    dtype = accumulate_dtype(x.dtype)
    sent, wide_y, wide_w = x.to(dtype).index_select(0, edge_index[0]), y.to(dtype), w.to(dtype)
    received = g.to(dtype).index_select(0, edge_index[1])
    gx = torch.zeros(x.shape, dtype=dtype, device=x.device)
    gy, gw = torch.zeros_like(wide_y), torch.empty_like(wide_w)
    for path in problem.paths:
        s1, s2, s3 = problem.slots1[path.slot1], problem.slots2[path.slot2], problem.slots3[path.slot3]
        table = cg(path.l1, path.l2, path.l3, wide_y)
        coupling = torch.einsum("eb,abk->eak", slot_view(wide_y, s2)[..., 0], table)
        columns = slice(path.weight, path.weight + path.mul)
        sent_block, received_block, weight = slot_view(sent, s1), slot_view(received, s3), wide_w[:, None, columns]
        u = torch.bmm(coupling, received_block)  # [E, 2 l1 + 1, mul]
        gw[:, columns] = (u * sent_block).sum(1)
        slot_view(gx, s1).index_add_(0, edge_index[0], u * weight)
        outer = torch.bmm(sent_block * weight, received_block.transpose(1, 2))  # [E, 2 l1 + 1, 2 l3 + 1]
        gy[:, s2.offset : s2.offset + s2.dim] += torch.einsum("eak,abk->eb", outer, table)
    return gx.to(x.dtype), gy.to(y.dtype), gw.to(w.dtype)


def channelwise_tp_bwd_bwd(
    problem: ChannelwiseTPProblem,
    g: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    q: torch.Tensor,
    edge_index: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients (dg, dx, dy, dw) of `channelwise_tp_bwd` for cotangents a, b, q of gx, gy, gw.

    The tensor product is trilinear, so they are the tangents of its forward and backward along (a, b, q):
    dg = F(a, y, w) + F(x, b, w) + F(x, y, q);  dx = Bx(b, w) + Bx(y, q);  dy = By(a, w) + By(x, q);
    dw = Bw(a, y) + Bw(x, b).
    """
    n_out = g.shape[0]

    def forward(*args):
        return channelwise_tp_fwd(problem, *args, edge_index, n_out)

    def backward(*args):
        return channelwise_tp_bwd(problem, g, *args, edge_index)

    dg = forward(a, y, w) + forward(x, b, w) + forward(x, y, q)
    along_a, along_b, along_q = backward(a, y, w), backward(x, b, w), backward(x, y, q)
    return dg, along_b[0] + along_q[0], along_a[1] + along_q[1], along_a[2] + along_b[2]
