"""The linear map with weights of each species: kernels and formulas against e3nn and against FP64.

Bounds as in test_linear.py: (2u + K v) sum |x||W| for a sum of K products of operands rounded with relative error u,
added with unit roundoff v.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from e3nn import o3
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mace_triton import reference_linear as reference
from mace_triton.kernels import offline, tiles
from mace_triton.kernels import species_linear as kernels
from mace_triton.layout import convert_layout
from mace_triton.linear_problem import LinearProblem
from mace_triton.nn.species_linear import SpeciesLinear, problem_of
from mace_triton.ops import dispatch
from mace_triton.ops import species_linear as ops
from mace_triton.ops.linear import lowp_weight
from mace_triton.ops.species import plan_of
from mace_triton.ops.species_linear import species_linear

MODES = ["fp64", "ieee", "tf32x3", "tf32", "bf16", "fp16"]
OPERAND_ERROR = {"fp64": 2**-53, "ieee": 2**-24, "tf32x3": 2**-20, "tf32": 2**-11, "bf16": 2**-7, "fp16": 2**-11}
CASES = {
    "skip": {"irreps_in": "32x0e+32x1o", "irreps_out": "32x0e+32x1o"},
    "last": {"irreps_in": "17x0e+17x1o+17x2e", "irreps_out": "17x0e"},
    "first": {"irreps_in": "96x0e", "irreps_out": "96x0e+96x1o"},  # a slot that nothing feeds
    "slots": {"irreps_in": "5x0e+3x1o+9x0e", "irreps_out": "4x0e+6x1o+2x0e"},
}
SPECIES = {"some": [2, 0, 2, 2, 4, 0, 2, 2, 2, 4, 2], "one": [3] * 9, "each": [4, 3, 2, 1, 0], "none": []}
COUNT = 5
OPS = {"species_linear_fwd", "species_linear_grad_x", "species_linear_grad_w"}


def case(name: str, layout_in: str = "mul_ir", layout_out: str = "mul_ir") -> LinearProblem:
    return LinearProblem(**CASES[name], layout_in=layout_in, layout_out=layout_out)


def plan(species: list[int], device: torch.device, count: int = COUNT):
    return plan_of(torch.tensor(species, dtype=torch.long, device=device), count)


def inputs(problem: LinearProblem, nodes: int, mode: str, device: torch.device, count: int = COUNT):
    """x and weight, which require gradients."""
    dtype = torch.float64 if mode == "fp64" else torch.float32
    shapes = ((nodes, problem.dim_in), (count, problem.weight_numel))
    return tuple(torch.randn(shape, dtype=dtype, device=device).requires_grad_() for shape in shapes)


def check_against_fp64(problem: LinearProblem, mode: str, species: list[int], device: torch.device, count=COUNT):
    """Output and both gradients of the op, run by the kernels, against the formula in FP64."""
    scale, where = 0.3, plan(species, device, count)
    x, weight = inputs(problem, len(species), mode, device, count)
    before = dispatch.calls.copy()
    out = species_linear(problem, x, weight, where, mode=mode, scale=scale)
    grad = torch.randn_like(out)
    gx, gw = torch.autograd.grad(out, (x, weight), grad)
    ran = dispatch.calls - before
    assert {op for (op, which) in ran if which == "triton"} == OPS
    length = {"out": problem.dim_in, "gx": problem.dim_out, "gw": 7 * len(species)}
    rest = (where.species, "fp64", scale)

    def exact(x, weight, grad):
        return {
            "out": reference.species_linear(problem, x, weight, *rest),
            "gx": reference.species_linear_grad_x(problem, grad, weight, *rest),
            "gw": reference.species_linear_grad_w(problem, x, grad, where.species, count, "fp64", scale),
        }

    exact_in = [t.detach().double() for t in (x, weight, grad)]
    want, magnitude = exact(*exact_in), exact(*(t.abs() for t in exact_in))
    unit = torch.finfo(x.dtype).eps
    for name, got in {"out": out, "gx": gx, "gw": gw}.items():
        bound = (2 * OPERAND_ERROR[mode] + (length[name] + 4) * unit) * magnitude[name]
        excess = (got.double() - want[name]).abs() - bound
        assert bool((excess <= 0).all()), f"{name}: above the bound by up to {excess.max():.2e}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_kernels_match_fp64(name, mode, device):
    check_against_fp64(case(name), mode, SPECIES["some"], device)


@pytest.mark.parametrize("species", SPECIES)
@pytest.mark.parametrize("layouts", [("mul_ir", "ir_mul"), ("ir_mul", "mul_ir"), ("ir_mul", "ir_mul")])
def test_kernels_take_both_layouts_and_any_species(layouts, species, device):
    if species == "none":  # nothing is launched, so only shapes can be seen
        problem, where = case("slots", *layouts), plan([], device)
        x, weight = inputs(problem, 0, "ieee", device)
        out = species_linear(problem, x, weight, where, mode="ieee")
        gx, gw = torch.autograd.grad(out.sum(), (x, weight))
        assert (out.shape, gx.shape) == ((0, problem.dim_out), x.shape)
        assert not gw.any()
        return
    check_against_fp64(case("slots", *layouts), "ieee", SPECIES[species], device)


@pytest.mark.parametrize(
    "tile",
    [
        tiles.Tile.of(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, LANES=8),
        tiles.Tile.of(BLOCK_M=64, BLOCK_N=32, BLOCK_K=32, LANES=16),
    ],
)
def test_every_tile_gives_the_same_map(tile, device):
    with tiles.forced("species_linear_fwd", tile):
        check_against_fp64(case("skip"), "ieee", SPECIES["some"] * 4, device)


@settings(max_examples=10, deadline=None)
@given(
    muls=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    count=st.integers(1, 9),
    numbers=st.lists(st.integers(0, 8), min_size=1, max_size=30),
)
def test_random_problems(muls, count, numbers):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problem = LinearProblem(f"{muls[0]}x0e+{muls[0]}x1o", f"{muls[1]}x1o+{muls[1]}x0e")
    check_against_fp64(problem, "ieee", [n % count for n in numbers], device, count)


def skip_tp(name: str = "skip", species: int = COUNT) -> o3.FullyConnectedTensorProduct:
    return o3.FullyConnectedTensorProduct(CASES[name]["irreps_in"], f"{species}x0e", CASES[name]["irreps_out"])


@pytest.mark.torchscript
@pytest.mark.parametrize("name", CASES)
def test_module_is_e3nn_in_fp64(name, device):
    """Output and gradients up to the second order, as force training needs them."""
    plain = skip_tp(name).double().to(device)
    ours = SpeciesLinear(plain, "fp64")
    x = torch.randn(11, plain.irreps_in1.dim, dtype=torch.float64, device=device).requires_grad_()
    y = torch.nn.functional.one_hot(torch.tensor(SPECIES["some"], device=device), COUNT).double()
    results = []
    for module in (plain, ours):
        out = module(x, y)
        gx, gw = torch.autograd.grad(out.pow(3).sum(), (x, module.weight), create_graph=True)
        results.append((out, gx, gw, *torch.autograd.grad(gx.pow(2).sum(), (x, module.weight))))
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.torchscript
def test_attributes_that_are_not_one_hot_go_the_way_of_e3nn(device):
    plain = skip_tp().to(device)
    ours = SpeciesLinear(plain, "ieee", "ir_mul", "ir_mul")
    x, y = torch.randn(4, plain.irreps_in1.dim, device=device), torch.rand(4, COUNT, device=device)
    before = dispatch.calls.copy()
    got = ours(convert_layout(x, ours.problem.irreps_in, "mul_ir", "ir_mul"), y)
    got = convert_layout(got, ours.problem.irreps_out, "ir_mul", "mul_ir")
    torch.testing.assert_close(got, plain(x, y))
    assert not dispatch.calls - before


@pytest.mark.torchscript
def test_module_shares_state_copies_pickles_and_restores(device):
    plain = skip_tp().to(device)
    ours = SpeciesLinear(plain, "bf16")
    assert ours.weight is plain.weight
    assert ours.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(3, plain.irreps_in1.dim, device=device)
    y = torch.eye(COUNT, device=device)[:3]
    with torch.no_grad():
        want = ours(x, y)
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(twin(x, y), want)
            twin.weight.zero_()
            assert not twin(x, y).any(), "an old copy of the weights was used"
        assert torch.equal(ours(x, y), want)
    back = ours.restore()
    assert type(back) is o3.FullyConnectedTensorProduct
    assert back.weight is plain.weight
    assert torch.equal(back(x, y), plain(x, y))
    double = copy.deepcopy(ours).double()
    assert double.run_mode == "fp64"
    torch.testing.assert_close(double(x.double(), y.double()), plain(x, y).double(), rtol=1e-5, atol=1e-5)


@pytest.mark.torchscript
def test_module_compiles_into_one_graph(device):
    ours = SpeciesLinear(skip_tp().to(device), "ieee")
    x, y = torch.randn(5, ours.problem.dim_in, device=device), torch.eye(COUNT, device=device)
    want = ours(x, y)
    out = torch.compile(ours, fullgraph=True, backend="aot_eager")(x, y)
    torch.testing.assert_close(out, want)
    got = torch.autograd.grad(out.square().sum(), ours.weight)[0]
    torch.testing.assert_close(got, torch.autograd.grad(want.square().sum(), ours.weight)[0])


def test_gradcheck_through_the_kernels(device):
    problem, where = LinearProblem("3x0e+2x1o+2x0e", "2x1o+3x0e"), plan([1, 0, 1], device, 3)
    x, weight = inputs(problem, 3, "fp64", device, 3)

    def apply(x, weight):
        return species_linear(problem, x, weight, where, mode="fp64", scale=0.7)

    assert torch.autograd.gradcheck(apply, (x, weight), fast_mode=True)
    assert torch.autograd.gradgradcheck(apply, (x, weight), fast_mode=True)


@pytest.mark.usefixtures("reference_path")
def test_gradcheck_on_the_cpu():
    problem, where = case("slots"), plan([1, 0, 1], torch.device("cpu"), 3)
    x, weight = inputs(problem, 3, "fp64", torch.device("cpu"), 3)
    before = dispatch.calls["species_linear_fwd", "reference"]

    def apply(x, weight):
        return species_linear(problem, x, weight, where, mode="fp64")

    assert torch.autograd.gradcheck(apply, (x, weight), fast_mode=True)
    assert torch.autograd.gradgradcheck(apply, (x, weight), fast_mode=True)
    assert dispatch.calls["species_linear_fwd", "reference"] > before


def test_opcheck(device):
    problem, where = case("slots"), plan([1, 0, 1], device, 3)
    x, weight = inputs(problem, 3, "ieee", device, 3)
    grad = torch.randn(3, problem.dim_out, device=device, requires_grad=True)
    rest = (*where, problem.key, "ieee", 0.5)
    torch.library.opcheck(ops._linear, (x, weight, None, *rest))
    torch.library.opcheck(ops._grad_x, (grad, weight, None, *rest))
    torch.library.opcheck(ops._grad_w, (x, grad, *rest))


def test_summed_and_sliced_gradients(device):
    problem, where = case("skip"), plan([1, 0, 1, 1], device, 3)
    x, weight = inputs(problem, 4, "ieee", device, 3)
    out = species_linear(problem, x, weight, where, mode="ieee")
    expanded = torch.autograd.grad(out.sum(), (x, weight), retain_graph=True)
    dense = torch.autograd.grad(out, (x, weight), torch.ones_like(out))
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))
    wide = torch.randn(4, 2 * problem.dim_in, device=device)[:, ::2]
    strided = species_linear(problem, wide, weight, where, mode="ieee")
    assert torch.equal(strided, species_linear(problem, wide.contiguous(), weight, where, mode="ieee"))


def test_weight_gradient_has_the_same_bits_every_run(device):
    problem = case("skip")
    where = plan([n % 3 for n in range(70)], device)
    x, grad = (torch.randn(70, width, device=device) for width in (problem.dim_in, problem.dim_out))
    first, second = (kernels.grad_w(problem, x, grad, where, "ieee", 1.0) for _ in range(2))
    assert torch.equal(first, second)
    assert first[:3].any(dim=1).all()
    assert not first[3:].any(), "species that do not occur"


@settings(max_examples=8, deadline=None)
@given(sizes=st.lists(st.integers(0, 70), min_size=1, max_size=9), parts=st.integers(1, 8))
@example(sizes=[n % 4 for n in range(89)], parts=64)
@example(sizes=[0, 0, 200, 0], parts=5)
@example(sizes=[16, 32, 0, 48, 0], parts=8)
@example(sizes=[1], parts=1)
def test_tiles_hold_every_node_once_and_keep_species_apart(sizes, parts):
    """Sums in FP64 of as many rows as each species has, whatever tiles they are cut into."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problem = LinearProblem("3x0e+2x1o", "2x0e+3x1o")
    species = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    nodes = len(species)
    where = plan(species[torch.randperm(nodes)].tolist(), device, len(sizes))
    x, grad = (torch.randn(nodes, n, dtype=torch.float64, device=device) for n in (problem.dim_in, problem.dim_out))
    with tiles.forced("species_linear_wgrad", tiles.Tile.of(BLOCK_R=16, BLOCK_U=16, BLOCK_W=16, LANES=4, PARTS=parts)):
        got = kernels.grad_w(problem, x, grad, where, "fp64", 0.3)
    want = reference.species_linear_grad_w(problem, x, grad, where.species, len(sizes), "fp64", 0.3)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert not got[where.ptr.diff() == 0].any(), "species that do not occur"


