"""The shapes of the published foundation models, with random weights.

Where the numbers come from, row by row in the comments:
  script      the training script that the MACE authors published beside the model (repositories mace-mp, mace-off and
              mace-foundations of ACEsuit)
  parser      an option that the script leaves out, so the default of MACE's own command line
  paper       the table of the model's paper
  inferred    not published; from what another program demands of the model's file, or from the model it was tuned from
"""

from __future__ import annotations

import math

import mace  # noqa: F401  before e3nn
import mace_models as mm
import numpy as np
import torch
from e3nn import o3
from mace import modules
from mace.tools.torch_tools import default_dtype

RESIDUAL, NONLINEAR = mm.RESIDUAL, mm.NONLINEAR
TO_BI = tuple(range(1, 84))  # hydrogen to bismuth

# MP-0, script: both blocks residual, 10 Bessel functions, 6 angstrom.
_MP0 = {"elements": mm.MP_ELEMENTS, "r_max": 6.0, "num_bessel": 10, "interaction_cls": RESIDUAL}
# MP-0b3, script: density blocks (the first without residual), Agnesi transform, ZBL, as MP-0 otherwise.
_DENSITY = _MP0 | {
    "interaction_cls_first": "RealAgnosticDensityInteractionBlock",
    "interaction_cls": "RealAgnosticDensityResidualInteractionBlock",
    "pair_repulsion": True,
    "distance_transform": "Agnesi",
}
# OFF23, script: --model=MACE, for which MACE puts RealAgnosticInteractionBlock first. Parser: 8 Bessel functions.
_OFF = {
    "elements": mm.OFF_ELEMENTS,
    "r_max": 5.0,
    "num_bessel": 8,
    "interaction_cls_first": "RealAgnosticInteractionBlock",
    "interaction_cls": RESIDUAL,
}
_NONLINEAR = {"interaction_cls": NONLINEAR, "r_max": 6.0, "num_bessel": 8}
# POLAR-1, script and its shared configuration, complete.
_POLAR = _NONLINEAR | {
    "kind": "PolarMACE",
    "elements": TO_BI,
    "use_agnostic_product": True,
    "num_recursion_steps": 2,
    "kspace_cutoff_factor": 1.5,
    "atomic_multipoles_max_l": 1,
    "atomic_multipoles_smearing_width": 1.5,
    "field_feature_max_l": 1,
    "field_feature_widths": [1.5, 3.0],
    "field_feature_norms": [20.0, 20.0, 0.5, 0.5],
    "field_norm_factor": 1.0,
    "include_electrostatic_self_interaction": True,
    "add_local_electron_energy": True,
    "fixedpoint_update_config": {
        "type": "AgnosticEmbeddedOneBodyVariableUpdate",
        "potential_embedding_cls": "AgnosticChargeBiasedLinearPotentialEmbedding",
        "nonlinearity_cls": "MLPNonLinearity",
    },
    "field_readout_config": {"type": "OneBodyMLPFieldReadout"},
}
_MH1_HEADS = ["matpes_r2scan", "mp_pbe_refit_add", "spice_wB97M", "oc20_usemppbe", "omol", "omat_pbe"]


def _category(classes: int, offset: int) -> dict:
    return {
        "type": "categorical",
        "per": "graph",
        "in_dim": 1,
        "emb_dim": 1024,
        "num_classes": classes,
        "offset": offset,
    }


FAMILIES: dict[str, dict] = {
    "mp-0-small": _MP0 | {"hidden": (128, 0)},
    "mp-0-medium": _MP0 | {"hidden": (128, 1)},
    "mp-0-large": _MP0 | {"hidden": (128, 2)},
    "mp-0b3-medium": _DENSITY | {"hidden": (128, 1)},
    # OMAT-0 medium: script, whose configuration file is not published: 8 Bessel functions are the parser's.
    "omat-0-medium": _DENSITY | {"hidden": (128, 1), "num_bessel": 8},
    # OMAT-0 small: inferred from medium, as the small models of all other series.
    "omat-0-small": _DENSITY | {"hidden": (128, 0), "num_bessel": 8},
    # OFF23: widths and cutoffs of the paper; the script of the medium model agrees.
    "off23-small": _OFF | {"hidden": (96, 0), "r_max": 4.5},
    "off23-medium": _OFF | {"hidden": (128, 1)},
    "off23-large": _OFF | {"hidden": (192, 2)},
    # The large file that can be downloaded has 224 channels by a user's count (MACE issue 1192): inferred.
    "off23-large-224": _OFF | {"hidden": (224, 2)},
    # OFF24 medium: inferred, OFF23 medium with a cutoff of 6 angstrom.
    "off24-medium": _OFF | {"hidden": (128, 1), "r_max": 6.0},
    # OMOL: script, complete; 89 elements by MACE's list of models (which 89 is inferred). 55 million parameters, as the
    # size of the file asks.
    "omol-0": _NONLINEAR
    | {
        "elements": mm.MP_ELEMENTS,
        "hidden": (1024, 2),
        "edge": (128, 2),
        "num_interactions": 3,
        "correlation": 2,
        "apply_cutoff": False,
        "embedding_specs": {"total_spin": _category(101, 0), "total_charge": _category(201, 100)},
    },
    # MH-1: inferred; another program that reads the file demands two nonlinear layers of 512x0e+512x1o, edges with an
    # equal set of irreps (128 wide as in POLAR), scalar edges in the first layer, weights that ignore the species in
    # the product, correlation 3, 89 elements and these heads. The cutoff is outside the radial network in its paper.
    "mh-1": _NONLINEAR
    | {
        "elements": mm.MP_ELEMENTS,
        "hidden": (512, 1),
        "edge": (128, 1),
        "use_edge_irreps_first": True,
        "use_agnostic_product": True,
        "apply_cutoff": False,
        "heads": _MH1_HEADS,
    },
    "polar-1-m": _POLAR | {"hidden": (512, 1), "edge": (128, 1)},
    "polar-1-l": _POLAR | {"hidden": (512, 2), "edge": (128, 2), "num_interactions": 3},
}
"""Name -> arguments of the model's class; hidden and edge are (channels, largest l)."""

