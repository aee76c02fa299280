"""The channel-wise tensor product: kernels, formulas and custom ops against e3nn and against FP64.

Bounds: sums of n products in a dtype with unit roundoff u are off by about u sqrt(n) of their size; every comparison is
of norms, with n the number of edges of a node times the products of a path.
"""

from __future__ import annotations

import math
import re

import pytest
import torch
from e3nn import o3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mace_triton import reference
from mace_triton.kernels import channelwise_tp as kernels
from mace_triton.kernels import channelwise_tp_source as source
from mace_triton.kernels import offline, tiles
from mace_triton.ops import channelwise_tp as ops
from mace_triton.ops import dispatch
from mace_triton.ops.channelwise_tp import channelwise_tp
from mace_triton.ops.graph import graph_plan
from mace_triton.problem import ChannelwiseTPProblem

HARMONICS = "1x0e+1x1o+1x2e+1x3o"
SHAPES = {
    "small": ("8x0e", HARMONICS, "8x0e+8x1o+8x2e+8x3o"),
    "medium": ("8x0e+8x1o", HARMONICS, "8x0e+8x1o+8x2e"),
    "large": ("8x0e+8x1o+8x2e", HARMONICS, "8x0e+8x1o+8x2e+8x3o"),
    "odd channels": ("17x0e+17x1o", "1x0e+1x1o", "17x0e+17x1o"),
    "several multiplicities": ("5x0e+3x1o+4x0o", "1x0e+1x1o", "2x0e+2x1o+2x1e"),
    "l = 3": ("4x3o", "1x1o+1x3o", "4x0e+4x2e"),
    "full blocks": ("64x0e+64x1o", "1x0e+1x1o+1x2e", "64x0e+64x1o+64x2e"),
}
"""On NVIDIA cards channels that fill blocks are loaded in another way than those of a last, partial block."""
EDGE_LISTS = {
    "duplicates, self edges, isolated nodes": [[0, 1, 1, 4, 0, 0, 2], [1, 0, 0, 4, 1, 1, 4]],
    "one edge": [[3], [0]],
    "no edge": [[], []],
}
INPUTS = ("x", "y", "w")


def problem_of(shape: str, layout: str = "ir_mul") -> ChannelwiseTPProblem:
    return ChannelwiseTPProblem.from_mace(*SHAPES[shape], layout_in=layout, layout_out=layout)


def edges_of(name: str, device: torch.device) -> torch.Tensor:
    return torch.tensor(EDGE_LISTS[name], dtype=torch.int64, device=device)


def operands(
    problem, n_in: int, n_out: int, n_edges: int, dtype, device, storage=None, features=None
) -> dict[str, torch.Tensor]:
    """x, y, w, the output gradient g and the cotangents a, b, q of gx, gy, gw."""
    x, y, w = (n_in, problem.dim_in1), (n_edges, problem.dim_in2), (n_edges, problem.weight_numel)
    shapes = {"x": x, "y": y, "w": w, "g": (n_out, problem.dim_out), "a": x, "b": y, "q": w}
    made = {name: torch.randn(shape, device=device).to(dtype) for name, shape in shapes.items()}
    for names, kept in (("wq", storage), ("xa", features)):
        for name in names:
            made[name] = made[name].to(kept or dtype)
    return made


def assert_close(actual: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, length: int) -> None:
    """||actual - exact|| <= 4 u sqrt(length) ||exact||, u the unit roundoff of what is stored.

    The operands are of size one, and so are the products: an element below that is what is left of larger ones.
    """
    assert actual.shape == exact.shape
    error = (actual.double() - exact.double()).norm()
    size = max(float(exact.double().norm()), math.sqrt(exact.numel()))
    assert error <= 4 * torch.finfo(dtype).eps * math.sqrt(length) * size, error


def in_fp64(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in given.items()}


