"""accelerate, restore, report and load_model: what is swapped, what stays the same, what is refused."""

import copy
import io
import logging
import pickle
from functools import lru_cache

import ase.build
import mace_models as mm
import numpy as np
import pytest
import torch
from e3nn import o3
from mace.calculators import MACECalculator
from mace.modules import MACE, ScaleShiftMACE, blocks
from mace.tools.torch_tools import default_dtype

import mace_triton as mt
from mace_triton.convert import check_model
from mace_triton.nn.conv import ConvTP, problem_of
from mace_triton.nn.linear import IrrepsLinear
from mace_triton.ops import dispatch

SMALL = {"channels": 8, "elements": (1, 6, 8)}
OURS = (IrrepsLinear, ConvTP)


@pytest.fixture(autouse=True)
def nan_filled_empties() -> None:
    """Not here: building e3nn modules compiles TorchScript, which cannot see through a patched torch.empty."""


@lru_cache(maxsize=8)
def plain(name: str, device: torch.device, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    return mm.build(name, dtype, device=device, **SMALL)


def ours_in(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, OURS)]


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


# What stays the same


@pytest.mark.parametrize("name", mm.BLOCKS)
def test_same_class_state_and_parameters(name, device):
    model = plain(name, device)
    before = copy.deepcopy(model.state_dict())
    fast = mt.accelerate(model, strict=True)
    assert type(fast) is ScaleShiftMACE
    assert isinstance(fast, MACE)
    assert same_tensors(model.state_dict(), fast.state_dict())
    assert [key for key, _ in fast.named_parameters()] == [key for key, _ in model.named_parameters()]
    assert not ours_in(model), "the input model was changed"
    assert same_tensors(before, model.state_dict())
    assert not any(hasattr(block, "conv_fusion") for block in model.interactions)
    shared = {p.data_ptr() for p in model.parameters() if p.numel()} & {p.data_ptr() for p in fast.parameters()}
    assert not shared, "the copy shares parameters with the input model"


@pytest.mark.parametrize("name", ["off-medium", "nonlinear"])
def test_state_dicts_load_both_ways(name, device, reference_path):
    one, two = mm.build(name, device=device, seed=1, **SMALL), mm.build(name, device=device, seed=2, **SMALL)
    batch = mm.random_batch(one)
    want = mm.evaluate(one, batch)["forces"]
    fast = mt.accelerate(two)
    assert not torch.allclose(mm.evaluate(fast, batch)["forces"], want)
    fast.load_state_dict(one.state_dict())
    torch.testing.assert_close(mm.evaluate(fast, batch)["forces"], want, rtol=1e-10, atol=1e-12)
    two.load_state_dict(fast.state_dict())
    torch.testing.assert_close(mm.evaluate(two, batch)["forces"], want)


@pytest.mark.parametrize("name", mm.BLOCKS)
def test_restore_gives_plain_mace(name, device, reference_path):
    model = plain(name, device)
    restored = mt.restore(mt.accelerate(model))
    kinds = {key: type(module).__name__ for key, module in restored.named_modules()}
    assert kinds == {key: type(module).__name__ for key, module in model.named_modules()}
    assert same_tensors(model.state_dict(), restored.state_dict())
    assert restored.__dict__.keys() == model.__dict__.keys()
    for block, original in zip(restored.interactions, model.interactions, strict=True):
        assert block.__dict__.keys() == original.__dict__.keys()
    batch = mm.random_batch(model)
    # Not equal bit by bit on a GPU: MACE's own scatter adds by atomics, in any order.
    energies = (mm.evaluate(m, batch)["energy"] for m in (restored, model))
    torch.testing.assert_close(*energies, rtol=1e-13, atol=1e-13)


def test_restore_leaves_the_random_numbers_alone(device):
    fast = mt.accelerate(plain("off-medium", device))
    torch.manual_seed(3)
    want = torch.rand(4)
    torch.manual_seed(3)
    mt.accelerate(mt.restore(fast))
    assert torch.equal(torch.rand(4), want)


