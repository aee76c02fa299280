"""Harmonics and radial features of edges against e3nn and MACE in FP64, to the second derivative.

Bounds: the harmonics and their derivatives are sums of at most 16 products of numbers near 1, so errors are a few eps
of the whole tensor. The radial features multiply a rounded angle w r, at most K pi, so that a derivative of order n is
known to about eps K pi w^n; `radial_bound` says so.
"""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from e3nn import o3
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from mace.modules import blocks, radial

from mace_triton.kernels import edge_harmonics as harmonics_kernels
from mace_triton.kernels import edge_radial as radial_kernels
from mace_triton.kernels import offline
from mace_triton.nn.edge_embedding import EdgeHarmonics, EdgeRadial, check_harmonics, kinds_of
from mace_triton.ops import dispatch
from mace_triton.ops import edge_embedding as ops
from mace_triton.ops.edge_embedding import edge_harmonics, edge_radial

DTYPES = [torch.float64, torch.float32]
ELEMENTS = (1, 6, 8, 29)
SETTINGS = [
    {"radial_type": basis, "distance_transform": transform, "apply_cutoff": cut}
    for basis in ("bessel", "gaussian")
    for transform in ("None", "Agnesi", "Soft")
    for cut in (True, False)
]


def plain_harmonics(lmax: int) -> o3.SphericalHarmonics:
    irreps = o3.Irreps.spherical_harmonics(lmax)
    return o3.SphericalHarmonics(irreps, normalize=True, normalization="component")


def plain_radial(width: int = 8, r_max: float = 5.0, p: int = 5, **settings) -> blocks.RadialEmbeddingBlock:
    settings = {"radial_type": "bessel", "distance_transform": "None", "apply_cutoff": True} | settings
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return blocks.RadialEmbeddingBlock(r_max=r_max, num_bessel=width, num_polynomial_cutoff=p, **settings)
    finally:
        torch.set_default_dtype(before)


def edges(n: int, device: torch.device, dtype=torch.float64, r_max: float = 5.0):
    """Lengths (one beyond the cutoff), node_attrs, edge_index and atomic_numbers of n edges between 6 atoms."""
    lengths = 0.6 + r_max * torch.rand(n, 1, dtype=torch.float64)
    lengths[-1:] = 1.1 * r_max
    attrs = torch.nn.functional.one_hot(torch.arange(6) % len(ELEMENTS), len(ELEMENTS)).double()
    index, numbers = torch.randint(6, (2, n)), torch.tensor(ELEMENTS)
    return lengths.to(device, dtype), attrs.to(device, dtype), index.to(device), numbers.to(device)


def derivatives(function, x: torch.Tensor, seed: int = 0) -> list[torch.Tensor]:
    """Results, the gradient of x, and the double backward's derivatives by the cotangents and by x."""
    generator = torch.Generator().manual_seed(seed)

    def like(t):
        return torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)

    leaf = x.detach().clone().requires_grad_()
    results = [t for t in function(leaf) if t is not None]
    cotangents = [like(t).requires_grad_() for t in results]
    (gx,) = torch.autograd.grad(results, leaf, cotangents, create_graph=True)
    second = torch.autograd.grad(gx, (*cotangents, leaf), like(gx), materialize_grads=True)
    return [t.detach() for t in (*results, gx, *second)]


def ran(before) -> set[str]:
    return {op for op, which in (dispatch.calls - before) if which == "triton"}


