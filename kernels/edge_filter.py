"""The edges within the cutoff, out of a longer list of candidates that stays valid while the atoms move a little.

The candidates lie in rows, one for each receiver: row i is ptr[i] .. ptr[i + 1]. Candidate k of row i is near where

    |x_i - x_sender[k] + shift[k]| < cutoff

Two passes, a program for each receiver: the first marks and counts the near ones, and notes whether some atom has gone
further than `reach` from where it was when the candidates were found; a cumulative sum of the counts says where each
row begins; the second writes the near ones there, in their order. So edges come sorted by receiver, always in the same
order, and nothing is asked of the host.

A list has `capacity` places, and what is near may be less. The rest is filled with edges of idle nodes, `idle` of them
behind the real ones: from such a node to itself and further than any cutoff, at most PAD an idle node but for the
first. What is near may also be more: places beyond the capacity are not written, and the count tells.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PAD = 64
"""Idle edges an idle node."""


@triton.jit
def edge_filter_mark_kernel(
    x_ptr,  # [nodes, 3]
    was_ptr,  # [nodes, 3]
    ptr_ptr,  # [nodes + 1]
    sender_ptr,  # [candidates]
    shift_ptr,  # [candidates, 3]
    near_ptr,  # [candidates] int8
    count_ptr,  # [nodes + 1], the first is zero
    moved_ptr,  # [1], zero
    reach_ptr,  # [1]
    square,
    BLOCK: tl.constexpr,
):
    node = tl.program_id(0)
    x, y, z = tl.load(x_ptr + 3 * node), tl.load(x_ptr + 3 * node + 1), tl.load(x_ptr + 3 * node + 2)
    a, b, c = x - tl.load(was_ptr + 3 * node), y - tl.load(was_ptr + 3 * node + 1), z - tl.load(was_ptr + 3 * node + 2)
    reach = tl.load(reach_ptr)
    stays = a * a + b * b + c * c <= reach * reach  # false for NaN
    tl.atomic_max(moved_ptr, 1, mask=stays == 0, sem="relaxed")
    begin, end = tl.load(ptr_ptr + node), tl.load(ptr_ptr + node + 1)
    total = tl.zeros([BLOCK], tl.int32)
    for first in range(begin, end, BLOCK):
        k = first + tl.arange(0, BLOCK)
        inside = k < end
        s = tl.load(sender_ptr + k, mask=inside, other=0)
        dx = x - tl.load(x_ptr + 3 * s, mask=inside, other=0.0)
        dy = y - tl.load(x_ptr + 3 * s + 1, mask=inside, other=0.0)
        dz = z - tl.load(x_ptr + 3 * s + 2, mask=inside, other=0.0)
        dx += tl.load(shift_ptr + 3 * k, mask=inside, other=0.0)
        dy += tl.load(shift_ptr + 3 * k + 1, mask=inside, other=0.0)
        dz += tl.load(shift_ptr + 3 * k + 2, mask=inside, other=0.0)
        near = ((dx * dx + dy * dy + dz * dz < square) & inside).to(tl.int32)
        tl.store(near_ptr + k, near.to(tl.int8), mask=inside)
        total += near
    tl.store(count_ptr + node + 1, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["nodes", "idle", "capacity"])
def edge_filter_write_kernel(
    ptr_ptr,  # [nodes + 1]
    sender_ptr,  # [candidates]
    shift_ptr,  # [candidates, 3]
    unit_ptr,  # [candidates, 3]
    near_ptr,  # [candidates]
    start_ptr,  # [nodes + 1], where each receiver's edges begin
    row_ptr,  # [nodes + idle + 1]
    from_ptr,  # [capacity] int32
    edge_ptr,  # [2, capacity] int64
    out_shift_ptr,  # [capacity, 3]
    out_unit_ptr,  # [capacity, 3]
    nodes,
    idle,
    capacity,
    far,
    BLOCK: tl.constexpr,
    EACH: tl.constexpr,
):
    node = tl.program_id(0)
    if node < nodes:
        begin, end = tl.load(ptr_ptr + node), tl.load(ptr_ptr + node + 1)
        place = tl.load(start_ptr + node)
        tl.store(row_ptr + node, tl.minimum(place, capacity))
        for first in range(begin, end, BLOCK):
            k = first + tl.arange(0, BLOCK)
            near = tl.load(near_ptr + k, mask=k < end, other=0).to(tl.int32)
            to = place + tl.cumsum(near, axis=0) - near
            mask = (near > 0) & (to < capacity)
            s = tl.load(sender_ptr + k, mask=mask, other=0)
            tl.store(from_ptr + to, s, mask=mask)
            tl.store(edge_ptr + to, s.to(tl.int64), mask=mask)
            tl.store(edge_ptr + capacity.to(tl.int64) + to, (tl.zeros_like(s) + node).to(tl.int64), mask=mask)
            for axis in tl.static_range(3):
                tl.store(out_shift_ptr + 3 * to + axis, tl.load(shift_ptr + 3 * k + axis, mask=mask), mask=mask)
                tl.store(out_unit_ptr + 3 * to + axis, tl.load(unit_ptr + 3 * k + axis, mask=mask), mask=mask)
            place += tl.sum(near, axis=0)
    else:
        to = (node - nodes) * BLOCK + tl.arange(0, BLOCK)
        count = tl.minimum(tl.load(start_ptr + nodes), capacity)
        mask = (to >= count) & (to < capacity)
        s = nodes + idle - 1 - tl.minimum((capacity - 1 - to) // EACH, idle - 1)
        tl.store(from_ptr + to, s, mask=mask)
        tl.store(edge_ptr + to, s.to(tl.int64), mask=mask)
        tl.store(edge_ptr + capacity.to(tl.int64) + to, s.to(tl.int64), mask=mask)
        for axis in tl.static_range(3):
            unit = tl.full([BLOCK], 1.0 if axis == 0 else 0.0, tl.float32)
            tl.store(out_shift_ptr + 3 * to + axis, far * unit, mask=mask)
            tl.store(out_unit_ptr + 3 * to + axis, unit, mask=mask)
        row = tl.where(to == 0, count, tl.maximum(capacity - (idle - to) * EACH, count))
        tl.store(row_ptr + nodes + to, row, mask=to <= idle)


def edge_filter(x, was, rows, reach, cutoff: float, capacity: int, idle: int, far: float) -> tuple:
    """rows: (ptr [N + 1], sender [K], shift [K, 3], unit_shift [K, 3]), the indices int32; x and was [N or more, 3];
    reach [1].

    Returns edge_index [2, capacity] int64 (sender, receiver), shifts and unit shifts [capacity, 3], row_ptr
    [N + idle + 1] and sender [capacity] int32, how many edges are near [1], and whether an atom has gone further than
    `reach` [1], both int32.
    """
    ptr, sender, shift, unit = rows
    nodes, block = ptr.shape[0] - 1, 128
    near = torch.empty(sender.shape, dtype=torch.int8, device=x.device)
    count, moved = ptr.new_zeros(nodes + 1), ptr.new_zeros(1)
    edge_index = torch.empty(2, capacity, dtype=torch.int64, device=x.device)
    shifts, units = (x.new_empty(capacity, 3) for _ in range(2))
    row_ptr, senders = ptr.new_empty(nodes + idle + 1), ptr.new_empty(capacity)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        edge_filter_mark_kernel[(nodes,)](
            *(x, was, ptr, sender, shift, near, count, moved, reach), cutoff * cutoff, BLOCK=block, num_warps=4
        )
        start = torch.cumsum(count, 0, dtype=torch.int32)
        edge_filter_write_kernel[(nodes + triton.cdiv(max(capacity, idle + 1), block),)](
            *(ptr, sender, shift, unit, near, start, row_ptr, senders, edge_index, shifts, units),
            *(nodes, idle, capacity, far),
            BLOCK=block,
            EACH=PAD,
            num_warps=4,
        )
    return edge_index, shifts, units, row_ptr, senders, start[-1:], moved


def offline_cases(target: str = "sm_90", dtypes: tuple[str, ...] = ("fp64", "fp32")) -> list:
    """Both passes, for `offline.compile_cases`."""
    from .offline import Case

    words = {"near_ptr": "*i8", "edge_ptr": "*i64"} | dict.fromkeys(
        ("ptr_ptr", "sender_ptr", "count_ptr", "moved_ptr", "start_ptr", "row_ptr", "from_ptr"), "*i32"
    )
    scalars = dict.fromkeys(("square", "far"), "fp32") | dict.fromkeys(("nodes", "idle", "capacity"), "i32")
    names = {
        "mark": "x_ptr was_ptr ptr_ptr sender_ptr shift_ptr near_ptr count_ptr moved_ptr reach_ptr square",
        "write": "ptr_ptr sender_ptr shift_ptr unit_ptr near_ptr start_ptr row_ptr from_ptr edge_ptr out_shift_ptr "
        "out_unit_ptr nodes idle capacity far",
    }
    cases = []
    for dtype in dtypes:
        for step, arguments in names.items():
            signature = {name: words.get(name, scalars.get(name, f"*{dtype}")) for name in arguments.split()}
            constants = {"BLOCK": 128} | ({"EACH": PAD} if step == "write" else {})
            pointers = tuple(name for name in signature if name.endswith("_ptr"))
            launch = (constants, 4, 1, pointers)
            cases.append(Case(f"{step} {dtype}", "edge_filter", f"edge_filter_{step}_kernel", signature, *launch))
    return cases
