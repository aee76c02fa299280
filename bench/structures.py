"""Liquid-water-like structures at 1 g/cc and their neighbour lists, the same for every provider."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

MOLECULE_VOLUME = 18.01528 / 0.602214076  # angstrom^3 of one water molecule at 1 g/cc
OH_LENGTH = 0.9572  # angstrom
HOH_ANGLE = np.deg2rad(104.52)
JITTER = 0.05  # angstrom: molecules sit near, not on, the points of a cubic grid


@dataclass(frozen=True)
class Graph:
    """A periodic structure and its directed edges.

    numbers [N], positions [N, 3] and cell [3, 3] in angstrom; edge_index [2, E] int64 (sender, receiver), unit_shifts
    and shifts [E, 3]: the vector of an edge is positions[receiver] - positions[sender] + shift.
    """

    numbers: np.ndarray
    positions: np.ndarray
    cell: np.ndarray
    edge_index: np.ndarray
    unit_shifts: np.ndarray
    shifts: np.ndarray

    @property
    def n_atoms(self) -> int:
        return len(self.numbers)

    @property
    def n_edges(self) -> int:
        return self.edge_index.shape[1]


def _random_rotations(n: int, rng: np.random.Generator) -> np.ndarray:
    """[n, 3, 3] rotation matrices, uniform over SO(3), from unit quaternions."""
    w, x, y, z = (q := rng.normal(size=(4, n))) / np.linalg.norm(q, axis=0)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        (2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        (2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    )
    return np.moveaxis(np.array(rows), 2, 0)


def water(n_atoms: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(numbers [N], positions [N, 3], cell [3, 3]) of n_atoms / 3 randomly oriented molecules in a cube at 1 g/cc.

    Raises ValueError unless n_atoms / 3 is a cube (24, 192, 1536, 5184, 41472, ...).
    """
    side = round((n_atoms / 3) ** (1 / 3))
    if 3 * side**3 != n_atoms:
        raise ValueError(f"n_atoms must be three times a cube (24, 192, 1536, 5184, 41472), got {n_atoms}")
    rng = np.random.default_rng(seed)
    step = MOLECULE_VOLUME ** (1 / 3)
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    centres = (grid + 0.5) * step + rng.uniform(-JITTER, JITTER, size=grid.shape)
    half = HOH_ANGLE / 2
    molecule = OH_LENGTH * np.array([[0, 0, 0], [np.sin(half), np.cos(half), 0], [-np.sin(half), np.cos(half), 0]])
    turned = np.einsum("nij,aj->nai", _random_rotations(side**3, rng), molecule)
    positions = (centres[:, None] + turned).reshape(-1, 3)
    return np.tile([8, 1, 1], side**3), positions, np.eye(3) * side * step


@lru_cache(maxsize=8)
def graph(n_atoms: int, r_max: float = 6.0, seed: int = 0) -> Graph:
    """The water box of n_atoms with all its edges up to r_max angstrom, in the order MACE's neighbour list gives."""
    from matscipy.neighbours import neighbour_list

    numbers, positions, cell = water(n_atoms, seed)
    sender, receiver, unit_shifts = neighbour_list("ijS", pbc=(True,) * 3, cell=cell, positions=positions, cutoff=r_max)
    edge_index = np.stack((sender, receiver)).astype(np.int64)
    return Graph(numbers, positions, cell, edge_index, unit_shifts.astype(np.float64), unit_shifts @ cell)
