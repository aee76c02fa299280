"""Gradients of atoms from those of edges, against autograd of vectors, lengths and harmonics in FP64.

Bound: a sum over an atom's edges, in any order, of numbers that took some twenty roundings, amplified by 1 / r.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mace_triton.kernels import edge_forces as kernels
from mace_triton.kernels import offline
from mace_triton.ops import dispatch
from mace_triton.ops import edge_forces as ops
from mace_triton.ops.edge_embedding import edge_harmonics, edge_vectors
from mace_triton.ops.edge_forces import edge_forces

DTYPES = [torch.float64, torch.float32]


def inputs(degrees: list[int], lmax: int, dtype: torch.dtype, device: torch.device):
    """Positions and sorted edges, `degrees` of them at each atom; cotangents of harmonics and lengths."""
    nodes, counts = len(degrees), torch.tensor(degrees)
    receiver = torch.repeat_interleave(torch.arange(nodes), counts)
    sender, edges = torch.randint(nodes, receiver.shape), len(receiver)
    x, shifts = 3 * torch.rand(nodes, 3, dtype=torch.float64), 2 * torch.randn(edges, 3, dtype=torch.float64)
    gy, gr = (torch.randn(edges, width, dtype=torch.float64) for width in ((lmax + 1) ** 2, 1))
    row_ptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    edge_index = torch.stack((sender, receiver)).to(device)
    x, shifts, gy, gr = (t.to(device, dtype) for t in (x, shifts, gy, gr))
    return x, shifts, edge_index, gy, gr, row_ptr.to(device)


def wanted(x, shifts, edge_index, gy, gr) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(gx, virial) by autograd in FP64, and 1 / r of the shortest edge."""
    x, shifts, gy, gr = (t.double() for t in (x, shifts, gy, gr))
    x, shifts = x.requires_grad_(), shifts.requires_grad_()
    v, r = edge_vectors(x, edge_index, shifts)
    y = edge_harmonics(v, int(gy.shape[1] ** 0.5) - 1)
    gx, e = torch.autograd.grad((y, r), (x, shifts), (gy, gr))
    virial = torch.zeros(len(x), 3, 3, dtype=x.dtype, device=x.device)
    virial.index_add_(0, edge_index[1], v.detach()[:, :, None] * e[:, None, :])
    return gx, virial, float((1 / r.detach()).max()) if len(r) else 1.0


def check(degrees: list[int], lmax: int, dtype: torch.dtype, device: torch.device) -> None:
    x, shifts, edge_index, gy, gr, row_ptr = inputs(degrees, lmax, dtype, device)
    v = x[edge_index[1]] - x[edge_index[0]] + shifts
    before = dispatch.calls.copy()
    got = edge_forces(gy, gr, v, row_ptr, edge_index[0].to(torch.int32))
    assert set(dispatch.calls - before) == {("edge_forces", "triton")}
    *exact, inverse = wanted(x, shifts, edge_index, gy, gr)
    terms = len(edge_index[0]) + 1
    for one, two, size in zip(got, exact, (1.0, 10.0), strict=True):
        assert one.dtype == dtype
        atol = 200 * size * max(1.0, inverse) ** 2 * terms * torch.finfo(dtype).eps
        torch.testing.assert_close(one.double(), two, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lmax", [1, 2, 3])
@pytest.mark.parametrize("degrees", [[1, 1], [0, 33, 0, 64, 100, 0], [0, 0]])
def test_kernel_is_autograd(degrees, lmax, dtype, device):
    check(degrees, lmax, dtype, device)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 70), min_size=1, max_size=6), st.sampled_from(DTYPES))
def test_any_rows(device, degrees, dtype):
    check(degrees, 3, dtype, device)


@pytest.mark.usefixtures("reference_path")
def test_formula_on_the_cpu():
    x, shifts, edge_index, gy, gr, row_ptr = inputs([3, 0, 8], 3, torch.float64, torch.device("cpu"))
    v = x[edge_index[1]] - x[edge_index[0]] + shifts
    dispatch.calls.clear()
    got = edge_forces(gy, gr, v, row_ptr, edge_index[0].to(torch.int32))
    assert set(dispatch.calls) == {("edge_forces", "reference")}
    torch.testing.assert_close(got, wanted(x, shifts, edge_index, gy, gr)[:2])


@pytest.mark.parametrize("on_cpu", [False, True])
def test_an_edge_of_length_zero_moves_nothing(on_cpu, device, request):
    if on_cpu:
        request.getfixturevalue("reference_path")
        device = torch.device("cpu")
    x, shifts, edge_index, gy, gr, row_ptr = inputs([2, 3], 3, torch.float64, device)
    v = x[edge_index[1]] - x[edge_index[0]] + shifts
    v[1] = 0.0
    gy0, gr0 = gy.clone(), gr.clone()
    gy0[1], gr0[1] = 0.0, 0.0
    sender = edge_index[0].to(torch.int32)
    got = edge_forces(gy, gr, v, row_ptr, sender)
    torch.testing.assert_close(got, edge_forces(gy0, gr0, v, row_ptr, sender))
    assert all(bool(t.isfinite().all()) for t in got)


def test_strided_inputs_and_opcheck(device):
    x, shifts, edge_index, gy, gr, row_ptr = inputs([4, 5], 2, torch.float64, device)
    v, sender = x[edge_index[1]] - x[edge_index[0]] + shifts, edge_index[0].to(torch.int32)
    want = edge_forces(gy, gr, v, row_ptr, sender)
    got = edge_forces(gy.t().contiguous().t(), gr.expand(-1, 2)[:, 1:], v.t().contiguous().t(), row_ptr, sender)
    torch.testing.assert_close(got, want)
    for test in ("test_schema", "test_faketensor"):
        torch.library.opcheck(ops._edge_forces, (gy, gr, v, row_ptr, sender), test_utils=test)


def test_bad_input_is_named(device):
    _, shifts, edge_index, gy, gr, row_ptr = inputs([4, 5], 2, torch.float32, device)
    v, sender = shifts, edge_index[0].to(torch.int32)
    for changed, error, match in (
        ((gy, gr, v[:, :2], row_ptr, sender), ValueError, "v must have shape"),
        ((gy[:, :5], gr, v, row_ptr, sender), ValueError, "gy must have shape"),
        ((gy, gr[:, 0], v, row_ptr, sender), ValueError, "gr, sender and row_ptr"),
        ((gy.double(), gr, v, row_ptr, sender), TypeError, "gy, gr and v"),
        ((gy, gr, v, row_ptr.long(), sender), TypeError, "must be int32"),
    ):
        with pytest.raises(error, match=match):
            edge_forces(*changed)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_kernel_compiles_without_spills(target):
    for name, stats in offline.compile_cases(kernels.offline_cases(target), target).items():
        assert (stats.spills, stats.stack) == (0, 0), (name, stats)
