"""The edges within the cutoff, out of a longer list of candidates that stays valid while the atoms move a little.

The candidates lie in rows, one for each receiver: row i is ptr[i] .. ptr[i + 1]. Candidate k of row i is near where

    |x_i - x_sender[k] + shift[k]| < cutoff

Two passes, a program for each receiver: the first marks and counts the near ones, and notes how far, in units of
`reach`, an atom has gone from where it was when the candidates were found; a cumulative sum of the counts says where
each row begins; the second writes the near ones there, in their order. So edges come sorted by receiver, always in the
same order, and nothing is asked of the host.

What depends on a length alone is the same for an edge and its way back, so both share a pair. Candidates know their
twin; the one that comes first counts the pair, in the same passes (its number in the upper half of a word), and a third
pass gives every edge the number of its pair. A candidate whose twin is itself has a pair of its own.

A list has `capacity` places, and what is near may be less. The rest is filled with edges of idle nodes, `idle` of them
behind the real ones: from such a node to itself and further than any cutoff, as many for each. They are in no row: an
idle node's is empty, so programs that walk rows do not see them, however many there are. What is near may also be more:
places beyond the capacity are not written, and the count tells.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def edge_filter_mark_kernel(
    x_ptr,  # [nodes, 3]
    was_ptr,  # [nodes, 3]
    ptr_ptr,  # [nodes + 1]
    sender_ptr,  # [candidates]
    shift_ptr,  # [candidates, 3]
    twin_ptr,  # [candidates]
    near_ptr,  # [candidates] int8
    count_ptr,  # [nodes + 1] int64, the first is zero: edges, and 2^32 times those that count a pair
    moved_ptr,  # [1] float32, zero
    reach_ptr,  # [1]
    square,
    BLOCK: tl.constexpr,
):
    node = tl.program_id(0)
    x, y, z = tl.load(x_ptr + 3 * node), tl.load(x_ptr + 3 * node + 1), tl.load(x_ptr + 3 * node + 2)
    a, b, c = x - tl.load(was_ptr + 3 * node), y - tl.load(was_ptr + 3 * node + 1), z - tl.load(was_ptr + 3 * node + 2)
    reach = tl.load(reach_ptr)
    gone, room = a * a + b * b + c * c, reach * reach
    part = tl.where(gone > 0.5 * room, gone / tl.where(room > 0, room, 1.0), 0.0)
    part = tl.where(gone <= room, part, 2.0).to(tl.float32)  # 2 for NaN
    tl.atomic_max(moved_ptr, part, mask=part > 0, sem="relaxed")
    begin, end = tl.load(ptr_ptr + node), tl.load(ptr_ptr + node + 1)
    total = tl.zeros([BLOCK], tl.int64)
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
        counts = (tl.load(twin_ptr + k, mask=inside, other=0) >= k).to(tl.int64)
        total += near.to(tl.int64) * (1 + (counts << 32))
    tl.store(count_ptr + node + 1, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["nodes", "idle", "capacity", "pairs"])
def edge_filter_write_kernel(
    ptr_ptr,  # [nodes + 1]
    sender_ptr,  # [candidates]
    shift_ptr,  # [candidates, 3]
    unit_ptr,  # [candidates, 3]
    twin_ptr,  # [candidates]
    near_ptr,  # [candidates]
    start_ptr,  # [nodes + 1] int64, where each receiver's edges, and 2^32 times where its pairs begin
    row_ptr,  # [nodes + idle + 1]
    from_ptr,  # [capacity] int32
    edge_ptr,  # [2, capacity] int64
    out_shift_ptr,  # [capacity, 3]
    out_unit_ptr,  # [capacity, 3]
    number_ptr,  # [candidates], the pairs' numbers, where they are counted
    chosen_ptr,  # [capacity], the candidate of each edge
    edge_of_ptr,  # [pairs]
    nodes,
    idle,
    capacity,
    pairs,
    far,
    BLOCK: tl.constexpr,
):
    node = tl.program_id(0)
    if node < nodes:
        begin, end = tl.load(ptr_ptr + node), tl.load(ptr_ptr + node + 1)
        start = tl.load(start_ptr + node)
        place, number = (start & 0x7FFFFFFF).to(tl.int32), (start >> 32).to(tl.int32)
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
            counts = near * (tl.load(twin_ptr + k, mask=k < end, other=0) >= k).to(tl.int32)
            pair = number + tl.cumsum(counts, axis=0) - counts
            tl.store(number_ptr + k, pair, mask=counts > 0)
            tl.store(chosen_ptr + to, k, mask=mask)
            tl.store(edge_of_ptr + pair, tl.minimum(to, capacity - 1), mask=(counts > 0) & (pair < pairs))
            place += tl.sum(near, axis=0)
            number += tl.sum(counts, axis=0)
    else:
        to = (node - nodes) * BLOCK + tl.arange(0, BLOCK)
        count = tl.minimum((tl.load(start_ptr + nodes) & 0x7FFFFFFF).to(tl.int32), capacity)
        mask = (to >= count) & (to < capacity)
        s = nodes + (to - count) // tl.maximum(tl.cdiv(capacity - count, idle), 1)
        tl.store(from_ptr + to, s, mask=mask)
        tl.store(edge_ptr + to, s.to(tl.int64), mask=mask)
        tl.store(edge_ptr + capacity.to(tl.int64) + to, s.to(tl.int64), mask=mask)
        for axis in tl.static_range(3):
            unit = tl.full([BLOCK], 1.0 if axis == 0 else 0.0, tl.float32)
            tl.store(out_shift_ptr + 3 * to + axis, far * unit, mask=mask)
            tl.store(out_unit_ptr + 3 * to + axis, unit, mask=mask)
        tl.store(row_ptr + nodes + to, tl.zeros_like(to) + count, mask=to <= idle)


@triton.jit(do_not_specialize=["nodes", "capacity", "pairs"])
def edge_filter_pair_kernel(
    twin_ptr,  # [candidates]
    number_ptr,  # [candidates]
    chosen_ptr,  # [capacity]
    start_ptr,  # [nodes + 1] int64
    pair_ptr,  # [capacity]
    edge_of_ptr,  # [pairs]
    count_ptr,  # [1]
    nodes,
    capacity,
    pairs,
    BLOCK: tl.constexpr,
):
    edge = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(start_ptr + nodes)
    count, numbers = (total & 0x7FFFFFFF).to(tl.int32), (total >> 32).to(tl.int32)
    tl.store(count_ptr + edge, count, mask=edge == 0)
    there = edge < tl.minimum(count, capacity)
    k = tl.load(chosen_ptr + edge, mask=there, other=0)
    k = tl.minimum(k, tl.load(twin_ptr + k, mask=there, other=0))
    pair = tl.load(number_ptr + k, mask=there, other=0)
    tl.store(pair_ptr + edge, tl.where(there, tl.minimum(pair, pairs - 1), pairs - 1), mask=edge < capacity)
    tl.store(edge_of_ptr + edge, tl.zeros_like(edge) + capacity - 1, mask=(edge >= numbers) & (edge < pairs))


def edge_filter(x, was, rows, reach, cutoff: float, capacity: int, pairs: int, idle: int, far: float) -> tuple:
    """rows: (ptr [N + 1], sender [K], shift [K, 3], unit_shift [K, 3], twin [K]), the indices int32; x and was [N or
    more, 3]; reach [1].

    Returns edge_index [2, capacity] int64 (sender, receiver), shifts and unit shifts [capacity, 3], row_ptr
    [N + idle + 1] and sender [capacity] int32, the pair of each edge [capacity] and an edge of each pair [pairs] int32,
    how many edges are near [1] int32, and `moved` [1] float32: the largest square of how far an atom has gone, in units
    of `reach`, zero below a half, 2 beyond 1.
    """
    ptr, sender, shift, unit, twin = rows
    nodes, block = ptr.shape[0] - 1, 128
    near = torch.empty(sender.shape, dtype=torch.int8, device=x.device)
    counts = torch.zeros(nodes + 2, dtype=torch.int64, device=x.device)
    moved = counts[-1:].view(torch.float32)[:1]
    edge_index = torch.empty(2, capacity, dtype=torch.int64, device=x.device)
    shifts, units = (x.new_empty(capacity, 3) for _ in range(2))
    row_ptr, count = ptr.new_empty(nodes + idle + 1), ptr.new_empty(1)
    senders, chosen, pair = (ptr.new_empty(capacity) for _ in range(3))
    number, edge_of = torch.empty_like(twin), ptr.new_empty(pairs)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        edge_filter_mark_kernel[(nodes,)](
            *(x, was, ptr, sender, shift, twin, near, counts, moved, reach), cutoff * cutoff, BLOCK=block, num_warps=4
        )
        start = torch.cumsum(counts[:-1], 0)
        edge_filter_write_kernel[(nodes + triton.cdiv(max(capacity, idle + 1), block),)](
            *(ptr, sender, shift, unit, twin, near, start, row_ptr, senders, edge_index, shifts, units),
            *(number, chosen, edge_of, nodes, idle, capacity, pairs, far),
            BLOCK=block,
            num_warps=4,
        )
        edge_filter_pair_kernel[(triton.cdiv(max(capacity, pairs), block),)](
            *(twin, number, chosen, start, pair, edge_of, count, nodes, capacity, pairs), BLOCK=block, num_warps=4
        )
    return edge_index, shifts, units, row_ptr, senders, pair, edge_of, count, moved


def offline_cases(target: str = "sm_90", dtypes: tuple[str, ...] = ("fp64", "fp32")) -> list:
    """Every pass, for `offline.compile_cases`."""
    from .offline import Case

    words = {"near_ptr": "*i8", "moved_ptr": "*fp32"} | dict.fromkeys(("edge_ptr", "start_ptr"), "*i64")
    words |= dict.fromkeys(("ptr_ptr", "sender_ptr", "twin_ptr", "row_ptr", "from_ptr", "number_ptr"), "*i32")
    words |= dict.fromkeys(("chosen_ptr", "pair_ptr", "edge_of_ptr"), "*i32")
    scalars = dict.fromkeys(("square", "far"), "fp32") | dict.fromkeys(("nodes", "idle", "capacity", "pairs"), "i32")
    names = {
        "mark": "x_ptr was_ptr ptr_ptr sender_ptr shift_ptr twin_ptr near_ptr count_ptr moved_ptr reach_ptr square",
        "write": "ptr_ptr sender_ptr shift_ptr unit_ptr twin_ptr near_ptr start_ptr row_ptr from_ptr edge_ptr "
        "out_shift_ptr out_unit_ptr number_ptr chosen_ptr edge_of_ptr nodes idle capacity pairs far",
        "pair": "twin_ptr number_ptr chosen_ptr start_ptr pair_ptr edge_of_ptr count_ptr nodes capacity pairs",
    }
    cases = []
    for dtype in dtypes:
        for step, arguments in names.items():
            signature = {name: words.get(name, scalars.get(name, f"*{dtype}")) for name in arguments.split()}
            signature |= {"count_ptr": "*i64" if step == "mark" else "*i32"} if "count_ptr" in signature else {}
            constants = {"BLOCK": 128}
            pointers = tuple(name for name in signature if name.endswith("_ptr"))
            launch = (constants, 4, 1, pointers)
            cases.append(Case(f"{step} {dtype}", "edge_filter", f"edge_filter_{step}_kernel", signature, *launch))
    return cases
