"""The certificate: energy, forces and stress of a fast model against MACE on e3nn in FP64, on the user's structure."""

from __future__ import annotations

from dataclasses import dataclass

import ase.data
import mace  # noqa: F401  before e3nn, see mace_triton/__init__.py
import numpy as np
import torch
from mace.data import AtomicData, KeySpecification, config_from_atoms
from mace.tools import AtomicNumberTable, torch_geometric
from mace.tools.torch_tools import default_dtype

from .convert import restore
from .precision import PRESETS, WORDS, Precision


@dataclass(frozen=True)
class Budget:
    """How far a policy may be from FP64 before the certificate fails.

    energy: meV/atom. force: meV/angstrom, root mean square over components. relative: added to `force`, in parts of the
    root-mean-square force, so that a strained structure with huge forces is judged fairly. reason: where the numbers
    come from.
    """

    energy: float
    force: float
    relative: float
    reason: str


BUDGETS = {
    "fp64": Budget(1e-5, 1e-5, 1e-8, "a model saved in FP32 carries constants rounded to 2^-24, ours are exact"),
    "fp32": Budget(
        0.01, 0.1, 2e-5, "positions near 20 angstrom round to 1e-6; an O-H bond of 50 eV/A^2 makes that 0.05"
    ),
    "tf32": Budget(0.5, 5.0, 2e-3, "operands of the linears keep 11 bits: 2^-11 = 5e-4 per product, over two layers"),
    "fp16": Budget(0.5, 5.0, 2e-3, "11 bits as TF32, in a smaller range"),
    "bf16": Budget(2.0, 20.0, 1e-2, "operands keep 8 bits: 2^-8 = 4e-3 per product; half the error of a good model"),
}
"""Policy name -> budget. The fixed parts stay below the error of a good model against DFT (1 meV/atom, 40 meV/A)."""


def budget_of(precision: Precision) -> Budget:
    """The budget of a preset; of another policy, the widest that one of its words has in the preset of that name."""
    if precision == PRESETS.get(precision.name):
        return BUDGETS[precision.name]
    words = {getattr(precision, field) for field in WORDS} & set(BUDGETS) or {precision.dtype}
    return max((BUDGETS[word] for word in words), key=lambda budget: budget.force)


@dataclass(frozen=True)
class Certificate:
    """Differences of a fast model to e3nn FP64 on one structure, and the policy's budget for them.

    energy_error: meV/atom. force_rmse and force_max (over components), force_scale (root mean square of the reference
    forces): meV/angstrom. stress_error: meV/angstrom^3, None without a cell. energy_limit and force_limit are the
    budget on this structure; `passed` compares energy_error and force_rmse with them. cut_from: how many atoms the
    structure has of which these are a piece, 0 where they are all.
    """

    policy: str
    atoms: int
    energy_error: float
    force_rmse: float
    force_max: float
    force_scale: float
    stress_error: float | None
    energy_limit: float
    force_limit: float
    cut_from: int = 0

    @property
    def passed(self) -> bool:
        return self.energy_error <= self.energy_limit and self.force_rmse <= self.force_limit  # False for nan

    def __str__(self) -> str:
        stress = "" if self.stress_error is None else f", stress {self.stress_error:.1e} meV/A^3"
        verdict = "within" if self.passed else "BEYOND"
        atoms = f"{self.atoms} atoms" + (f" cut out of {self.cut_from}" if self.cut_from else "")
        return (
            f"{self.policy} against e3nn FP64, {atoms}: energy {self.energy_error:.1e} meV/atom, forces "
            f"{self.force_rmse:.1e} rms and {self.force_max:.1e} largest meV/A of {self.force_scale:.0f}{stress}: "
            f"{verdict} the budget ({self.energy_limit:.1e} meV/atom, {self.force_limit:.1e} meV/A)"
        )


def certify(
    model_fast: torch.nn.Module,
    model_e3nn: torch.nn.Module | None,
    atoms: ase.Atoms,
    *,
    head: str | None = None,
    budget: Budget | None = None,
    fast: dict | None = None,
) -> Certificate:
    """Compare an accelerated model with plain MACE in FP64 on `atoms`.

    model_e3nn: the plain model of any dtype (a float64 copy is used); None restores it from `model_fast`. head: of a
    model with several. budget: instead of the policy's, `budget_of`. Neither model is changed.

    Raises ValueError for an unknown head, an empty structure, an element that the model does not know, or a model
    without energies.
    """
    conversion = getattr(model_fast, "mace_triton", None)
    dtype = next(model_fast.parameters()).dtype
    precision = conversion.precision if conversion else PRESETS["fp64" if dtype == torch.float64 else "fp32"]
    policy, budget = precision.name, budget or budget_of(precision)
    reference = restore(model_fast if model_e3nn is None else model_e3nn).double()
    exact = single_point(reference.to(next(model_fast.parameters()).device), atoms, head=head)
    if fast is None:
        fast = single_point(model_fast, atoms, head=head)
    difference = 1e3 * (fast["forces"] - exact["forces"])
    scale = 1e3 * float(np.sqrt(np.mean(exact["forces"] ** 2)))
    # A total energy is one number of the model's dtype: E0s of thousands of eV round to its last bit.
    rounding = 1e3 * 4 * torch.finfo(dtype).eps * abs(exact["energy"]) / len(atoms)
    stress = 1e3 * float(np.abs(fast["stress"] - exact["stress"]).max()) if "stress" in exact else None
    return Certificate(
        policy=policy,
        atoms=len(atoms),
        energy_error=1e3 * abs(fast["energy"] - exact["energy"]) / len(atoms),
        force_rmse=float(np.sqrt(np.mean(difference**2))),
        force_max=float(np.abs(difference).max()),
        force_scale=scale,
        stress_error=stress,
        energy_limit=budget.energy + rounding,
        force_limit=budget.force + budget.relative * scale,
    )


