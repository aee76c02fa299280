"""Random-weight MACE models with the shapes of the published ones, and random batches for them."""

from __future__ import annotations

import ase
import mace  # noqa: F401  before e3nn
import numpy as np
import torch
from e3nn import o3
from mace import data, modules
from mace.tools import AtomicNumberTable, torch_geometric
from mace.tools.torch_tools import default_dtype

MP_ELEMENTS = tuple(z for z in range(1, 95) if z not in (84, 85, 86, 87, 88))  # the 89 of MACE-MP-0
OFF_ELEMENTS = (1, 6, 7, 8, 9, 15, 16, 17, 35, 53)

_MP = {"elements": MP_ELEMENTS, "r_max": 6.0, "num_bessel": 10, "channels": 128}
_OFF = {"elements": OFF_ELEMENTS, "num_bessel": 8}

SHAPES: dict[str, dict] = {
    "mp-small": {**_MP, "L": 0},
    "mp-medium": {**_MP, "L": 1},
    "mp-large": {**_MP, "L": 2},
    "off-small": {**_OFF, "r_max": 4.5, "channels": 96, "L": 0},
    "off-medium": {**_OFF, "r_max": 5.0, "channels": 128, "L": 1},
    "off-large": {**_OFF, "r_max": 5.0, "channels": 192, "L": 2},
}
"""Published models: elements, cutoff (angstrom), radial functions, channels, largest l of the hidden features."""

RESIDUAL = "RealAgnosticResidualInteractionBlock"
NONLINEAR = "RealAgnosticResidualNonLinearInteractionBlock"
DENSITY = {
    "interaction_cls": "RealAgnosticDensityResidualInteractionBlock",
    "distance_transform": "Agnesi",
    "pair_repulsion": True,
}
BLOCKS: dict[str, dict] = {
    "residual": {},
    "agnostic": {"interaction_cls_first": "RealAgnosticInteractionBlock"},
    "density": {**DENSITY, "interaction_cls_first": "RealAgnosticDensityInteractionBlock"},
    "density-residual": DENSITY,
    "att-residual": {"interaction_cls": "RealAgnosticAttResidualInteractionBlock"},
    "nonlinear": {
        "interaction_cls": NONLINEAR,
        "apply_cutoff": False,
        "readout_cls": modules.NonLinearBiasReadoutBlock,
    },
    "multi-head": {"heads": ["one", "two"]},
    "three-layers": {"num_interactions": 3},
}
"""Every interaction block of MACE, and other variants, on an OFF-like model with L = 1."""


def build(
    name: str,
    dtype: torch.dtype = torch.float64,
    *,
    device: str | torch.device = "cpu",
    channels: int | None = None,
    elements: tuple[int, ...] | None = None,
    seed: int = 0,
    **changes,
) -> modules.ScaleShiftMACE:
    """A ScaleShiftMACE with random weights: `name` from SHAPES or BLOCKS; channels and elements shrink it for a CPU."""
    spec = {"interaction_cls": RESIDUAL, "heads": None, "num_interactions": 2, "max_ell": 3, "correlation": 3}
    spec |= SHAPES[name] if name in SHAPES else {**SHAPES["off-medium"], **BLOCKS[name]}
    spec |= changes | {key: value for key, value in (("channels", channels), ("elements", elements)) if value}
    spec.setdefault("interaction_cls_first", spec["interaction_cls"])
    for key in ("interaction_cls", "interaction_cls_first"):
        spec[key] = modules.interaction_classes[spec[key]]
    numbers, width, L = list(spec.pop("elements")), spec.pop("channels"), spec.pop("L")
    n_heads = len(spec["heads"] or ["Default"])
    torch.manual_seed(seed)
    with default_dtype(dtype):
        model = modules.ScaleShiftMACE(
            num_polynomial_cutoff=5,
            num_elements=len(numbers),
            atomic_numbers=numbers,
            hidden_irreps=o3.Irreps("+".join(f"{width}x{l}{'eo'[l % 2]}" for l in range(L + 1))),
            MLP_irreps=o3.Irreps("16x0e"),
            atomic_energies=np.linspace(-3.0, 2.0, n_heads * len(numbers)).reshape(n_heads, -1),
            avg_num_neighbors=20.0,
            gate=torch.nn.functional.silu,
            atomic_inter_scale=[0.8] * n_heads if n_heads > 1 else 0.8,
            atomic_inter_shift=[0.1] * n_heads if n_heads > 1 else 0.1,
            **spec,
        )
    return model.to(device)


