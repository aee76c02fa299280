"""The edge list of a graph, sorted once by receiver (and by sender where a deterministic backward asks for it).

Every layer and every derivative of the channel-wise tensor product walks the same plan.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class GraphPlan(NamedTuple):
    """Compressed rows of an edge list; n_out receivers, n_in senders, E edges.

    edge_index [2, E] int64 (sender, receiver) as the caller gave it; receiver_ptr [n_out + 1] int32: row i holds the
    positions receiver_ptr[i] .. receiver_ptr[i + 1] of perm [E] int32, the edge numbers sorted by receiver; sender [E]
    int32: the sender of edge perm[k]. sender_ptr [n_in + 1] and sender_perm [E] int32: the same by sender, whose
    entries are edge numbers, empty unless asked for. n_in is what the senders were checked against.
    """

    edge_index: torch.Tensor
    receiver_ptr: torch.Tensor
    perm: torch.Tensor
    sender: torch.Tensor
    sender_ptr: torch.Tensor
    sender_perm: torch.Tensor
    n_in: int

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors in order, as the custom ops take them."""
        return self[:-1]

    @property
    def n_out(self) -> int:
        return self.receiver_ptr.shape[0] - 1

    @property
    def n_edges(self) -> int:
        return self.perm.shape[0]


def capturing(tensor: torch.Tensor) -> bool:
    """Whether work on the tensor's device is being captured in a CUDA graph: then nothing may synchronise."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _check_range(edge_index: torch.Tensor, n_in: int, n_out: int) -> None:
    # One synchronisation per graph. A CUDA graph under capture cannot be asked; its warm-up run was.
    if edge_index.shape[1] == 0 or capturing(edge_index):
        return
    low = edge_index.amin(dim=1)
    high = edge_index.amax(dim=1)
    low_s, low_r, high_s, high_r = torch.cat((low, high)).tolist()
    for row, name, lowest, highest, n in ((0, "sender", low_s, high_s, n_in), (1, "receiver", low_r, high_r, n_out)):
        if lowest < 0 or highest >= n:
            raise ValueError(
                f"edge_index[{row}] ({name}) holds {lowest if lowest < 0 else highest}, but there are {n} nodes: "
                f"indices must lie in 0 .. {n - 1}"
            )


def row_ptr(ordered: torch.Tensor, n: int) -> torch.Tensor:
    """[n + 1] int32: where each of 0 .. n - 1 begins in a sorted index, and its length."""
    return torch.searchsorted(ordered, torch.arange(n + 1, device=ordered.device, dtype=ordered.dtype), out_int32=True)


def compressed_rows(index: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ptr [n + 1], perm) int32: the places where `index` is i are perm[ptr[i]] .. perm[ptr[i + 1] - 1], in order."""
    # A radix sort takes a pass for each byte of its keys.
    narrow = next((t for t in (torch.uint8, torch.int16, torch.int32) if n <= torch.iinfo(t).max), torch.int64)
    ordered, perm = torch.sort(index.to(narrow), stable=True)
    return row_ptr(ordered, n), perm.to(torch.int32)


@torch.library.custom_op("mace_triton::graph_plan", mutates_args=())
def _graph_plan(edge_index: torch.Tensor, n_in: int, n_out: int, by_sender: bool) -> list[torch.Tensor]:
    _check_range(edge_index, n_in, n_out)
    receiver_ptr, perm = compressed_rows(edge_index[1], n_out)
    sender = edge_index[0].index_select(0, perm).to(torch.int32)
    if by_sender:
        sender_ptr, sender_perm = compressed_rows(edge_index[0], n_in)
    else:
        sender_ptr, sender_perm = perm.new_empty(0), perm.new_empty(0)
    return [receiver_ptr, perm, sender, sender_ptr, sender_perm]


@_graph_plan.register_fake
def _(edge_index, n_in, n_out, by_sender):
    def ints(n):
        return edge_index.new_empty(n, dtype=torch.int32)

    n_edges = edge_index.shape[1]
    rows = (n_in + 1, n_edges) if by_sender else (0, 0)
    return [ints(n_out + 1), ints(n_edges), ints(n_edges), ints(rows[0]), ints(rows[1])]


_last: tuple | None = None
_given = threading.local()


@contextmanager
def given(plan: GraphPlan) -> Iterator[None]:
    """Inside, in this thread, `graph_plan` gives `plan` for its edge_index: whoever made the edges sorted them."""
    _given.plan = plan
    try:
        yield
    finally:
        _given.plan = None


def graph_plan(edge_index: torch.Tensor, n_in: int, n_out: int, *, by_sender: bool = False) -> GraphPlan:
    """Sort the edges of a graph by receiver; the newest plan is kept and given again for the same, unchanged tensor.

    edge_index: [2, E] int64 or int32, (sender, receiver), in any order, duplicates allowed. n_in, n_out: how many
    nodes the senders and receivers index. by_sender: also sort by sender, which a deterministic backward needs.

    Raises TypeError for another dtype, ValueError for another shape or an index out of range (checked once a graph).
    """
    global _last
    _check_shape(edge_index)
    plan = getattr(_given, "plan", None)
    if (
        plan is not None
        and plan.edge_index is edge_index
        and not by_sender
        and (plan.n_in, plan.n_out) == (n_in, n_out)
    ):
        return plan
    if torch.compiler.is_compiling() or edge_index.is_inference() or capturing(edge_index):
        return GraphPlan(edge_index, *_graph_plan(edge_index, n_in, n_out, by_sender), n_in)
    tag = (edge_index._version, n_in, n_out, by_sender)
    if _last is None or _last[0] is not edge_index or _last[1] != tag:
        plan = GraphPlan(edge_index, *_graph_plan(edge_index, n_in, n_out, by_sender), n_in)
        _last = (edge_index, tag, plan)
        return plan
    return _last[2]


def _check_shape(edge_index: torch.Tensor) -> None:
    if edge_index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"edge_index must be int64 or int32, got {edge_index.dtype}")
    if edge_index.ndim != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"edge_index must have shape [2, E], got {list(edge_index.shape)}")


def check_edges(edge_index: torch.Tensor, nodes: int) -> None:
    """Raise what `graph_plan` raises; where it keeps a plan, that is made here, and the convolution finds it."""
    _check_shape(edge_index)
    if torch.compiler.is_compiling():
        return
    if edge_index.is_inference():
        _check_range(edge_index, nodes, nodes)
    elif not capturing(edge_index):
        graph_plan(edge_index, nodes, nodes)
