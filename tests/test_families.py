"""Every family of MACE models against plain MACE in FP64: shapes of the published models, and the kinds beside them.

On a GPU the models have their published widths, on a CPU 8 channels, and the two nonlinear ones also theirs. The
certificate of exactness is that of test_mace_parity.py: FP64 to 1e-12 of the largest value, FP32 within 1.5 times the
error of e3nn's own FP32.
"""

import copy
import inspect
import sys
from functools import lru_cache
from types import SimpleNamespace

import foundation_shapes as fs
import mace_models as mm
import numpy as np
import pytest
import torch
from e3nn import o3
from mace import modules
from mace.modules import extensions
from mace.modules.lora import inject_lora, merge_lora_weights
from mace.tools.finetuning_utils import load_foundations_elements
from mace.tools.scripts_utils import extract_config_mace_model
from mace.tools.torch_tools import default_dtype
from mace.tools.utils import AtomicNumberTable
from torch_ema import ExponentialMovingAverage

import mace_triton as mt
from mace_triton.certify import single_point
from mace_triton.ops import dispatch

EXACT = 1e-12
CONV = ("channelwise_tp_fwd", "channelwise_tp_bwd")
OPS = ("linear_fwd", "linear_grad_x", *CONV, "symmetric_contraction_fwd", "symmetric_contraction_bwd")


@pytest.fixture(autouse=True)
def nan_filled_empties() -> None:
    """Not here: building e3nn modules compiles TorchScript, which cannot see through a patched torch.empty."""


def polar_runs() -> bool:
    """Whether graph_longrange is there, in a version that has what PolarMACE of this MACE calls."""
    if not extensions.GRAPH_LONGRANGE_AVAILABLE:
        return False
    return (
        "force_pbc_evaluator" in inspect.signature(extensions.GTOElectrostaticFeatures.precompute_geometry).parameters
    )


no_polar = pytest.mark.skipif(not polar_runs(), reason="needs graph_longrange as PolarMACE calls it (0.4.0)")
NAMES = [name for name in fs.FAMILIES if torch.cuda.is_available() or not name.endswith("-224")]  # of 8 channels twice
FAMILIES = [pytest.param(name, marks=no_polar) if name.startswith("polar") else name for name in NAMES]


@pytest.fixture(autouse=True)
def plain_torchscript():
    """e3nn's TorchScript as it stands: optimizing it anew for every batch would be most of the time here."""
    with torch.jit.optimized_execution(False):
        yield


def frozen(model: torch.nn.Module) -> torch.nn.Module:
    """`model` with constant weights, as MACE's calculator uses it."""
    return model.requires_grad_(False)


@lru_cache(maxsize=8)
def plain(name: str, device: torch.device, full: bool = False) -> torch.nn.Module:
    """The family's model in FP64: published width on a GPU or where asked for, else 8 channels."""
    shrink = 1 if full or device.type == "cuda" else fs.FAMILIES[name]["hidden"][0] // 8
    return frozen(fs.build(name, device, shrink=shrink))


def tensors(out: dict) -> dict[str, torch.Tensor]:
    return {key: value for key, value in out.items() if torch.is_tensor(value)}


def agree(got: dict, want: dict, bound: float = EXACT) -> None:
    """Every output within `bound` of its largest wanted value."""
    want = tensors(want)
    assert tensors(got).keys() == want.keys()
    for key, value in want.items():
        error, scale = (got[key].double() - value.double()).abs().max(), value.double().abs().max()
        assert torch.isfinite(got[key]).all(), key
        assert error <= bound * scale, f"{key}: off by {error:.3g}, largest value {scale:.3g}"


def ran(*ops: str) -> None:
    """Assert that each op ran since `dispatch.calls` was cleared, and on one backend only."""
    which = {backend for _, backend in dispatch.calls}
    assert len(which) == 1, dispatch.calls
    assert all(dispatch.calls[op, next(iter(which))] > 0 for op in ops), dispatch.calls