def _spread(rng: np.random.Generator, n: int, cell: np.ndarray) -> np.ndarray:
    """n random points in the cell, no two (periodic images included) closer than 1.5 angstrom."""
    shifts = np.array([(i, j, k) for i in (-1, 0, 1) for j in (-1, 0, 1) for k in (-1, 0, 1)]) @ cell
    points: list[np.ndarray] = []
    while len(points) < n:
        p = rng.random(3) @ cell
        if all(np.linalg.norm(p - q + shifts, axis=1).min() > 1.5 for q in points):
            points.append(p)
    return np.array(points)


def random_structures(elements, seed: int = 0, *, n_atoms: int = 5) -> list[ase.Atoms]:
    """A periodic triclinic crystal, a molecule with one atom far from all others, and a lone atom."""
    rng = np.random.default_rng(seed)
    cell = np.array([[4.6, 0.0, 0.0], [0.9, 5.1, 0.0], [-0.7, 1.1, 5.6]]) * (n_atoms / 5) ** (1 / 3)
    crystal = ase.Atoms(rng.choice(elements, n_atoms), _spread(rng, n_atoms, cell), cell=cell, pbc=True)
    molecule = ase.Atoms(rng.choice(elements, 4), np.vstack([_spread(rng, 3, np.eye(3) * 4.0), [[40.0, 0.0, 0.0]]]))
    lone = ase.Atoms(rng.choice(elements, 1), [[0.0, 0.0, 0.0]])
    return [crystal, molecule, lone]


def batch_of(model: torch.nn.Module, structures: list[ase.Atoms], dtype=None, device=None) -> dict[str, torch.Tensor]:
    """MACE's input dictionary for these structures; dtype and device are the model's unless given."""
    first = next(model.parameters())
    dtype, device = dtype or first.dtype, device or first.device
    table = AtomicNumberTable([int(z) for z in model.atomic_numbers])
    heads = getattr(model, "heads", None) or ["Default"]
    with default_dtype(dtype):
        graphs = [
            data.AtomicData.from_config(
                data.config_from_atoms(atoms, head_name=heads[number % len(heads)]),
                z_table=table,
                cutoff=float(model.r_max),
                heads=heads,
            )
            for number, atoms in enumerate(structures)
        ]
    return torch_geometric.Batch.from_data_list(graphs).to(device).to_dict()


def random_batch(model: torch.nn.Module, seed: int = 0, *, n_atoms: int = 5) -> dict[str, torch.Tensor]:
    """A batch of `random_structures` with the model's elements, cutoff, heads, dtype and device."""
    return batch_of(model, random_structures([int(z) for z in model.atomic_numbers], seed, n_atoms=n_atoms))


def cast(batch: dict[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the batch in the model's dtype (MACE marks tensors of its input as requiring gradients)."""
    dtype = next(model.parameters()).dtype
    fresh = {key: value.detach().clone() for key, value in batch.items() if torch.is_tensor(value)}
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in fresh.items()}


def evaluate(model: torch.nn.Module, batch: dict[str, torch.Tensor], **flags) -> dict[str, torch.Tensor]:
    """The model's output on a copy of the batch, with forces, stress and virials."""
    flags = {"compute_stress": True, "compute_virials": True} | flags
    return model(cast(batch, model), **flags)


def warmed(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.nn.Module:
    """`model` after two evaluations: TorchScript runs later ones in other code, which rounds otherwise."""
    for _ in range(2):
        evaluate(model, batch)
    return model