def check_harmonics_match(n: int, lmax: int, dtype: torch.dtype, device: torch.device) -> None:
    v, before = torch.randn(n, 3, dtype=torch.float64).to(device), dispatch.calls.copy()
    got = derivatives(lambda x: (edge_harmonics(x, lmax),), v.to(dtype))
    assert ran(before) == {"edge_harmonics_fwd", "edge_harmonics_bwd", "edge_harmonics_bwd_bwd"}
    plain = plain_harmonics(lmax)
    want = derivatives(lambda x: (plain(x),), v.to(dtype).double())
    # Gradients grow with 1 / r, and so do their rounding errors: each edge is compared with its own size.
    inverse = 1 / v.norm(dim=1, keepdim=True)
    for order, (ours, exact) in enumerate(zip(got, want, strict=True)):
        size = 16 * inverse ** min(order, 2) if order != 2 else 16 * inverse
        assert ours.dtype == dtype
        assert bool(
            (
                (ours.double() - exact).abs() <= 16 * torch.finfo(dtype).eps * size * exact.abs().amax().clamp_min(1)
            ).all()
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lmax", [1, 2, 3])
def test_harmonics_are_e3nns(lmax, dtype, device):
    check_harmonics_match(150, lmax, dtype, device)


@budget(max_examples=10, deadline=None)
@given(st.integers(1, 140), st.sampled_from((1, 2, 3)), st.sampled_from(DTYPES))
def test_harmonics_of_any_size(n, lmax, dtype):
    check_harmonics_match(n, lmax, dtype, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def radial_bound(usual: torch.Tensor, dtype: torch.dtype, width: int) -> float:
    """Rounding of angles up to width pi, relative to the largest of many entries: a few may all be small by chance, as
    sums whose terms cancel, with a margin for the sums behind it."""
    return 8 * torch.finfo(dtype).eps * width * math.pi * float(usual.abs().amax().clamp_min(1e-3))


def check_radial_matches(module: blocks.RadialEmbeddingBlock, n: int, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(n)  # hypothesis wants the same numbers when it tries again
    module = copy.deepcopy(module).to(device)
    lengths, attrs, index, numbers = edges(n, device)
    ours, before = EdgeRadial(module).to(dtype), dispatch.calls.copy()
    got = derivatives(lambda r: ours(r, attrs.to(dtype), index, numbers), lengths.to(dtype))
    assert ran(before) == {"edge_radial_fwd", "edge_radial_bwd", "edge_radial_bwd_bwd"}
    exact = copy.deepcopy(module).to(dtype).double()  # the same rounded buffers
    want = derivatives(lambda r: exact(r, attrs, index, numbers), lengths.to(dtype).double())
    many, *rest = edges(90, device)
    usual = derivatives(lambda r: exact(r, *rest), many.to(dtype).double())
    for mine, theirs, scale in zip(got, want, usual, strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, dtype)
        error = (mine.double() - theirs).abs().amax()
        assert float(error) <= radial_bound(scale, dtype, mine.shape[1] if mine.shape[1] > 1 else 8)


@pytest.mark.torchscript
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(str(v) for v in s.values()))
def test_radial_features_are_maces(settings, dtype, device):
    check_radial_matches(plain_radial(**settings), 90, dtype, device)


@pytest.mark.torchscript
@pytest.mark.parametrize(
    ("width", "p", "basis"), [(10, 6, "bessel"), (1, 5, "bessel"), (17, 8, "bessel"), (128, 5, "gaussian")]
)
def test_other_widths_and_cutoffs(width, p, basis, device):
    check_radial_matches(plain_radial(width, 6.0, p, radial_type=basis), 40, torch.float64, device)


@budget(max_examples=8, deadline=None)
@given(st.integers(1, 24), st.integers(2, 9), st.integers(1, 80))
def test_radial_of_any_size(width, p, n):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_radial_matches(plain_radial(width, 5.0, p), n, torch.float64, device)


@pytest.mark.parametrize("transform", ["None", "Agnesi"])
def test_chebyshev_features_are_maces_and_have_the_gradients_it_lacks(transform, device):
    """torch cannot differentiate its Chebyshev polynomials; cos(k arccos t) and finite differences stand in."""
    plain = plain_radial(6, 5.0, radial_type="chebyshev", distance_transform=transform).to(device)
    lengths, attrs, index, numbers = edges(30, device)
    ours = EdgeRadial(plain)
    torch.testing.assert_close(ours(lengths, attrs, index, numbers)[0], plain(lengths, attrs, index, numbers)[0])

    def features(r):
        return ours(r, attrs[:, :], index[:, :4], numbers)[0]

    leaf = lengths[:4].clone().requires_grad_()
    assert torch.autograd.gradcheck(features, (leaf,))
    assert torch.autograd.gradgradcheck(features, (leaf,))


@pytest.mark.usefixtures("reference_path")
@pytest.mark.torchscript
@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[3], SETTINGS[10]], ids=["bessel", "agnesi", "soft"])
def test_formulas_on_the_cpu(settings):
    device, before = torch.device("cpu"), dispatch.calls.copy()
    module = plain_radial(**settings)
    lengths, attrs, index, numbers = edges(12, device)
    got = derivatives(lambda r: EdgeRadial(module)(r, attrs, index, numbers), lengths)
    want = derivatives(lambda r: module(r, attrs, index, numbers), lengths)
    v, plain = torch.randn(12, 3, dtype=torch.float64), plain_harmonics(3)
    got += derivatives(lambda x: (edge_harmonics(x, 3),), v)
    want += derivatives(lambda x: (plain(x),), v)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    done = {op for op, which in dispatch.calls - before if which == "reference"}
    assert done == {f"edge_{kind}_{pass_}" for kind in ("harmonics", "radial") for pass_ in ("fwd", "bwd", "bwd_bwd")}