def test_frozen_parameters_and_mode_are_kept(device):
    model = copy.deepcopy(plain("off-medium", device)).eval()
    model.interactions[0].linear.weight.requires_grad_(False)
    for converted in (mt.accelerate(model), mt.restore(mt.accelerate(model))):
        assert not converted.training
        assert not converted.interactions[0].linear.training
        frozen = [key for key, p in converted.named_parameters() if not p.requires_grad]
        assert frozen == ["interactions.0.linear.weight"]


# Precision


@pytest.mark.parametrize(
    ("precision", "dtype", "mode", "storage"),
    [
        (None, torch.float64, "fp64", "fp64"),
        ("fp64", torch.float64, "fp64", "fp64"),
        ("fp32", torch.float32, "tf32x3", "fp32"),
        ("bf16", torch.float32, "bf16", "bf16"),
        ("fp16", torch.float32, "fp16", "fp16"),
        (mt.Precision("mine", "fp32", "ieee", "bf16"), torch.float32, "ieee", "bf16"),
    ],
)
def test_policies(precision, dtype, mode, storage, device):
    fast = mt.accelerate(plain("off-medium", device), precision)
    assert {p.dtype for p in fast.parameters()} == {dtype}
    block = fast.interactions[1]
    assert block.linear.mode == block.linear_up.mode == mode
    assert fast.products[0].linear.mode == ("tf32x3" if precision == "bf16" else mode)
    assert block.conv_tp.storage == block.conv_tp_weights.storage == storage
    assert block.conv_tp_weights.last_mode == mode
    exact = "fp64" if dtype == torch.float64 else "tf32x3"
    assert {fast.node_embedding.linear.mode, fast.readouts[0].linear.mode, fast.readouts[1].linear_1.mode} == {exact}


@pytest.mark.parametrize("name", ["off-medium", "nonlinear"])
def test_policies_of_single_blocks(name, device, tmp_path):
    words = {"radial": "bf16", "readout": "fp16", "contraction": "bf16", "features": "fp16", "product": "tf32x3"}
    mt.Precision("mine", "fp32", "tf32", "fp32", **words).save(tmp_path / "mine.json")
    fast = mt.accelerate(plain(name, device), tmp_path / "mine.json")
    block, product = fast.interactions[1], fast.products[1]
    assert block.conv_tp_weights.last_mode == "bf16"
    assert (block.linear_up.mode, product.linear.mode, fast.readouts[0].linear.mode) == ("tf32", "tf32x3", "fp16")
    # the non-linear block's residual map reads the features as well, in FP32
    assert block.linear_up.run_storage == ("fp32" if name == "nonlinear" else "fp16")
    assert product.linear.run_storage == "fp32"
    assert product.symmetric_contractions.run_storage == "bf16"
    shown = str(mt.report(fast))
    assert ("fp16 result" in shown) == (name != "nonlinear")
    assert "bf16 features" in shown
    assert same_tensors(mt.restore(fast).state_dict(), copy.deepcopy(plain(name, device)).float().state_dict())


def test_none_follows_a_float32_model(device):
    fast = mt.accelerate(copy.deepcopy(plain("off-medium", device)).float())
    assert fast.interactions[0].linear.mode == "tf32x3"
    assert fast.mace_triton.precision.name == "fp32"


def test_accelerating_again_starts_from_the_restored_model(device, reference_path):
    model = plain("off-medium", device)
    again = mt.accelerate(mt.accelerate(model, "fp64"), "fp64", deterministic=True)
    assert again.interactions[0].conv_tp.deterministic
    assert same_tensors(again.state_dict(), model.state_dict())
    batch = mm.random_batch(model)
    want = mm.evaluate(model, batch)["forces"]
    torch.testing.assert_close(mm.evaluate(again, batch)["forces"], want, rtol=1e-10, atol=1e-12)


# Use


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", ["off-medium", "nonlinear"])
def test_copies_compute_the_same(name, how, device, reference_path):
    fast = mt.accelerate(plain(name, device), "bf16")
    batch = mm.random_batch(fast)
    want = mm.evaluate(fast, batch)["forces"]
    if how == "deepcopy":
        twin = copy.deepcopy(fast)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(fast))
    else:
        buffer = io.BytesIO()
        torch.save(fast, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, map_location=device, weights_only=False)
    assert ours_in(twin) == ours_in(fast)
    torch.testing.assert_close(mm.evaluate(twin, batch)["forces"], want, rtol=1e-5, atol=1e-7)
    assert str(mt.report(twin)) == str(mt.report(fast))