def single_point(model: torch.nn.Module, atoms: ase.Atoms, *, head: str | None = None) -> dict:
    """Energy (eV), forces (eV/angstrom) and, for three periodic directions, stress (eV/angstrom^3) as float64 numpy.

    The neighbour list and the input are made in the model's own dtype. What models read beside the atoms (charge, spin,
    external_field) comes from atoms.info, as in MACECalculator. Raises as `certify` does.
    """
    if not hasattr(model, "atomic_energies_fn"):
        raise ValueError(f"{type(model).__name__} has no energy and forces to compare")
    first = next(model.parameters())
    batch = batch_of(model, atoms, head, first.dtype).to(first.device)
    periodic = bool(atoms.pbc.all())
    out = model(batch.to_dict(), compute_stress=periodic)
    keys = ["forces", "stress"] if periodic else ["forces"]
    result = {key: out[key].detach().double().cpu().numpy() for key in keys}
    return result | {"energy": out["energy"].double().item()}


def piece(atoms: ase.Atoms, count: int) -> ase.Atoms:
    """The `count` atoms nearest to the first one, alone in the open: a structure that e3nn has memory for."""
    away = atoms.get_distances(0, range(len(atoms)), mic=True, vector=True)
    nearest = np.argsort(np.linalg.norm(away, axis=1), kind="stable")[:count]
    found = ase.Atoms(atoms.numbers[nearest], away[nearest])
    found.info.update(atoms.info)
    return found


_READ_FROM_INFO = {"total_charge": "charge", "total_spin": "spin", "external_field": "external_field"}


def batch_of(model: torch.nn.Module, atoms: ase.Atoms, head: str | None, dtype: torch.dtype):
    """MACE's batch of one structure, on the CPU; see `graph_of`."""
    return torch_geometric.Batch.from_data_list([graph_of(model, atoms, head, dtype)])


def graph_of(
    model: torch.nn.Module,
    atoms: ase.Atoms,
    head: str | None,
    dtype: torch.dtype,
    keys: KeySpecification | None = None,
    cutoff: float | None = None,
) -> AtomicData:
    """MACE's graph of one structure. keys: where charges and the like lie; None: where MACECalculator looks for them.

    cutoff: angstrom, up to which edges are looked for; None: the model's.

    Raises ValueError for an unknown head and for what `check_structure` refuses.
    """
    table = AtomicNumberTable([int(z) for z in model.atomic_numbers])
    heads = list(getattr(model, "heads", None) or ["Default"])
    check_structure(atoms, table.zs)
    head = pick_head(heads, head)
    keys = keys or KeySpecification(dict(_READ_FROM_INFO), {"charges": "Qs"})
    with default_dtype(dtype):
        config = config_from_atoms(atoms, keys, head_name=head)
        return AtomicData.from_config(config, z_table=table, cutoff=cutoff or float(model.r_max), heads=heads)


def check_structure(atoms: ase.Atoms, known: list[int]) -> None:
    """Raise ValueError for an empty structure, positions that are not finite, or an element the model lacks."""
    if len(atoms) == 0:
        raise ValueError("atoms is empty: the structure needs at least one atom")
    if not np.isfinite(atoms.positions).all():
        raise ValueError("atoms has positions that are not finite")
    unknown = sorted(set(atoms.numbers.tolist()) - set(known))
    if unknown:
        names = ", ".join(ase.data.chemical_symbols[z] for z in unknown)
        raise ValueError(f"atoms holds elements that the model does not know ({names}): use another model")


def pick_head(heads: list[str], head: str | None) -> str:
    """The head to use. Raises ValueError for an unknown one, or for none where the model has several."""
    if head is None and len(heads) > 1:
        default = [name for name in heads if name.lower() == "default"]
        if not default:
            raise ValueError(f"the model has several heads: pass head=, one of {heads}")
        return default[0]
    if head is not None and head not in heads:
        raise ValueError(f"head {head!r} is not in the model; it has {heads}")
    return head or heads[0]
