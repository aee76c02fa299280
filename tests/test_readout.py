"""A readout's energies and gradient in one pass, against MACE's readouts and autograd in FP64.

Bound: sums of C products, through one activation, of M more.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mace_triton.kernels import offline
from mace_triton.kernels import readout as kernels
from mace_triton.ops import dispatch
from mace_triton.ops import readout as ops
from mace_triton.ops.readout import readout

DTYPES = [torch.float64, torch.float32]


def inputs(nodes: int, channels: int, rest: int, hidden: int, dtype: torch.dtype, device: torch.device):
    """x [nodes, channels + rest], first (None for hidden = 0), last, before."""
    x = torch.randn(nodes, channels + rest, dtype=torch.float64)
    first = torch.randn(channels, hidden, dtype=torch.float64) / channels**0.5 if hidden else None
    last = torch.randn(hidden or channels, dtype=torch.float64)
    before = torch.randn(nodes, dtype=torch.float64, device=device)
    return *(t if t is None else t.to(device, dtype) for t in (x, first, last)), before


def exact(x, first, last, before) -> tuple[torch.Tensor, torch.Tensor]:
    x, last = x.double().requires_grad_(), last.double()
    channels = len(last) if first is None else len(first)
    scalars = x[:, :channels]
    e = scalars @ last if first is None else torch.nn.functional.silu(scalars @ first.double()) @ last
    return before + e.detach(), torch.autograd.grad(e.sum(), x)[0]


def check(nodes: int, channels: int, rest: int, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
    given_ = inputs(nodes, channels, rest, hidden, dtype, device)
    called = dispatch.calls.copy()
    got = readout(*given_)
    assert set(dispatch.calls - called) == {("readout", "triton")}
    assert (got[0].dtype, got[1].dtype) == (torch.float64, dtype)
    for one, two in zip(got, exact(*given_), strict=True):
        atol = 30 * torch.finfo(dtype).eps * math.sqrt(channels * max(hidden, 1))
        torch.testing.assert_close(one.double(), two, rtol=0, atol=atol)
    assert not got[1][:, channels:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [0, 1, 16, 24])
@pytest.mark.parametrize(("nodes", "channels", "rest"), [(1, 8, 0), (37, 17, 51), (20, 96, 0), (9, 192, 200)])
def test_kernel_is_the_readout(nodes, channels, rest, hidden, dtype, device):
    check(nodes, channels, rest, hidden, dtype, device)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 40), st.integers(1, 140), st.integers(0, 300), st.integers(0, 40), st.sampled_from(DTYPES))
def test_any_size(device, nodes, channels, rest, hidden, dtype):
    check(nodes, channels, rest, hidden, dtype, device)


def test_activation_far_out(device):
    """silu and its slope neither overflow nor turn into NaN."""
    x = torch.tensor([[-1e4], [-90.0], [0.0], [90.0], [1e4]], device=device)
    one, before = torch.ones(1, 1, device=device), torch.zeros(5, dtype=torch.float64, device=device)
    e, gx = readout(x, one, one[0], before)
    assert e.tolist() == pytest.approx([0.0, 0.0, 0.0, 90.0, 1e4])
    assert gx[:, 0].tolist() == pytest.approx([0.0, 0.0, 0.5, 1.0, 1.0])


@pytest.mark.usefixtures("reference_path")
@pytest.mark.parametrize("hidden", [0, 16])
def test_formula_on_the_cpu(hidden):
    given_ = inputs(6, 8, 5, hidden, torch.float64, torch.device("cpu"))
    dispatch.calls.clear()
    torch.testing.assert_close(readout(*given_), exact(*given_))
    assert set(dispatch.calls) == {("readout", "reference")}


def test_strided_inputs_and_opcheck(device):
    x, first, last, before = inputs(6, 8, 5, 16, torch.float64, device)
    got = readout(x.t().contiguous().t(), first.t().contiguous().t(), last.expand(2, -1).t()[:, 1], before)
    torch.testing.assert_close(got, readout(x, first, last, before))
    for test in ("test_schema", "test_faketensor"):
        torch.library.opcheck(ops._readout, (x, first, last, before), test_utils=test)


def test_bad_input_is_named(device):
    x, first, last, before = inputs(6, 8, 0, 16, torch.float32, device)
    for changed, error, match in (
        ((x[:, :4], first, last, before), ValueError, "x, first and last must be"),
        ((x, first, last[1:], before), ValueError, "last must have shape"),
        ((x, first, last, before.float()), ValueError, "before must be float64"),
        ((x.double(), first, last, before), TypeError, "x, first and last"),
        ((x, first.repeat(1, 200), last.repeat(200), before), ValueError, "too many"),
    ):
        with pytest.raises(error, match=match):
            readout(*changed)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_kernel_compiles_without_spills(target):
    for name, stats in offline.compile_cases(kernels.offline_cases(target), target).items():
        assert (stats.spills, stats.stack) == (0, 0), (name, stats)