@pytest.mark.parametrize("lmax", [1, 3])
def test_a_zero_length_edge_has_finite_values_and_no_gradient(lmax, device):
    v = torch.randn(5, 3, dtype=torch.float64, device=device)
    v[2] = 0
    results = derivatives(lambda x: (edge_harmonics(x, lmax),), v)
    assert all(bool(t.isfinite().all()) for t in results)
    assert results[0][2].tolist() == [1.0] + [0.0] * (len(results[0][2]) - 1)
    assert not results[1][2].any()
    assert not results[3][2].any()
    for settings in (SETTINGS[0], SETTINGS[3], SETTINGS[4]):
        lengths, attrs, index, numbers = edges(5, device)
        lengths[2] = 0
        ours = EdgeRadial(plain_radial(**settings).to(device))
        results = derivatives(lambda r, ours=ours: ours(r, attrs, index, numbers), lengths)  # noqa: B023
        assert all(bool(t.isfinite().all()) for t in results)
        lengths[2] = 1e-6
        limit = ours(lengths, attrs, index, numbers)[0]
        torch.testing.assert_close(results[0][2], limit[2], rtol=1e-4, atol=1e-4)
        cut = settings["apply_cutoff"]
        assert results[1 if cut else 2][2].item() == 0.0


def test_no_edges(device):
    v = torch.empty(0, 3, device=device).requires_grad_()
    assert edge_harmonics(v, 3).shape == (0, 16)
    assert torch.autograd.grad(edge_harmonics(v, 2).sum(), v)[0].shape == (0, 3)
    ours = EdgeRadial(plain_radial(distance_transform="Agnesi", apply_cutoff=False).to(device))
    lengths, attrs, index, numbers = edges(0, device)
    features, cutoff = ours(lengths.requires_grad_(), attrs, index, numbers)
    assert (features.shape, cutoff.shape) == ((0, 8), (0, 1))
    assert torch.autograd.grad(features.sum() + cutoff.sum(), lengths)[0].shape == (0, 1)


def test_strided_and_expanded_gradients(device):
    wide = torch.randn(9, 6, dtype=torch.float64, device=device)[:, ::2]
    assert torch.equal(edge_harmonics(wide, 3), edge_harmonics(wide.contiguous(), 3))
    leaf = wide.contiguous().requires_grad_()
    y = edge_harmonics(leaf, 3)
    expanded = torch.autograd.grad(y.sum(), leaf, retain_graph=True)[0]
    assert torch.equal(expanded, torch.autograd.grad(y, leaf, torch.ones_like(y))[0])


@pytest.mark.torchscript
def test_opcheck(device):
    v, g = torch.randn(7, 3, device=device), torch.randn(7, 9, device=device)
    torch.library.opcheck(ops._harmonics, (v.clone().requires_grad_(), 9))
    torch.library.opcheck(ops._harmonics_bwd, (g.requires_grad_(), v.clone().requires_grad_()))
    r = 1 + torch.rand(7, 1, device=device)
    basis, constants = (
        torch.arange(1.0, 5.0, device=device),
        torch.tensor([5.0, 5, 0.6, 0, 0, 0], device=device).double(),
    )
    rest = (r.new_empty(0), torch.empty(2, 0, dtype=torch.int64, device=device), basis, constants, "bessel", "none")
    torch.library.opcheck(ops._radial, (r.clone().requires_grad_(), *rest, False))
    g, gc = torch.randn(7, 4, device=device).requires_grad_(), torch.randn(7, 1, device=device).requires_grad_()
    torch.library.opcheck(ops._radial_bwd, (g, gc, r.clone().requires_grad_(), *rest, False))


@pytest.mark.torchscript
def test_modules_share_state_copy_pickle_and_restore(device):
    plain, harmonics = plain_radial(distance_transform="Agnesi").to(device), plain_harmonics(2)
    ours = EdgeRadial(plain)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    inputs = edges(6, device)
    want = ours(*inputs)[0]
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(*inputs)[0], want)
        with torch.no_grad():
            twin.cutoff_fn.r_max.fill_(1e-3)
        assert not twin(*inputs)[0].any(), "an old copy of the constants was used"
    back = ours.restore()
    assert type(back) is blocks.RadialEmbeddingBlock
    torch.testing.assert_close(back(*inputs)[0], want)
    v, mine = torch.randn(4, 3, device=device), EdgeHarmonics(harmonics)
    for twin in (mine, copy.deepcopy(mine), pickle.loads(pickle.dumps(mine)), mine.restore()):
        torch.testing.assert_close(twin(v), harmonics(v))
    assert type(mine.restore()) is o3.SphericalHarmonics