def check_against_reference(
    problem, edge_index, n_in, n_out, dtype, storage=None, deterministic=False, features=None
) -> None:
    """Forward, backward and double backward of the kernels against the FP64 formulas on the same (rounded) inputs."""
    given = operands(problem, n_in, n_out, edge_index.shape[1], dtype, edge_index.device, storage, features)
    x, y, w, g, a, b, q = given.values()
    ex, ey, ew, eg, ea, eb, eq = in_fp64(given).values()
    plan = graph_plan(edge_index, n_in, n_out, by_sender=deterministic)
    length = 50 * max(1, edge_index.shape[1])
    stored = {"w": storage or dtype, "x": features or dtype}
    exact = reference.channelwise_tp_fwd(problem, ex, ey, ew, edge_index, n_out)
    assert_close(kernels.forward(problem, x, y, w, plan), exact, dtype, length)
    exact = reference.channelwise_tp_bwd(problem, eg, ex, ey, ew, edge_index)
    for name, got, want in zip(INPUTS, kernels.backward(problem, g, x, y, w, plan), exact, strict=True):
        assert got.dtype == given[name].dtype
        assert_close(got, want, stored.get(name, dtype), length)
    exact = reference.channelwise_tp_bwd_bwd(problem, eg, ex, ey, ew, ea, eb, eq, edge_index)
    got = kernels.double_backward(problem, g, x, y, w, a, b, q, plan)
    for name, one, want in zip(("g", *INPUTS), got, exact, strict=True):
        assert one.dtype == given[name].dtype
        assert_close(one, want, stored.get(name, dtype), length)


