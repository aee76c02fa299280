"""The linear map of few scalars to many, with its own kernels: against FP64, in every storage of the result.

The bound is that of test_linear.py, plus one rounding of the result to the type it is stored in.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from mace_triton import reference_linear as reference
from mace_triton.kernels import linear_scalars as kernels
from mace_triton.kernels import offline
from mace_triton.linear_problem import LinearProblem
from mace_triton.ops import dispatch
from mace_triton.ops.linear import linear, lowp_weight

OPERAND_ERROR = {"tf32x3": 2**-20, "tf32": 2**-11, "bf16": 2**-7, "fp16": 2**-11}
STORED = {"tf32x3": [torch.float32], "tf32": [torch.float32, torch.bfloat16]}
STORED |= {"bf16": [torch.float32, torch.bfloat16], "fp16": [torch.float32, torch.float16]}
PAIRS = [(mode, dtype) for mode, dtypes in STORED.items() for dtype in dtypes]


def problem_of(narrow: int, wide: int, bias: bool = False) -> LinearProblem:
    layouts = {"layout_in": "ir_mul", "layout_out": "ir_mul"}
    return LinearProblem(f"{narrow}x0e", f"{wide}x0e", biases=(bias,), **layouts)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions of `kernels/linear_scalars.py` that ran, in order."""
    names: list[str] = []
    for name in ("forward", "grad_x"):
        right = getattr(kernels, name)

        def spy(*args, right=right, name=name):
            names.append(name)
            return right(*args)

        monkeypatch.setattr(kernels, name, spy)
    return names


def assert_within(got: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor, mode: str, length: int) -> None:
    """|got - exact| <= (2 u + length eps) magnitude, and the rounding of what is stored."""
    bound = (2 * OPERAND_ERROR[mode] + (length + 4) * 2**-23) * magnitude + torch.finfo(got.dtype).eps * exact.abs()
    assert bool(((got.double() - exact).abs() <= bound).all())


def check(narrow: int, wide: int, rows: int, mode: str, stored: torch.dtype, device: torch.device) -> None:
    problem, bias = problem_of(narrow, wide, True), torch.randn(wide, device=device, requires_grad=True)
    x = torch.randn(rows, narrow, device=device, requires_grad=True)
    weight = torch.randn(problem.weight_numel, device=device, requires_grad=True)
    residual = torch.randn(rows, wide, device=device)
    g = torch.randn(rows, wide, device=device).to(stored)
    before = dispatch.calls.copy()
    out = linear(problem, x, weight, mode=mode, bias=bias, residual=residual, scale=0.5, out_dtype=stored)
    gx, gw, gb = torch.autograd.grad(out, (x, weight, bias), g)
    assert {which for _, which in dispatch.calls - before} == {"triton"}
    assert (out.dtype, gx.dtype, gw.dtype, gb.dtype) == (stored, *(torch.float32,) * 3)
    wide_x, wide_w, wide_g, *added = (t.detach().double() for t in (x, weight, g, bias, residual))
    exact = reference.linear(problem, wide_x, wide_w, "fp64", *added, 0.5)
    magnitude = reference.linear(problem, wide_x.abs(), wide_w.abs(), "fp64", *(t.abs() for t in added), 0.5)
    assert_within(out, exact, magnitude, mode, narrow)
    for got, function, other, length in (
        (gx, reference.linear_grad_x, wide_w, wide),
        (gw, reference.linear_grad_w, wide_x, rows),
    ):
        args = (wide_g, other) if got is gx else (other, wide_g)
        exact, magnitude = (function(problem, *(f(t) for t in args), "fp64", 0.5) for f in (torch.clone, torch.abs))
        assert_within(got, exact, magnitude, mode, length)
    assert_within(gb, wide_g.sum(0), wide_g.abs().sum(0), mode, rows)


@pytest.mark.parametrize(("mode", "stored"), PAIRS)
@pytest.mark.parametrize(("narrow", "wide"), [(64, 320), (16, 68), (32, 141)])
def test_against_fp64(narrow, wide, mode, stored, device, launched):
    check(narrow, wide, 150, mode, stored, device)
    assert launched == ["forward", "grad_x"]


