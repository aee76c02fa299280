"""The radial network: kernels and formulas against e3nn and FP64, derivatives to the second order.

Bounds: a layer of K products adds (2u + K v) sum |h||V| to the error and passes on what its input brought, u being the
rounding of the operands and v that of the sums; silu has a slope below 1.1. Following |V| through the layers gives the
bound in `scale_of`.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from e3nn import nn
from hypothesis import given, settings
from hypothesis import strategies as st

from mace_triton import reference_radial_mlp as reference
from mace_triton.kernels import offline
from mace_triton.kernels import radial_mlp as kernels
from mace_triton.nn.radial_mlp import RadialNet, problem_of
from mace_triton.ops import dispatch
from mace_triton.ops import radial_mlp as ops
from mace_triton.ops.radial_mlp import radial_mlp

MODES = ["fp64", "ieee", "tf32x3", "tf32"]
OPERAND_ERROR = {"fp64": 2**-53, "ieee": 2**-24, "tf32x3": 2**-24, "tf32": 2**-11}
NORM = 1.6791767
SIZES = {"mace": (8, 64, 3), "odd": (13, 32, 2), "single": (10, 16, 1)}


def inputs(width_in: int, width: int, layers: int, edges: int, mode: str, device: torch.device):
    """x, g, first, hidden; the weights are as large as e3nn's."""
    dtype = torch.float64 if mode == "fp64" else torch.float32

    def randn(*shape):
        return torch.randn(shape, dtype=dtype, device=device)

    first, hidden = randn(width_in, width) / width_in**0.5, randn(layers - 1, width, width) / width**0.5
    return randn(edges, width_in), randn(edges, width), first, hidden


def scale_of(x, g, first, hidden):
    """Bounds of |h_L| and |gx|, and of what errors of relative size 1 in every product add up to."""
    weights, h = [first, *hidden.unbind(0)], x.abs()
    for v in weights:
        h = 1.1 * NORM * (h @ v.abs())
    t = g.abs()
    for v in reversed(weights):
        t = 1.1 * NORM * (t @ v.abs().T)
    return h, t


def check_against_fp64(sizes: tuple[int, int, int], edges: int, mode: str, device: torch.device) -> None:
    x, g, first, hidden = inputs(*sizes, edges, mode, device)
    before = dispatch.calls.copy()
    leaf = x.clone().requires_grad_()
    out = radial_mlp(leaf, first, hidden, norm=NORM, mode=mode)
    (gx,) = torch.autograd.grad(out, leaf, g)
    ran = {op for op, which in (dispatch.calls - before) if which == "triton"}
    assert ran == {"radial_mlp_fwd", "radial_mlp_bwd"}
    exact = [t.double() for t in (x, g, first, hidden)]
    want, z = reference.radial_mlp(exact[0], *exact[2:], NORM, "fp64")
    want_gx = reference.radial_mlp_grad_x(exact[1], z, *exact[2:], NORM, "fp64")
    unit, layers, width = torch.finfo(x.dtype).eps, sizes[2], max(sizes[:2])
    relative = layers * (2 * OPERAND_ERROR[mode] + (width + 8) * unit)
    bound, bound_gx = scale_of(*exact)
    assert bool(((out.double() - want).abs() <= relative * bound).all())
    # An error of z moves silu' too, by at most half of it.
    slack = relative * bound_gx * (1 + bound.amax())
    assert bool(((gx.double() - want_gx).abs() <= slack).all())
    assert float((out.double() - want).norm() / want.norm()) < 4 * (OPERAND_ERROR[mode] + 8 * unit)
    assert float((gx.double() - want_gx).norm() / want_gx.norm()) < 8 * (OPERAND_ERROR[mode] + 8 * unit)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_kernels_match_fp64(sizes, mode, device):
    check_against_fp64(sizes, 150, mode, device)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 64), st.sampled_from((16, 32, 64)), st.integers(1, 4), st.integers(1, 70))
