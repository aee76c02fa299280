"""Render docs/water-model.md and docs/water-medium-model.md from the models' JSON files: no number is typed by hand.

python -m mace_triton.models.card [--summary RUN.json ...] [--json WATER-MEDIUM.json --out docs/water-medium-model.md]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from mace_triton.models import FOLDER

TEMPLATE = """\
# The {size}water model

<!-- Made by `python -m mace_triton.models.card` from mace_triton/models/{name}.json. Do not edit. -->

{purpose}

## What it is
| | |
|---|---|
{architecture}

Weights: float32 in `{name}.safetensors`; everything else is in `{name}.json` and is rebuilt in the dtype you ask for.
Energies in eV, lengths in angstrom. Zero of energy: {zero:.4f} eV per molecule (the mean of the training data) was
subtracted; add it times the number of molecules to get the DFT total energy. The energies of single atoms are 0 by
construction: the data hold one composition only.

## Data
{data}. {train} training frames from {folders};
the folder `{held_folder}` ({held} frames) was kept out as a whole, and {near} training frames that lie within
0.05 angstrom (root mean square) of one of its frames were dropped ({same} of them identical). The frames of all folders
come from the same kind of run, so the held-out errors speak for liquid water near these conditions and for nothing
else.

## Training
`python -m mace_triton.models.train_water DATA.npz --out DIR --minutes {minutes:g}{how}`:
MACE's own step, loss, optimiser groups and averaging. Stage one weights energy : forces as {one}, learning rate
{lr:g} down to {lr2:g}; stage two {two}, down to {lr3:g}. {steps} steps of {batch} frames ({epochs} epochs, {steps2}
steps in stage two) in {seconds:.0f} s, seed {seed}.

## Held-out errors (FP64, e3nn, from the stored files)
| | energy, meV/atom | forces, meV/angstrom |
|---|---|---|
| root mean square error | {e_rmse:.3f} | {f_rmse:.2f} |
| mean absolute error | {e_mae:.3f} | {f_mae:.2f} |
| spread of the data | {e_spread:.3f} | {f_spread:.1f} |
{stability}
## Limits
Liquid water near the density and temperature of the training data. No isolated molecules, ions, ice, surfaces or other
elements. The stress was not trained. Interactions end at {r_max:g} angstrom per layer; there is no long-range
electrostatics.

## Licence
The weights are the project's own, under its MIT licence. The training data belong to the deepmd-kit repository
(LGPL-3.0) and are not part of this package.

Made with {versions}.
"""

PURPOSE = {
    "small": """\
A small MACE model of liquid water that ships with the package: `mace_triton.models.load_water()`,
`MACETritonCalculator("water")`, and the default of `mace-triton demo`. It is there to run a real model at once, to test
and to time; it is no research-grade potential.""",
    "medium": """\