@budget(max_examples=8, deadline=None)
@given(st.sampled_from((16, 32, 64, 128)), st.integers(128, 400), st.integers(1, 140), st.sampled_from(PAIRS))
def test_any_size(narrow, wide, rows, pair):
    check(narrow, wide, rows, *pair, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.mark.parametrize(("narrow", "error"), [(64, 2.2e-7), (128, 1.8e-7)])
def test_3xtf32_is_near_fp32(narrow, error, device):
    """Root mean square error over FP64's root mean square; FP32's: 1.4e-7 for sums of 64 products, 2.1e-7 of 128."""
    if device.type != "cuda":
        pytest.skip("the interpreter's products are FP32")
    problem = problem_of(narrow, 640)
    x, grad = torch.randn(500, narrow, device=device), torch.randn(500, 640, device=device)
    weight = torch.randn(problem.weight_numel, device=device)
    found = kernels.forward(problem, x, weight, None, None, "tf32x3", 1.0, torch.float32)
    exact = reference.linear(problem, x.double(), weight.double(), "fp64")
    assert float((found - exact).norm() / exact.norm()) < error
    back = kernels.grad_x(problem, grad, weight, "tf32x3", 1.0)
    exact = reference.linear_grad_x(problem, grad.double(), weight.double(), "fp64", 1.0)
    assert float((back - exact).norm() / exact.norm()) < 2e-7


def test_a_copy_of_the_weights_gives_the_same_bits(device, launched, monkeypatch):
    problem = problem_of(64, 128)
    x = torch.randn(5, 64, device=device, requires_grad=True)
    weight = torch.randn(problem.weight_numel, device=device)
    for mode in STORED:
        copy = lowp_weight(weight, mode, problem)
        assert copy.ndim == (2 if mode == "tf32x3" else 1)
        pairs = []
        for lowp, residual in itertools.product((None, copy), (None, torch.ones(5, 128, device=device))):
            out = linear(problem, x, weight, mode=mode, weight_lowp=lowp, residual=residual)
            pairs.append((out, *torch.autograd.grad(out.square().sum(), x)))
        for one, two in zip(pairs[:2], pairs[2:], strict=True):
            assert all(map(torch.equal, one, two))
    monkeypatch.setattr(kernels, "split", lambda weight: pytest.fail("split again"))
    linear(problem, x, weight, mode="tf32x3", weight_lowp=lowp_weight(weight, "ieee").expand(2, -1).clone())
    general = problem_of(24, 128)
    with pytest.raises(ValueError, match="weight_lowp is no copy"):
        linear(general, x[:, :24], weight[: 24 * 128], mode="tf32x3", weight_lowp=weight[: 24 * 128].expand(2, -1))


@pytest.mark.parametrize(("wide", "stored", "bulk"), [(68, torch.float32, True), (68, torch.bfloat16, False)])
def test_rows_at_16_bytes_are_moved_as_tiles(wide, stored, bulk, device, monkeypatch):
    """Rows that start elsewhere are moved by loads and stores; so are those of GPUs before Hopper."""
    if device.type == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("this GPU has no units that move tiles")
    problem, found, right = problem_of(32, wide), [], kernels._moved
    monkeypatch.setattr(kernels, "_moved", lambda t, tile: found.append(right(t, tile) is not t) or right(t, tile))
    x = torch.randn(40, 32, device=device, requires_grad=True)
    weight = torch.randn(problem.weight_numel, device=device)
    out = linear(problem, x, weight, mode="bf16", out_dtype=stored)
    torch.autograd.grad(out, x, torch.randn_like(out))
    assert found == [bulk, bulk]


@pytest.mark.parametrize("mode", STORED)
def test_no_rows(mode, device, launched):
    problem = problem_of(64, 128)
    x = torch.empty(0, 64, device=device, requires_grad=True)
    out = linear(problem, x, torch.randn(problem.weight_numel, device=device), mode=mode)
    assert out.shape == (0, 128)
    assert torch.autograd.grad(out.sum(), x)[0].shape == (0, 64)
    assert launched == ["forward", "grad_x"]


def test_strided_and_expanded_gradients(device):
    problem, weight = problem_of(32, 96), torch.randn(32 * 96, device=device)
    x = torch.randn(11, 64, device=device)[:, ::2].requires_grad_()
    out = linear(problem, x, weight, mode="tf32x3")
    assert torch.equal(out, linear(problem, x.contiguous(), weight, mode="tf32x3"))
    expanded = torch.autograd.grad(out.sum(), x, retain_graph=True)[0]
    assert torch.equal(expanded, torch.autograd.grad(out, x, torch.ones_like(out))[0])


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_second_derivatives_keep_the_storage(stored, device):
    """gx is linear in g and in the weights: its derivatives are the map itself and the gradient of the weights."""
    problem = problem_of(64, 128)
    x, a = (torch.randn(9, 64, device=device) for _ in range(2))
    weight = torch.randn(problem.weight_numel, device=device, requires_grad=True)
    g = torch.randn(9, 128, device=device).to(stored).requires_grad_()
    out = linear(problem, x.requires_grad_(), weight, mode="tf32x3", out_dtype=stored)
    (gx,) = torch.autograd.grad(out, x, g, create_graph=True)
    dg, dw = torch.autograd.grad(gx, (g, weight), a)
    assert (dg.dtype, dw.dtype) == (stored, torch.float32)
    exact = [t.detach().double() for t in (a, weight, g)]
    want = reference.linear(problem, exact[0], exact[1], "fp64")
    torch.testing.assert_close(dg.double(), want, rtol=4 * torch.finfo(stored).eps, atol=1e-5)
    want = reference.linear_grad_w(problem, exact[0], exact[2], "fp64", 1.0)
    torch.testing.assert_close(dw.double(), want, rtol=1e-5, atol=1e-5)


def test_a_nan_is_not_lost(device):
    problem = problem_of(16, 80)
    x, weight = torch.randn(5, 16, device=device), torch.randn(16 * 80, device=device)
    x[3, 2] = float("nan")
    weight[7] = float("nan")
    for mode in STORED:
        out = linear(problem, x, weight, mode=mode)
        assert bool(out[3].isnan().all())
        assert bool(out[:, 7].isnan().all())
        assert int(out.isnan().sum()) == 80 + 4


@pytest.mark.usefixtures("reference_path")
def test_formula_stores_in_16_bits_too():
    problem = problem_of(64, 128)
    x, weight = torch.randn(4, 64, requires_grad=True), torch.randn(64 * 128)
    out = linear(problem, x, weight, mode="ieee", out_dtype=torch.bfloat16)
    assert torch.equal(out, linear(problem, x, weight, mode="ieee").bfloat16())
    g = torch.randn(4, 128).bfloat16()
    wide = torch.autograd.grad(linear(problem, x, weight, mode="ieee"), x, g.float())[0]
    assert torch.equal(torch.autograd.grad(out, x, g)[0], wide)


def test_other_maps_take_the_general_kernel(device, launched):
    for problem, mode in (
        (problem_of(64, 128), "ieee"),
        (problem_of(24, 128), "tf32x3"),
        (problem_of(64, 32), "tf32x3"),
        (LinearProblem("16x0e+16x1o", "80x0e+80x1o", layout_in="ir_mul", layout_out="ir_mul"), "tf32x3"),
    ):
        x = torch.randn(3, problem.dim_in, device=device)
        linear(problem, x, torch.randn(problem.weight_numel, device=device), mode=mode)
    assert not launched


@pytest.mark.parametrize(
    ("mode", "out_dtype"), [("tf32", torch.float64), ("fp64", torch.bfloat16), ("bf16", torch.int32)]
)
def test_a_wrong_storage_is_named(mode, out_dtype, device):
    problem, dtype = problem_of(16, 64), torch.float64 if mode == "fp64" else torch.float32
    x, weight = (torch.zeros(shape, dtype=dtype, device=device) for shape in ((2, 16), (16 * 64,)))
    with pytest.raises(TypeError, match="out_dtype must be x's dtype, or 16 bits"):
        linear(problem, x, weight, mode=mode, out_dtype=out_dtype)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_kernels_compile_without_spills(target):
    for name, stats in offline.compile_cases(kernels.offline_cases(target), target).items():
        assert (stats.spills, stats.stack) == (0, 0), (name, stats)
