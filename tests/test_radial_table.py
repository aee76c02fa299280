"""Functions from tables: kernel against formula and against the polynomials, and tables against a model's network.

Bound: a cubic by Horner's rule takes six roundings of numbers no larger than the sum of its coefficients.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_mace_parity import e3nn_model, fast_model

from mace_triton import reference_radial_table as reference
from mace_triton.engine import radial
from mace_triton.kernels import offline
from mace_triton.kernels import radial_table as kernels
from mace_triton.ops import dispatch
from mace_triton.ops import radial_table as ops
from mace_triton.ops.radial_table import radial_table

DTYPES = [torch.float64, torch.float32]
PER = 16.0


def inputs(edges: int, width: int, kinds: int, dtype: torch.dtype, device: torch.device):
    """Lengths inside the table, at its knots, behind it; random coefficients, edges and kinds of 5 atoms."""
    intervals = 40
    r = (intervals + 4) / PER * torch.rand(edges, 1, dtype=torch.float64)
    r[: edges // 4] = (r[: edges // 4] * PER).round() / PER
    table = torch.randn(kinds, kinds, intervals, 4, width, dtype=torch.float64)
    edge_index, kind = torch.randint(5, (2, edges)), torch.randint(kinds, (5,), dtype=torch.int32)
    return r.to(device, dtype), table.to(device, dtype), edge_index.to(device), kind.to(device)


def check(edges: int, width: int, kinds: int, dtype: torch.dtype, device: torch.device) -> None:
    r, table, edge_index, kind = inputs(edges, width, kinds, dtype, device)
    before = dispatch.calls.copy()
    h, slope = radial_table(r, table, edge_index, kind, per_angstrom=PER)
    assert set(dispatch.calls - before) == {("radial_table", "triton")}
    exact = reference.radial_table(r.double(), table.double(), edge_index, kind, PER)
    size = 4 * float(table.abs().max()) if edges else 1.0
    for got, want, factor in ((h, exact[0], 1.0), (slope, exact[1], 2 * PER)):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=0, atol=8 * factor * size * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("edges", "width", "kinds"), [(1, 64, 1), (70, 64, 3), (33, 1, 2), (20, 10, 1), (5, 200, 2)])
def test_kernel_follows_the_polynomials(edges, width, kinds, dtype, device):
    check(edges, width, kinds, dtype, device)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 100), st.integers(1, 70), st.integers(1, 4), st.sampled_from(DTYPES))
def test_any_size(device, edges, width, kinds, dtype):
    check(edges, width, kinds, dtype, device)


def test_values_between_behind_and_unknown(device):
    table = torch.zeros(1, 1, 2, 4, 1, dtype=torch.float64, device=device)
    table[0, 0, :, :, 0] = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, -5.0, 0.0, 2.0]])
    r = torch.tensor([[0.0], [0.25], [0.5], [0.75], [1.0], [7.0], [float("nan")]], dtype=torch.float64, device=device)
    nobody = torch.zeros(2, 0, dtype=torch.int64, device=device), torch.zeros(0, dtype=torch.int32, device=device)
    h, slope = radial_table(r, table, *nobody, per_angstrom=2.0)
    assert h[:6, 0].tolist() == [1.0, 3.25, 10.0, 7.75, 7.0, 7.0]
    assert slope[:6, 0].tolist() == [4.0, 16.0, -10.0, -7.0, 2.0, 2.0]
    assert bool(h[6].isnan())
    assert bool(slope[6].isnan())


@pytest.mark.usefixtures("reference_path")
def test_formula_on_the_cpu():
    r, table, edge_index, kind = inputs(9, 4, 2, torch.float32, torch.device("cpu"))
    dispatch.calls.clear()
    radial_table(r, table, edge_index, kind, per_angstrom=PER)
    assert set(dispatch.calls) == {("radial_table", "reference")}


def test_strided_inputs_and_opcheck(device):
    r, table, edge_index, kind = inputs(12, 4, 2, torch.float64, device)
    want = radial_table(r, table, edge_index, kind, per_angstrom=PER)
    wide, turned = torch.stack((r, r), 2)[:, :, 0], table.transpose(3, 4).contiguous().transpose(3, 4)
    got = radial_table(wide, turned, edge_index.t().contiguous().t(), kind, per_angstrom=PER)
    torch.testing.assert_close(got, want)
    torch.library.opcheck(ops._radial_table, (r, table, edge_index, kind, PER), test_utils="test_schema")
    torch.library.opcheck(ops._radial_table, (r, table, edge_index, kind, PER), test_utils="test_faketensor")


def test_bad_input_is_named(device):
    r, table, edge_index, kind = inputs(6, 4, 2, torch.float32, device)
    for changed, error, match in (
        ((r[:, 0], table, edge_index, kind), ValueError, "r must have shape"),
        ((r, table[0], edge_index, kind), ValueError, "table must have shape"),
        ((r, table.double(), edge_index, kind), TypeError, "both be float64 or both float32"),
        ((r, table.expand(2, 2, 40, 4, 4).repeat(1, 1, 1, 1, 70), edge_index, kind), ValueError, "at most 256"),
        ((r, table, edge_index[:, 1:], kind), ValueError, "edge_index must have shape"),
        ((r, table, edge_index, kind.long()), TypeError, "kind int32"),
    ):
        with pytest.raises(error, match=match):
            radial_table(*changed, per_angstrom=PER)


@pytest.mark.torchscript
@pytest.mark.parametrize("name", ["mp-medium", "density"])
def test_tables_are_a_models_radial_functions(name, device, reference_path):
    """To half an ulp of FP32, of the largest value; the density model has tables for every pair of elements."""
    model, fast = e3nn_model(name, device), fast_model(name, device, "fp32")
    networks = [(layer.conv_tp_weights, "hidden") for layer in fast.interactions]
    if name == "density":
        networks += [(layer.density_fn, "density") for layer in fast.interactions]
    attrs = torch.eye(3, device=device)[torch.tensor([0, 2, 2, 1])]
    made = radial.radial_of(fast.radial_embedding, networks, fast.atomic_numbers, attrs, float(fast.r_max))
    assert isinstance(made, radial.Table)
    assert made.tables[0].shape[0] == (3 if name == "density" else 1)
    r = (0.7 + 5.5 * torch.rand(400, 1, device=device)).requires_grad_(True)
    edge_index = torch.randint(4, (2, 400), device=device)
    exact = [(layer.conv_tp_weights, "hidden") for layer in model.interactions]
    exact += [(layer.density_fn, "density") for layer in model.interactions if name == "density"]
    embedding, numbers = model.radial_embedding, model.atomic_numbers
    wanted = radial.functions(embedding, exact, numbers, r.double(), attrs.double(), edge_index)
    for (h, slope), want in zip(made(r.detach(), edge_index), wanted, strict=True):
        eps = torch.finfo(torch.float32).eps
        assert (h - want).abs().max() <= 4 * eps * want.abs().max()
        want_slope = radial.slopes(want, r)
        assert (slope - want_slope).abs().max() <= 16 * eps * want_slope.abs().max()


@pytest.mark.torchscript
def test_without_a_good_table_the_network_stays(device, reference_path, monkeypatch):
    fast = fast_model("mp-medium", device, "fp32")
    networks = [(layer.conv_tp_weights, "hidden") for layer in fast.interactions]
    attrs = torch.eye(3, device=device)

    def made():
        return radial.radial_of(fast.radial_embedding, networks, fast.atomic_numbers, attrs, float(fast.r_max))

    assert isinstance(made(), radial.Table)
    monkeypatch.setattr(radial, "TOLERANCE", 0.0)
    network = made()
    assert isinstance(network, radial.Network)
    monkeypatch.undo()
    r, edge_index = 1.0 + 4.0 * torch.rand(50, 1, device=device), torch.zeros(2, 50, dtype=torch.int64, device=device)
    for one, two in zip(network(r, edge_index), made()(r, edge_index), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5 * float(two[1].abs().max()))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_kernels_compile_without_spills(target):
    for name, stats in offline.compile_cases(kernels.offline_cases(target), target).items():
        assert (stats.spills, stats.stack) == (0, 0), (name, stats)
