"""The symmetric contraction: formula, kernels, custom ops and module against MACE's own and against FP64.

A sum of n products in a dtype with unit roundoff u is off by about u sqrt(n) of the sum of their absolute values; that
sum is the same formula on the absolute values of all operands. Comparisons are of norms.
"""

from __future__ import annotations

import itertools
import math
import random
from contextlib import ExitStack

import mace  # noqa: F401  before e3nn
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mace_triton import reference_symmetric_contraction as reference
from mace_triton.dev_cases import contraction_problem
from mace_triton.kernels import offline, tiles
from mace_triton.kernels import symmetric_contraction as kernels
from mace_triton.kernels import symmetric_contraction_source as source
from mace_triton.ops import dispatch
from mace_triton.ops import symmetric_contraction as ops
from mace_triton.ops.species import plan_of, species_plan
from mace_triton.ops.symmetric_contraction import combine, symmetric_contraction
from mace_triton.symmetric_contraction_problem import PACK, SymmetricContractionProblem


def problem_with(
    terms: int, channels: int = 5, dim_in: int = 4, dim_out: int = 3, degree: int = 3, paths: int | None = 7
) -> SymmetricContractionProblem:
    """Every k-th of all possible terms, so that about `terms` of them are left; up to 3 paths each, or their own."""
    degrees = range(1, degree + 1)
    monomials = [m for d in degrees for m in itertools.combinations_with_replacement(range(dim_in), d)]
    every = [(m, monomial) for monomial in monomials for m in range(dim_out)]
    kept, rng = tuple(every[:: max(1, len(every) // terms)]), random.Random(0)
    if paths is None:
        return SymmetricContractionProblem(channels, dim_in, dim_out, kept)
    rows = (rng.sample(range(paths), rng.randint(1, min(3, paths))) for _ in kept)
    table = tuple(tuple((k, rng.uniform(-1.0, 1.0)) for k in sorted(row)) for row in rows)
    return SymmetricContractionProblem(channels, dim_in, dim_out, kept, paths, table)


def operands(problem, species: list[int], count: int, dtype, device) -> dict[str, torch.Tensor]:
    """x, the weights w, the output gradient g and the cotangents a, q of gx, gw."""
    n, wide = len(species), ops.STORAGE[dtype]
    x, w = (n, problem.dim_in, problem.channels), (count, problem.paths, problem.channels)
    g = (n, problem.dim_out, problem.channels)
    made = {name: torch.randn(shape, device=device).to(dtype) for name, shape in (("x", x), ("g", g), ("a", x))}
    return made | {name: torch.randn(w, device=device).to(wide) for name in ("w", "q")}


def plan(species: list[int], count: int, device) -> object:
    return plan_of(torch.tensor(species, dtype=torch.long, device=device), count)


def assert_close(actual: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor, length: int) -> None:
    assert torch.isfinite(actual).all()
    assert actual.shape == exact.shape
    error, unit = (actual.double() - exact).norm(), torch.finfo(actual.dtype).eps
    assert error <= 8 * unit * math.sqrt(max(length, 1)) * magnitude.norm()


def wanted(problem, data: dict[str, torch.Tensor], species: torch.Tensor, with_q: bool = True) -> list[torch.Tensor]:
    """By the formulas, in the operands' dtype: out; gx, gw; dg, dx, dw."""
    x, w, g, a, q = (data[key] for key in ("x", "w", "g", "a", "q"))
    coef = reference.combine(problem, w)
    return [
        reference.symmetric_contraction_fwd(problem, x, coef, species),
        *reference.symmetric_contraction_bwd(problem, g, x, coef, species),
        *reference.symmetric_contraction_bwd_bwd(problem, g, x, coef, a, q if with_q else None, species),
    ]


def test_formula_has_exact_second_derivatives_where_a_component_is_small():
    """Those of autograd through the formula, which `dev parity` compares with, are those that are written out."""
    problem = problem_with(3)
    data = operands(problem, [0, 1], 2, torch.float64, "cpu")
    data["x"][:, ::2] *= 1e-8
    x, w, g = (data[key].requires_grad_() for key in ("x", "w", "g"))
    species = torch.tensor([0, 1])
    out = reference.symmetric_contraction_fwd(problem, x, reference.combine(problem, w), species)
    first = torch.autograd.grad(out, (x, w), g, create_graph=True)
    second = torch.autograd.grad(first, (g, x, w), (data["a"], data["q"]))
    with torch.no_grad():
        exact = wanted(problem, data, species)
    for got, want in zip((out, *first, *second), exact, strict=True):
        assert (got - want).norm() <= 100 * torch.finfo(want.dtype).eps * want.norm()


SPECIES = {
    "some absent": ([3, 0, 0, 3, 1, 0, 3], 5),
    "one": ([0] * 20, 1),
    "two tiles": ([0, 1, 1] * 15, 2),
    "no node": ([], 3),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SPECIES)
def test_kernels_match_fp64(name, dtype, device):
    species, count = SPECIES[name]
    problem = problem_with(12 if len(species) > 40 else 40)  # the interpreter takes a term and a node at a time
    data = operands(problem, species, count, dtype, device)
    graph = plan(species, count, device)
    exact = {key: tensor.double() for key, tensor in data.items()}
    x, w = (data[key].requires_grad_() for key in ("x", "w"))
    dispatch.calls.clear()
    out = symmetric_contraction(problem, x, w, graph)
    g = data["g"].requires_grad_()
    gx, gw = torch.autograd.grad(out, (x, w), g, create_graph=True)
    second = torch.autograd.grad((gx, gw), (g, x, w), (data["a"], data["q"]))
    called = {op for op, which in dispatch.calls if which == "triton"}
    assert called == {f"symmetric_contraction_{word}" for word in ("combine", "fwd", "bwd", "bwd_bwd")}
    results = (t.detach() for t in (out, gx, gw, *second))
    sizes = wanted(absolute(problem), {key: tensor.abs() for key, tensor in exact.items()}, graph.species)
    for got, want, size, n in zip(
        results, wanted(problem, exact, graph.species), sizes, lengths(problem, species), strict=True
    ):
        assert_close(got, want, size, n)


def absolute(problem) -> SymmetricContractionProblem:
    """The problem with the absolute values of its table: what errors are measured by."""
    table = tuple(tuple((k, abs(factor)) for k, factor in row) for row in problem.table)
    sizes = (problem.channels, problem.dim_in, problem.dim_out)
    return SymmetricContractionProblem(*sizes, problem.terms, problem.paths, table)


def lengths(problem, species: list[int]) -> tuple[int, ...]:
    """Products in a sum, of out; gx, gw; dg, dx, dw."""
    entries, nodes = sum(map(len, problem.table)), max(map(species.count, species), default=0)
    return entries, entries, entries * nodes, 3 * entries, 3 * entries, 3 * entries * nodes


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    channels=st.sampled_from([1, 3, 17, 32, 40]),
    dim_in=st.integers(1, 5),
    dim_out=st.integers(1, 4),
    degree=st.integers(1, 4),
    terms=st.integers(1, 40),
    nodes=st.integers(1, 6),
    paths=st.sampled_from([None, 1, 20]),
    budget=st.sampled_from([1, 20, 96]),
    products=st.booleans(),
    tile_nodes=st.sampled_from([1, 2, 4]),
)
def test_any_polynomial(channels, dim_in, dim_out, degree, terms, nodes, paths, budget, products, tile_nodes, device):
    problem = problem_with(terms, channels, dim_in, dim_out, degree, paths)
    assert SymmetricContractionProblem.from_key(problem.key) == problem
    species = [i * i % 3 for i in range(nodes)]
    data, graph = operands(problem, species, 3, torch.float64, device), plan(species, 3, device)
    x, w, g, a, q = (data[key] for key in ("x", "w", "g", "a", "q"))
    coef, direct = kernels.combine(problem, [w], graph.ptr), torch.zeros_like(g)
    for number, ((m, monomial), row) in enumerate(zip(problem.terms, problem.table, strict=True)):
        product = torch.stack([x[:, i] for i in monomial]).prod(dim=0)
        own = sum(factor * w[species, path] for path, factor in row)
        assert_close(coef[species, number // PACK, :, number % PACK], own, own.abs(), 3)
        direct[:, m] += own * product
    exact = wanted(problem, data, graph.species)
    positive = {key: tensor.abs() for key, tensor in data.items()}
    sizes = wanted(absolute(problem), positive, graph.species)
    assert_close(exact[0], direct, sizes[0], terms)
    with ExitStack() as stack:
        for op in ("fwd", "bwd", "weights", "fwd_tangent", "bwd_tangent", "weights_tangent"):
            block = {"NODES": tile_nodes, "REGISTERS": budget, "PRODUCTS": int(products), "PARTS": 2}
            tile = tiles.Tile.of(num_warps=1, BLOCK_C=32, **block)
            stack.enter_context(tiles.forced(f"symmetric_contraction_{op}", tile))
        results = [
            kernels.forward(problem, x, coef, graph),
            kernels.grad_x(problem, g, x, coef, graph),
            kernels.grad_weights(problem, g, x, graph, torch.float64),
            kernels.forward(problem, x, coef, graph, a, kernels.combine(problem, [q], graph.ptr)),
            kernels.grad_x(problem, g, x, coef, graph, a, kernels.combine(problem, [q], graph.ptr)),
            kernels.grad_weights(problem, g, x, graph, torch.float64, a),
        ]
        without_q = kernels.grad_x(problem, g, x, coef, graph, a)
    for got, want, size, n in zip(results, exact, sizes, lengths(problem, species), strict=True):
        assert_close(got, want, size, n)
    assert_close(without_q, wanted(problem, data, graph.species, with_q=False)[4], sizes[4], 3 * terms)


@pytest.mark.parametrize("products", [True, False])
def test_every_part_holds_the_paths_that_fit(products):
    problem = problem_with(200, paths=30)
    for budget in (1, 20, 1000):
        parts = source.parts(problem, budget, products)
        assert [path for part in parts for path in range(*part)] == list(range(problem.paths))
        for part in parts:
            entries = (entry for group in problem.groups for entry in source._by_path(problem, group, part).values())
            held = {(m, last) for some in entries for m, last, _ in some if products}
            assert part[1] - part[0] + len(held) <= budget or part[1] - part[0] == 1


@pytest.mark.parametrize("path", ["kernels", "reference"])
def test_gradcheck(path, device, request):
    if path == "reference":
        request.getfixturevalue("reference_path")
        device = torch.device("cpu")
    problem, species = problem_with(12, channels=2, dim_in=3, dim_out=2), [1, 0, 1]
    data, graph = operands(problem, species, 2, torch.float64, device), plan(species, 2, device)
    inputs = (data["x"].requires_grad_(), data["w"].requires_grad_())

    def apply(x, w):
        return symmetric_contraction(problem, x, w, graph)

    assert torch.autograd.gradcheck(apply, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(apply, inputs, fast_mode=True)


def test_force_training_makes_no_tangent_of_the_weights(device, monkeypatch):
    problem, species = problem_with(30), [1, 0, 1]
    data, graph = operands(problem, species, 2, torch.float64, device), plan(species, 2, device)
    tangents, run = [], kernels.grad_x
    monkeypatch.setattr(kernels, "grad_x", lambda *args: tangents.append(args[5:]) or run(*args))
    x, w = data["x"].requires_grad_(), data["w"].requires_grad_()
    energy = symmetric_contraction(problem, x, w, graph).square().sum()
    (force,) = torch.autograd.grad(energy, x, create_graph=True)
    torch.autograd.grad(force.square().sum(), w)
    assert [q for a, q in (pair for pair in tangents if pair)] == [None]


def test_opcheck(device):
    problem, species = problem_with(12), [1, 0, 1]
    data, graph = operands(problem, species, 2, torch.float32, device), plan(species, 2, device)
    x, w, g = (data[key].requires_grad_() for key in ("x", "w", "g"))
    coef = combine(problem, w)
    torch.library.opcheck(ops._combine, ([w.detach()], graph.ptr, problem.key), test_utils=("test_schema",))
    torch.library.opcheck(ops._fwd, (x, w, coef, *graph, problem.key))
    torch.library.opcheck(ops._fwd, (x, None, coef, *graph, problem.key))
    torch.library.opcheck(ops._bwd, (g, x, w, coef, *graph, problem.key, True, True))
    torch.library.opcheck(ops._bwd, (g, x, w, coef, *graph, problem.key, True, False))
    torch.library.opcheck(ops._bwd, (g, x, None, coef, *graph, problem.key, True, False))


def test_strided_and_expanded_operands(device):
    problem, species = problem_with(30), [1, 0, 1, 1]
    data, graph = operands(problem, species, 2, torch.float32, device), plan(species, 2, device)
    x, coef = data["x"].transpose(1, 2).contiguous().transpose(1, 2), combine(problem, data["w"])
    dense = symmetric_contraction(problem, data["x"], data["w"], graph)
    leaf = x.requires_grad_()
    out = symmetric_contraction(problem, leaf, None, graph, coef)
    assert torch.equal(out, dense)
    expanded = torch.autograd.grad(out.sum(), leaf, retain_graph=True)[0]
    assert torch.equal(expanded, torch.autograd.grad(out, leaf, torch.ones_like(out))[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weights_in_pieces(dtype, device):
    """Pieces along the paths, one strided and one empty, are the whole tensor, to both derivatives."""
    problem, species = problem_with(30), [1, 0, 1, 1]
    data, graph = operands(problem, species, 2, dtype, device), plan(species, 2, device)
    whole = data["w"].clone().requires_grad_()
    strided = data["w"][:, 3:].transpose(0, 1).contiguous().transpose(0, 1)
    pieces = [t.clone(memory_format=torch.preserve_format) for t in (data["w"][:, :1], data["w"][:, :0])]
    pieces = [t.requires_grad_() for t in (*pieces, data["w"][:, 1:3].clone(), strided)]
    found, before = [], dispatch.calls.copy()
    for weights in (whole, pieces):
        x, asked = data["x"].clone().requires_grad_(), [whole] if weights is whole else pieces
        out = symmetric_contraction(problem, x, weights, graph)
        (gx,) = torch.autograd.grad(out, x, data["g"], create_graph=True)
        grads = [torch.autograd.grad(f.square().sum(), asked, retain_graph=True) for f in (out, gx)]
        found.append((out, gx, *(torch.cat(g, dim=1) for g in grads)))
    for got, exact in zip(*found, strict=True):
        assert torch.equal(got, exact)
    assert torch.equal(combine(problem, pieces), combine(problem, whole))
    assert {which for _, which in dispatch.calls - before} == {"triton"}


def test_the_same_bits_every_run(device):
    problem, species = problem_with(60), [0, 1, 2] * 20
    data, graph = operands(problem, species, 3, torch.float32, device), plan(species, 3, device)
    runs = [kernels.grad_weights(problem, data["g"], data["x"], graph, torch.float32) for _ in range(2)]
    assert torch.equal(*runs)


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
        ({"weights": torch.zeros(2, 1, 5)}, ValueError, "weights must have shape"),
        ({"weights": torch.zeros(2, 7, 5, device="meta")}, ValueError, "weights is on meta"),
        ({"weights": None}, ValueError, "weights: give them, or coef"),
        ({"weights": []}, ValueError, "weights must have shape"),
        ({"weights": [torch.zeros(2, 3, 5), torch.zeros(2, 3, 5)]}, ValueError, "weights must have shape"),
        ({"weights": [torch.zeros(2, 3, 5), torch.zeros(1, 4, 5)]}, ValueError, "weights must have shape"),
        ({"weights": [torch.zeros(2, 3, 5), torch.zeros(2, 4, 5).double()]}, TypeError, "convert them to one"),
        ({"weights": [torch.zeros(2, 3, 5), torch.zeros(2, 4, 5, device="meta")]}, ValueError, "move them together"),
        ({"coef": torch.zeros(2, 1, 5, 4)}, ValueError, "coef must have shape"),
        ({"coef": torch.zeros(2, 4, 5, 4).double()}, TypeError, "coef must be torch.float32"),
        ({"plan": plan_of(torch.tensor([0, 1]), 2)}, ValueError, "plan: it was made for 2 nodes"),
        ({"x": torch.zeros(3, 4, 5, dtype=torch.int32)}, TypeError, "x must be float64"),
        ({"x": torch.zeros(3, 4, 5, dtype=torch.float64)}, TypeError, "weights must be torch.float64"),
        ({"x": torch.zeros(3, 4, 5, device="meta")}, ValueError, "plan is on cpu"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    problem, cpu = problem_with(12), torch.device("cpu")
    data = operands(problem, [1, 0, 1], 2, torch.float32, cpu)
    arguments = {"x": data["x"], "weights": data["w"], "plan": plan([1, 0, 1], 2, cpu)} | change
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


@pytest.mark.parametrize(
    ("paths", "table", "words"),
    [
        (2, (), "0 rows for 1 terms"),
        (None, (((0, 1.0),),), "say how many"),
        (2, (((2, 1.0),),), "paths within 0 .. 1"),
        (2, (((0, 1.0), (0, 2.0)),), "twice"),
    ],
)
def test_bad_tables_are_named(paths, table, words):
    with pytest.raises(ValueError, match=words):
        SymmetricContractionProblem(3, 4, 2, ((0, (0,)),), paths, table)


# ---------------------------------------------------------------------------------------------------- without a GPU


@pytest.mark.parametrize(
    ("shape", "target", "dtypes"),
    [
        ("small", "sm_80", ("fp32", "fp64")),
        ("small", "sm_90", ("fp32", "fp64")),
        ("small", "gfx942", ("fp32", "fp64")),
        ("medium", "sm_90", ("fp32",)),
        ("medium", "sm_90", ("fp64",)),
    ],
)
def test_kernels_compile_without_spills(shape, target, dtypes):
    problem = contraction_problem(shape, 128)
    cases = kernels.offline_cases(problem, target, dtypes)
    for name, stats in offline.compile_cases(cases, target).items():
        assert (stats.spills, stats.stack) == (0, 0), (name, stats)
        # Only the sums over tiles cross threads, and the search for a tile's species, with a word for each of 4 warps;
        # anywhere else it would be a layout that is converted.
        assert stats.shared <= 16 or "_sum" in name, (name, stats)


def test_loops_carry_every_sum():
    """Triton would drop a sum from its loop that it took for another one; the interpreter does not show that."""
    problem = problem_with(40)
    cases = [case for case in kernels.offline_cases(problem, "sm_90", ("fp32",)) if "_weights" in case.name]
    found = [stats.carried for stats in offline.compile_cases(cases, "sm_90").values()]
    assert found == [problem.paths + 2, problem.paths]  # the first kernel also carries the next tiles of x and g
