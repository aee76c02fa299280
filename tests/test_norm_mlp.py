"""MACE's RadialMLP: kernels and formulas against PyTorch in FP64, derivatives to the second order.

Bounds: a layer of K products rounds to (2u + K v) of sum |h||V|, u being the rounding of the operands and v that of the
sums. The layer norm divides by the root of the variance, so errors are compared in the norm over the rows, with weights
of such a size that all variances are near 1: each layer then passes its input's error on at most about twice.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mace.modules.radial import RadialMLP

from mace_triton import reference_norm_mlp as reference
from mace_triton.kernels import norm_mlp as kernels
from mace_triton.kernels import offline
from mace_triton.nn.norm_mlp import NormNet, problems_of
from mace_triton.ops import dispatch
from mace_triton.ops import norm_mlp as ops
from mace_triton.ops.norm_mlp import norm_mlp

MODES = ["fp64", "ieee", "tf32x3", "tf32"]
OPERAND_ERROR = {"fp64": 2**-53, "ieee": 2**-24, "tf32x3": 2**-24, "tf32": 2**-11}
EPS = 1e-5
SIZES = {"mace": (64, 3), "odd": (32, 2), "density": (16, 1)}


def inputs(width: int, layers: int, rows: int, mode: str, device: torch.device) -> list[torch.Tensor]:
    """g, first, hidden, bias, gain, shift."""
    dtype = torch.float64 if mode == "fp64" else torch.float32

    def randn(*shape):
        return torch.randn(shape, dtype=dtype, device=device)

    hidden = 2.0 * randn(layers - 1, width, width) / width**0.5
    bias, shift = 0.3 * randn(layers - 1, width), 0.3 * randn(layers, width)
    return [randn(rows, width), randn(rows, width), hidden, bias, 1.0 + 0.2 * randn(layers, width), shift]


def check_against_fp64(sizes: tuple[int, int], rows: int, mode: str, device: torch.device) -> None:
    g, first, *weights = inputs(*sizes, rows, mode, device)
    before = dispatch.calls.copy()
    leaf = first.clone().requires_grad_()
    out = norm_mlp(leaf, *weights, eps=EPS, mode=mode)
    (gz,) = torch.autograd.grad(out, leaf, g)
    assert {op for op, which in (dispatch.calls - before) if which == "triton"} == {"norm_mlp_fwd", "norm_mlp_bwd"}
    exact_g, exact_first, *exact = (t.double() for t in (g, first, *weights))
    leaf = exact_first.requires_grad_()
    want, _ = reference.norm_mlp(leaf, *exact, EPS, "fp64")
    (want_gz,) = torch.autograd.grad(want, leaf, exact_g)
    width, layers = sizes
    unit = 2**layers * (2 * OPERAND_ERROR[mode] + (width**0.5 + 8) * torch.finfo(first.dtype).eps)
    assert float((out.double() - want).norm()) <= unit * float(want.norm())
    assert float((gz.double() - want_gz).norm()) <= 2 * unit * float(want_gz.norm())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_kernels_match_fp64(sizes, mode, device):
    check_against_fp64(sizes, 150, mode, device)


@settings(max_examples=10, deadline=None)
@given(st.sampled_from((16, 32, 64)), st.integers(1, 4), st.integers(1, 70))
def test_any_sizes(width, layers, rows):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_against_fp64((width, layers), rows, "ieee", device)


def test_rows_without_variance(device):
    """A row of equal numbers has no direction: its layer norm is zero, the gradient large but finite."""
    g, first, *weights = inputs(16, 2, 5, "ieee", device)
    first[2] = 0.5  # whose mean is exact
    leaf = first.requires_grad_()
    out = norm_mlp(leaf, *weights, eps=EPS, mode="ieee")
    want, _ = reference.norm_mlp(leaf, *weights, EPS)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    (gz,), (want_gz,) = (torch.autograd.grad(o, leaf, g) for o in (out, want))
    torch.testing.assert_close(gz, want_gz, rtol=1e-4, atol=1e-4 * float(want_gz.abs().max()))


def test_no_rows(device):
    _, first, *weights = inputs(64, 3, 0, "ieee", device)
    leaf = first.requires_grad_()
    out = norm_mlp(leaf, *weights, eps=EPS, mode="ieee")
    assert out.shape == torch.autograd.grad(out.sum(), leaf)[0].shape == (0, 64)


def apply(weights):
    return lambda first: norm_mlp(first, *weights, eps=EPS, mode="fp64")


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_gradcheck_to_the_second_order(sizes, device):
    _, first, *weights = inputs(*sizes, 3, "fp64", device)
    leaf = first.requires_grad_()
    assert torch.autograd.gradcheck(apply(weights), (leaf,), fast_mode=True)
    assert torch.autograd.gradgradcheck(apply(weights), (leaf,), fast_mode=True)


@pytest.mark.usefixtures("reference_path")
def test_gradcheck_on_the_cpu():
    _, first, *weights = inputs(16, 3, 3, "fp64", torch.device("cpu"))
    before = dispatch.calls["norm_mlp_bwd", "reference"]
    assert torch.autograd.gradcheck(apply(weights), (first.requires_grad_(),))
    assert torch.autograd.gradgradcheck(apply(weights), (first.requires_grad_(),))
    assert dispatch.calls["norm_mlp_bwd", "reference"] > before


def test_opcheck(device):
    g, first, *weights = inputs(16, 2, 5, "ieee", device)
    rest = (*weights, EPS, "ieee")
    _, z = ops._fwd(first, *rest)
    torch.library.opcheck(ops._bwd, (g.requires_grad_(), z, first.clone().requires_grad_(), *rest))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")  # z has no gradient, by design
    torch.library.opcheck(ops._fwd, (first.clone().requires_grad_(), *rest), test_utils=tests)


def test_summed_and_sliced_gradients(device):
    _, first, *weights = inputs(16, 2, 9, "ieee", device)
    wide = torch.randn(9, 32, device=device)[:, ::2]
    strided, dense = (norm_mlp(t, *weights, eps=EPS, mode="ieee") for t in (wide, wide.contiguous()))
    assert torch.equal(strided, dense)
    leaf = first.requires_grad_()
    out = norm_mlp(leaf, *weights, eps=EPS, mode="ieee")
    expanded = torch.autograd.grad(out.sum(), leaf, retain_graph=True)[0]
    assert torch.equal(expanded, torch.autograd.grad(out, leaf, torch.ones_like(out))[0])


def test_a_second_derivative_by_vmap(device):
    _, first, *weights = inputs(16, 2, 2, "fp64", device)
    leaf = first.requires_grad_()
    (grad,) = torch.autograd.grad(apply(weights)(leaf).square().sum(), leaf, create_graph=True)
    directions = torch.eye(grad.numel(), dtype=grad.dtype, device=device).reshape(-1, *grad.shape)

    def row(direction):
        return torch.autograd.grad(grad, leaf, direction, retain_graph=True)[0]

    torch.testing.assert_close(torch.vmap(row)(directions), torch.stack([row(d) for d in directions]))


def net_of(*sizes: int) -> RadialMLP:
    """A RadialMLP whose layer norms and biases are not what they start as."""
    net = RadialMLP(list(sizes))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return net


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("sizes", [(264, 64, 64, 64, 96), (10, 64, 1), (8, 24, 48, 5), (8, 128, 3), (7, 9)])
def test_module_is_mace_in_fp64(sizes, trained, device):
    plain = net_of(*sizes).double().to(device).requires_grad_(trained)
    ours = NormNet(plain, "fp64")
    assert ours.fused == (set(sizes[1:-1]) == {64})
    x = torch.randn(21, sizes[0], dtype=torch.float64, device=device).requires_grad_()
    before, results = dispatch.calls.copy(), []
    for net in (plain, ours):
        wanted = (x, *net.parameters()) if trained else (x,)
        out = net(x)
        first = torch.autograd.grad(out.pow(3).sum(), wanted, create_graph=True)
        second = torch.autograd.grad(first[0].pow(2).sum(), wanted, materialize_grads=True)
        results.append((out, *first, *second))
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11 * float(want.abs().max()))
    ran = {op for op, which in (dispatch.calls - before) if which == "triton"}
    assert ("norm_mlp_fwd" in ran) == (ours.fused and not trained)
    assert {"linear_fwd", "linear_grad_x"} <= ran


@pytest.mark.parametrize("width", [264, 1032])
def test_fp32_is_as_exact_as_mace(width, device):
    """The whole network with the inputs of MH-1: its error against FP64 beside that of MACE's own FP32."""
    exact = net_of(width, 64, 64, 64, 96).double().to(device).requires_grad_(False)
    plain = copy.deepcopy(exact).float()
    x = torch.randn(64, width, dtype=torch.float64, device=device)
    g = torch.randn(64, 96, dtype=torch.float64, device=device)
    results = []
    for net in (exact, plain, NormNet(plain, "tf32x3")):
        leaf = x.to(next(net.parameters()).dtype).requires_grad_()
        out = net(leaf)
        results.append((out, torch.autograd.grad(out, leaf, g.to(out.dtype))[0]))
    for want, theirs, ours in zip(*results, strict=True):
        errors = [float((t.double() - want).norm() / want.norm()) for t in (theirs, ours)]
        assert errors[1] <= 1.5 * errors[0] + 2**-24