def test_any_sizes(width_in, width, layers, edges):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_against_fp64((width_in, width, layers), edges, "ieee", device)


def test_no_edges(device):
    x, _, first, hidden = inputs(8, 64, 3, 0, "ieee", device)
    leaf = x.requires_grad_()
    out = radial_mlp(leaf, first, hidden, norm=NORM, mode="ieee")
    assert out.shape == (0, 64)
    assert torch.autograd.grad(out.sum(), leaf)[0].shape == (0, 8)


def apply(first, hidden):
    return lambda x: radial_mlp(x, first, hidden, norm=NORM, mode="fp64")


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_gradcheck_to_the_second_order(sizes, device):
    x, _, first, hidden = inputs(*sizes, 3, "fp64", device)
    assert torch.autograd.gradcheck(apply(first, hidden), (x.requires_grad_(),), fast_mode=True)
    assert torch.autograd.gradgradcheck(apply(first, hidden), (x.requires_grad_(),), fast_mode=True)


def weighted(x, first, hidden):
    return radial_mlp(x, first, hidden, norm=NORM, mode="fp64")


def trained_inputs(sizes: tuple[int, int, int], edges: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    x, _, first, hidden = inputs(*sizes, edges, "fp64", device)
    return tuple(t.requires_grad_() for t in (x, first, hidden))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_gradcheck_with_trained_weights(sizes, device):
    tensors, before = trained_inputs(sizes, 3, device), dispatch.calls.copy()
    assert torch.autograd.gradcheck(weighted, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(weighted, tensors, fast_mode=True)
    ran = {op for op, which in (dispatch.calls - before) if which == "triton"}
    assert ran == {"radial_mlp_fwd", "radial_mlp_grads"}


def force_loss(x: torch.Tensor, first: torch.Tensor, hidden: torch.Tensor, mode: str) -> torch.Tensor:
    """A loss on the result and on its gradient by x alone, as force training has it."""
    leaf = x.detach().requires_grad_()
    out = radial_mlp(leaf, first, hidden, norm=NORM, mode=mode)
    (gx,) = torch.autograd.grad(out.sin().sum(), leaf, create_graph=True)
    return out.square().mean() + gx.square().sum(1).mean()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_force_training_matches_fp64(sizes, mode, device, monkeypatch):
    x, _, first, hidden = inputs(*sizes, 150, mode, device)
    weights, before = [t.requires_grad_() for t in (first, hidden)], dispatch.calls.copy()
    wanted = weights if sizes[2] > 1 else weights[:1]
    got = torch.autograd.grad(force_loss(x, *weights, mode), wanted)
    ran = {op for op, which in (dispatch.calls - before) if which == "triton"}
    assert ran == {"radial_mlp_fwd", "radial_mlp_bwd", "radial_mlp_grads", "radial_mlp_bwd_bwd"}
    monkeypatch.setattr(dispatch, "backend", lambda tensor: "reference")
    exact = [t.detach().double().requires_grad_() for t in weights]
    want = torch.autograd.grad(force_loss(x.double(), *exact, "fp64"), exact if sizes[2] > 1 else exact[:1])
    for mine, theirs in zip(got, want, strict=True):
        error = (mine.double() - theirs).norm() / theirs.norm()
        assert float(error) < 64 * (OPERAND_ERROR[mode] + 8 * torch.finfo(mine.dtype).eps)


@pytest.mark.usefixtures("reference_path")
def test_higher_derivatives_with_trained_weights():
    """A derivative of a force loss' gradient, which nothing of MACE asks for, comes from the formulas."""
    x, first, hidden = trained_inputs((4, 16, 2), 3, torch.device("cpu"))
    assert torch.autograd.gradcheck(lambda v, w: force_loss(x, v, w, "fp64"), (first, hidden), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda v, w: force_loss(x, v, w, "fp64"), (first, hidden), fast_mode=True)


@pytest.mark.usefixtures("reference_path")
def test_gradcheck_on_the_cpu():
    x, _, first, hidden = inputs(8, 16, 3, 3, "fp64", torch.device("cpu"))
    before = dispatch.calls["radial_mlp_fwd", "reference"]
    assert torch.autograd.gradcheck(apply(first, hidden), (x.requires_grad_(),))
    assert torch.autograd.gradgradcheck(apply(first, hidden), (x.requires_grad_(),))
    assert dispatch.calls["radial_mlp_fwd", "reference"] > before


def test_silu_to_the_last_bits(device):
    """One layer whose weights are the unit matrix is silu itself: everywhere, and where exp would overflow."""
    z = torch.cat(
        [torch.linspace(-90, 90, 3001), torch.randn(1000), torch.tensor([-1e30, -200, -0.0, 1e-30, 200, 1e30])]
    )
    x, eye = z.to(device)[:, None].expand(-1, 16).contiguous(), torch.eye(16, device=device)
    before = dispatch.calls.copy()
    out = radial_mlp(x, eye, eye.new_empty(0, 16, 16), norm=1.0, mode="ieee")
    assert set(dispatch.calls - before) == {("radial_mlp_fwd", "triton")}
    exact, unit = torch.nn.functional.silu(x.double()), torch.finfo(torch.float32).eps
    # Below -87 exp stops, with silu at 1.6e-38 of its argument.
    assert bool(((out.double() - exact).abs() <= 6 * unit * exact.abs() + 2e-38 * x.double().abs()).all())
    x[5, 3] = torch.nan
    out = radial_mlp(x, eye, eye.new_empty(0, 16, 16), norm=1.0, mode="ieee")
    assert bool(out[5].isnan().all())
    assert int(out.isnan().sum()) == 16


def test_opcheck(device):
    x, g, first, hidden = inputs(8, 16, 2, 5, "ieee", device)
    rest = (first, hidden, NORM, "ieee")
    _, z = ops._fwd(x, *rest, True)
    torch.library.opcheck(ops._bwd, (g.requires_grad_(), x.clone().requires_grad_(), z, *rest))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")  # z has no gradient, by design
    for keep_first in (False, True):
        torch.library.opcheck(ops._fwd, (x.clone().requires_grad_(), *rest, keep_first), test_utils=tests)


def test_summed_and_sliced_gradients(device):
    x, _, first, hidden = inputs(8, 32, 2, 9, "ieee", device)
    wide = torch.randn(9, 16, device=device)[:, ::2]
    strided, dense = (radial_mlp(t, first, hidden, norm=NORM, mode="ieee") for t in (wide, wide.contiguous()))
    assert torch.equal(strided, dense)
    leaf = x.requires_grad_()
    out = radial_mlp(leaf, first, hidden, norm=NORM, mode="ieee")
    expanded = torch.autograd.grad(out.sum(), leaf, retain_graph=True)[0]
    assert torch.equal(expanded, torch.autograd.grad(out, leaf, torch.ones_like(out))[0])


def test_a_second_derivative_by_vmap(device):
    x, _, first, hidden = inputs(4, 16, 2, 2, "fp64", device)
    leaf = x.requires_grad_()
    (grad,) = torch.autograd.grad(apply(first, hidden)(leaf).square().sum(), leaf, create_graph=True)
    directions = torch.eye(grad.numel(), dtype=grad.dtype, device=device).reshape(-1, *grad.shape)

    def row(direction):
        return torch.autograd.grad(grad, leaf, direction, retain_graph=True)[0]

    torch.testing.assert_close(torch.vmap(row)(directions), torch.stack([row(d) for d in directions]))


def net_of(sizes=(8, 64, 64, 64, 96), act=torch.nn.functional.silu, **options) -> nn.FullyConnectedNet:
    return nn.FullyConnectedNet(list(sizes), act, **options)


@pytest.mark.torchscript
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("sizes", [(8, 64, 64, 64, 96), (10, 16, 17), (8, 24, 48, 5)])
def test_module_is_e3nn_in_fp64(sizes, trained, device):
    plain = net_of(sizes).double().to(device).requires_grad_(trained)
    ours = RadialNet(plain, "fp64")
    assert ours.fused == (len(set(sizes[1:-1])) == 1)
    x = torch.randn(21, sizes[0], dtype=torch.float64, device=device).requires_grad_()
    before, results = dispatch.calls.copy(), []
    for net in (plain, ours):
        wanted = (x, *net.parameters()) if trained else (x,)
        out = net(x)
        first = torch.autograd.grad(out.pow(3).sum(), wanted, create_graph=True)
        results.append((out, *first, *torch.autograd.grad(first[0].pow(2).sum(), wanted)))
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    ran = {op for op, which in (dispatch.calls - before) if which == "triton"}
    assert ("radial_mlp_fwd" in ran) == ours.fused
    assert ("radial_mlp_grads" in ran) == (ours.fused and trained)
    assert "linear_fwd" in ran


@pytest.mark.torchscript
def test_module_shares_state_copies_pickles_and_restores(device):
    plain = net_of().to(device).requires_grad_(False)
    ours = RadialNet(plain, "ieee")
    assert ours.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(5, 8, device=device)
    want = ours(x)
    torch.testing.assert_close(want, plain(x), rtol=1e-5, atol=1e-5)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(x), want)
        with torch.no_grad():
            twin.layer0.weight.zero_()
        assert not twin(x).any(), "an old copy of the weights was used"
    back = ours.restore()
    assert type(back) is nn.FullyConnectedNet
    assert torch.equal(back(x), plain(x))
    double = copy.deepcopy(ours).double()
    assert double.run_mode == "fp64"
    torch.testing.assert_close(double(x.double()), want.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.torchscript
def test_module_compiles_into_one_graph(device):
    ours = RadialNet(net_of().to(device).requires_grad_(False), "ieee")
    x = torch.randn(5, 8, device=device).requires_grad_()
    want = ours(x)
    out = torch.compile(ours, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(out, want)
    got = torch.autograd.grad(out.square().sum(), x)[0]
    torch.testing.assert_close(got, torch.autograd.grad(want.square().sum(), x)[0])


def test_bad_arguments_are_named(device):
    x, _, first, hidden = inputs(8, 32, 2, 4, "ieee", device)
    with pytest.raises(ValueError, match="mode must be one of"):
        radial_mlp(x, first, hidden, norm=NORM, mode="fp8")
    with pytest.raises(ValueError, match="first must have shape"):
        radial_mlp(x, first[:, :24], hidden, norm=NORM, mode="ieee")
    with pytest.raises(ValueError, match=r"hidden must have shape \[layers - 1, 32, same\]"):
        radial_mlp(x, first, hidden[0], norm=NORM, mode="ieee")
    with pytest.raises(ValueError, match=r"x must have shape \[E, 8\]"):
        radial_mlp(x[:, 1:], first, hidden, norm=NORM, mode="ieee")
    with pytest.raises(TypeError, match=r"x must be torch\.float64"):
        radial_mlp(x, first, hidden, norm=NORM, mode="fp64")
    with pytest.raises(ValueError, match="hidden is on meta"):
        radial_mlp(x, first, hidden.to("meta"), norm=NORM, mode="ieee")


@pytest.mark.torchscript
def test_networks_it_cannot_stand_in_for_are_refused():
    with pytest.raises(ValueError, match="last layer has an activation"):
        problem_of(net_of(out_act=True))
    with pytest.raises(ValueError, match="variance"):
        problem_of(net_of(variance_in=2))
    with pytest.raises(TypeError, match=r"must be an e3nn\.nn\.FullyConnectedNet"):
        RadialNet(torch.nn.Linear(3, 2), "ieee")
    assert not RadialNet(net_of(act=torch.tanh), "ieee").fused


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_kernels_compile_without_spills(target):
    for name, stats in offline.compile_cases(kernels.offline_cases(target), target).items():
        assert (stats.spills, stats.stack) == (0, 0), (name, stats)