def water() -> ase.Atoms:
    atoms = ase.build.molecule("H2O")
    atoms.set_cell([4.0, 4.2, 4.4])
    atoms.set_pbc(True)
    return atoms


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_mace_calculator_takes_the_model(dtype, device, reference_path, caplog):
    model = plain("off-medium", device)
    fast = mt.accelerate(model, "fp64" if dtype == "float64" else "fp32")
    results = []
    for m in (copy.deepcopy(model), fast):
        atoms = water()
        with caplog.at_level(logging.ERROR):
            atoms.calc = MACECalculator(models=m, device=device.type, default_dtype=dtype)
        dispatch.calls.clear()
        results.append((atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()))
    assert dispatch.calls.total() > 0
    bound = 1e-10 if dtype == "float64" else 1e-5
    for want, got in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, rtol=bound, atol=bound)


def test_mace_calculator_may_change_the_dtype(device, reference_path):
    """`.double()` on an FP32 model, as MACECalculator(default_dtype="float64") does, computes in FP64."""
    model = plain("off-medium", device)
    atoms = water()
    atoms.calc = MACECalculator(models=mt.accelerate(model, "bf16"), device=device.type, default_dtype="float64")
    got = atoms.get_forces()
    atoms.calc = MACECalculator(models=copy.deepcopy(model).float().double(), device=device.type)
    np.testing.assert_allclose(got, atoms.get_forces(), rtol=1e-5, atol=1e-8)
    assert {row.precision for row in mt.report(atoms.calc.models[0]).rows} == {"float64"}


def test_a_committee_and_its_descriptors(device, reference_path):
    models = [mm.build("off-medium", device=device, seed=seed, **SMALL) for seed in (1, 2)]
    both = []
    for members in (models, [mt.accelerate(model) for model in models]):
        atoms = water()
        atoms.calc = MACECalculator(models=members, device=device.type, default_dtype="float64")
        forces = atoms.get_forces()
        both.append((forces, atoms.calc.results["energy_var"], atoms.calc.get_descriptors(atoms)[0]))
    for want, got in zip(*both, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)


