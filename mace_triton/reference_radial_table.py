"""Functions of a length from a table of cubic polynomials, in plain PyTorch: see `kernels/radial_table.py`."""

from __future__ import annotations

import torch


def _rows(r, table, edge_index, kind, per_angstrom: float):
    """(u [E, 1], the coefficients [E, 4, H]) of each edge's interval."""
    kinds, _, intervals, _, width = table.shape
    t = r[:, 0] * per_angstrom
    k = t.nan_to_num().clamp(0, intervals - 1).long()
    u = torch.where(t - k > 1, 1.0, t - k)
    if kinds > 1:
        sender, receiver = kind.long()[edge_index]
        k = k + (sender * kinds + receiver) * intervals
    return u[:, None], table.view(-1, 4, width)[k]


def forward(r, table, edge_index, kind, per_angstrom: float) -> torch.Tensor:
    """As `kernels.radial_table.forward`."""
    u, a = _rows(r, table, edge_index, kind, per_angstrom)
    return a[:, 0] + u * (a[:, 1] + u * (a[:, 2] + u * a[:, 3]))


def grad(g, r, table, edge_index, kind, per_angstrom: float) -> torch.Tensor:
    """As `kernels.radial_table.grad`."""
    u, a = _rows(r, table, edge_index, kind, per_angstrom)
    slope = a[:, 1] + u * (2.0 * a[:, 2] + 3.0 * u * a[:, 3])
    return (g * slope).sum(1, keepdim=True) * per_angstrom
