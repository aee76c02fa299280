"""The ASE face: MACE's own calculator around accelerated models."""

from __future__ import annotations

from dataclasses import replace
from glob import glob
from pathlib import Path

import ase
import mace  # noqa: F401  before e3nn, see mace_triton/__init__.py
import numpy as np
import torch
from ase.calculators.calculator import Calculator, all_changes
from ase.stress import full_3x3_to_voigt_6_stress
from mace.calculators import MACECalculator
from mace.modules import models

from . import checks
from .certify import Certificate, certify, pick_head, piece, single_point
from .convert import accelerate, load_model
from .engine import SKIN, Engine, Results
from .models import FOLDER, SHIPPED, load_stored
from .precision import Precision

PIECE = 500
"""Atoms of the piece that a certificate is of where the whole structure is too large for e3nn in FP64."""


def _reads_atoms_alone(model: torch.nn.Module) -> bool:
    """Whether atoms and cell decide all that the model gives: no charges, spins or fields."""
    return type(model) in (models.MACE, models.ScaleShiftMACE) and not hasattr(model, "joint_embedding")


class MACETritonCalculator(MACECalculator):
    """`MACECalculator` whose models run on our kernels; energies in eV, forces in eV/angstrom, stress in eV/angstrom^3.

    model: "water" or "water-medium" (which ship with the package), a .model file, a pattern such as
    "committee_*.model", the name of a foundation model (fetched by MACE's own loader), a MACE module, or a list of any
    of these (a committee).
    precision: "fp64", "fp32", "tf32", "bf16", "fp16", a policy file or a `Precision`; None keeps the model's own.
    head: which head of a model with several. device: "cuda", "cuda:1" or "cpu"; the default is a GPU if there is one.
    deterministic: the same bits on every run, for more time. skin: steps run on `Engine`, with neighbours looked for
    this much (angstrom) beyond the cutoff; other atoms than before are left to MACECalculator until they are asked for
    again. None leaves each step to it, as do models that read more than atoms and cell. Other arguments go to
    `MACECalculator`.

    Raises FileNotFoundError for a file that is not there, ValueError or TypeError for what is no MACE model, an unknown
    precision, head or device.
    """

    def __init__(
        self,
        model: str | Path | torch.nn.Module | list = "water",
        *,
        precision: str | Precision | None = None,
        head: str | None = None,
        device: str | None = None,
        deterministic: bool = False,
        skin: float | None = SKIN,
        **kwargs,
    ):
        device = check_device(device)
        sources = model if isinstance(model, (list, tuple)) else [model]
        dtype = torch.float32 if precision is None else Precision.parse(precision).torch_dtype
        plain = [loaded for source in sources for loaded in load(source, device, dtype)]
        models = [accelerate(m.to(device), precision, deterministic=deterministic) for m in plain]
        head = pick_head(list(getattr(models[0], "heads", None) or ["Default"]), head)
        dtype = str(next(models[0].parameters()).dtype).removeprefix("torch.")
        super().__init__(models=models, device=device, default_dtype=dtype, head=head, **kwargs)

        self.skin = skin
        self.engines: list[Engine] = []
        self._asked: tuple[bytes, bytes] | None = None

    def __getstate__(self) -> dict:
        """Engines stay behind: a CUDA graph can be neither copied nor pickled, and is made again when it is wanted."""
        return self.__dict__ | {"engines": []}

    def check_state(self, atoms, tol: float = 1e-15) -> list[str]:
        """What has changed since the last step, which ASE asks twice a step or, in NPT, four times.

        On the engine, bit by bit: within a tolerance, as ASE compares, it takes longer than all else that ASE does.
        """
        before = self.atoms
        if before is None or not self.runs_on_engine:
            return super().check_state(atoms, tol)
        changed = [name for name in all_changes if not _same(_part(before, name), _part(atoms, name))]
        if changed or not _same(list(before.info), list(atoms.info)):
            return changed or ["info"]
        return [] if all(_same(value, atoms.info[key]) for key, value in before.info.items()) else ["info"]

    def calculate(self, atoms=None, properties=None, system_changes=all_changes):
        """Energy, forces and stress (eV, angstrom), and the energies of the atoms, as `MACECalculator` gives them."""
        if not self._engine_serves(atoms) and self._maces_way(atoms, properties, system_changes):
            return
        Calculator.calculate(self, atoms)
        self.results, found = {}, [_step(engine, atoms) for engine in self._engines_for(atoms)]
        energy, energies, forces, stress = (
            _together([getattr(results, key) for results in found])
            for key in ("energy", "energies", "forces", "stress")
        )
        per_angstrom = self.energy_units_to_eV / self.length_units_to_A
        self._share("energy", energy[:, 0] * self.energy_units_to_eV)
        self._share("forces", forces * per_angstrom)
        self._share("stress", stress[:, 0] * per_angstrom / self.length_units_to_A**2)
        self.results["stress"] = full_3x3_to_voigt_6_stress(self.results["stress"])
        self.results["free_energy"] = self.results["energy"]
        self.results["energies"] = _mean(energies) * self.energy_units_to_eV
        self.results["node_energy"] = self.results["energies"] - self.engines[0].atomic_energies

    def _maces_way(self, atoms, properties, system_changes) -> bool:
        """MACECalculator's step; False where memory is too small for it, and the engine may have enough."""
        try:
            super().calculate(atoms, properties, system_changes)
            return True
        except torch.OutOfMemoryError:
            if not self._engine_can():
                raise
        torch.cuda.empty_cache()
        return False

    @property
    def runs_on_engine(self) -> bool:
        """Whether steps run on `Engine`: with a skin, and models that read nothing but atoms and cell."""
        return self.skin is not None and all(map(_reads_atoms_alone, self.models))

    def _engine_serves(self, atoms: ase.Atoms) -> bool:
        """Whether this step runs on the engine: that of the first structure, or of one that is asked for again.

        One takes longer to make than a step of MACE's: not for structures that come one after another.
        """
        before, self._asked = self._asked, _kind(atoms)
        again = before is None or self._asked in (before, self._made_for())
        return self._engine_can() and again

    def _engine_can(self) -> bool:
        return self.runs_on_engine and not self.compute_atomic_stresses

    def _made_for(self) -> tuple[bytes, bytes] | None:
        """The kind of atoms that the engines at hand serve."""
        return _kind(self.engines[0].structures[0]) if self.engines else None

    def _engines_for(self, atoms: ase.Atoms) -> list[Engine]:
        """One for each model; those at hand if they were made for such atoms."""
        if self._made_for() != _kind(atoms):
            self.engines = []  # their memory is free before new ones take some
            self.engines = [Engine(m, atoms.copy(), head=self.head, skin=self.skin) for m in self.models]
        return self.engines

    def _share(self, key: str, values: np.ndarray) -> None:
        """Put the mean over the committee in the results, and the values and their variance where there are several."""
        mean = _mean(values)
        self.results[key] = float(mean) if mean.ndim == 0 else mean
        if len(values) > 1:
            self.results[key + "_comm"], self.results[key + "_var"] = values, values.var(axis=0)

    def certify(self, atoms: ase.Atoms) -> Certificate:
        """The certificate of the (first) model on `atoms`, as steps run it: differences to e3nn FP64, same weights.

        Where the GPU's memory is too small for e3nn, it is of a piece of the structure, and says so.
        """
        try:
            return certify(self.models[0], None, atoms, head=self.head, fast=self._first(atoms))
        except torch.OutOfMemoryError:
            if len(atoms) <= PIECE:
                raise
        self.engines = []
        torch.cuda.empty_cache()
        return replace(self.certify(piece(atoms, PIECE)), cut_from=len(atoms))

    def check(self, atoms: ase.Atoms, certificate: Certificate) -> list[checks.Check]:
        """Symmetries and derivatives of the (first) model on `atoms`, as steps run it, within the certificate's limits.

        Energies and forces under translation, rotation and renumbering; forces and stress as derivatives; the energy
        where a neighbour passes the cutoff.
        """
        return checks.run(self._first, atoms, float(self.models[0].r_max), certificate)

    def _first(self, atoms: ase.Atoms) -> dict:
        """Energy, forces and stress of the first model, as steps run it."""
        if not self.runs_on_engine:
            return single_point(self.models[0], atoms, head=self.head)
        return _single_point(self._engines_for(atoms)[0], atoms)


