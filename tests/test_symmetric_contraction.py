"""The symmetric contraction: formula, kernels, custom ops and module against MACE's own and against FP64.

A sum of n products in a dtype with unit roundoff u is off by about u sqrt(n) of the sum of their absolute values; that
sum is the same formula on the absolute values of all operands. Comparisons are of norms.
"""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import mace  # noqa: F401  before e3nn
import pytest
import torch
from e3nn import o3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mace.modules.irreps_tools import reshape_irreps
from mace.modules.symmetric_contraction import SymmetricContraction as PlainContraction

from mace_triton import reference_symmetric_contraction as reference
from mace_triton.kernels import offline, tiles
from mace_triton.kernels import symmetric_contraction as kernels
from mace_triton.kernels import symmetric_contraction_source as source
from mace_triton.layout import convert_layout
from mace_triton.nn.symmetric_contraction import ReshapeIrreps, SymmetricContraction, parameters_of, problem_of
from mace_triton.ops import dispatch
from mace_triton.ops import symmetric_contraction as ops
from mace_triton.ops.species import plan_of, species_plan
from mace_triton.ops.symmetric_contraction import symmetric_contraction
from mace_triton.symmetric_contraction_problem import PACK, SymmetricContractionProblem

OUTPUTS = ("{c}x0e", "{c}x0e+{c}x1o", "{c}x0e+{c}x1o+{c}x2e", "{c}x0e+{c}x1o+{c}x2e+{c}x3o")
INPUT = "{c}x0e+{c}x1o+{c}x2e+{c}x3o"


