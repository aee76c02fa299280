"""Models that ship with the package: safetensors for the parameters, JSON for everything else, nothing pickled."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from e3nn import o3
from mace import modules
from mace.tools.torch_tools import default_dtype
from safetensors.torch import load_file, save_file

FOLDER = Path(__file__).parent
SHIPPED = ("water", "water-medium")
"""Names of the models that come with the package."""


def build_model(architecture: dict, dtype: torch.dtype = torch.float32) -> modules.ScaleShiftMACE:
    """A plain e3nn ScaleShiftMACE with fresh weights from an `architecture` block as stored in `water.json`.

    Buffers (Clebsch-Gordan tensors, Bessel frequencies) are computed in `dtype`, so a float64 model is exact in
    float64 even though its parameters are stored in float32.
    """
    a = dict(architecture)
    with default_dtype(dtype):
        return modules.ScaleShiftMACE(
            r_max=a["r_max"],
            num_bessel=a["num_bessel"],
            num_polynomial_cutoff=a["num_polynomial_cutoff"],
            max_ell=a["max_ell"],
            interaction_cls=modules.interaction_classes[a["interaction"]],
            interaction_cls_first=modules.interaction_classes[a["interaction_first"]],
            num_interactions=a["num_interactions"],
            num_elements=len(a["atomic_numbers"]),
            hidden_irreps=o3.Irreps(a["hidden_irreps"]),
            MLP_irreps=o3.Irreps(a["MLP_irreps"]),
            atomic_energies=np.array([a["atomic_energies"]]),
            avg_num_neighbors=a["avg_num_neighbors"],
            atomic_numbers=a["atomic_numbers"],
            correlation=a["correlation"],
            gate=modules.gate_dict[a["gate"]],
            use_reduced_cg=False,
            radial_MLP=a["radial_MLP"],
            radial_type=a["radial_type"],
            atomic_inter_scale=a["atomic_inter_scale"],
            atomic_inter_shift=a["atomic_inter_shift"],
        )


def save_stored(model: torch.nn.Module, card: dict, stem: Path) -> None:
    """Write `stem.safetensors` (float32 parameters under their state-dict names) and `stem.json` (the card)."""
    weights = {name: p.detach().float().cpu().contiguous() for name, p in model.named_parameters()}
    save_file(weights, str(stem.with_suffix(".safetensors")))
    stem.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n")


def load_stored(stem: Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
    """The model stored as `stem.safetensors` + `stem.json`.

    Raises FileNotFoundError if a file is missing, ValueError if the weights do not belong to the architecture.
    """
    for path in (stem.with_suffix(".json"), stem.with_suffix(".safetensors")):
        if not path.is_file():
            raise FileNotFoundError(
                f"model file {path.name} is missing in {path.parent}; "
                "make it with: python -m mace_triton.models.train_water DATA.npz --out DIR"
            )
    model = build_model(load_card(stem)["architecture"], dtype)
    weights = load_file(str(stem.with_suffix(".safetensors")))
    wanted = {name: p.shape for name, p in model.named_parameters()}
    if wanted != {name: w.shape for name, w in weights.items()}:
        raise ValueError(f"{stem.name}.safetensors does not fit the architecture in {stem.name}.json")
    model.load_state_dict(weights, strict=False)  # what is not a parameter was computed by build_model
    return model.to(device)


def load_card(stem: Path = FOLDER / "water") -> dict:
    """The JSON beside the weights: architecture, units, training summary, measured errors."""
    return json.loads(stem.with_suffix(".json").read_text())


def load_water(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> modules.ScaleShiftMACE:
    """The shipped liquid-water model as plain MACE (e3nn). Energies in eV, lengths in angstrom.

    Its zero of energy is the mean energy of liquid water per molecule in the training data (see the model card).
    Raises FileNotFoundError if the weights are not installed.
    """
    return load_stored(FOLDER / "water", device, dtype)