def test_training_steps_follow_mace(device, reference_path):
    """Three steps of Adam, and an averaged copy of the weights as MACE's trainer keeps one."""
    model = copy.deepcopy(plain("off-medium", device))
    fast = mt.accelerate(model)
    batch = mm.random_batch(model)
    averages = []
    for m in (model, fast):
        optimizer = torch.optim.Adam(m.parameters(), lr=1e-3)
        average = torch.optim.swa_utils.AveragedModel(m, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
        for _ in range(3):
            optimizer.zero_grad()
            out = mm.evaluate(m, batch, training=True)
            ((out["forces"] - 0.1).pow(2).mean() + out["energy"].pow(2).mean()).backward()
            optimizer.step()
            average.update_parameters(m)
        averages.append(average.module)
    start = plain("off-medium", device).state_dict()["interactions.1.linear.weight"]
    assert not torch.allclose(model.interactions[1].linear.weight, start)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(fast.state_dict()[key], value, rtol=1e-7, atol=1e-9)
    want, got = (mm.evaluate(average, batch)["forces"] for average in averages)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


# Report


def test_report_lists_what_runs(device, reference_path):
    model = plain("nonlinear", device)
    fast = mt.accelerate(model, "bf16")
    rows = {row.block: row for row in mt.report(fast).rows}
    assert rows.keys() >= set(ours_in(fast))
    assert rows["interactions.1.linear_up"].layout == "mul_ir -> ir_mul"
    assert rows["interactions.1.linear_res"].layout == "ir_mul -> mul_ir"
    assert rows["interactions.1.linear_2"].layout == "mul_ir -> ir_mul"
    assert rows["interactions.1.conv_tp"].precision == "fp32 weights"
    assert rows["interactions.1.source_embedding"].precision == "tf32x3"
    where = "kernels/{}.py" if device.type == "cuda" else "{}, reference formulas on the CPU"
    assert rows["interactions.1.conv_tp"].runs == where.format("channelwise_tp")
    assert rows["products.0.symmetric_contractions"].runs == where.format("symmetric_contraction")
    assert rows["interactions.1.conv_tp_weights"].runs == where.format("norm_mlp")
    table = str(mt.report(fast)).splitlines()
    assert table[0] == "ScaleShiftMACE: precision bf16, sums in any order"
    starts = {line.index(row.layout) for line, row in zip(table[2:], mt.report(fast).rows, strict=True)}
    assert len(starts) == 1, "the last column is not aligned"


def test_report_of_a_plain_model(device):
    report = mt.report(plain("off-medium", device))
    assert "not accelerated" in report.title
    assert all(row.runs == "MACE's own code: not accelerated" for row in report.rows)


class Odd(blocks.RealAgnosticResidualInteractionBlock):
    """A user's own interaction block."""


def test_an_unknown_block_stays_maces_own(device, reference_path):
    model = copy.deepcopy(plain("off-medium", device))
    model.interactions[1].__class__ = Odd
    fast = mt.accelerate(model)
    assert not [name for name in ours_in(fast) if name.startswith("interactions.1")]
    assert "interactions.0.conv_tp" in ours_in(fast)
    row = next(row for row in mt.report(fast).rows if row.block == "interactions.1.conv_tp")
    assert row.runs == "MACE's own code: interaction block Odd is not known"
    batch = mm.random_batch(model)
    want = mm.evaluate(model, batch)["forces"]
    torch.testing.assert_close(mm.evaluate(fast, batch)["forces"], want, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match=r"interactions\.1\.conv_tp: interaction block Odd is not known"):
        mt.accelerate(model, strict=True)


def test_a_block_with_a_foreign_linear_keeps_mul_ir(device, reference_path):
    class Scaled(o3.Linear):
        def forward(self, features):
            return 2 * super().forward(features)

    model = copy.deepcopy(plain("off-medium", device))
    assert mt.accelerate(model).interactions[1].conv_tp.problem.layout_in == "ir_mul"
    model.interactions[1].linear.__class__ = Scaled
    fast = mt.accelerate(model)
    block = fast.interactions[1]
    assert type(block.linear) is Scaled
    assert (block.linear_up.problem.layout_out, block.conv_tp.problem.layout_in) == ("mul_ir", "mul_ir")
    batch = mm.random_batch(model)
    want = mm.evaluate(model, batch)["forces"]
    torch.testing.assert_close(mm.evaluate(fast, batch)["forces"], want, rtol=1e-10, atol=1e-12)


# Refusals


def test_what_is_no_mace_model_is_refused(device, tmp_path):
    model = plain("off-medium", device)
    cases = [
        ("my.model", TypeError, "load_model"),
        (tmp_path, TypeError, "load_model"),
        (torch.nn.Linear(2, 2), TypeError, "must be a MACE model.*got Linear"),
        (None, TypeError, "got NoneType"),
        (model.state_dict(), TypeError, "must be a MACE model"),
        (torch.jit.script(torch.nn.Linear(2, 2)), TypeError, "TorchScript"),
        (torch.compile(model), TypeError, "before compiling"),
        (MACECalculator(models=copy.deepcopy(model), device=device.type), TypeError, r"models\[0\]"),
    ]
    for thing, error, words in cases:
        for call in (mt.accelerate, mt.restore, mt.report):
            with pytest.raises(error, match=words):
                call(thing)


def test_unknown_precision_and_half_models_are_refused(device):
    model = plain("off-medium", device)
    with pytest.raises(ValueError, match="precision must be one of"):
        mt.accelerate(model, "fp8")
    with pytest.raises(ValueError, match=r"torch\.bfloat16 parameters"):
        mt.accelerate(copy.deepcopy(model).bfloat16())


def test_cuequivariance_models_are_refused(device):
    pytest.importorskip("cuequivariance_torch")
    from mace.modules.wrapper_ops import CuEquivarianceConfig

    for config in (
        CuEquivarianceConfig(enabled=True, layout="ir_mul", group="O3_e3nn", optimize_all=True),
        CuEquivarianceConfig(enabled=True, layout="mul_ir", group="O3_e3nn", optimize_linear=True),
    ):
        model = mm.build("mp-small", device=device, cueq_config=config, max_ell=1, correlation=2, **SMALL)
        for call in (mt.accelerate, mt.restore, mt.report, check_model):
            with pytest.raises(ValueError, match=r"cuEquivariance.*convert_cueq_e3nn"):
                call(model)


def test_openequivariance_models_are_refused(device):
    model = copy.deepcopy(plain("off-medium", device))
    model.interactions[0].conv_tp.layout_transpose_in = None  # what MACE's wrapper leaves on such a module
    with pytest.raises(ValueError, match=r"OpenEquivariance.*convert_oeq_e3nn"):
        mt.accelerate(model)


def test_conv_tp_refuses_what_it_cannot_run():
    with pytest.raises(TypeError, match="must be an e3nn"):
        ConvTP(torch.nn.Linear(2, 2))
    tp = plain("off-medium", torch.device("cpu")).interactions[1].conv_tp
    with pytest.raises(ValueError, match="storage must be one of"):
        ConvTP(tp, "int8")
    with pytest.raises(ValueError, match="layout_in"):
        ConvTP(tp, "fp32", "mul", "mul_ir")
    shared = o3.TensorProduct("2x0e", "0e", "2x0e", [(0, 0, 0, "uvu", True)])
    with pytest.raises(ValueError, match="come with each edge"):
        problem_of(shared)
    full = o3.TensorProduct("2x0e", "1x0e", "2x0e", [(0, 0, 0, "uvw", True)], shared_weights=False)
    with pytest.raises(ValueError, match="'uvw'"):
        problem_of(full)
    one_slot = [(0, 0, 0, "uvu", True), (1, 1, 0, "uvu", True)]
    summed = o3.TensorProduct("2x0e+2x1o", "0e+1o", "2x0e", one_slot, shared_weights=False, internal_weights=False)
    with pytest.raises(ValueError, match="path weight"):
        problem_of(summed)


def test_a_node_index_out_of_range_is_an_error(device, reference_path):
    fast = mt.accelerate(plain("off-medium", device))
    batch = mm.random_batch(fast)
    conv = fast.interactions[1].conv_tp
    n, e = batch["positions"].shape[0], batch["edge_index"].shape[1]
    x = torch.zeros(n, conv.problem.dim_in1, dtype=torch.float64, device=device)
    y = torch.zeros(e, conv.problem.dim_in2, dtype=torch.float64, device=device)
    w = torch.zeros(e, conv.weight_numel, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match="edge_index"):
        conv(x, y, w, batch["edge_index"] + n)
    with pytest.raises(ValueError, match="x must have shape"):
        conv(x[:, 1:], y, w, batch["edge_index"])


# Files


def test_load_model_reads_what_mace_saves(device, tmp_path):
    model = plain("off-medium", device)
    torch.save(model, tmp_path / "good.model")
    loaded = mt.load_model(tmp_path / "good.model", device=device.type)
    assert same_tensors(loaded.state_dict(), model.state_dict())
    torch.save(mt.accelerate(model), tmp_path / "fast.model")
    assert ours_in(mt.load_model(str(tmp_path / "fast.model"), device=device.type))


def test_load_model_explains_a_wrong_file(tmp_path):
    (tmp_path / "text.model").write_text("not a model")
    (tmp_path / "empty.model").write_bytes(b"")
    torch.save({"model": {}, "optimizer": {}}, tmp_path / "checkpoint.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "linear.model")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "lammps.pt")
    for name, words in {
        "text.model": "is no MACE model file",
        "empty.model": "is no MACE model file",
        "checkpoint.pt": r"holds a dictionary \(model, optimizer\)",
        "linear.model": "must be a MACE model.*got Linear",
        "lammps.pt": "TorchScript|is no MACE model file",
    }.items():
        with pytest.raises(ValueError, match=words) as caught:
            mt.load_model(tmp_path / name)
        assert name in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"no file .*medium-mpa-0.*off-medium"):
        mt.load_model(tmp_path / "missing.model")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_load_model_names_a_missing_device(tmp_path):
    with pytest.raises(ValueError, match="device is 'cuda'"):
        mt.load_model(tmp_path / "any.model", device="cuda")


def test_the_default_dtype_is_left_alone(device):
    with default_dtype(torch.float32):
        mt.accelerate(plain("off-medium", device), "fp64")
        assert torch.get_default_dtype() == torch.float32