def ops_of(model: torch.nn.Module) -> set[str]:
    """The ops that energy and forces of an accelerated model must have called."""
    kinds = {type(module).__name__ for module in model.modules()}
    ops = set(OPS)
    if "SpeciesLinear" in kinds:
        ops.add("species_linear_fwd")
    if "RadialNet" in kinds:
        ops |= {"radial_mlp_fwd", "radial_mlp_bwd"}
    if "NormNet" in kinds:
        ops |= {"norm_mlp_fwd", "norm_mlp_bwd"}
    return ops


def rms(found: list[torch.Tensor]) -> float:
    return torch.cat(found).double().pow(2).mean().sqrt().item()


def force_errors(model: torch.nn.Module, seeds: range, n_atoms: int = 8) -> tuple[float, float, float]:
    """RMS force, and the errors of e3nn's and of our FP32 against e3nn FP64 (eV/A)."""
    singles = frozen(mt.restore(model).float()), frozen(mt.accelerate(model, "fp32"))
    wanted, errors = [], ([], [])
    for seed in seeds:
        batch = fs.random_batch(model, seed, n_atoms=n_atoms)
        wanted.append(mm.evaluate(model, batch)["forces"])
        for single, found in zip(singles, errors, strict=True):
            found.append(mm.evaluate(single, batch)["forces"].double() - wanted[-1])
    return rms(wanted), *(rms(found) for found in errors)


# The published shapes


@pytest.mark.parametrize("name", FAMILIES)
def test_energy_forces_stress_agree(name, device, reference_path):
    model = plain(name, device)
    fast = frozen(mt.accelerate(model, "fp64", strict=True))
    batch = fs.random_batch(model, seed=1)
    want = mm.evaluate(model, batch)
    dispatch.calls.clear()
    got = mm.evaluate(fast, batch)
    ran(*ops_of(fast))
    agree(got, want)
    assert want["forces"].abs().max() > 1e-3  # a model that predicts nothing would agree with anything
    check_fp32(model)
    check_report(fast)
    check_restore(fast, model, batch)


def check_fp32(model: torch.nn.Module) -> None:
    seeds = range(4 if torch.cuda.is_available() else 2)
    scale, theirs, ours = force_errors(model, seeds)
    assert ours <= 1.5 * theirs + 1e-7 * scale
    assert theirs < 1e-4 * scale


def check_report(fast: torch.nn.Module) -> None:
    """Whatever owns weights has a row, and whatever MACE's code runs has a reason."""
    rows = {row.block: row.runs for row in mt.report(fast).rows}
    for name, module in fast.named_modules():
        if name and next(module.parameters(recurse=False), None) is not None and not hasattr(module, "conv_tp"):
            assert any(f"{name}.".startswith(f"{block}.") for block in rows), f"{name} is in no row"
    reasons = [runs.removeprefix("MACE's own code") for runs in rows.values() if runs.startswith("MACE's own code")]
    assert all(len(reason) > 5 for reason in reasons)
    for key in ("linear_up", "linear", "conv_tp", "conv_tp_weights", "density_fn", "skip_tp", "symmetric_contractions"):
        assert not any(runs.startswith("MACE") for block, runs in rows.items() if block.endswith(f".{key}")), rows