A MACE model of liquid water with the shape of MACE-MP's "medium", trained on this package's kernels, that ships with
the package: `MACETritonCalculator("water-medium")`. It is there for studies of precision; it is no research-grade
potential. It is the first of three seeds (see [studies](studies/README.md)), not the best of them.""",
}

STABILITY = """
## Stability
{picoseconds:.3g} ps of NVT at {target:g} K ({atoms} atoms, step {timestep:g} fs, precision {policy}, {device}):
temperature {mean:.1f} +- {std:.1f} K, largest force {force:.2f} eV/angstrom, longest O-H bond {bond:.3f} angstrom,
potential energy drift {drift:+.3f} meV/atom/ps;
molecules intact: {intact}.
"""

ROWS = (
    ("hidden features", "hidden_irreps"),
    ("layers", "num_interactions"),
    ("cutoff, angstrom", "r_max"),
    ("spherical harmonics up to l", "max_ell"),
    ("correlation", "correlation"),
    ("radial functions", "num_bessel"),
    ("radial MLP", "radial_MLP"),
    ("readout", "MLP_irreps"),
    ("interaction block", "interaction"),
    ("neighbours per atom", "avg_num_neighbors"),
)


def render(card: dict, summary: dict | None = None) -> str:
    """The model card in Markdown, from water.json and, if there is one, the summary of a long run of the demo.

    Raises KeyError naming the field that an unfinished training has not written.
    """
    architecture, frames, settings, training = (card[k] for k in ("architecture", "frames", "settings", "training"))
    errors = card["held_out_errors"]
    rows = [f"| {label} | {_cell(architecture[key])} |" for label, key in ROWS]
    size, precision = settings.get("size", "small"), settings.get("precision")
    return TEMPLATE.format(
        name=card["name"],
        size="" if size == "small" else f"{size} ",
        purpose=PURPOSE[size],
        how="" if size == "small" else f" --size {size} --precision {precision} --seed {settings['seed']}",
        architecture="\n".join(rows),
        zero=card["energy_zero_eV_per_molecule"],
        data=card["data"].split(";")[0],
        train=frames["train"],
        folders=", ".join(f"`{name}`" for name in frames["train_folders"]),
        held_folder=frames["held_out_folder"],
        held=frames["held_out"],
        near=frames["dropped_within_0.05_angstrom_rms_of_held_out"],
        same=frames["dropped_identical_to_held_out"],
        minutes=settings["minutes"],
        one=_ratio(settings["weights_stage_one"]),
        two=_ratio(settings["weights_stage_two"]),
        lr=settings["lr"],
        lr2=settings["lr_stage_two"],
        lr3=settings["lr_final"],
        steps=training["steps"],
        batch=settings["batch_size"],
        epochs=training["epochs"],
        steps2=training["steps_in_stage_two"],
        seconds=training["seconds"],
        seed=settings["seed"],
        e_rmse=errors["energy_rmse_meV_per_atom"],
        f_rmse=errors["force_rmse_meV_per_angstrom"],
        e_mae=errors["energy_mae_meV_per_atom"],
        f_mae=errors["force_mae_meV_per_angstrom"],
        e_spread=errors["spread_energy_meV_per_atom"],
        f_spread=errors["spread_force_meV_per_angstrom"],
        stability="" if summary is None else render_stability(summary),
        r_max=architecture["r_max"],
        versions=", ".join(f"{name} {version}" for name, version in card["versions"].items()),
    )


def render_stability(summary: dict) -> str:
    """The paragraph about a long run, from the JSON that `mace-triton demo --summary` writes."""
    return STABILITY.format(
        picoseconds=summary["picoseconds"],
        target=summary["options"]["temperature"],
        atoms=summary["atoms"],
        timestep=summary["options"]["timestep"],
        policy=summary["certificate"]["policy"],
        device=summary["device"],
        mean=summary["temperature_mean_K"],
        std=summary["temperature_std_K"],
        force=summary["largest_force_eV_per_angstrom"],
        bond=summary["longest_OH_bond_angstrom"],
        drift=summary["potential_drift_meV_per_atom_per_ps"],
        intact="yes" if summary["molecules_intact"] else "NO",
    )


def merge(summaries: list[dict]) -> dict | None:
    """One summary of a run that was made in parts (`mace-triton demo --start`); None for no part at all."""
    if not summaries:
        return None
    length = np.array([part["picoseconds"] for part in summaries])
    mean = np.array([part["temperature_mean_K"] for part in summaries])
    square = np.array([part["temperature_std_K"] for part in summaries]) ** 2 + mean**2
    drift = np.array([part["potential_drift_meV_per_atom_per_ps"] for part in summaries])
    energy = np.array([part["potential_mean_eV"] for part in summaries])
    whole = float(np.average(mean, weights=length))
    spent = {part["device"]: 0.0 for part in summaries}
    for part in summaries:
        spent[part["device"]] += part["picoseconds"]
    devices = list(spent) if len(spent) == 1 else [f"{ps:.3g} ps on {device}" for device, ps in spent.items()]
    first = {key: value for key, value in summaries[0].items() if key not in ("ms_per_step", "ns_per_day")}
    return first | {
        "device": ", ".join(devices),
        "picoseconds": float(length.sum()),
        "temperature_mean_K": whole,
        "temperature_std_K": float(np.sqrt(np.average(square, weights=length) - whole**2)),
        "potential_mean_eV": float(np.average(energy, weights=length)),
        "potential_drift_meV_per_atom_per_ps": float(np.average(drift, weights=length)),
        "largest_force_eV_per_angstrom": max(part["largest_force_eV_per_angstrom"] for part in summaries),
        "longest_OH_bond_angstrom": max(part["longest_OH_bond_angstrom"] for part in summaries),
        "molecules_intact": all(part["molecules_intact"] for part in summaries),
    }


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _ratio(weights: list[float]) -> str:
    return " : ".join(f"{weight:g}" for weight in weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=FOLDER / "water.json")
    parser.add_argument("--summary", type=Path, nargs="*", help="of a long demo run; several if it was made in parts")
    parser.add_argument("--out", type=Path, default=FOLDER.parent.parent / "docs" / "water-model.md")
    args = parser.parse_args()
    if not args.json.is_file():
        raise SystemExit(f"no such file: {args.json}; train the model first")
    stored = FOLDER / f"{args.json.stem}-stability.json"  # kept beside the weights, so that the card can be made again
    if args.summary:
        stored.write_text(json.dumps(merge([json.loads(path.read_text()) for path in args.summary]), indent=1) + "\n")
    summary = json.loads(stored.read_text()) if stored.is_file() else None
    args.out.write_text(render(json.loads(args.json.read_text()), summary))
    print(args.out)


if __name__ == "__main__":
    main()
