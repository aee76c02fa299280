"""Boxes of liquid water, made from nothing but a seed; the demo and the benches start from them."""

from __future__ import annotations

import ase
import numpy as np

SPACING = 12.4447 / 4
"""Edge of the cube that one molecule owns, in angstrom: 64 molecules in a box of 12.4447 angstrom, 0.99 g/cm3."""

BOND, ANGLE = 0.97, np.deg2rad(104.5)
_CHARGES = np.array([-0.82, 0.41, 0.41])  # point charges of O, H, H: enough to turn hydrogens towards oxygens
_NEIGHBOURS = np.array(
    [(i, j, k) for i in (-1, 0, 1) for j in (-1, 0, 1) for k in (-1, 0, 1) if (i, j, k) != (0, 0, 0)]
)


def water_box(n_side: int = 4, *, seed: int = 0, jitter: float = 0.15, tries: int = 24) -> ase.Atoms:
    """A periodic cube of `n_side`^3 water molecules (3 n_side^3 atoms: 4 -> 192, 8 -> 1536, 12 -> 5184).

    Oxygens sit on a cubic grid of spacing 3.11 angstrom, each shifted by up to `jitter` angstrom along every axis. Each
    molecule in turn draws `tries` orientations and keeps the one with the lowest Coulomb energy to the molecules
    placed around it, so that no hydrogens face each other. Atoms come molecule by molecule as O, H, H. The same
    arguments give the same box. Lengths in angstrom.

    Raises ValueError unless n_side >= 1 and 0 <= jitter <= 0.5 (larger shifts let molecules touch).
    """
    if n_side < 1:
        raise ValueError(f"n_side must be at least 1, got {n_side}")
    if not 0 <= jitter <= 0.5:
        raise ValueError(f"jitter must lie between 0 and 0.5 angstrom, got {jitter}")
    rng = np.random.default_rng(seed)
    box = n_side * SPACING
    grid = np.stack(np.meshgrid(*[np.arange(n_side)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    oxygens = (grid + 0.5) * SPACING + rng.uniform(-jitter, jitter, grid.shape)
    molecules = np.full((len(grid), 3, 3), np.nan)  # [molecule, O H H, xyz]; nan: not placed yet
    for m, cell in enumerate(grid):
        candidates = oxygens[m] + _molecule() @ _random_rotations(rng, tries)  # [tries, 3, 3]
        around = np.unique(((cell + _NEIGHBOURS) % n_side) @ [n_side**2, n_side, 1])
        placed = molecules[around[(around != m) & ~np.isnan(molecules[around, 0, 0])]]
        molecules[m] = candidates[np.argmin(_coulomb(candidates, placed, box))]
    return ase.Atoms("OHH" * len(grid), molecules.reshape(-1, 3), cell=[box] * 3, pbc=True)


def longest_bond(atoms: ase.Atoms) -> float:
    """The longest O-H bond in angstrom of a box whose atoms come as O, H, H; above about 1.5 a molecule is broken."""
    positions = atoms.get_positions().reshape(-1, 3, 3)
    bonds = positions[:, 1:] - positions[:, :1]
    box = atoms.cell.lengths()
    return float(np.linalg.norm(bonds - box * np.round(bonds / box), axis=-1).max())


def is_water_box(atoms: ase.Atoms) -> bool:
    """True for an orthorhombic periodic box whose atoms come molecule by molecule as O, H, H."""
    in_order = len(atoms) % 3 == 0 and np.array_equal(atoms.numbers, np.tile([8, 1, 1], len(atoms) // 3))
    return bool(in_order and atoms.pbc.all() and atoms.cell.orthorhombic)


def _molecule() -> np.ndarray:
    """O, H, H around the oxygen, in angstrom. [3, 3]"""
    return BOND * np.array([[0, 0, 0], [1, 0, 0], [np.cos(ANGLE), np.sin(ANGLE), 0]])


def _random_rotations(rng: np.random.Generator, count: int) -> np.ndarray:
    """Uniform rotation matrices from unit quaternions. [count, 3, 3]"""
    q = rng.normal(size=(count, 4))
    w, x, y, z = (q / np.linalg.norm(q, axis=1, keepdims=True)).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.array(rows).transpose(2, 0, 1)


def _coulomb(candidates: np.ndarray, placed: np.ndarray, box: float) -> np.ndarray:
    """Energy (any unit) of each candidate with the placed molecules. [T,3,3], [P,3,3] -> [T]"""
    d = candidates[:, :, None, None] - placed[None, None]
    d -= box * np.round(d / box)
    inverse = 1.0 / np.linalg.norm(d, axis=-1)  # [T, 3, P, 3]
    return np.einsum("tapb,a,b->t", inverse, _CHARGES, _CHARGES)