def test_bad_arguments_are_named(device):
    problem, where = case("skip"), plan([1, 0, 1], device, 3)
    x, weight = (t.detach() for t in inputs(problem, 3, "ieee", device, 3))
    with pytest.raises(ValueError, match="mode must be one of"):
        species_linear(problem, x, weight, where, mode="fp8")
    with pytest.raises(TypeError, match=r"x must be torch\.float64"):
        species_linear(problem, x, weight, where, mode="fp64")
    with pytest.raises(ValueError, match=r"x must have shape \[N, 128\]"):
        species_linear(problem, x[:, 1:], weight, where, mode="ieee")
    with pytest.raises(ValueError, match=r"weight must have shape \[3, 2048\]"):
        species_linear(problem, x, weight[:2], where, mode="ieee")
    with pytest.raises(TypeError, match="weight must have x's dtype"):
        species_linear(problem, x, weight.half(), where, mode="fp16")
    with pytest.raises(ValueError, match="it was made for 3 nodes, but x has 2"):
        species_linear(problem, x[:2], weight, where, mode="ieee")
    with pytest.raises(ValueError, match="weight is on meta"):
        species_linear(problem, x, weight.to("meta"), where, mode="ieee")
    with pytest.raises(ValueError, match="weight_lowp"):
        species_linear(problem, x, weight, where, mode="bf16", weight_lowp=lowp_weight(weight, "fp16"))
    biased = LinearProblem("3x0e", "2x0e", biases=(True,))
    with pytest.raises(ValueError, match="no biases"):
        species_linear(biased, x, weight, where, mode="ieee")


@pytest.mark.torchscript
def test_modules_it_cannot_stand_in_for_are_refused():
    with pytest.raises(ValueError, match="weights must be its own"):
        problem_of(o3.FullyConnectedTensorProduct("3x0e", "2x0e", "3x0e", internal_weights=False, shared_weights=False))
    with pytest.raises(ValueError, match="must be one-hot species"):
        problem_of(o3.FullyConnectedTensorProduct("3x0e", "2x1o", "3x1o"))
    with pytest.raises(ValueError, match="path weight"):
        problem_of(o3.FullyConnectedTensorProduct("3x0e", "2x0e", "3x0e", in1_var=[2.0]))
    with pytest.raises(TypeError, match=r"must be an e3nn\.o3\.FullyConnectedTensorProduct"):
        SpeciesLinear(o3.Linear("3x0e", "2x0e"), "ieee")


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_kernels_compile_without_spills(target):
    for name, stats in offline.compile_cases(kernels.offline_cases(target), target).items():
        assert (stats.spills, stats.stack) == (0, 0), (name, stats)