def _together(parts: list[np.ndarray]) -> np.ndarray:
    """The arrays of a committee's members behind each other; one's own is not copied."""
    return np.stack(parts) if len(parts) > 1 else parts[0][None]


def _mean(values: np.ndarray) -> np.ndarray:
    """Over the members of a committee."""
    return values.mean(axis=0) if len(values) > 1 else values[0]


def _part(atoms: ase.Atoms, name: str) -> np.ndarray | None:
    """One of ASE's `all_changes` of a structure, None where it has none."""
    return atoms.cell.array if name == "cell" else atoms.pbc if name == "pbc" else atoms.arrays.get(name)


def _same(one, other) -> bool:
    return one is other or np.array_equal(one, other)


def _step(engine: Engine, atoms: ase.Atoms) -> Results:
    engine.step(atoms.positions, atoms.cell.array[None])
    return engine.on_host()


def _single_point(engine: Engine, atoms: ase.Atoms) -> dict:
    """What `certify.single_point` gives, from the engine."""
    results = _step(engine, atoms)
    stress = {"stress": results.stress} if atoms.pbc.all() else {}
    return {"energy": float(results.energy[0]), "forces": results.forces} | stress


def _kind(atoms: ase.Atoms) -> tuple[bytes, bytes]:
    """What an engine is made for: everything but positions and cell."""
    return atoms.numbers.tobytes(), atoms.pbc.tobytes()


def load(
    source: str | Path | torch.nn.Module, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> list[torch.nn.Module]:
    """Plain MACE models from a shipped one's name, a name, a file, a pattern or a module; several only for a pattern.

    dtype: of the shipped ones alone, whose constants are computed in it; the others come as they were saved.
    """
    if isinstance(source, torch.nn.Module):
        return [source]
    if str(source) in SHIPPED:
        return [load_stored(FOLDER / str(source), device, dtype)]
    if any(mark in str(source) for mark in "*?["):
        files = sorted(glob(str(source)))
        if not files:
            raise FileNotFoundError(f"model: no file matches {str(source)!r}")
        return [load_model(file, device) for file in files]
    return [load_model(source, device)]


def check_device(device: str | None) -> str:
    """The device to use; None picks a GPU if there is one. Raises ValueError if it is not there."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is not known: use 'cuda', 'cuda:N' or 'cpu'") from error
    if kind.type not in ("cuda", "cpu"):
        raise ValueError(f"device {device!r} has no kernels here: use 'cuda', 'cuda:N' or 'cpu'")
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r} is not there: torch sees {torch.cuda.device_count()} GPUs; use 'cpu'")
    return device