SAME_SHAPE = {
    "mpa-0-medium": "mp-0b3-medium",  # inferred: same period, authors and width, no script
    "matpes-pbe-0": "omat-0-medium",  # inferred: tuned from OMAT-0, as the names of the files say
    "matpes-r2scan-0": "omat-0-medium",
}
"""Published models with the shape of another one."""


def irreps(shape: tuple[int, int]) -> o3.Irreps:
    """(8, 1) -> 8x0e+8x1o."""
    channels, largest = shape
    return o3.Irreps("+".join(f"{channels}x{l}{'eo'[l % 2]}" for l in range(largest + 1)))


def build(
    name: str, device: str | torch.device = "cpu", *, shrink: int = 1, seed: int = 0, **changes
) -> torch.nn.Module:
    """The family's model in FP64 with random weights; shrink divides every number of channels (4 are left at least)."""
    spec = {"num_interactions": 2, "correlation": 3, "heads": None, "max_ell": 3} | FAMILIES[name] | changes
    spec.setdefault("interaction_cls_first", spec["interaction_cls"])
    for key in ("interaction_cls", "interaction_cls_first"):
        spec[key] = modules.interaction_classes[spec[key]]
    for key, argument in (("hidden", "hidden_irreps"), ("edge", "edge_irreps")):
        if key in spec:
            channels, largest = spec.pop(key)
            spec[argument] = irreps((max(channels // shrink, 4), largest))
    if "embedding_specs" in spec:
        spec["embedding_specs"] = {
            key: value | {"emb_dim": max(value["emb_dim"] // shrink, 4)}
            for key, value in spec["embedding_specs"].items()
        }
    numbers, n_heads = list(spec.pop("elements")), len(spec["heads"] or ["Default"])
    torch.manual_seed(seed)
    with default_dtype(torch.float64):
        model = getattr(modules, spec.pop("kind", "ScaleShiftMACE"))(
            num_polynomial_cutoff=5,
            num_elements=len(numbers),
            atomic_numbers=numbers,
            MLP_irreps=o3.Irreps("16x0e"),
            atomic_energies=np.linspace(-3.0, 2.0, n_heads * len(numbers)).reshape(n_heads, -1),
            avg_num_neighbors=20.0,
            gate=torch.nn.functional.silu,
            use_reduced_cg=False,  # the parser's default, and all there was when the older models were made
            atomic_inter_scale=[0.8] * n_heads,
            atomic_inter_shift=[0.1] * n_heads,
            **spec,
        )
    return _awake(model).to(device)


def _awake(model: torch.nn.Module) -> torch.nn.Module:
    # MACE starts the embeddings and beta at almost zero or zero, where an error of ours in them would not show. Random
    # Fukui functions may sum to nearly zero and are divided by that sum: a bias keeps the models well conditioned.
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for block in model.interactions:
            for key in ("source_embedding", "target_embedding"):
                if hasattr(block, key):
                    getattr(block, key).weight.normal_(generator=generator)
            if hasattr(block, "beta"):
                block.alpha.fill_(math.sqrt(20.0))
                block.beta.fill_(1.5)
        if isinstance(model, modules.PolarMACE):
            model.fukui_source_map.linear_2.bias.add_(1.0)
            for update in model.field_dependent_charges_maps:
                update.readout.linear_2.bias[-2:].add_(1.0)
    return model


def batch_of(model: torch.nn.Module, structures: list) -> dict[str, torch.Tensor]:
    """MACE's input for these structures, each with a total charge and spin of its own, and what dipole models read."""
    batch = mm.batch_of(model, structures)
    graphs, device, dtype = len(structures), batch["positions"].device, batch["positions"].dtype
    number = torch.arange(graphs, device=device, dtype=dtype)
    batch["total_charge"], batch["total_spin"] = number - 1, number + 1
    batch["charges"] = torch.linspace(-0.5, 0.5, len(batch["batch"]), device=device, dtype=dtype)
    batch["fermi_level"] = torch.zeros(graphs, device=device, dtype=dtype)
    batch["external_field"] = torch.zeros(graphs, 3, device=device, dtype=dtype)
    return batch


def random_batch(model: torch.nn.Module, seed: int = 0, *, n_atoms: int = 5) -> dict[str, torch.Tensor]:
    """`batch_of` for `mace_models.random_structures` with the model's elements; for PolarMACE of crystals only."""
    elements = [int(z) for z in model.atomic_numbers]
    structures = mm.random_structures(elements, seed, n_atoms=n_atoms)
    if isinstance(model, modules.PolarMACE):  # its reciprocal sum would fill a molecule's huge box with waves
        structures = [structures[0], mm.random_structures(elements, seed + 100, n_atoms=n_atoms)[0]]
    return batch_of(model, structures)
