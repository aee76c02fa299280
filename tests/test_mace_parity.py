"""Accelerated MACE against e3nn in FP64: energies, forces, stress, virials, hessian, training, symmetries, compile.

Models are shrunk to a few channels; the FP64 error of both sides is a few hundred rounding units, so agreement is asked
to 1e-12 of the largest value.
"""

from functools import lru_cache

import mace_models as mm
import numpy as np
import pytest
import torch
from e3nn import o3
from mace import modules
from mace.tools.compile import configure_autograd_for_compile
from mace.tools.torch_tools import default_dtype

import mace_triton as mt
from mace_triton.nn.conv import ConvTP
from mace_triton.nn.linear import IrrepsLinear
from mace_triton.ops import dispatch

SMALL = {"channels": 8, "elements": (1, 6, 8)}
WIDTHS = {"cpu": 8, "cuda": 64}
"""Channels of models whose rounding is measured: on a GPU enough of them that FP32 sums run as 3xTF32."""
EXACT = 1e-12
OUTPUTS = ("energy", "node_energy", "forces", "stress", "virials", "node_feats")
OPS = ("linear_fwd", "linear_grad_x", "channelwise_tp_fwd", "channelwise_tp_bwd")


@pytest.fixture(autouse=True)
def nan_filled_empties() -> None:
    """Not here: building e3nn modules compiles TorchScript, which cannot see through a patched torch.empty."""


@lru_cache(maxsize=32)
def e3nn_model(
    name: str, device: torch.device, dtype: torch.dtype = torch.float64, channels: int = 8
) -> torch.nn.Module:
    if dtype == torch.float64:
        return mm.build(name, device=device, **SMALL | {"channels": channels})
    return mt.restore(e3nn_model(name, device, channels=channels)).to(dtype)


@lru_cache(maxsize=32)
def fast_model(
    name: str, device: torch.device, precision: str | mt.Precision = "fp64", channels: int = 8
) -> torch.nn.Module:
    return mt.accelerate(e3nn_model(name, device, channels=channels), precision, strict=True)


def close(got: torch.Tensor, want: torch.Tensor, bound: float, what: str) -> None:
    """Largest difference within `bound` of the largest wanted value."""
    error, scale = (got.double() - want.double()).abs().max(), want.double().abs().max()
    assert torch.isfinite(got).all(), what
    assert error <= bound * scale, f"{what}: off by {error:.3g}, largest value {scale:.3g}"


def rms(tensor: torch.Tensor) -> float:
    return tensor.double().pow(2).mean().sqrt().item()


def ran(*ops: str) -> None:
    """Assert that each op ran since `dispatch.calls` was cleared, and on one backend only."""
    which = {backend for _, backend in dispatch.calls}
    assert len(which) == 1, dispatch.calls
    assert all(dispatch.calls[op, next(iter(which))] > 0 for op in ops), dispatch.calls


@pytest.mark.parametrize("name", [*mm.SHAPES, *mm.BLOCKS])
def test_fp64_agrees(name, device, reference_path):
    model, fast = e3nn_model(name, device), fast_model(name, device)
    batch = mm.random_batch(model, seed=1)
    want = mm.evaluate(model, batch)
    dispatch.calls.clear()
    got = mm.evaluate(fast, batch)
    ran(*OPS)
    for key in OUTPUTS:
        close(got[key], want[key], EXACT, key)
    assert want["forces"].abs().max() > 1e-3  # a model that predicts nothing would agree with anything


@pytest.mark.parametrize("name", ["residual", "nonlinear"])
def test_hessian_agrees(name, device, reference_path):
    model, fast = e3nn_model(name, device), fast_model(name, device)
    structures = mm.random_structures(SMALL["elements"], seed=2, n_atoms=3)[:2]
    batch = mm.batch_of(model, structures)
    flags = {"compute_hessian": True, "compute_stress": False, "compute_virials": False}
    want = mm.evaluate(model, batch, **flags)["hessian"]
    dispatch.calls.clear()
    got = mm.evaluate(fast, batch, **flags)["hessian"]
    ran("channelwise_tp_bwd_bwd")
    close(got, want, EXACT, "hessian")


