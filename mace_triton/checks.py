"""What must hold for any energy and forces, whatever the model: tested on the user's structure as steps run it.

Forces are the derivative of the energy, stress that by a strain; nothing depends on where the structure lies, how it is
turned or how its atoms are numbered; the energy has no jump where a neighbour leaves the cutoff. Derivatives are tested
as work along a path, by Gauss-Legendre quadrature: W = - sum_k w_k F(x_k).d must be E(end) - E(start). That divides
nothing by a small step, so what rounding may do is known: an energy is as good as the certificate's limit, and two of
them differ by no more than twice that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ase
import numpy as np

from .certify import Certificate

Evaluate = Callable[[ase.Atoms], dict]
"""Atoms -> {"energy": eV, "forces": [N, 3] eV/angstrom, "stress": [..., 3, 3] eV/angstrom^3 if periodic throughout}."""

POINTS, WEIGHTS = np.polynomial.legendre.leggauss(6)
STEP, STRAIN, CROSSING = 0.03, 0.004, 0.02
"""Root mean square displacement (angstrom), strain, and how far about the cutoff a neighbour is moved (angstrom)."""
ASKED, FAR = 64, 0.5
"""How many atoms are asked for a neighbour near the cutoff, and how far from it (angstrom) that may be."""


@dataclass(frozen=True)
class Check:
    """One property: `error` and `limit` in `unit`. error is None where the structure gives no occasion to test it."""

    name: str
    error: float | None
    limit: float
    unit: str

    @property
    def passed(self) -> bool:
        return self.error is None or self.error <= self.limit  # False for nan

    def __str__(self) -> str:
        if self.error is None:
            return f"{self.name}: nothing to test here"
        verdict = "within" if self.passed else "BEYOND"
        return f"{self.name}: {self.error:.1e} {self.unit}, {verdict} {self.limit:.1e}"


def run(evaluate: Evaluate, atoms: ase.Atoms, cutoff: float, certificate: Certificate, seed: int = 0) -> list[Check]:
    """Every check on `atoms`, which stay as they are. cutoff: the model's, angstrom. Limits come from the certificate.

    Raises what `evaluate` raises.
    """
    rng = np.random.default_rng(seed)
    bare = ase.Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    bare.info.update(atoms.info)
    start = evaluate(bare)
    found = [_work(evaluate, bare, rng, certificate)]
    if atoms.pbc.all():
        found.append(_work_of_strain(evaluate, bare, rng, certificate))
    for name, change in (("translation", _moved), ("rotation", _turned), ("permutation", _renumbered)):
        found += _unchanged(name, evaluate, start, *change(bare, rng), certificate)
    return [*found, _crossing(evaluate, bare, cutoff, certificate)]


def _of_energies(name: str, difference: float, atoms: int, certificate: Certificate) -> Check:
    """A difference of two energies (eV), in meV/atom."""
    return Check(name, 1e3 * abs(difference) / atoms, 2 * certificate.energy_limit, "meV/atom")


def _along(evaluate: Evaluate, place: Callable[[float], ase.Atoms], slope: Callable[[dict, ase.Atoms], float]) -> float:
    """E(1) - E(0) less the integral of dE/ds over s in 0 .. 1, for atoms `place(s)`."""
    ends = [evaluate(place(s))["energy"] for s in (0.0, 1.0)]
    total = 0.0
    for point, weight in zip(POINTS, WEIGHTS, strict=True):
        here = place(0.5 * (1.0 + point))
        total += 0.5 * weight * slope(evaluate(here), here)
    return float(ends[1] - ends[0] - total)


def _work(evaluate: Evaluate, atoms: ase.Atoms, rng, certificate: Certificate) -> Check:
    step = rng.normal(0.0, STEP, atoms.positions.shape)

    def place(s: float) -> ase.Atoms:
        there = atoms.copy()
        there.positions += (s - 0.5) * step
        return there

    difference = _along(evaluate, place, lambda found, _: -float((found["forces"] * step).sum()))
    return _of_energies("forces are the energy's derivative", difference, len(atoms), certificate)


def _work_of_strain(evaluate: Evaluate, atoms: ase.Atoms, rng, certificate: Certificate) -> Check:
    strain = rng.normal(0.0, STRAIN, (3, 3))
    strain = 0.5 * (strain + strain.T)

    def place(s: float) -> ase.Atoms:
        there = atoms.copy()
        there.set_cell(atoms.cell.array @ (np.eye(3) + (s - 0.5) * strain), scale_atoms=True)
        return there

    def slope(found: dict, there: ase.Atoms) -> float:
        # stress V = dE/d(strain) at `there`, whose cell is that of `atoms` times F: d(strain) = F^-1 ds strain
        frame = np.linalg.solve(atoms.cell.array, there.cell.array)
        stress = np.asarray(found["stress"]).reshape(3, 3)
        return float((stress * np.linalg.solve(frame, strain)).sum() * there.get_volume())

    difference = _along(evaluate, place, slope)
    return _of_energies("stress is the energy's derivative", difference, len(atoms), certificate)


def _moved(atoms: ase.Atoms, rng) -> tuple[ase.Atoms, Callable]:
    there = atoms.copy()
    there.positions += rng.uniform(-3.0, 3.0, 3)
    return there, lambda forces: forces


def _turned(atoms: ase.Atoms, rng) -> tuple[ase.Atoms, Callable]:
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    rotation = q * np.sign(np.diag(r))
    rotation[:, 0] *= np.linalg.det(rotation)
    there = atoms.copy()
    there.set_cell(atoms.cell.array @ rotation.T)
    there.positions = atoms.positions @ rotation.T
    return there, lambda forces: forces @ rotation


def _renumbered(atoms: ase.Atoms, rng) -> tuple[ase.Atoms, Callable]:
    order = rng.permutation(len(atoms))
    return atoms[order], lambda forces: forces[np.argsort(order)]


def _unchanged(name: str, evaluate: Evaluate, start: dict, there, back: Callable, certificate: Certificate) -> list:
    """Energy and forces of `there`, taken `back`, against those of the start."""
    found = evaluate(there)
    forces = 1e3 * float(np.sqrt(np.mean((back(found["forces"]) - start["forces"]) ** 2)))
    return [
        _of_energies(f"energy under {name}", found["energy"] - start["energy"], len(there), certificate),
        Check(f"forces under {name}", forces, 2 * certificate.force_limit, "meV/A"),
    ]


def _crossing(evaluate: Evaluate, atoms: ase.Atoms, cutoff: float, certificate: Certificate) -> Check:
    """The work as one atom moves so that a neighbour passes the cutoff; a jump of the energy has no work."""
    name, mic = "no jump at the cutoff", bool(atoms.pbc.any())
    found = [_nearest(atoms, i, cutoff, mic) for i in range(min(len(atoms), ASKED))] if len(atoms) > 1 else []
    distance, i, j = min(found, key=lambda one: abs(one[0] - cutoff), default=(0.0, 0, 0))
    if abs(distance - cutoff) > FAR:
        return Check(name, None, 0.0, "")
    apart = atoms.get_distance(i, j, mic=mic, vector=True)
    along = apart / np.linalg.norm(apart)

    def place(s: float) -> ase.Atoms:
        there = atoms.copy()
        there.positions[j] += (cutoff - distance + (s - 0.5) * CROSSING) * along
        return there

    difference = _along(evaluate, place, lambda found, _: -float(found["forces"][j] @ along) * CROSSING)
    return _of_energies(name, difference, len(atoms), certificate)


def _nearest(atoms: ase.Atoms, i: int, cutoff: float, mic: bool) -> tuple[float, int, int]:
    """(distance, i, j) of the atom j whose distance from i is nearest to the cutoff."""
    distances = atoms.get_distances(i, range(len(atoms)), mic=mic)
    distances[i] = np.inf
    j = int(np.argmin(np.abs(distances - cutoff)))
    return float(distances[j]), i, j
