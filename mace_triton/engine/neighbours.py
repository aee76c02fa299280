"""Which atoms may come within the cutoff: vesin's neighbour list on the model's device, in rows by receiver."""

from __future__ import annotations

import math

import torch
import vesin.torch

from ..ops.edge_filter import Candidates
from ..ops.graph import row_ptr

UNTOLD = 0.5**0.5
"""How far an atom may have gone, in units of what it may go, without being told of (`ops.edge_filter`)."""


class Watch:
    """`leaving`: whether an atom that goes on as it did since the last step leaves the skin in the next.

    Then candidates are better found before that step, which else would have to be evaluated a second time.
    """

    def __init__(self):
        self.gone, self.leaving = UNTOLD, False

    def see(self, moved: float) -> None:
        """moved: the largest square of how far an atom has gone, in units of how far it may go."""
        before, self.gone = self.gone, max(UNTOLD, math.sqrt(moved))
        self.leaving = 2 * self.gone - before > 1


def candidates(
    positions: torch.Tensor, cells: torch.Tensor, periodic: torch.Tensor, sizes: list[int], reach: float, cutoff: float
) -> tuple[Candidates, torch.Tensor]:
    """All pairs nearer than `reach` (angstrom) of systems one behind the other; which [K] are nearer than `cutoff`.

    positions [N, 3] float64, anywhere in space; cells [B, 3, 3] float64, rows are the cell vectors; periodic [B, 3]
    bool, on the CPU; sizes: atoms of each system. Cells smaller than the cutoff have several pairs of the same atoms.
    The shifts come in float64.
    """
    finder = vesin.torch.NeighborList(reach, True)
    found, first = [], 0
    for cell, wraps, size in zip(cells, periodic, sizes, strict=True):
        points = positions[first : first + size]
        receiver, sender, unit, distance = _pairs(finder, points, cell * wraps.to(cell)[:, None], wraps)
        unit = -unit.to(points.dtype)  # vesin's pairs go from the first atom to the second: here the first receives
        found.append((receiver + first, sender + first, unit, unit @ cell, distance < cutoff))
        first += size
    rows = [torch.cat(parts) for parts in zip(*found, strict=True)]
    order, twin = in_order(*rows[:3], atoms=first)
    receiver, sender, unit, shift, near = (part[order] for part in rows)
    return Candidates(row_ptr(receiver, first), sender.to(torch.int32), shift, unit, twin.to(torch.int32)), near


def strain(rows: torch.Tensor, matrices: torch.Tensor, system: torch.Tensor | None, out: torch.Tensor) -> None:
    """rows [K, 3], each times the matrix, out of [B, 3, 3], of its system [K]; where there is one, system is not read.

    Three launches: as a matrix product, of one matrix or of batches, it takes a GPU many times as long.
    """
    a, b, c = matrices[0] if len(matrices) == 1 else matrices[system].unbind(1)
    x, y, z = rows.split(1, dim=1)
    torch.mul(x, a, out=out).addcmul_(y, b).addcmul_(z, c)


def in_order(receiver, sender, unit: torch.Tensor, atoms: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(order, twin) of pairs [K] of so many atoms, unit shifts [K, 3]: a GPU finds them in another order every time.

    order: by receiver, sender and unit shift. twin: in that order, for each pair the place of the one with the atoms
    exchanged and the opposite unit shift; a pair that has no such other, or several, is its own twin. Where 64 bits are
    too few to number pairs, they are in order by receiver alone and without twins.
    """
    place = torch.arange(receiver.shape[0], device=receiver.device)
    numbers = _numbers(receiver, sender, unit, atoms) if len(place) else None
    if numbers is None:
        return receiver.argsort(stable=True), place
    (there, order), back = numbers[0].sort(), numbers[1]
    back = back[order]
    at = torch.searchsorted(there, back).clamp(max=len(there) - 1)
    twin = torch.where(there[at] == back, at, place)
    return order, torch.where(twin[twin] == place, twin, place)


def _numbers(receiver, sender, unit: torch.Tensor, atoms: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A number for every pair and for the one with the opposite vector; None where 64 bits are too few.

    Pairs of the same atoms have as many numbers as there are unit shifts within -half .. half, zero in the middle.
    """
    x, y, z = unit.long().unbind(1)
    base = 2 * int(unit.abs().max()) + 1
    if atoms**2 * base**3 >= 1 << 62:
        return None
    shift = (x * base + y) * base + z
    ahead, back = (
        (one * atoms + two) * base**3 + base**3 // 2 for one, two in ((receiver, sender), (sender, receiver))
    )
    return ahead + shift, back - shift


def _pairs(finder, points: torch.Tensor, cell: torch.Tensor, wraps: torch.Tensor) -> list[torch.Tensor]:
    """vesin's pairs, in no order: `in_order` sorts them anyway."""
    try:
        return finder.compute(points, cell, wraps, "ijSd")
    except RuntimeError as error:
        if points.is_cuda and "MAX_PAIRS" in str(error):  # its room on a GPU ends at some hundred pairs an atom
            return [part.to(points.device) for part in finder.compute(points.cpu(), cell.cpu(), wraps, "ijSd")]
        raise


def padded(pairs: Candidates, places: int) -> Candidates:
    """The pairs in `places` places (no fewer than they need); what is behind them is zero."""
    spare = places - pairs.sender.shape[0]
    rows = (torch.nn.functional.pad(t, (0, 0, 0, spare)) for t in (pairs.shift, pairs.unit_shift))
    sender, twin = (torch.nn.functional.pad(t, (0, spare)) for t in (pairs.sender, pairs.twin))
    return Candidates(pairs.ptr, sender, *rows, twin)