def check_restore(fast: torch.nn.Module, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> None:
    """The restored model has MACE's classes and the same weights; the accelerated one the same state dict."""
    restored = mt.restore(fast)
    for key, module in model.named_modules():
        assert type(restored.get_submodule(key)).__name__ == type(module).__name__
    for other in (fast, restored):
        state = other.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    energies = (mm.evaluate(m, batch)["energy"] for m in (restored, model))
    torch.testing.assert_close(*energies, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ["mh-1", "omol-0"])
def test_nonlinear_models_of_published_width(name, device, reference_path):
    """Energies and forces of MH-1's and OMOL's full shapes, where MACE's own cuEquivariance path goes wrong."""
    model = plain(name, device, full=True)
    batch = fs.random_batch(model, seed=2, n_atoms=3)
    agree(mm.evaluate(frozen(mt.accelerate(model, "fp64")), batch), mm.evaluate(model, batch))
    scale, theirs, ours = force_errors(model, range(1), n_atoms=3)
    assert ours <= 1.5 * theirs + 1e-7 * scale


# What a model may have beside its blocks


def test_every_head_has_its_energy(device, reference_path):
    model = plain("mh-1", device)
    fast = mt.accelerate(model)
    atoms = mm.random_structures([1, 6, 8], seed=3)[0]
    batch = fs.batch_of(model, [atoms] * len(model.heads))
    assert batch["head"].tolist() == list(range(len(model.heads)))
    want, got = mm.evaluate(model, batch), mm.evaluate(fast, batch)
    agree(got, want)
    assert len(set(got["interaction_energy"].tolist())) == len(model.heads)


def test_charge_and_spin_change_the_energy(device, reference_path):
    model = plain("omol-0", device)
    fast = mt.accelerate(model)
    batch = fs.batch_of(model, [mm.random_structures([1, 6, 8], seed=4)[0]] * 3)
    agree(mm.evaluate(fast, batch), mm.evaluate(model, batch))
    assert len(set(mm.evaluate(fast, batch)["interaction_energy"].tolist())) == 3


def test_certificate_is_of_the_charge_that_the_structure_has(device, reference_path):
    model = plain("omol-0", device)
    fast = mt.accelerate(model)
    atoms = mm.random_structures([1, 6, 8], seed=4)[0]
    energies = []
    for charge in (0, 2):
        atoms.info["charge"] = charge
        assert mt.certify(fast, model, atoms).passed
        energies.append(single_point(fast, atoms)["energy"])
    assert energies[0] != energies[1]


PER_NODE = {"type": "continuous", "per": "node", "in_dim": 1, "emb_dim": 4}
OPTIONS: dict[str, tuple[str, dict]] = {
    "so3": ("off-medium", {"use_so3": True}),  # has weights of paths that do not exist
    "nonlinear-so3": ("nonlinear", {"use_so3": True}),
    "embedding-readout": ("multi-head", {"embedding_specs": {"charges": PER_NODE}, "use_embedding_readout": True}),
    "last-readout-only": ("off-medium", {"use_last_readout_only": True}),
    "one-layer": ("off-medium", {"num_interactions": 1}),
    "all-irreps-kept": ("off-medium", {"keep_last_layer_irreps": True}),
    "two-correlations": ("off-medium", {"correlation": [2, 3]}),
    "gaussians": ("off-small", {"radial_type": "gaussian", "distance_transform": "Soft", "pair_repulsion": True}),
    "radial-widths": ("off-medium", {"radial_MLP": [16, 32]}),
    "radial-linear": ("nonlinear", {"radial_MLP": []}),
    "density-edges": ("density", {"edge_irreps": fs.irreps((4, 1)), "use_edge_irreps_first": True}),
    "density-no-cutoff": ("density", {"apply_cutoff": False}),
    "first-nonlinear": ("off-medium", {"interaction_cls_first": mm.NONLINEAR}),
}
"""What MACE's command line can change beside the families: name -> (model of mace_models, arguments)."""


@pytest.mark.parametrize("name", OPTIONS)
def test_options_agree(name, device, reference_path):
    base, changes = OPTIONS[name]
    model = frozen(mm.build(base, device=device, channels=8, elements=(1, 6, 8), **changes))
    fast = frozen(mt.accelerate(model, strict=True))
    batch = fs.random_batch(model, seed=5)
    dispatch.calls.clear()
    got = mm.evaluate(fast, batch)
    ran(*CONV)
    agree(got, mm.evaluate(model, batch))
    assert mt.restore(fast).state_dict().keys() == model.state_dict().keys()


def test_forces_of_chebyshev_models_are_right(device, reference_path):
    """PyTorch cannot differentiate its Chebyshev polynomials: MACE's own forces lack their part, ours do not."""
    options = {"radial_type": "chebyshev", "distance_transform": "Agnesi"}
    model = frozen(mm.build("off-small", device=device, channels=8, elements=(1, 6, 8), **options))
    fast = frozen(mt.accelerate(model, strict=True))
    atoms = mm.random_structures([1, 6, 8], seed=5)[0]
    forces, energies = mm.evaluate(fast, mm.batch_of(fast, [atoms]))["forces"], []
    for step in (1e-4, -1e-4):
        moved = atoms.copy()
        moved.positions[0, 1] += step
        batch = mm.batch_of(model, [moved])
        energies.append(mm.evaluate(model, batch)["interaction_energy"].item())
        agree({"energy": mm.evaluate(fast, batch)["energy"]}, {"energy": mm.evaluate(model, batch)["energy"]})
    slope = (energies[1] - energies[0]) / 2e-4
    assert abs(forces[0, 1].item() - slope) <= 1e-5 * forces.abs().max().item()


def test_harmonics_above_three_keep_maces_product(device, reference_path):
    model = frozen(mm.build("off-small", device=device, channels=8, elements=(1, 6, 8), max_ell=4, correlation=2))
    fast = frozen(mt.accelerate(model))
    batch = fs.random_batch(model, seed=5)
    agree(mm.evaluate(fast, batch), mm.evaluate(model, batch))
    rows = {row.block: row.runs for row in mt.report(fast).rows}
    assert "supported are l <= 3" in rows["interactions.1.conv_tp"]
    with pytest.raises(ValueError, match=r"interactions\.0\.conv_tp: .*supported are l <= 3"):
        mt.accelerate(model, strict=True)


def test_the_kernels_themselves_agree(device):
    """On a CPU this runs the Triton kernels in the interpreter, so the structure is tiny."""
    model = plain("mh-1", device)
    fast = frozen(mt.accelerate(model))
    batch = fs.batch_of(model, mm.random_structures([1, 6, 8], seed=7, n_atoms=2)[1:2])
    dispatch.calls.clear()
    got = mm.evaluate(fast, batch)
    assert {backend for _, backend in dispatch.calls} == {"triton"}
    ran(*ops_of(fast))
    agree(got, mm.evaluate(model, batch))


DIPOLES = {
    "AtomicDipolesMACE": {"MLP_irreps": o3.Irreps("8x1o"), "atomic_energies": None},
    "EnergyDipolesMACE": {"MLP_irreps": o3.Irreps("8x0e+8x1o"), "atomic_energies": np.linspace(-3.0, 2.0, 3)},
    "AtomicDielectricMACE": {
        "MLP_irreps": o3.Irreps("8x0e+8x1o+8x2e"),
        "hidden_irreps": fs.irreps((8, 2)),
        "atomic_energies": None,
        "use_polarizability": True,
    },
}


def dipole_model(kind: str, device: torch.device) -> torch.nn.Module:
    """A model of MACE's class `kind`, with the first block that its command line gives it."""
    spec = {"hidden_irreps": fs.irreps((8, 1))} | DIPOLES[kind]
    torch.manual_seed(0)
    with default_dtype(torch.float64):
        model = getattr(modules, kind)(
            r_max=5.0,
            num_bessel=8,
            num_polynomial_cutoff=5,
            max_ell=3,
            interaction_cls=modules.interaction_classes[mm.RESIDUAL],
            interaction_cls_first=modules.interaction_classes["RealAgnosticInteractionBlock"],
            num_interactions=2,
            num_elements=3,
            avg_num_neighbors=10.0,
            atomic_numbers=[1, 6, 8],
            correlation=3,
            gate=torch.nn.functional.silu,
            **spec,
        )
    return frozen(model.double().to(device))


@pytest.mark.parametrize("kind", DIPOLES)
def test_dipoles_and_polarizabilities_agree(kind, device, reference_path):
    model = dipole_model(kind, device)
    fast = frozen(mt.accelerate(model, strict=True))
    batch = fs.random_batch(model)
    want = model(mm.cast(batch, model))
    dispatch.calls.clear()
    got = fast(mm.cast(batch, fast))
    ran("linear_fwd", "channelwise_tp_fwd", "symmetric_contraction_fwd", "species_linear_fwd", "radial_mlp_fwd")
    agree(got, want)
    check_report(fast)
    check_dipoles_fp32(model, batch, want)
    assert mt.restore(fast).state_dict().keys() == model.state_dict().keys()


def test_dielectric_derivatives_agree(device, reference_path):
    """Of one structure and in the default dtype: MACE's own code takes no other."""
    model = dipole_model("AtomicDielectricMACE", device)
    fast = frozen(mt.accelerate(model, strict=True))
    batch = fs.batch_of(model, mm.random_structures([1, 6, 8])[:1])
    with default_dtype(torch.float64):
        want, got = (m(mm.cast(batch, m), compute_dielectric_derivatives=True) for m in (model, fast))
    assert want["dmu_dr"].abs().max() > 1e-3
    agree(got, want)


def check_dipoles_fp32(model: torch.nn.Module, batch: dict[str, torch.Tensor], want: dict) -> None:
    single, fast = mt.restore(model).float(), mt.accelerate(model, "fp32")
    theirs, ours = (frozen(m)(mm.cast(batch, m)) for m in (single, fast))
    for key in {"dipole", "polarizability", "forces"} & tensors(ours).keys():
        scale = want[key].abs().max()
        errors = [(out[key].double() - want[key]).abs().max() for out in (theirs, ours)]
        assert errors[1] <= 1.5 * errors[0] + 2.0**-20 * scale, key  # one sample: 16 roundings on top


def test_a_certificate_needs_energies(device):
    model = dipole_model("AtomicDipolesMACE", device)
    with pytest.raises(ValueError, match="AtomicDipolesMACE has no energy"):
        mt.certify(mt.accelerate(model), model, mm.random_structures([1, 6, 8])[0])


class Les(torch.nn.Module):
    """Stands in for les, which is not published as a package: any smooth energy of the charges and distances."""

    def __init__(self, les_arguments: dict):
        super().__init__()

    def forward(self, latent_charges, positions, cell, batch, **_):
        pairs = torch.cdist(positions, positions).add(1.0).reciprocal() * (batch[:, None] == batch)
        energy = torch.zeros(len(cell), dtype=positions.dtype, device=positions.device)
        return {"E_lr": energy.index_add(0, batch, latent_charges * (pairs @ latent_charges)), "BEC": None}


def test_maceles(device, reference_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "les", SimpleNamespace(Les=Les))
    monkeypatch.setattr(modules, "MACELES", extensions.MACELES, raising=False)
    model = frozen(fs.build("off23-small", device, shrink=12, kind="MACELES", les_arguments={}))
    fast = frozen(mt.accelerate(model, strict=True))
    batch = fs.random_batch(model)
    agree(mm.evaluate(fast, batch), mm.evaluate(model, batch))
    rows = {row.block: row for row in mt.report(fast).rows}
    assert rows["les_readouts.0.linear"].module == "IrrepsLinear"


# Fine-tuning


def loss_gradients(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of a loss on energy and forces, by parameter."""
    model.zero_grad(set_to_none=True)
    out = mm.evaluate(model, batch, training=True)
    (out["forces"].pow(2).mean() + out["energy"].pow(2).mean()).backward()
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def same_gradients(fast: torch.nn.Module, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> None:
    want, got = loss_gradients(model, batch), loss_gradients(fast, batch)
    assert got.keys() == want.keys()
    largest = max(gradient.abs().max() for gradient in want.values())
    for key, gradient in want.items():
        assert (got[key] - gradient).abs().max() <= EXACT * largest, key


@pytest.mark.parametrize("name", ["off-medium", "nonlinear"])
def test_averaged_weights_are_seen(name, device, reference_path):
    """MACE validates with averaged weights, which torch_ema swaps in through `.data` between two evaluations."""
    model = mm.build(name, device=device, channels=8, elements=(1, 6, 8))
    batch, results = fs.random_batch(model, seed=8), []
    for m in (model, mt.accelerate(model)):
        average = ExponentialMovingAverage(m.parameters(), decay=0.5)
        optimizer = torch.optim.SGD(m.parameters(), lr=1e-3)
        for _ in range(2):
            loss_gradients(m, batch)
            optimizer.step()
            average.update()
        frozen(m)
        found = [mm.evaluate(m, batch)["forces"]]
        with average.average_parameters():
            found.append(mm.evaluate(m, batch)["forces"])
        results.append([*found, mm.evaluate(m, batch)["forces"]])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10 * float(want.abs().max()))
    assert not torch.allclose(*results[0][:2], rtol=1e-6)


def with_lora(model: torch.nn.Module) -> torch.nn.Module:
    """A copy with MACE's LoRA in it, whose adapters (zero at first) have been trained."""
    model = copy.deepcopy(model)
    inject_lora(model, rank=2, alpha=1.0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_" in key:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


@pytest.mark.parametrize("name", ["mp-0b3-medium", "mh-1"])
def test_lora(name, device, reference_path):
    model = fs.build(name, device, shrink=fs.FAMILIES[name]["hidden"][0] // 8)
    tuned = with_lora(model)
    fast = mt.accelerate(tuned)
    assert fast.state_dict().keys() == tuned.state_dict().keys()
    batch = fs.random_batch(tuned, seed=6)
    want = mm.evaluate(tuned, batch)
    assert not torch.allclose(want["forces"], mm.evaluate(model, batch)["forces"], rtol=1e-6)
    dispatch.calls.clear()
    agree(mm.evaluate(fast, batch), want)
    ran(*OPS)
    same_gradients(fast, tuned, batch)
    with torch.no_grad():  # here MACE's LoRA puts merged weights into its base for the time of the call
        no_forces = {"compute_force": False, "compute_stress": False, "compute_virials": False}
        agree(mm.evaluate(fast, batch, **no_forces), mm.evaluate(tuned, batch, **no_forces))
    agree(mm.evaluate(mt.restore(fast), batch), want)
    for merged in (mt.accelerate(merge_lora_weights(copy.deepcopy(tuned)), strict=True), merge_lora_weights(fast)):
        agree(mm.evaluate(merged, batch), want)
        assert merged.state_dict().keys() == model.state_dict().keys()


def test_strict_refuses_a_radial_network_with_lora(device):
    tuned = with_lora(plain("mp-0-small", device))
    rows = {row.block: row.runs for row in mt.report(mt.accelerate(tuned)).rows}
    assert "merge_lora_weights" in rows["interactions.1.conv_tp_weights"]
    with pytest.raises(ValueError, match=r"interactions\.0\.conv_tp_weights: net: its layers are wrapped"):
        mt.accelerate(tuned, strict=True)


@pytest.mark.parametrize("name", ["mp-0b3-medium", "mh-1"])
def test_fine_tuning_from_a_foundation_model(name, device, reference_path):
    """MACE's own steps: the configuration of the foundation, fewer elements, its weights, then training."""
    foundation = plain(name, device)
    table = AtomicNumberTable([1, 6, 8])
    models = []
    for source in (foundation, mt.accelerate(foundation)):
        torch.manual_seed(0)  # of the readouts, which MACE takes from a foundation with one head only
        spec = extract_config_mace_model(source)
        columns = [foundation.atomic_numbers.tolist().index(z) for z in table.zs]
        spec |= {"atomic_numbers": table.zs, "num_elements": 3, "atomic_energies": spec["atomic_energies"][:, columns]}
        max_l, readout = foundation.products[0].linear.irreps_out.lmax, len(source.heads) == 1
        with default_dtype(torch.float64):
            model = modules.ScaleShiftMACE(**spec).to(device)
            models.append(load_foundations_elements(model, source, table, load_readout=readout, max_L=max_l))
    one, two = models
    assert all(torch.equal(two.state_dict()[key], value) for key, value in one.state_dict().items())
    same_gradients(mt.accelerate(one.to(device)), one, fs.random_batch(one, seed=7))