@pytest.mark.torchscript
def test_modules_compile_into_one_graph(device):
    ours, harmonics = (
        EdgeRadial(plain_radial(distance_transform="Agnesi").to(device)),
        EdgeHarmonics(plain_harmonics(3)),
    )
    lengths, *rest = edges(6, device)

    def both(v, r):
        return harmonics(v), ours(r, *rest)[0]

    v = torch.randn(6, 3, dtype=torch.float64, device=device).requires_grad_()
    lengths.requires_grad_()
    want, got = both(v, lengths), torch.compile(both, fullgraph=True, backend="aot_eager")(v, lengths)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)
    pairs = [torch.autograd.grad(sum(t.square().sum() for t in r), (v, lengths)) for r in (want, got)]
    for theirs, mine in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_bad_arguments_are_named(device):
    r, basis = torch.ones(4, 1, device=device), torch.ones(3, device=device)
    constants = torch.ones(6, dtype=torch.float64, device=device)
    for error, words, change in (
        (ValueError, "kind must be one of", {"kind": "fourier"}),
        (ValueError, "transform must be one of", {"transform": "log"}),
        (ValueError, "radius, edge_index: transform 'soft' needs both", {"transform": "soft"}),
        (ValueError, r"r must have shape \[E, 1\]", {"r": r[:, 0]}),
        (ValueError, "basis must have shape", {"basis": basis[:0]}),
        (TypeError, "basis must have r's dtype", {"basis": basis.double()}),
        (TypeError, "constants must be float64", {"constants": constants.float()}),
        (TypeError, "r must be float64 or float32", {"r": r.half()}),
        (ValueError, "basis is on meta", {"basis": basis.to("meta")}),
        (ValueError, "basis: this op differentiates r alone", {"basis": basis.clone().requires_grad_()}),
    ):
        arguments = {"r": r, "basis": basis, "constants": constants, "kind": "bessel"} | change
        with pytest.raises(error, match=words):
            edge_radial(**arguments)
    nodes = {"radius": basis, "edge_index": torch.zeros(2, 3, dtype=torch.int64, device=device)}
    with pytest.raises(ValueError, match=r"edge_index must have shape \[2, 4\]"):
        edge_radial(r, basis, constants, kind="bessel", transform="soft", **nodes)
    with pytest.raises(ValueError, match=r"v must have shape \[E, 3\]"):
        edge_harmonics(r, 2)
    with pytest.raises(ValueError, match=r"lmax must be 1 \.\. 3"):
        edge_harmonics(torch.ones(4, 3, device=device), 4)
    with pytest.raises(TypeError, match="v must be float64 or float32"):
        edge_harmonics(torch.ones(4, 3, device=device).half(), 2)


@pytest.mark.torchscript
def test_modules_it_cannot_stand_in_for_are_refused():
    with pytest.raises(ValueError, match="normalization='component'"):
        check_harmonics(o3.SphericalHarmonics([0, 1], normalize=True, normalization="integral"))
    with pytest.raises(ValueError, match="l must be 0 "):
        check_harmonics(o3.SphericalHarmonics([0, 2], normalize=True, normalization="component"))
    with pytest.raises(ValueError, match="l must be 0 "):
        check_harmonics(plain_harmonics(4))
    with pytest.raises(TypeError, match="SphericalHarmonics"):
        EdgeHarmonics(torch.nn.Identity())
    with pytest.raises(TypeError, match="RadialEmbeddingBlock"):
        EdgeRadial(torch.nn.Identity())
    trained = plain_radial()
    trained.bessel_fn = radial.BesselBasis(5.0, 8, trainable=True)
    with pytest.raises(ValueError, match="is trained"):
        kinds_of(trained)
    other = plain_radial()
    other.cutoff_fn = torch.nn.Identity()
    with pytest.raises(ValueError, match="cutoff Identity is not known"):
        kinds_of(other)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_kernels_compile_without_spills(target):
    cases = [*harmonics_kernels.offline_cases(target), *radial_kernels.offline_cases(target)]
    for name, stats in offline.compile_cases(cases, target).items():
        assert (stats.spills, stats.stack) == (0, 0), (name, stats)
