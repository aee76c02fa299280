"""The gradients of atoms from those of their edges, in plain PyTorch: see `kernels/edge_forces.py`."""

from __future__ import annotations

import torch

from . import reference_edge_embedding as embedding


def edge_forces(gy, gr, v, row_ptr, sender) -> tuple[torch.Tensor, torch.Tensor]:
    """As `kernels.edge_forces.edge_forces`."""
    nodes = row_ptr.shape[0] - 1
    r = v.square().sum(1, keepdim=True).sqrt()
    e = embedding.harmonics_grad(gy, v) + torch.where(r > 0, gr / torch.where(r > 0, r, 1.0), 0.0) * v
    receiver = torch.repeat_interleave(row_ptr.diff().long())
    e, v, sender = (t[: len(receiver)] for t in (e, v, sender))  # edges behind the last row move nothing
    gx = v.new_zeros(nodes, 3).index_add_(0, receiver, e).index_add_(0, sender.long(), -e)
    dyads = v[:, :, None] * e[:, None, :]
    return gx, v.new_zeros(nodes, 3, 3).index_add_(0, receiver, dyads)