@pytest.mark.parametrize("layout", ["mul_ir", "ir_mul"])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_match_fp64_formulas(shape, layout, device):
    edge_index = edges_of("duplicates, self edges, isolated nodes", device)
    check_against_reference(problem_of(shape, layout), edge_index, 5, 6, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_deterministic_kernels_match_fp64_formulas(shape, dtype, device):
    """A row of gx an edge: each part of the backward must know which slots of it earlier parts have written."""
    edge_index = edges_of("duplicates, self edges, isolated nodes", device)
    check_against_reference(problem_of(shape), edge_index, 5, 6, dtype, deterministic=True)


@pytest.mark.parametrize("shape", ["odd channels", "full blocks"])
@pytest.mark.parametrize(
    ("dtype", "storage"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ],
)
def test_storage_dtypes(dtype, storage, shape, device):
    edge_index = edges_of("duplicates, self edges, isolated nodes", device)
    check_against_reference(problem_of(shape), edge_index, 5, 6, dtype, storage)


@pytest.mark.parametrize("shape", ["odd channels", "full blocks"])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("features", "storage"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_stored_features(features, storage, deterministic, shape, device):
    """16-bit features are read beside FP32 harmonics; results and sums are FP32."""
    how = (torch.float32, storage, deterministic, features)
    check_against_reference(problem_of(shape), edges_of("duplicates, self edges, isolated nodes", device), 5, 6, *how)


@pytest.mark.parametrize("layout", ["mul_ir", "ir_mul"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_sources_with_assembly_compute_the_formula(layout, deterministic, device, assembly_by_triton):
    """In the interpreter, too, which knows no assembly: rows, offsets and names are those of the formula."""
    edge_index = edges_of("duplicates, self edges, isolated nodes", device)
    problem = problem_of("full blocks", layout)
    check_against_reference(problem, edge_index, 5, 6, torch.float64, deterministic=deterministic)
    check_against_reference(problem, edge_index, 5, 6, torch.float32, torch.bfloat16, deterministic)
    assert len(set(assembly_by_triton)) > 2


@pytest.mark.parametrize("layout", ["mul_ir", "ir_mul"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_loads_by_assembly_leave_what_is_written_to_triton(layout, deterministic):
    """With NVIDIA's instructions all that is read and never written: features, weights, their tangents, gradients."""
    problem, everything = problem_of("full blocks", layout), (0, 1, 2, 3, 4, 5, 6)
    assert len(problem.paths) == len(everything)
    rows = (0, 2) if deterministic else None
    for ahead in (None, 0, 2):
        for text in (
            source.forward_source(problem, everything, 32, True, ahead),
            source.forward_source(problem, everything, 32, False, ahead, paired=True),
            source.backward_source(problem, everything, 32, "edge" if deterministic else "atomic", rows, True, ahead),
            source.forces_source(problem, everything, 32, True, ahead),
        ):
            loads = set(re.findall(r"tl.load\((\w+?)\d* ", text))
            operands = {f"{letter}_row" for letter in "xawqdg"}
            assert bool(loads & operands) == (ahead is None)
            assert ("ld.global" in text) == (ahead is not None)
    partial = source.forces_source(problem_of("odd channels"), (0,), 32, True, 2)
    assert "ld.global" not in partial
    assert "mask=mask" in partial


@pytest.mark.usefixtures("reference_path")
def test_stored_features_on_the_cpu():
    problem, edge_index = (
        problem_of("odd channels"),
        edges_of("duplicates, self edges, isolated nodes", torch.device("cpu")),
    )
    half = torch.bfloat16
    x, y, w, g, *_ = operands(problem, 5, 6, edge_index.shape[1], torch.float32, "cpu", half, half).values()
    x.requires_grad_(True)
    y.requires_grad_(True)
    out = channelwise_tp(problem, x, y, w, graph_plan(edge_index, 5, 6))
    want = reference.channelwise_tp_fwd(problem, x.double(), y.double(), w.double(), edge_index, 6)
    assert_close(out, want, torch.float32, 50 * edge_index.shape[1])
    gx, gy = torch.autograd.grad(out, (x, y), g, create_graph=True)
    assert (out.dtype, gx.dtype, gy.dtype) == (torch.float32, half, torch.float32)
    dx, dy = torch.autograd.grad(gy.square().sum(), (x, y))
    assert (dx.dtype, dy.dtype) == (half, torch.float32)
    exact = [t.detach().double().requires_grad_(True) for t in (x, y)]
    out = channelwise_tp(problem, *exact, w.double(), graph_plan(edge_index, 5, 6))
    (gy,) = torch.autograd.grad(out, exact[1], g.double(), create_graph=True)
    assert_close(dx, torch.autograd.grad(gy.square().sum(), exact[0])[0], half, 50 * edge_index.shape[1])


@pytest.mark.parametrize("edges", EDGE_LISTS)
def test_edge_lists(edges, device):
    check_against_reference(problem_of("odd channels"), edges_of(edges, device), 5, 6, torch.float32)


@pytest.mark.parametrize("channels", [64, 96, 128, 192])
def test_real_channel_counts(channels, device):
    hidden, target = f"{channels}x0e+{channels}x1o", f"{channels}x0e+{channels}x1o"
    problem = ChannelwiseTPProblem.from_mace(hidden, "1x0e+1x1o", target, layout_in="ir_mul", layout_out="ir_mul")
    check_against_reference(problem, torch.tensor([[0, 1], [1, 1]], device=device), 2, 2, torch.float32)


@pytest.mark.parametrize("block", [{"SPLIT": 3}, {"PAIRS": 12, "TANGENT_PAIRS": 12}, {"BLOCK_C": 16}])
@pytest.mark.parametrize("deterministic", [False, True])
def test_every_tile_choice_gives_the_same(block, deterministic, device):
    usual = {"PAIRS": 190, "TANGENT_PAIRS": 80, "BLOCK_C": 32, "SPLIT": 1, "AHEAD": 2}
    tile = tiles.Tile.of(num_warps=1, **(usual | block))
    edge_index = edges_of("duplicates, self edges, isolated nodes", device)
    with tiles.forced("channelwise_tp_fwd", tile), tiles.forced("channelwise_tp_bwd", tile):
        check_against_reference(problem_of("medium"), edge_index, 5, 6, torch.float32, deterministic=deterministic)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_problems(data, device):
    """Whatever irreps, instructions and edges: the kernels compute the formula."""
    irreps = st.lists(
        st.tuples(st.integers(1, 5), st.sampled_from(["0e", "0o", "1o", "1e", "2e", "3o"])), min_size=1, max_size=3
    ).map(lambda slots: "+".join(f"{mul}x{ir}" for mul, ir in slots))
    harmonics = data.draw(st.sampled_from(["1x0e", "1x0e+1x1o", "1x1o+1x2e", "1x0e+1x1o+1x2e+1x3o"]))
    target = data.draw(st.sampled_from(["1x0e", "1x0e+1x1o", "1x0o+1x1e+1x2e", "1x3o"]))
    layouts = {name: data.draw(st.sampled_from(["mul_ir", "ir_mul"])) for name in ("layout_in", "layout_out")}
    problem = ChannelwiseTPProblem.from_mace(data.draw(irreps), harmonics, target, **layouts)
    n_in, n_out, n_edges = (data.draw(st.integers(low, 5)) for low in (1, 1, 0))
    edge_index = torch.stack([torch.randint(0, n, (n_edges,), device=device) for n in (n_in, n_out)])
    check_against_reference(problem, edge_index, n_in, n_out, torch.float64)


@pytest.mark.torchscript
@pytest.mark.parametrize("shape", SHAPES)
def test_formulas_match_e3nn(shape, reference_path):
    """The FP64 formulas are e3nn's TensorProduct followed by a scatter."""
    problem = problem_of(shape, "mul_ir")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        instructions = [(*slots, "uvu", True) for slots in problem.instructions]
        irreps = (problem.irreps_in1, problem.irreps_in2, problem.irreps_out)
        product = o3.TensorProduct(*irreps, instructions, shared_weights=False, internal_weights=False)
    finally:
        torch.set_default_dtype(before)
    edge_index = edges_of("duplicates, self edges, isolated nodes", torch.device("cpu"))
    given = operands(problem, 5, 6, 7, torch.float64, torch.device("cpu"))
    message = product(given["x"][edge_index[0]], given["y"], given["w"])
    exact = torch.zeros(6, problem.dim_out, dtype=torch.float64).index_add(0, edge_index[1], message)
    got = channelwise_tp(problem, given["x"], given["y"], given["w"], graph_plan(edge_index, 5, 6))
    torch.testing.assert_close(got, exact, rtol=1e-13, atol=1e-13)


def test_kernels_run_where_asked(device):
    """The op takes the kernels on a GPU and in the interpreter; otherwise the tests above would prove nothing."""
    problem = problem_of("odd channels")
    x, y, w, g, *_ = operands(problem, 5, 6, 7, torch.float32, device).values()
    before = dispatch.calls.copy()
    plan = graph_plan(edges_of("duplicates, self edges, isolated nodes", device), 5, 6)
    leaves = [t.requires_grad_() for t in (x, y, w)]
    grads = torch.autograd.grad(channelwise_tp(problem, *leaves, plan), leaves, g, create_graph=True)
    torch.autograd.grad(sum((grad**2).sum() for grad in grads), leaves)
    ran = dispatch.calls - before
    assert {op for op, which in ran if which == "triton"} >= {
        "channelwise_tp_fwd",
        "channelwise_tp_bwd",
        "channelwise_tp_bwd_bwd",
    }
    assert not [op for op, which in ran if which == "reference" and op.startswith("channelwise")]


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_gradcheck(backend, device, monkeypatch):
    if backend == "reference":
        monkeypatch.setattr(dispatch, "backend", lambda tensor: "reference")
    problem = ChannelwiseTPProblem.from_mace("3x0e+3x1o", "1x0e+1x1o", "3x0e+3x1o")
    plan = graph_plan(torch.tensor([[0, 1, 1], [1, 0, 0]], device=device), 2, 3)
    given = operands(problem, 2, 3, 3, torch.float64, device)
    leaves = [given[name].requires_grad_() for name in INPUTS]
    # Atomic adds into a sender's row may come in any order on a GPU.
    slack = {"nondet_tol": 1e-12}

    def function(*args):
        return channelwise_tp(problem, *args, plan)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True, **slack)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True, **slack)


@pytest.mark.parametrize("op", ["_fwd", "_bwd", "_bwd_bwd"])
def test_opcheck(op, device):
    problem = ChannelwiseTPProblem.from_mace("3x0e+3x1o", "1x0e+1x1o", "3x0e+3x1o")
    plan = graph_plan(torch.tensor([[0, 1, 1], [1, 0, 0]], device=device), 2, 3)
    given = operands(problem, 2, 3, 3, torch.float64, device)
    names = {"_fwd": "xyw", "_bwd": "gxyw", "_bwd_bwd": "gxywabq"}[op]
    # The double backward has no derivative of its own, so its arguments ask for none.
    tensors = [given[name].requires_grad_(op != "_bwd_bwd") for name in names]
    last = (problem.key, True) if op == "_bwd" else (problem.key,)
    torch.library.opcheck(getattr(ops, op), (*tensors, *plan.tensors, *last))


def test_expanded_and_strided_arguments(device):
    """Gradients of a summed energy arrive with stride 0, features sometimes as slices of a wider tensor."""
    problem = problem_of("odd channels")
    edge_index = edges_of("duplicates, self edges, isolated nodes", device)
    plan = graph_plan(edge_index, 5, 6)
    x, y, w, *_ = operands(problem, 5, 6, 7, torch.float64, device).values()
    wide = torch.randn(5, problem.dim_in1 + 3, dtype=torch.float64, device=device)
    wide[:, 1:-2] = x
    strided = [wide[:, 1:-2].detach(), y.T.contiguous().T, w.T.contiguous().T]
    leaves = [t.requires_grad_() for t in strided]
    grads = torch.autograd.grad(channelwise_tp(problem, *leaves, plan).sum(), leaves)
    g = torch.ones(6, problem.dim_out, dtype=torch.float64, device=device)
    for got, want in zip(grads, reference.channelwise_tp_bwd(problem, g, x, y, w, edge_index), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_no_gradient_of_features_that_need_none(device):
    problem = problem_of("odd channels")
    plan = graph_plan(edges_of("one edge", device), 5, 6)
    x, y, w, *_ = operands(problem, 5, 6, 1, torch.float64, device).values()
    all_three = [t.clone().requires_grad_() for t in (x, y, w)]
    only_two = [y.clone().requires_grad_(), w.clone().requires_grad_()]
    full = torch.autograd.grad(channelwise_tp(problem, *all_three, plan).square().sum(), all_three)
    part = torch.autograd.grad(channelwise_tp(problem, x, *only_two, plan).square().sum(), only_two)
    torch.testing.assert_close(part, full[1:], rtol=1e-13, atol=1e-13)


def test_deterministic_mode_repeats_its_bits(device):
    problem = problem_of("medium")
    edge_index = torch.stack([torch.randint(0, 3, (20,), device=device) for _ in range(2)])
    plan = graph_plan(edge_index, 3, 3, by_sender=True)
    x, y, w, g, *_ = operands(problem, 3, 3, 20, torch.float32, device).values()

    def gradients():
        leaves = [t.clone().requires_grad_() for t in (x, y, w)]
        out = channelwise_tp(problem, *leaves, plan, deterministic=True)
        return out, *torch.autograd.grad(out, leaves, g)

    for one, two in zip(gradients(), gradients(), strict=True):
        assert torch.equal(one, two)


def test_edge_order_does_not_matter(device):
    problem = problem_of("odd channels")
    edge_index = edges_of("duplicates, self edges, isolated nodes", device)
    x, y, w, *_ = operands(problem, 5, 6, 7, torch.float64, device).values()
    order = torch.randperm(7, device=device)
    one = channelwise_tp(problem, x, y, w, graph_plan(edge_index, 5, 6))
    two = channelwise_tp(problem, x, y[order], w[order], graph_plan(edge_index[:, order].contiguous(), 5, 6))
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_plan_is_built_once_per_graph_and_again_after_a_change(device):
    edge_index = edges_of("duplicates, self edges, isolated nodes", device)
    plan = graph_plan(edge_index, 5, 6)
    assert graph_plan(edge_index, 5, 6) is plan
    edge_index[1, 0] = 5
    changed = graph_plan(edge_index, 5, 6)
    assert changed is not plan
    assert changed.receiver_ptr.tolist() == [0, 2, 4, 4, 4, 6, 7]


@pytest.mark.parametrize(
    ("target", "hidden", "storages", "features"),
    [
        ("sm_90", "128x0e+128x1o+128x2e", ("fp32",), None),
        ("sm_90", "128x0e+128x1o", ("fp64",), None),
        ("sm_90", "128x0e+128x1o", ("bf16",), None),
        ("sm_90", "128x0e", ("bf16",), "bf16"),
        ("sm_90", "128x0e", ("fp16",), "fp16"),
        ("sm_80", "128x0e+128x1o", ("fp32",), None),
        ("gfx942", "128x0e+128x1o", ("fp32",), None),
    ],
)
def test_kernels_compile_without_spills(target, hidden, storages, features):
    problem = ChannelwiseTPProblem.from_mace(
        hidden, HARMONICS, "128x0e+128x1o+128x2e+128x3o", layout_in="ir_mul", layout_out="ir_mul"
    )
    compiled = offline.compile_cases(kernels.offline_cases(problem, target, storages, features), target)
    assert {name.split()[0] for name in compiled} == {
        f"channelwise_tp_{kind}" for kind in ("fwd", "bwd", "forces", "fwd_pairs", "fwd_tangent", "bwd_tangent")
    }
    assert {name: stats for name, stats in compiled.items() if stats.spills or stats.stack} == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 14 GB of GPU memory")
def test_more_weights_than_int32_counts():
    device = torch.device("cuda")
    hidden = "128x0e+128x1o+128x2e"
    problem = ChannelwiseTPProblem.from_mace(
        hidden, HARMONICS, "128x0e+128x1o+128x2e+128x3o", layout_in="ir_mul", layout_out="ir_mul"
    )
    n_nodes, n_edges = 64, 2**31 // problem.weight_numel + 1000
    assert n_edges * problem.weight_numel > 2**31
    edge_index = torch.randint(0, n_nodes - 1, (2, n_edges), device=device)
    last = torch.arange(n_edges - 40, n_edges, device=device)
    edge_index[1] = n_nodes - 2
    edge_index[1, last] = n_nodes - 1  # the last rows of w go to a receiver of their own
    x = torch.randn(n_nodes, problem.dim_in1, device=device)
    y = torch.randn(n_edges, problem.dim_in2, device=device)
    w = torch.empty(n_edges, problem.weight_numel, device=device, dtype=torch.bfloat16).normal_()
    g = torch.randn(n_nodes, problem.dim_out, device=device)
    plan = graph_plan(edge_index, n_nodes, n_nodes)
    exact = reference.channelwise_tp_fwd(
        problem, x.double(), y[last].double(), w[last].double(), edge_index[:, last], n_nodes
    )
    assert_close(kernels.forward(problem, x, y, w, plan)[-1], exact[-1], torch.float32, 4000)
    exact = reference.channelwise_tp_bwd(
        problem, g.double(), x.double(), y[last].double(), w[last].double(), edge_index[:, last]
    )
    _, gy, gw = kernels.backward(problem, g, x, y, w, plan)
    assert_close(gy[last], exact[1], torch.float32, 4000)
    assert_close(gw[last], exact[2], torch.bfloat16, 4000)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("deterministic", [False, True])
def test_kernels_run_where_their_tensors_lie(deterministic):
    """Triton launches on the current device, which need not be that of the tensors."""
    edge_index = edges_of("duplicates, self edges, isolated nodes", torch.device("cuda:1"))
    with torch.cuda.device(0):
        check_against_reference(problem_of("medium"), edge_index, 5, 6, torch.float32, deterministic=deterministic)


def _valid(device):
    problem = problem_of("odd channels")
    plan = graph_plan(edges_of("one edge", device), 5, 6)
    x, y, w, *_ = operands(problem, 5, 6, 1, torch.float32, device).values()
    return problem, plan, x, y, w


def test_bad_arguments_name_themselves(device):
    problem, plan, x, y, w = _valid(device)
    with pytest.raises(ValueError, match="x must have shape"):
        channelwise_tp(problem, x[:, :-1], y, w, plan)
    with pytest.raises(ValueError, match="w has 2 rows, but the graph has 1 edges"):
        channelwise_tp(problem, x, y, w.repeat(2, 1), plan)
    with pytest.raises(TypeError, match="x must be one of"):
        channelwise_tp(problem, x, y.double(), w, plan)
    with pytest.raises(TypeError, match="w must be one of"):
        channelwise_tp(problem, x, y, w.double(), plan)
    with pytest.raises(TypeError, match="y must be float64"):
        channelwise_tp(problem, x, y.int(), w, plan)
    with pytest.raises(ValueError, match="deterministic=True needs"):
        channelwise_tp(problem, x, y, w, plan, deterministic=True)
    with pytest.raises(ValueError, match="x is on meta"):
        channelwise_tp(problem, x.to("meta"), y, w, plan)
    with pytest.raises(ValueError, match="x has 4 rows"):
        channelwise_tp(problem, x[:4], y, w, plan)


@pytest.mark.parametrize(
    ("edge_index", "error", "message"),
    [
        (torch.tensor([[0], [6]]), ValueError, r"edge_index\[1\] \(receiver\) holds 6, but there are 6 nodes"),
        (torch.tensor([[-1], [0]]), ValueError, r"edge_index\[0\] \(sender\) holds -1"),
        (torch.tensor([0, 1]), ValueError, "must have shape"),
        (torch.tensor([[0.0], [1.0]]), TypeError, "int64 or int32"),
    ],
)
def test_bad_graphs(edge_index, error, message, device):
    with pytest.raises(error, match=message):
        graph_plan(edge_index.to(device), 5, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"irreps_in1": "8x0z"}, "irreps_in1"),
        ({"irreps_in1": "8x4e"}, "supported are l <= 3"),
        ({"irreps_in2": "2x0e"}, "irreps_in2: every multiplicity must be 1"),
        ({"irreps_in2": "+".join(["1x3o"] * 5)}, "irreps_in2: dimension 35"),
        ({"instructions": ((0, 3, 0),)}, "points outside"),
        ({"irreps_out": "7x0e"}, "equal multiplicities"),
        ({"irreps_out": "8x1o"}, "parities differ"),
        ({"layout_in": "ir"}, "layout_in must be one of"),
    ],
)
def test_bad_problems(change, message):
    fine = {"irreps_in1": "8x0e", "irreps_in2": "1x0e", "irreps_out": "8x0e", "instructions": ((0, 0, 0),)}
    with pytest.raises(ValueError, match=message):
        ChannelwiseTPProblem(**(fine | change))


def test_problem_survives_its_key():
    for shape in SHAPES:
        problem = problem_of(shape)
        assert ChannelwiseTPProblem.from_key(problem.key) == problem