def loss_gradients(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of a loss on energy, forces and stress, by parameter."""
    model.zero_grad(set_to_none=True)
    out = mm.evaluate(model, batch, training=True)
    target = torch.linspace(-1.0, 1.0, out["forces"].numel(), device=out["forces"].device).view_as(out["forces"])
    loss = (out["forces"] - target).pow(2).mean() + out["energy"].pow(2).mean() + out["stress"].pow(2).sum()
    loss.backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients


@pytest.mark.parametrize("name", ["mp-small", "mp-large", *mm.BLOCKS])
def test_training_gradients_agree(name, device, reference_path):
    model, fast = e3nn_model(name, device), fast_model(name, device)
    batch = mm.random_batch(model, seed=3)
    want = loss_gradients(model, batch)
    dispatch.calls.clear()
    got = loss_gradients(fast, batch)
    ran(*OPS, "linear_grad_w", "channelwise_tp_bwd_bwd")
    assert got.keys() == want.keys()
    largest = max(gradient.abs().max() for gradient in want.values())
    for key, gradient in want.items():
        error = (got[key] - gradient).abs().max()
        assert error <= EXACT * max(gradient.abs().max(), 1e-3 * largest), f"{key}: off by {error:.3g}"


def force_errors(name: str, device: torch.device, policy: str | mt.Precision) -> tuple[float, float, float]:
    """RMS force, and the errors of e3nn's FP32 and of the policy against e3nn FP64, on several structures (eV/A)."""
    width = {"channels": WIDTHS[device.type]}
    exact = e3nn_model(name, device, **width)
    models = e3nn_model(name, device, torch.float32, **width), fast_model(name, device, policy, **width)
    wanted, errors = [], [[] for _ in models]
    for seed in range(4):
        batch = mm.random_batch(exact, seed=seed, n_atoms=8)
        wanted.append(mm.evaluate(exact, batch)["forces"])
        for model, found in zip(models, errors, strict=True):
            found.append(mm.evaluate(model, batch)["forces"].double() - wanted[-1])
    return rms(torch.cat(wanted)), *(rms(torch.cat(found)) for found in errors)


@pytest.mark.parametrize("name", [*mm.SHAPES, "density", "nonlinear"])
def test_fp32_is_as_exact_as_e3nn(name, device, reference_path):
    scale, theirs, ours = force_errors(name, device, "fp32")
    assert ours <= 1.5 * theirs + 1e-7 * scale
    assert theirs < 1e-4 * scale


UNITS = {"tf32": 2.0**-11, "bf16": 2.0**-9, "fp16": 2.0**-12}
"""Half the largest relative error of rounding one operand, policy -> unit: stricter than need be."""


def check_budget(name: str, policy: str | mt.Precision, unit: float, device: torch.device) -> None:
    """A policy rounds some operands to `unit`; e3nn's FP32 rounds these and everything else, so its error in units of
    2^-24 bounds the policy's in its own. Nor may the error be so small that the policy must have been ignored."""
    scale, single, error = force_errors(name, device, policy)
    assert unit / 50 * scale <= error <= unit / 2.0**-24 * single


@pytest.mark.parametrize("precision", UNITS)
@pytest.mark.parametrize("name", ["mp-medium", "off-large", "nonlinear"])
def test_low_precision_keeps_its_budget(name, precision, device, reference_path):
    check_budget(name, precision, UNITS[precision], device)


@pytest.mark.parametrize("storage", ["bf16", "fp16"])
def test_stored_radial_weights_keep_the_budget(storage, device, reference_path):
    """No preset stores the weights of the tensor product in 16 bits, but a policy of one's own may."""
    check_budget("mp-medium", mt.Precision("stored", "fp32", "tf32x3", storage), UNITS[storage], device)


@pytest.mark.parametrize("word", ["bf16", "fp16"])
@pytest.mark.parametrize("block", ["linear", "product", "radial", "readout", "contraction", "features"])
def test_every_block_has_its_own_precision(block, word, device, reference_path):
    words = {"linear": "tf32x3", "radial": "tf32x3", "product": "tf32x3"} | {block: word}
    policy = mt.Precision("mine", "fp32", tensor_product="fp32", **words)
    check_budget("mp-medium", policy, UNITS[word], device)


@pytest.mark.parametrize("name", ["mp-large", "nonlinear"])
def test_rotation_and_translation(name, device, reference_path):
    fast = fast_model(name, device)
    structures = mm.random_structures(SMALL["elements"], seed=5)
    rotation = o3.rand_matrix(dtype=torch.float64).numpy()
    moved = [atoms.copy() for atoms in structures]
    for atoms in moved:
        atoms.set_cell(atoms.cell.array @ rotation.T)
        atoms.positions = atoms.positions @ rotation.T + np.array([0.3, -1.7, 0.9])
    mm.warmed(fast, mm.batch_of(fast, structures))
    before, after = (mm.evaluate(fast, mm.batch_of(fast, s)) for s in (structures, moved))
    turn = torch.from_numpy(rotation).to(device)
    rounded = 10 * EXACT  # turned positions are rounded in their last place, and forces of stiff pairs follow
    close(after["energy"], before["energy"], rounded, "energy")
    close(after["forces"], before["forces"] @ turn.T, rounded, "forces")
    crystal = turn @ before["stress"][0] @ turn.T
    close(after["stress"][0], crystal, rounded, "stress")
    inverted = [atoms.copy() for atoms in structures]
    for atoms in inverted:
        atoms.set_cell(-atoms.cell.array)
        atoms.positions = -atoms.positions
    mirrored = mm.evaluate(fast, mm.batch_of(fast, inverted))
    close(mirrored["forces"], -before["forces"], EXACT, "forces under inversion")


@pytest.mark.parametrize("name", ["mp-large", "density"])
def test_order_of_atoms_and_edges_does_not_matter(name, device, reference_path):
    fast = fast_model(name, device)
    atoms = mm.random_structures(SMALL["elements"], seed=6, n_atoms=7)[0]
    order = np.random.default_rng(0).permutation(len(atoms))
    batch = mm.batch_of(fast, [atoms])
    before, after = mm.evaluate(fast, batch), mm.evaluate(fast, mm.batch_of(fast, [atoms[order]]))
    close(after["forces"], before["forces"][order], EXACT, "forces of permuted atoms")
    shuffle = torch.randperm(batch["edge_index"].shape[1], device=batch["edge_index"].device)
    edges = {key: batch[key][shuffle] for key in ("shifts", "unit_shifts")}
    edges["edge_index"] = batch["edge_index"][:, shuffle]
    shuffled = mm.evaluate(fast, batch | edges)
    close(shuffled["forces"], before["forces"], EXACT, "forces of shuffled edges")
    close(shuffled["stress"], before["stress"], EXACT, "stress of shuffled edges")


def test_a_lone_atom_has_no_edges_and_no_forces(device, reference_path):
    model, fast = e3nn_model("mp-medium", device), fast_model("mp-medium", device)
    batch = mm.batch_of(model, mm.random_structures(SMALL["elements"])[2:])
    assert batch["edge_index"].shape[1] == 0
    want, got = mm.evaluate(model, batch), mm.evaluate(fast, batch)
    close(got["energy"], want["energy"], EXACT, "energy")
    assert got["forces"].abs().max() == 0


@pytest.mark.parametrize("name", ["off-medium", "nonlinear"])
def test_the_kernels_themselves_agree(name, device):
    """On a CPU this runs the Triton kernels in the interpreter, so the structure is tiny."""
    model, fast = e3nn_model(name, device), fast_model(name, device)
    batch = mm.batch_of(model, mm.random_structures(SMALL["elements"], seed=7, n_atoms=2)[1:2])
    want = mm.evaluate(model, batch)
    dispatch.calls.clear()
    got = mm.evaluate(fast, batch)
    assert {backend for _, backend in dispatch.calls} == {"triton"}
    ran(*OPS)
    for key in OUTPUTS:
        close(got[key], want[key], EXACT, key)


def test_the_kernels_train(device):
    model, fast = e3nn_model("off-small", device), fast_model("off-small", device)
    batch = mm.batch_of(model, mm.random_structures(SMALL["elements"], seed=7)[1:2])
    want = loss_gradients(model, batch)
    dispatch.calls.clear()
    got = loss_gradients(fast, batch)
    assert {backend for _, backend in dispatch.calls} == {"triton"}
    ran("channelwise_tp_bwd_bwd", "linear_grad_w")
    largest = max(gradient.abs().max() for gradient in want.values())
    assert all((got[key] - want[key]).abs().max() <= EXACT * largest for key in want)


@pytest.mark.parametrize("name", ["mp-medium", "off-large"])
def test_published_width(name, device, reference_path):
    """The real channel count and elements, on four atoms."""
    model = mm.build(name, device=device)
    fast = mt.accelerate(model, strict=True)
    elements = [int(z) for z in model.atomic_numbers][::7]
    batch = mm.batch_of(model, mm.random_structures(elements, seed=8)[1:2])
    want = mm.evaluate(model, batch)
    dispatch.calls.clear()
    got = mm.evaluate(fast, batch)
    ran(*OPS)
    for key in OUTPUTS:
        close(got[key], want[key], EXACT, key)


@pytest.mark.parametrize("kind", ["AtomicDipolesMACE", "EnergyDipolesMACE"])
def test_dipole_models_agree(kind, device, reference_path):
    residual = modules.interaction_classes[mm.RESIDUAL]
    with default_dtype(torch.float64):
        model = getattr(modules, kind)(
            r_max=5.0,
            num_bessel=8,
            num_polynomial_cutoff=5,
            max_ell=2,
            interaction_cls=residual,
            interaction_cls_first=residual,
            num_interactions=2,
            num_elements=3,
            hidden_irreps=o3.Irreps("8x0e+8x1o"),
            MLP_irreps=o3.Irreps("8x1o" if kind == "AtomicDipolesMACE" else "8x0e+8x1o"),
            avg_num_neighbors=10.0,
            atomic_numbers=[1, 6, 8],
            correlation=2,
            gate=torch.nn.functional.silu,
            atomic_energies=None if kind == "AtomicDipolesMACE" else np.zeros(3),
        ).to(device)
    fast = mt.accelerate(model, strict=True)
    batch = mm.random_batch(model)
    batch["charges"] = torch.zeros(batch["positions"].shape[0], device=device)
    want = model(mm.cast(batch, model))
    dispatch.calls.clear()
    got = fast(mm.cast(batch, fast))
    ran("linear_fwd", "channelwise_tp_fwd")
    for key in ("dipole", "forces") if kind == "EnergyDipolesMACE" else ("dipole",):
        close(got[key], want[key], EXACT, key)


def test_models_with_a_simplified_linear_agree(device, reference_path):
    """Older versions of MACE saved the linear behind conv_tp with its slots merged (640x1o for 5 slots of 128x1o)."""
    model = mm.build("mp-large", device=device, **SMALL)
    for block in model.interactions:
        with default_dtype(torch.float64):
            merged = o3.Linear(block.linear.irreps_in.simplify(), block.linear.irreps_out).to(device)
        merged.load_state_dict(block.linear.state_dict())
        block.linear = merged
    exact = e3nn_model("mp-large", device)
    batch = mm.random_batch(exact, seed=9)
    want = mm.evaluate(exact, batch)
    close(mm.evaluate(model, batch)["forces"], want["forces"], EXACT, "the two e3nn models")
    fast = mt.accelerate(model, strict=True)
    assert fast.interactions[1].linear.problem.layout_in == "ir_mul"
    close(mm.evaluate(fast, batch)["forces"], want["forces"], EXACT, "forces")
    close(mm.evaluate(mt.restore(fast), batch)["forces"], want["forces"], EXACT, "forces of the restored model")


def test_deterministic_gives_the_same_bits(device, reference_path):
    fast = mt.accelerate(e3nn_model("mp-large", device), "fp32", deterministic=True)
    batch = mm.random_batch(fast, seed=10, n_atoms=8)
    mm.warmed(fast, batch)
    first, *others = (mm.evaluate(fast, batch) for _ in range(3))
    assert all(torch.equal(first[key], other[key]) for other in others for key in ("energy", "forces", "stress"))
    exact = mm.evaluate(e3nn_model("mp-large", device), batch)
    assert rms(first["forces"] - exact["forces"]) < 1e-4 * rms(exact["forces"])


@pytest.mark.parametrize("name", [*mm.SHAPES, "density", "nonlinear"])
def test_deterministic_agrees(name, device, reference_path):
    """The gradient of the features takes other kernels here, and FP64 cuts them into parts where FP32 does not."""
    model = e3nn_model(name, device)
    fast = mt.accelerate(model, "fp64", strict=True, deterministic=True)
    batch = mm.random_batch(model, seed=1)
    want, got = mm.evaluate(model, batch), mm.evaluate(fast, batch)
    for key in OUTPUTS:
        close(got[key], want[key], EXACT, key)


def test_agrees_with_cuequivariance(device, reference_path):
    pytest.importorskip("cuequivariance_torch" if device.type == "cpu" else "cuequivariance_ops_torch")
    from mace.cli.convert_e3nn_cueq import run

    model = mm.build("mp-medium", device=device, max_ell=2, **SMALL)  # max_ell = 3 takes cuEq a minute to set up
    with default_dtype(torch.float64):  # MACE's converter sets the global default
        theirs = run(model, device=device.type, return_model=True).to(device)
    batch = mm.random_batch(model, seed=11)
    want, got = mm.evaluate(theirs, batch), mm.evaluate(mt.accelerate(model, strict=True), batch)
    for key in ("energy", "forces", "stress"):
        close(got[key], want[key], 1e-9, key)  # MACE's conversion of the contraction's weights costs some digits


def test_compiled_forces_equal_eager_ones(device, reference_path):
    """torch.compile(fullgraph=True) of energy and forces, the gradient taken inside."""
    block = e3nn_model("mp-medium", device, torch.float32).interactions[1]
    up = IrrepsLinear(block.linear_up, "ieee", layout_out="ir_mul")
    conv = ConvTP(block.conv_tp, "fp32", "ir_mul", "ir_mul")
    down = IrrepsLinear(block.linear, "ieee", layout_in="ir_mul")
    n, e = 6, 30
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, block.linear_up.irreps_in.dim, generator=generator).to(device)
    weights = torch.randn(e, conv.weight_numel, generator=generator).to(device)
    positions = torch.randn(n, 3, generator=generator).to(device).requires_grad_(True)
    edge_index = torch.randint(0, n, (2, e), generator=generator).to(device)

    def energy_and_forces(positions):
        vectors = positions[edge_index[1]] - positions[edge_index[0]] + 0.5
        harmonics = torch.cat([vectors**k for k in range(1, 6)] + [vectors[:, :1]], dim=1)  # [E, 16], any smooth map
        energy = down(conv(up(x), harmonics, weights, edge_index)).tanh().sum()
        return energy.detach(), -torch.autograd.grad(energy, positions)[0]

    want = energy_and_forces(positions)
    assert want[1].abs().max() > 1e-3
    configure_autograd_for_compile()
    torch._dynamo.reset()
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(energy_and_forces, fullgraph=True, backend=backend)
    for mine, eager in zip(compiled(positions), want, strict=True):
        close(mine, eager, 1e-5, "compiled")
