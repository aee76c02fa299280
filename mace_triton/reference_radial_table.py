"""Functions of a length from a table of cubic polynomials, in plain PyTorch: see `kernels/radial_table.py`."""

from __future__ import annotations

import torch


def radial_table(r, table, edge_index, kind, per_angstrom: float) -> tuple[torch.Tensor, torch.Tensor]:
    """As `kernels.radial_table.radial_table`."""
    kinds, _, intervals, _, width = table.shape
    t = r[:, 0] * per_angstrom
    k = t.nan_to_num().clamp(0, intervals - 1).long()
    u = torch.where(t - k > 1, 1.0, t - k)[:, None]
    if kinds > 1:
        sender, receiver = kind.long()[edge_index]
        k = k + (sender * kinds + receiver) * intervals
    a0, a1, a2, a3 = table.view(-1, 4, width)[k].unbind(1)
    return a0 + u * (a1 + u * (a2 + u * a3)), per_angstrom * (a1 + u * (2.0 * a2 + 3.0 * u * a3))
