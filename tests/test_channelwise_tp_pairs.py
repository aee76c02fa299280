"""The tensor product with weights of pairs, and its way back to forces: kernels and formulas against the plain one.

Bounds are those of `test_channelwise_tp.py`; a length's gradient sums products over all weights of an edge.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_channelwise_tp import SHAPES, assert_close, operands, problem_of

from mace_triton import reference
from mace_triton.kernels import channelwise_tp as kernels
from mace_triton.kernels import tiles
from mace_triton.ops import channelwise_tp_pairs as ops
from mace_triton.ops import dispatch
from mace_triton.ops.channelwise_tp_pairs import add_forces, channelwise_tp_pairs
from mace_triton.problem import ChannelwiseTPProblem

DEGREES = [2, 0, 5, 1, 0, 3]


def edges_of(degrees: list[int], pairs: int, device: torch.device):
    """(row_ptr, sender, pair) of sorted edges with random senders; some pairs have no edge, some several."""
    counts = torch.tensor(degrees)
    total = int(counts.sum())
    row_ptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    drawn = torch.randint(len(degrees), (total,)), torch.randint(pairs, (total,))
    return tuple(t.to(device, torch.int32) for t in (row_ptr, *drawn))


def check(problem, degrees: list[int], dtype, device, storage=None, backend: str = "triton", features=None) -> None:
    pairs, nodes, edges = 6, len(degrees), sum(degrees)
    row_ptr, sender, pair = edges_of(degrees, pairs, device)
    given_ = operands(problem, nodes, nodes, edges, dtype, device, features=features)
    x, y, g = given_["x"], given_["y"], given_["g"]
    w, d = (torch.randn(pairs, problem.weight_numel, device=device).to(storage or dtype) for _ in range(2))
    receiver = torch.repeat_interleave(torch.arange(nodes, device=device), row_ptr.diff().long())
    edge_index, rows = torch.stack((sender.long(), receiver)), pair.long()
    called, length = dispatch.calls.copy(), 50 * max(1, edges)
    out = channelwise_tp_pairs(problem, x, y, w, row_ptr, sender, pair)
    want = (x.double(), y.double(), w.double()[rows], edge_index)
    assert_close(out, reference.channelwise_tp_fwd(problem, *want, nodes), dtype, length)
    gx, gy, gw = reference.channelwise_tp_bwd(problem, g.double(), *want)
    gr = (gw * d.double()[rows]).sum(1, keepdim=True)
    for wrt_x in (True, False):
        start = torch.randn_like(y), torch.randn(edges, 1, dtype=dtype, device=device)
        sums, into = tuple(t.clone() for t in start), torch.randn(x.shape, dtype=dtype, device=device)
        before = into.double().clone()
        add_forces(problem, g, x, y, w, d, into if wrt_x else None, *sums, row_ptr, sender, pair)
        assert_close(into, before + gx if wrt_x else before, dtype, length)
        assert_close(sums[0], start[0].double() + gy, dtype, length)
        assert_close(sums[1], start[1].double() + gr, dtype, length * problem.weight_numel)
    used = {"channelwise_tp_pairs_fwd", "channelwise_tp_pairs_bwd"}
    assert set(dispatch.calls - called) == {(op, backend) for op in used}


@pytest.mark.parametrize("layout", ["mul_ir", "ir_mul"])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_match_fp64_formulas(shape, layout, device):
    check(problem_of(shape, layout), DEGREES, torch.float64, device)


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", ["medium", "odd channels", "full blocks"])
def test_single_precision_and_stored_weights(shape, storage, device):
    check(problem_of(shape), DEGREES, torch.float32, device, storage)


@pytest.mark.parametrize("shape", ["odd channels", "full blocks"])
@pytest.mark.parametrize("features", [torch.bfloat16, torch.float16])
def test_stored_features(features, shape, device):
    check(problem_of(shape), DEGREES, torch.float32, device, torch.bfloat16, features=features)


@pytest.mark.parametrize("layout", ["mul_ir", "ir_mul"])
def test_sources_with_assembly_compute_the_formula(layout, device, assembly_by_triton):
    check(problem_of("full blocks", layout), DEGREES, torch.float64, device)
    check(problem_of("full blocks", layout), DEGREES, torch.float32, device, torch.float16)
    assert len(set(assembly_by_triton)) > 2


@pytest.mark.parametrize("degrees", [[0], [0, 0, 0], [1], [40]])
def test_rows_of_every_kind(degrees, device):
    check(problem_of("small"), degrees, torch.float32, device)


@pytest.mark.parametrize("channels", [17, 96])
def test_any_number_of_channels(channels, device):
    texts = (f"{channels}x0e+{channels}x1o", "1x0e+1x1o+1x2e", f"{channels}x0e+{channels}x1o")
    problem = ChannelwiseTPProblem.from_mace(*texts, layout_in="ir_mul", layout_out="ir_mul")
    check(problem, DEGREES, torch.float32, device)


@pytest.mark.parametrize("budget", [8, 60])
def test_parts_add_up(budget, device):
    """Kernels that take several launches; gradients of y and of lengths are shared by all of them."""
    problem = problem_of("large")
    forward = tiles.Tile.of(1, 1, PAIRS=budget, TANGENT_PAIRS=budget, BLOCK_C=32, SPLIT=1, AHEAD=2)
    backward = tiles.Tile.of(1, 1, PAIRS=budget, TANGENT_PAIRS=budget, BLOCK_C=32, SPLIT=2, AHEAD=2)
    with tiles.forced("channelwise_tp_fwd", forward), tiles.forced("channelwise_tp_bwd", backward):
        assert len(kernels._forces_kernels(problem, budget, 32, 0, True)) > 1
        check(problem, DEGREES, torch.float64, device)


def _stretches_add_up(device: torch.device) -> None:
    """Some receivers at a time, with rows of weights of their own, as all at once; poison in the edges of others."""
    problem, degrees = problem_of("medium"), [0, 3, 0, 0, 4, 2, 0]
    row_ptr, sender, pair = edges_of(degrees, 6, device)
    edges = len(sender)
    given_ = operands(problem, 7, 7, edges, torch.float64, device)
    x, y, g = given_["x"], given_["y"], given_["g"]
    w, d = (torch.randn(6, problem.weight_numel, dtype=torch.float64, device=device) for _ in range(2))
    want = channelwise_tp_pairs(problem, x, y, w, row_ptr, sender, pair)
    want_sums, sums = ((torch.zeros_like(x), torch.zeros_like(y), y.new_zeros(edges, 1)) for _ in range(2))
    add_forces(problem, g, x, y, w, d, *want_sums, row_ptr, sender, pair)
    for first, last in ((0, 2), (2, 4), (4, 7)):
        ptr = row_ptr[first : last + 1]
        held = slice(int(ptr[0]), int(ptr[-1]))
        rows, own = pair[held].long(), torch.full_like(pair, 0)
        own[held] = torch.arange(len(rows), dtype=torch.int32, device=device)
        there = y.new_full(y.shape, float("nan"))
        there[held] = y[held]
        mine, slope = (t[rows] if len(rows) else t[:1] for t in (w, d))
        out = channelwise_tp_pairs(problem, x, there, mine, ptr, sender, own)
        torch.testing.assert_close(out, want[first:last])
        add_forces(problem, g[first:last], x, there, mine, slope, *sums, ptr, sender, own)
    for got, expected in zip(sums, want_sums, strict=True):
        torch.testing.assert_close(got, expected)


def test_stretches_add_up(device):
    _stretches_add_up(device)


@pytest.mark.usefixtures("reference_path")
def test_formulas_on_the_cpu():
    _stretches_add_up(torch.device("cpu"))
    check(problem_of("medium"), DEGREES, torch.float64, torch.device("cpu"), backend="reference")
    half = torch.bfloat16
    check(problem_of("small"), DEGREES, torch.float32, torch.device("cpu"), half, "reference", half)


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 9), min_size=1, max_size=7))
def test_any_rows(device, degrees):
    check(problem_of("medium"), degrees, torch.float32, device)


def test_strided_inputs_and_opcheck(device):
    problem = problem_of("small")
    row_ptr, sender, pair = edges_of(DEGREES, 6, device)
    x, y, _, g, *_ = operands(problem, 6, 6, len(sender), torch.float64, device).values()
    w, d = (torch.randn(6, problem.weight_numel, dtype=torch.float64, device=device) for _ in range(2))
    order = (row_ptr, sender, pair)
    turned = [t.t().contiguous().t() for t in (x, y, w)]
    want = channelwise_tp_pairs(problem, x, y, w, *order)
    torch.testing.assert_close(channelwise_tp_pairs(problem, *turned, *order), want)
    sums = torch.zeros_like(y), torch.zeros(len(sender), 1, dtype=torch.float64, device=device)
    for test in ("test_schema", "test_faketensor"):
        torch.library.opcheck(ops._fwd, (x, y, w, *order, problem.key), test_utils=test)
        for gx in (torch.zeros_like(x), None):
            torch.library.opcheck(ops._bwd, (g, x, y, w, d, gx, *sums, *order, problem.key), test_utils=test)


def test_bad_input_is_named(device):
    problem = problem_of("small")
    row_ptr, sender, pair = edges_of(DEGREES, 6, device)
    x, y, _, g, *_ = operands(problem, 6, 6, len(sender), torch.float32, device).values()
    w = torch.randn(6, problem.weight_numel, device=device)
    order, gx = (row_ptr, sender, pair), torch.zeros_like(x)
    gy, gr = torch.zeros_like(y), torch.zeros(len(sender), 1, device=device)
    for changed, error, match in (
        ((x[:, 1:], y, w, *order), ValueError, "x must have shape"),
        ((x, y, w, row_ptr, sender, pair[1:]), ValueError, "sender, pair and row_ptr"),
        ((x, y, w, row_ptr.long(), sender, pair), TypeError, "must be int32"),
        ((x, y.double(), w, *order), TypeError, "x must be one of"),
        ((x, y.half(), w, *order), TypeError, "y must be float64 or float32"),
        ((x, y, w.double(), *order), TypeError, "w must be one of"),
    ):
        with pytest.raises(error, match=match):
            channelwise_tp_pairs(problem, *changed)
    for changed, error, match in (
        ((g[1:], x, y, w, w, gx, gy, gr), ValueError, "g must have shape"),
        ((g, x, y, w, w[1:], gx, gy, gr), ValueError, "d must have shape"),
        ((g, x, y, w, w, gx, gy.t().contiguous().t(), gr), ValueError, "gy must be contiguous"),
        ((g, x, y, w, w, gx[1:], gy, gr), ValueError, "gx must be contiguous"),
        ((g, x, y, w, w, gx.double(), gy, gr), TypeError, "must have y's dtype"),
        ((g, x, y, w, w.half(), None, gy, gr), TypeError, "that of w"),
    ):
        with pytest.raises(error, match=match):
            add_forces(problem, *changed, *order)
