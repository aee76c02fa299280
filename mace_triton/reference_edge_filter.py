"""The edges within the cutoff out of a longer list, in plain PyTorch: see `kernels/edge_filter.py`."""

from __future__ import annotations

import torch


def edge_filter(x, was, rows, reach, cutoff: float, capacity: int, pairs: int, idle: int, far: float) -> tuple:
    """As `kernels.edge_filter.edge_filter`."""
    ptr, sender, shift, unit, twin = rows
    nodes = ptr.shape[0] - 1
    gone, room = (x[:nodes] - was[:nodes]).square().sum(1), reach * reach
    moved = torch.where(gone <= room, torch.where(gone > 0.5 * room, gone / room, 0.0), 2.0).amax(0, True).float()
    number = torch.arange(sender.shape[0], device=x.device)
    receiver = torch.searchsorted(ptr, number, right=True, out_int32=True) - 1  # `nodes` where the list is not filled
    listed = number < ptr[-1]
    vector = x[receiver.clamp(max=nodes - 1)] - x[sender] + shift
    near = (vector.square().sum(1) < cutoff * cutoff) & listed
    start = torch.zeros_like(ptr)
    start[1:] = torch.zeros_like(ptr[1:]).index_add(0, receiver.clamp(max=nodes - 1), near.to(ptr.dtype)).cumsum(0)
    kept = number[near][:capacity]
    senders, receivers = sender[kept], receiver[kept]
    spare = capacity - kept.shape[0]
    pads = (nodes + torch.arange(spare, device=x.device) // max(1, -(-spare // idle))).to(torch.int32)
    away = torch.zeros(spare, 3, dtype=x.dtype, device=x.device)
    away[:, 0] = 1.0
    edge_index = torch.stack((torch.cat((senders, pads)), torch.cat((receivers, pads)))).long()
    behind = start.new_full((idle + 1,), kept.shape[0])
    row_ptr = torch.cat((start[:-1].clamp(max=capacity), behind)).to(torch.int32)
    shifts, units = torch.cat((shift[kept], far * away)), torch.cat((unit[kept], away))
    counts = near & (twin >= number)
    numbers = (counts.cumsum(0) - 1).to(torch.int32)
    pair = torch.full((capacity,), pairs - 1, dtype=torch.int32, device=x.device)
    pair[: kept.shape[0]] = numbers[torch.minimum(kept, twin[kept])].clamp(max=pairs - 1)
    edge_of = torch.full((pairs,), capacity - 1, dtype=torch.int32, device=x.device)
    first = counts[kept].nonzero()[:, 0]
    edge_of[numbers[kept[first]][:pairs]] = first[:pairs].to(torch.int32)
    senders = edge_index[0].to(torch.int32)
    return edge_index, shifts, units, row_ptr, senders, pair, edge_of, start[-1:], moved