def problem_with(
    terms: int, channels: int = 5, dim_in: int = 4, dim_out: int = 3, degree: int = 3
) -> SymmetricContractionProblem:
    """Every k-th of all possible terms, so that about `terms` of them are left."""
    degrees = range(1, degree + 1)
    monomials = [m for d in degrees for m in itertools.combinations_with_replacement(range(dim_in), d)]
    every = [(m, monomial) for monomial in monomials for m in range(dim_out)]
    return SymmetricContractionProblem(channels, dim_in, dim_out, tuple(every[:: max(1, len(every) // terms)]))


def operands(problem, species: list[int], count: int, dtype, device) -> dict[str, torch.Tensor]:
    """x, coef, the output gradient g and the cotangents a, q of gx, gcoef."""
    n, wide = len(species), ops.STORAGE[dtype]
    x, coef = (n, problem.dim_in, problem.channels), (count, problem.rows, problem.channels, PACK)
    g = (n, problem.dim_out, problem.channels)
    made = {name: torch.randn(shape, device=device).to(dtype) for name, shape in (("x", x), ("g", g), ("a", x))}
    return made | {name: torch.randn(coef, device=device).to(wide) for name in ("coef", "q")}


def plan(species: list[int], count: int, device) -> object:
    return plan_of(torch.tensor(species, dtype=torch.long, device=device), count)


def assert_close(actual: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor, length: int) -> None:
    assert torch.isfinite(actual).all()
    assert actual.shape == exact.shape
    error, unit = (actual.double() - exact).norm(), torch.finfo(actual.dtype).eps
    assert error <= 8 * unit * math.sqrt(max(length, 1)) * magnitude.norm()


def wanted(problem, data: dict[str, torch.Tensor], species: torch.Tensor, with_q: bool = True) -> list[torch.Tensor]:
    """By the formulas, in the operands' dtype: out; gx, gcoef; dg, dx, dcoef."""
    x, coef, g, a, q = (data[key] for key in ("x", "coef", "g", "a", "q"))
    return [
        reference.symmetric_contraction_fwd(problem, x, coef, species),
        *reference.symmetric_contraction_bwd(problem, g, x, coef, species),
        *reference.symmetric_contraction_bwd_bwd(problem, g, x, coef, a, q if with_q else None, species),
    ]


SPECIES = {
    "some absent": ([3, 0, 0, 3, 1, 0, 3], 5),
    "one": ([0] * 20, 1),
    "two tiles": ([0, 1, 1] * 15, 2),
    "no node": ([], 3),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SPECIES)
def test_kernels_match_fp64(name, dtype, device):
    problem, (species, count) = problem_with(40), SPECIES[name]
    data = operands(problem, species, count, dtype, device)
    graph = plan(species, count, device)
    exact = {key: tensor.double() for key, tensor in data.items()}
    x, coef = (data[key].requires_grad_() for key in ("x", "coef"))
    dispatch.calls.clear()
    out = symmetric_contraction(problem, x, coef, graph)
    g = data["g"].requires_grad_()
    gx, gcoef = torch.autograd.grad(out, (x, coef), g, create_graph=True)
    second = torch.autograd.grad((gx, gcoef), (g, x, coef), (data["a"], data["q"]))
    called = {op for op, which in dispatch.calls if which == "triton"}
    assert called == {f"symmetric_contraction_{word}" for word in ("fwd", "bwd", "bwd_bwd")}
    terms, widest = len(problem.terms), max(species.count(z) for z in range(count))
    results = (t.detach() for t in (out, gx, gcoef, *second))
    sizes = wanted(problem, {key: tensor.abs() for key, tensor in exact.items()}, graph.species)
    lengths = (terms, terms, widest, *(3 * terms,) * 3)
    for got, want, size, n in zip(results, wanted(problem, exact, graph.species), sizes, lengths, strict=True):
        assert_close(got, want, size, n)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    channels=st.sampled_from([1, 3, 17, 32, 40]),
    dim_in=st.integers(1, 5),
    dim_out=st.integers(1, 4),
    degree=st.integers(1, 4),
    terms=st.integers(1, 60),
    nodes=st.integers(1, 6),
    budget=st.sampled_from([1, 7, 96]),
)
def test_any_polynomial(channels, dim_in, dim_out, degree, terms, nodes, budget, device):
    problem = problem_with(terms, channels, dim_in, dim_out, degree)
    assert SymmetricContractionProblem.from_key(problem.key) == problem
    species = [i * i % 3 for i in range(nodes)]
    data, graph = operands(problem, species, 3, torch.float64, device), plan(species, 3, device)
    x, coef, g, a = (data[key] for key in ("x", "coef", "g", "a"))
    direct = torch.zeros_like(g)
    for number, (m, monomial) in enumerate(problem.terms):
        product = torch.stack([x[:, i] for i in monomial]).prod(dim=0)
        direct[:, m] += coef[species, number // PACK, :, number % PACK] * product
    exact = wanted(problem, data, graph.species, with_q=False)
    sizes = wanted(problem, {key: tensor.abs() for key, tensor in data.items()}, graph.species, with_q=False)
    assert_close(exact[0], direct, sizes[0], terms)
    tile = tiles.Tile.of(num_warps=1, BLOCK_C=32, TERMS=budget, PARTS=64)
    with tiles.forced("symmetric_contraction_coef", tile):
        results = [
            kernels.forward(problem, x, coef, graph),
            kernels.grad_x(problem, g, x, coef, graph),
            kernels.grad_coef(problem, g, x, graph, torch.float64),
            kernels.forward(problem, x, coef, graph, a),
            kernels.grad_x(problem, g, x, coef, graph, a),
            kernels.grad_coef(problem, g, x, graph, torch.float64, a),
        ]
    for got, want, size in zip(results, exact, sizes, strict=True):
        assert_close(got, want, size, terms * degree + nodes)


def test_every_part_holds_whole_groups_within_its_budget():
    problem = problem_with(200)
    for budget in (1, 20, 1000):
        parts = source.parts(problem, budget)
        assert [number for part in parts for number in range(*part)] == list(range(len(problem.groups)))
        sizes = [[sum(len(r.entries) for r in g.rows) for g in problem.groups[slice(*part)]] for part in parts]
        assert all(sum(size) <= budget or len(size) == 1 for size in sizes)


@pytest.mark.parametrize("path", ["kernels", "reference"])
def test_gradcheck(path, device, request):
    if path == "reference":
        request.getfixturevalue("reference_path")
        device = torch.device("cpu")
    problem, species = problem_with(12, channels=2, dim_in=3, dim_out=2), [1, 0, 1]
    data, graph = operands(problem, species, 2, torch.float64, device), plan(species, 2, device)
    inputs = (data["x"].requires_grad_(), data["coef"].requires_grad_())

    def apply(x, coef):
        return symmetric_contraction(problem, x, coef, graph)

    assert torch.autograd.gradcheck(apply, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(apply, inputs, fast_mode=True)


def test_force_training_makes_no_tangent_of_the_coefficients(device, monkeypatch):
    problem, species = problem_with(30), [1, 0, 1]
    data, graph = operands(problem, species, 2, torch.float64, device), plan(species, 2, device)
    tangents, run = [], kernels.grad_x
    monkeypatch.setattr(kernels, "grad_x", lambda *args: tangents.append(args[5:]) or run(*args))
    x, coef = data["x"].requires_grad_(), data["coef"].requires_grad_()
    energy = symmetric_contraction(problem, x, coef, graph).square().sum()
    (force,) = torch.autograd.grad(energy, x, create_graph=True)
    torch.autograd.grad(force.square().sum(), coef)
    assert [q for a, q in (pair for pair in tangents if pair)] == [None]


def test_opcheck(device):
    problem, species = problem_with(12), [1, 0, 1]
    data, graph = operands(problem, species, 2, torch.float32, device), plan(species, 2, device)
    x, coef, g = (data[key].requires_grad_() for key in ("x", "coef", "g"))
    torch.library.opcheck(ops._fwd, (x, coef, *graph, problem.key))
    torch.library.opcheck(ops._bwd, (g, x, coef, *graph, problem.key, True, True))
    torch.library.opcheck(ops._bwd, (g, x, coef, *graph, problem.key, True, False))


def test_strided_and_expanded_operands(device):
    problem, species = problem_with(30), [1, 0, 1, 1]
    data, graph = operands(problem, species, 2, torch.float32, device), plan(species, 2, device)
    x, coef = data["x"].transpose(1, 2).contiguous().transpose(1, 2), data["coef"]
    dense = symmetric_contraction(problem, data["x"], coef, graph)
    leaf = x.requires_grad_()
    out = symmetric_contraction(problem, leaf, coef, graph)
    assert torch.equal(out, dense)
    expanded = torch.autograd.grad(out.sum(), leaf, retain_graph=True)[0]
    assert torch.equal(expanded, torch.autograd.grad(out, leaf, torch.ones_like(out))[0])


def test_the_same_bits_every_run(device):
    problem, species = problem_with(60), [0, 1, 2] * 20
    data, graph = operands(problem, species, 3, torch.float32, device), plan(species, 3, device)
    runs = [kernels.grad_coef(problem, data["g"], data["x"], graph, torch.float32) for _ in range(2)]
    assert torch.equal(*runs)


# ------------------------------------------------------------------------------------------------------- the module


@pytest.fixture(
    params=[(o, k, r) for o in OUTPUTS[:3] for k in (1, 2, 3) for r in (False, True)] + [(OUTPUTS[3], 2, True)]
)
def plain(request) -> PlainContraction:
    """MACE's modules, FP64, four species."""
    return build(*request.param)


def build(outputs: str, correlation: int, reduced: bool, channels: int = 3, elements: int = 4) -> PlainContraction:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        irreps = (text.format(c=channels) for text in (INPUT, outputs))
        return PlainContraction(*irreps, correlation, num_elements=elements, use_reduced_cg=reduced)
    finally:
        torch.set_default_dtype(before)


def features(nodes: int = 6, channels: int = 3, elements: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(nodes, channels, 16, dtype=torch.float64, requires_grad=True)
    return x, torch.nn.functional.one_hot(torch.arange(nodes) ** 2 % elements, elements).double()


def test_module_is_mace_in_fp64(plain, reference_path):
    ours, (x, y) = SymmetricContraction(plain, "ir_mul"), features()
    want = plain(x, y)
    dispatch.calls.clear()
    got = convert_layout(ours(x, y), plain.irreps_out, "ir_mul", "mul_ir")
    assert dispatch.calls["symmetric_contraction_fwd", "reference"] == 1
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12 * float(want.abs().max()))
    weights = [w for w in parameters_of(plain) if w.requires_grad]
    g = torch.randn_like(want)
    pairs = zip(*(torch.autograd.grad(out, (x, *weights), g, create_graph=True) for out in (got, want)), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11 * float(want.abs().max()))


def test_numbers_of_terms_are_those_of_the_design():
    """94, 410 and 887: what is left of 28, 86 and 159 paths once products of features commute."""
    counts = [len(problem_of(build(outputs, 3, False))[0].terms) for outputs in OUTPUTS[:3]]
    assert counts == [94, 410, 887]
    assert [len(problem_of(build(outputs, 3, True))[0].terms) for outputs in OUTPUTS[:3]] == counts


def test_module_stays_maces_class():
    before = build(OUTPUTS[1], 2, True)
    ours, (x, y) = SymmetricContraction(before), features()
    assert isinstance(ours, PlainContraction)
    assert ours.state_dict().keys() == before.state_dict().keys()
    want = before(x, y)
    for other in (ours, pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours), ours.restore()):
        torch.testing.assert_close(other(x, y), want)
    assert type(ours.restore()) is PlainContraction
    assert ours.restore().state_dict().keys() == before.state_dict().keys()
    assert ours.float()(x.float(), y.float()).dtype == torch.float32


def test_attributes_that_are_not_one_hot_go_maces_way():
    before = build(OUTPUTS[1], 2, True)
    ours, (x, y) = SymmetricContraction(before), features()
    for attrs in (0.5 * y, y + torch.roll(y, 1, 1), torch.zeros_like(y)):
        dispatch.calls.clear()
        torch.testing.assert_close(ours(x, attrs), before(x, attrs))
        assert not dispatch.calls
    y[0] *= 3  # the same tensor, changed in place after it had been looked at
    torch.testing.assert_close(ours(x, y), before(x, y))


def test_agnostic_weights_do_not_ask_for_the_species():
    before = build(OUTPUTS[1], 2, True, elements=1)
    ours, (x, _) = SymmetricContraction(before, agnostic=True), features()
    torch.testing.assert_close(ours(x, torch.ones(6, 1, dtype=torch.float64)), before(x, torch.ones(6, 1).double()))


def test_coefficients_are_made_once_per_version(monkeypatch):
    ours, made = SymmetricContraction(build(OUTPUTS[0], 2, True)).requires_grad_(False), []
    combine = ours._combine
    monkeypatch.setattr(ours, "_combine", lambda *args: made.append(1) or combine(*args))
    first = ours.coefficients()
    assert ours.coefficients() is first
    with torch.no_grad():
        parameters_of(ours)[0].add_(1.0)
    assert not torch.equal(ours.coefficients(), first)
    assert len(made) == 2
    ours.requires_grad_(True)
    assert ours.coefficients().requires_grad


def test_module_compiles_into_one_graph(reference_path):
    ours, (x, y) = SymmetricContraction(build(OUTPUTS[1], 2, True)), features()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), ours(x, y))


def test_reshape_is_a_view():
    irreps = o3.Irreps(INPUT.format(c=3))
    theirs = reshape_irreps(irreps)
    ours, x = ReshapeIrreps(theirs), torch.randn(4, irreps.dim)
    ir_mul = convert_layout(x, irreps, "mul_ir", "ir_mul")
    assert torch.equal(ours(ir_mul), theirs(x))
    assert ours(ir_mul).data_ptr() == ir_mul.data_ptr()
    assert torch.equal(ours.restore()(x), theirs(x))
    with pytest.raises(ValueError, match="reshape: 3x0e"):
        ReshapeIrreps(reshape_irreps(o3.Irreps("3x0e+2x1o")))


# ------------------------------------------------------------------------------------------------ species, bad input


def test_species_plan_sorts_and_remembers():
    y = torch.nn.functional.one_hot(torch.tensor([3, 0, 3, 1]), 5).float()
    found = species_plan(y)
    assert found.species.tolist() == [3, 0, 3, 1]
    assert found.perm.tolist() == [1, 3, 0, 2]
    assert found.ptr.tolist() == [0, 1, 2, 2, 4, 4]
    assert species_plan(y) is found
    y[0] = torch.tensor([1.0, 0, 0, 0, 0])
    assert species_plan(y).species.tolist() == [0, 0, 3, 1]
    assert species_plan(2 * y) is None
    assert species_plan(torch.zeros(0, 3)).ptr.tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="node_attrs must have shape"):
        species_plan(torch.zeros(4))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(3, 5, 4)}, ValueError, "x must have shape"),
        ({"coef": torch.zeros(2, 1, 5, 4)}, ValueError, "coef must have shape"),
        ({"plan": plan_of(torch.tensor([0, 1]), 2)}, ValueError, "plan: it was made for 2 nodes"),
        ({"x": torch.zeros(3, 4, 5, dtype=torch.int32)}, TypeError, "x must be float64"),
        ({"x": torch.zeros(3, 4, 5, dtype=torch.float64)}, TypeError, "coef must be torch.float64"),
        ({"x": torch.zeros(3, 4, 5, device="meta")}, ValueError, "coef is on cpu"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    problem, cpu = problem_with(12), torch.device("cpu")
    data = operands(problem, [1, 0, 1], 2, torch.float32, cpu)
    arguments = {"x": data["x"], "coef": data["coef"], "plan": plan([1, 0, 1], 2, cpu)} | change
    with pytest.raises(error, match=words):
        symmetric_contraction(problem, **arguments)


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        (((2, (0,)),), "output component 2"),
        (((0, (1, 0)),), "must be sorted"),
        (((0, (0, 4)),), "within 0 .. 3"),
        (((0, ()),), "between 1 and 4"),
        (((0, (0, 0, 0, 0, 0)),), "between 1 and 4"),
        (((0, (0,)), (0, (0,))), "twice"),
    ],
)
def test_bad_problems_are_named(terms, words):
    with pytest.raises(ValueError, match=words):
        SymmetricContractionProblem(3, 4, 2, terms)
    with pytest.raises(ValueError, match="channels"):
        SymmetricContractionProblem(0, 4, 2, ())


def test_modules_it_cannot_stand_in_for_are_refused():
    with pytest.raises(TypeError, match="must be MACE's SymmetricContraction"):
        SymmetricContraction(torch.nn.Linear(2, 2))
    mixed = build(OUTPUTS[0], 1, True)
    mixed.irreps_in = type(mixed.irreps_in)("3x0e+2x1o")
    with pytest.raises(ValueError, match="one multiplicity everywhere"):
        SymmetricContraction(mixed)


# ---------------------------------------------------------------------------------------------------- without a GPU


@pytest.mark.parametrize(("outputs", "target"), [(0, "sm_80"), (0, "sm_90"), (0, "gfx942"), (1, "sm_90")])
def test_kernels_compile_without_spills(outputs, target):
    problem, _ = problem_of(build(OUTPUTS[outputs], 3, True, channels=128, elements=1))
    cases = kernels.offline_cases(problem, target, ("fp32",))
    for name, stats in offline.compile_cases(cases, target).items():
        assert (stats.spills, stats.stack, stats.shared) == (0, 0, 0), (name, stats)
