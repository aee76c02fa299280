"""The torch-sim face: accelerated models for batches of systems that stay on the GPU.

Needs torch-sim (`pip install torch-sim-atomistic`); nothing else in the package imports it.
"""

from __future__ import annotations

import operator
from pathlib import Path

import ase
import numpy as np
import torch
from torch_sim.models.interface import ModelInterface

from .calculator import check_device, load
from .convert import accelerate
from .engine import SKIN, Engine, Results
from .precision import Precision

ENGINES = 4
"""Batches that a model keeps an engine for, the latest ones: torch-sim's batchers come back to some."""


class MACETritonModel(ModelInterface):
    """A MACE model for torch-sim on `Engine`: energies in eV, forces in eV/angstrom, stress in eV/angstrom^3.

    model: "water" (the model that ships with the package), a .model file, a foundation model's name or a MACE module.
    precision: "fp64", "fp32", "tf32", "bf16", "fp16", a policy file or a `Precision`; None keeps the model's own.
    head: of a model with several. device: "cuda", "cuda:1" or "cpu"; the default is a GPU if there is one. skin:
    angstrom beyond the cutoff in which neighbours are kept. compute_stress: whether stresses are given.

    A batch of other atoms than before has a CUDA graph of its own, which takes a while to make. Raises what
    `MACETritonCalculator` raises.
    """

    def __init__(
        self,
        model: str | Path | torch.nn.Module = "water",
        *,
        precision: str | Precision | None = None,
        head: str | None = None,
        device: str | torch.device | None = None,
        skin: float = SKIN,
        compute_stress: bool = True,
    ):
        super().__init__()
        self._device = torch.device(check_device(None if device is None else str(device)))
        dtype = torch.float32 if precision is None else Precision.parse(precision).torch_dtype
        (plain,) = load(model, str(self._device), dtype)
        self.model = accelerate(plain.to(self._device), precision)
        self._dtype = next(self.model.parameters()).dtype
        self._compute_forces, self._compute_stress = True, compute_stress
        self._memory_scales_with = "n_atoms_x_density"
        self.head, self.skin = head, skin
        self._engines: list[tuple[tuple[torch.Tensor, ...], Engine]] = []
        self._last: tuple | None = None

    def __getstate__(self) -> dict:
        """Engines stay behind: a CUDA graph can be neither copied nor pickled, and is made again when it is wanted."""
        return self.__dict__ | {"_engines": [], "_last": None}

    def forward(self, state, **_) -> dict[str, torch.Tensor]:
        """{"energy" [B], "forces" [N, 3], "stress" [B, 3, 3]} of a `torch_sim.SimState`, in the model's dtype."""
        engine = self._engine_for(state)
        found = self._step(engine, state)
        results = {"energy": found.energy, "forces": found.forces}
        if self._compute_stress:
            results["stress"] = found.stress
        return {key: value.to(self._dtype, copy=True) for key, value in results.items()}

    def _step(self, engine: Engine, state) -> Results:
        """A step; a new engine short of memory has that of the engines for earlier batches, which are forgotten."""
        given, settled = (state.positions, state.row_vector_cell), engine.rebuilds > 0
        try:
            found = engine.step(*given)
            if settled or engine.shares == 1 or len(self._engines) == 1:
                return found
        except torch.OutOfMemoryError:
            if len(self._engines) == 1:
                raise
        del self._engines[1:]
        engine.renew()
        return engine.step(*given)

    def _engine_for(self, state) -> Engine:
        """The engine of such atoms, made if there is none."""
        given = state.atomic_numbers, state.system_idx, state.pbc
        versions = [getattr(value, "_version", None) for value in given]
        if self._last is not None and versions == self._last[1] and all(map(operator.is_, given, self._last[0])):
            return self._engines[0][1]  # nothing is asked of the GPU
        self._last = given, versions
        periodic = torch.as_tensor(state.pbc).expand(3)
        key = state.atomic_numbers, state.system_idx, periodic
        for place, (known, engine) in enumerate(self._engines):
            if all(map(_same, known, key)):
                self._engines.insert(0, self._engines.pop(place))
                return engine
        structures = _structures(state, periodic)
        engine = Engine(self.model, structures, head=self.head, stress=self._compute_stress, skin=self.skin)
        del self._engines[ENGINES - 1 :]
        self._engines.insert(0, (tuple(t.clone() for t in key), engine))
        return engine


def _same(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one.shape == two.shape and torch.equal(one, two)


def _structures(state, periodic: torch.Tensor) -> list[ase.Atoms]:
    """The systems of a state, one after another."""
    system = state.system_idx.cpu().numpy()
    numbers, positions = state.atomic_numbers.cpu().numpy(), state.positions.detach().double().cpu().numpy()
    cells = state.row_vector_cell.detach().double().cpu().numpy()
    if (np.diff(system) < 0).any():
        raise ValueError("state: system_idx must be sorted")
    return [
        ase.Atoms(numbers[system == b], positions[system == b], cell=cell, pbc=periodic.cpu().numpy())
        for b, cell in enumerate(cells)
    ]