def test_module_shares_state_copies_pickles_and_restores(device):
    plain = net_of(8, 64, 64, 5).to(device).requires_grad_(False)
    ours = NormNet(plain, "ieee")
    assert isinstance(ours, RadialMLP)
    assert ours.hs == plain.hs
    assert ours.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(5, 8, device=device)
    want = ours(x)
    torch.testing.assert_close(want, plain(x), rtol=1e-5, atol=1e-5)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(x), want)
        for p in twin.parameters():
            with torch.no_grad():
                p.zero_()
            assert not torch.equal(twin(x), want), "an old copy of the weights was used"
        assert not twin(x).any()
    back = ours.restore()
    assert type(back) is RadialMLP
    assert back.__dict__.keys() == plain.__dict__.keys()
    assert torch.equal(back(x), plain(x))
    double = copy.deepcopy(ours).double()
    assert double.run_mode == "fp64"
    torch.testing.assert_close(double(x.double()), want.double(), rtol=1e-4, atol=1e-5)


def test_module_compiles_into_one_graph(device):
    ours = NormNet(net_of(8, 64, 64, 5).to(device).requires_grad_(False), "ieee")
    x = torch.randn(5, 8, device=device).requires_grad_()
    want = ours(x)
    out = torch.compile(ours, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(out, want)
    got = torch.autograd.grad(out.square().sum(), x)[0]
    torch.testing.assert_close(got, torch.autograd.grad(want.square().sum(), x)[0])


def test_bad_arguments_are_named(device):
    _, first, hidden, bias, gain, shift = inputs(32, 2, 4, "ieee", device)
    good = {"eps": EPS, "mode": "ieee"}
    with pytest.raises(ValueError, match="mode must be one of"):
        norm_mlp(first, hidden, bias, gain, shift, eps=EPS, mode="fp8")
    with pytest.raises(ValueError, match="gain must have shape"):
        norm_mlp(first, hidden, bias, gain[:, :24], shift, **good)
    with pytest.raises(ValueError, match=r"hidden must have shape \[1, 32, 32\]"):
        norm_mlp(first, hidden[0], bias, gain, shift, **good)
    with pytest.raises(ValueError, match=r"shift must have shape \[2, 32\]"):
        norm_mlp(first, hidden, bias, gain, shift[:1], **good)
    with pytest.raises(ValueError, match=r"first must have shape \[4, 32\]"):
        norm_mlp(first[:, 1:], hidden, bias, gain, shift, **good)
    with pytest.raises(TypeError, match=r"first must be torch\.float64"):
        norm_mlp(first, hidden, bias, gain, shift, eps=EPS, mode="fp64")
    with pytest.raises(ValueError, match="bias is on meta"):
        norm_mlp(first, hidden, bias.to("meta"), gain, shift, **good)
    with pytest.raises(ValueError, match="gain: this op gives no gradient"):
        norm_mlp(first, hidden, bias, gain.clone().requires_grad_(), shift, **good)


def test_networks_it_cannot_stand_in_for_are_refused():
    net = net_of(8, 16, 3)
    net.net[0] = torch.nn.Sequential(net.net[0])
    with pytest.raises(ValueError, match="merge_lora_weights"):
        problems_of(net)
    net = net_of(8, 16, 3)
    net.net[2] = torch.nn.Linear(16, 3, bias=False)
    with pytest.raises(ValueError, match="wrapped"):
        problems_of(net)
    net = net_of(8, 16, 3)
    net.net[0] = torch.nn.Linear(8, 16, bias=False)
    with pytest.raises(ValueError, match="must have a bias"):
        problems_of(net)
    with pytest.raises(TypeError, match="must be MACE's RadialMLP"):
        NormNet(torch.nn.Linear(3, 2), "ieee")
    with pytest.raises(ValueError, match="mode must be one of"):
        NormNet(net_of(8, 16, 3), "fp8")


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_kernels_compile_without_spills(target):
    for name, stats in offline.compile_cases(kernels.offline_cases(target), target).items():
        assert (stats.spills, stats.stack) == (0, 0), (name, stats)
