"""Edge vectors and lengths against MACE's function in FP64, to the second derivative, and the stand-in for it.

Bounds: a vector is a sum of three numbers and its length has half an ulp more; a gradient of positions sums one number
for each of an atom's edges, in any order, so it is held to eps times the sum of their sizes.
"""

from __future__ import annotations

import copy
import pickle
import threading

import mace_models as mm
import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from mace.modules import models, utils

import mace_triton as mt
from mace_triton.kernels import edge_vectors as kernels
from mace_triton.kernels import offline
from mace_triton.nn import edge_vectors as standin
from mace_triton.ops import dispatch
from mace_triton.ops import edge_embedding as ops
from mace_triton.ops.edge_embedding import edge_vectors

DTYPES = [torch.float64, torch.float32]
PLAIN = utils.get_edge_vectors_and_lengths


def graph(nodes: int, edges: int, dtype: torch.dtype, device: torch.device):
    """Positions, edges in any order (duplicates and loops among them), shifts; the last atom has no edge."""
    x = 8 * torch.rand(nodes, 3, dtype=torch.float64)
    index = torch.randint(max(1, nodes - 1), (2, edges))
    shifts = torch.randn(edges, 3, dtype=torch.float64)
    return x.to(device, dtype), index.to(device), shifts.to(device, dtype)


def derivatives(function, x, shifts, seed: int = 0) -> dict[str, torch.Tensor]:
    """Results, gradients, and the double backward's derivatives by the cotangents and by the positions."""
    generator = torch.Generator().manual_seed(seed)

    def like(t):
        return torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)

    x, shifts = (t.detach().clone().requires_grad_() for t in (x, shifts))
    v, r = function(x, shifts)
    gv, gr = like(v).requires_grad_(), like(r).requires_grad_()
    gx, gs = torch.autograd.grad((v, r), (x, shifts), (gv, gr), create_graph=True)
    wanted = torch.autograd.grad((gx, gs), (gv, gr, x, shifts), (like(gx), like(gs)))
    names = ("v", "r", "gx", "gs", "d gv", "d gr", "dx", "ds")
    return dict(zip(names, (t.detach() for t in (v, r, gx, gs, *wanted)), strict=True))


def check_matches(nodes: int, edges: int, dtype: torch.dtype, device: torch.device) -> None:
    x, index, shifts = graph(nodes, edges, dtype, device)
    before = dispatch.calls.copy()
    got = derivatives(lambda x, s: edge_vectors(x, index, s), x, shifts)
    assert {op for op, which in dispatch.calls - before if which == "triton"} == {
        "edge_vectors_fwd",
        "edge_vectors_bwd",
    }
    want = derivatives(lambda x, s: PLAIN(x, index, s), x.double(), shifts.double())
    degree = int(index.flatten().bincount(minlength=1).max())
    inverse = float((1 / want["r"]).max())
    for name, exact in want.items():
        terms = degree if name in ("gx", "dx") else 1
        size = 16 * max(1.0, inverse) ** (2 if name in ("dx", "ds") else 1)
        assert got[name].dtype == dtype
        torch.testing.assert_close(got[name].double(), exact, rtol=0, atol=size * terms * 16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("nodes", "edges"), [(2, 1), (7, 129), (40, 700)])
def test_vectors_are_maces(nodes, edges, dtype, device):
    check_matches(nodes, edges, dtype, device)


@budget(max_examples=8, deadline=None)
@given(st.integers(2, 30), st.integers(1, 300), st.sampled_from(DTYPES))
def test_graphs_of_any_size(nodes, edges, dtype):
    check_matches(nodes, edges, dtype, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.mark.usefixtures("reference_path")
def test_formulas_on_the_cpu():
    x, index, shifts = graph(9, 50, torch.float64, torch.device("cpu"))
    got = derivatives(lambda x, s: edge_vectors(x, index, s), x, shifts)
    want = derivatives(lambda x, s: PLAIN(x, index, s), x, shifts)
    torch.testing.assert_close(got, want)
    assert dispatch.calls["edge_vectors_bwd", "reference"]


def test_a_zero_length_edge_moves_nothing(device):
    x, index, shifts = graph(5, 12, torch.float64, device)
    index[:, 3], shifts[3] = 2, 0
    got = derivatives(lambda x, s: edge_vectors(x, index, s), x, shifts)
    assert all(bool(t.isfinite().all()) for t in got.values())
    assert got["r"][3].item() == 0
    assert got["d gr"][3].item() == 0
    want = derivatives(lambda x, s: PLAIN(x, index, s), x, shifts)
    torch.testing.assert_close(got["gx"], want["gx"])


def test_no_edges(device):
    x, index, shifts = graph(3, 0, torch.float32, device)
    x.requires_grad_()
    v, r = edge_vectors(x, index, shifts)
    assert (v.shape, r.shape) == ((0, 3), (0, 1))
    assert not torch.autograd.grad(v.sum() + r.sum(), x)[0].any()


def test_strided_and_expanded_tensors(device):
    x, index, shifts = graph(6, 20, torch.float64, device)
    wide, turned = torch.stack((x, x), dim=2)[:, :, 0], index.t().contiguous().t()
    assert not wide.is_contiguous()
    leaf = wide.detach().requires_grad_()
    v, r = edge_vectors(leaf, turned, shifts)
    assert torch.equal(v, edge_vectors(x, index, shifts)[0])
    (got,) = torch.autograd.grad(v.sum() + r.sum(), leaf)  # expanded cotangents
    want = derivatives_of_sum(x, index, shifts)
    torch.testing.assert_close(got, want)


def derivatives_of_sum(x, index, shifts) -> torch.Tensor:
    leaf = x.detach().clone().requires_grad_()
    v, r = PLAIN(leaf, index, shifts)
    return torch.autograd.grad(v.sum() + r.sum(), leaf)[0]


def test_opcheck(device):
    x, index, shifts = graph(5, 7, torch.float64, device)
    x, shifts = x.requires_grad_(), shifts.requires_grad_()
    torch.library.opcheck(ops._vectors, (x, index, shifts))
    v, r = (t.detach().requires_grad_() for t in edge_vectors(x, index, shifts))
    gv, gr = torch.randn_like(v).requires_grad_(), torch.randn_like(r).requires_grad_()
    torch.library.opcheck(ops._vectors_bwd, (gv, gr, v, r, index, 5))


def test_bad_arguments_are_named(device):
    x, index, shifts = graph(5, 7, torch.float64, device)
    far = index.clone()
    far[1, 3] = 5
    for error, words, change in (
        (ValueError, r"x must have shape \[N, 3\]", {"x": x[:, :2]}),
        (ValueError, r"shifts must have shape \[E, 3\]", {"shifts": shifts[:, 0]}),
        (TypeError, "x must be float64 or float32", {"x": x.half()}),
        (TypeError, "shifts must have x's dtype", {"shifts": shifts.float()}),
        (TypeError, "edge_index must be int64 or int32", {"edge_index": index.double()}),
        (ValueError, r"edge_index must have shape \[2, E\]", {"edge_index": index.t()}),
        (ValueError, r"edge_index must have shape \[2, 7\]", {"edge_index": index[:, :6]}),
        (ValueError, r"edge_index\[1\] \(receiver\) holds 5", {"edge_index": far}),
        (ValueError, "shifts is on meta", {"shifts": shifts.to("meta")}),
    ):
        with pytest.raises(error, match=words):
            edge_vectors(**({"x": x, "edge_index": index, "shifts": shifts} | change))


def model_and_data(device: torch.device) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    plain = mm.build("off-medium", device=device, channels=8, elements=(1, 6, 8))
    return plain, mm.random_batch(plain)


def kernel_calls(before) -> int:
    """How often the op ran since, on whichever backend this test is for."""
    return sum(n for (op, _), n in (dispatch.calls - before).items() if op == "edge_vectors_fwd")


def places() -> set:
    return {place.get_edge_vectors_and_lengths for place in (utils, models)}


@pytest.mark.torchscript
@pytest.mark.usefixtures("reference_path")
def test_an_accelerated_model_takes_the_kernel_and_leaves_mace_alone(device):
    plain, data = model_and_data(device)
    fast = mt.accelerate(plain)
    row = next(row for row in mt.report(fast).rows if row.block == "edge vectors")
    assert "edge_vectors" in row.runs
    want = plain(mm.cast(data, plain))["forces"]
    for model in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), mt.accelerate(fast)):
        before = dispatch.calls.copy()
        torch.testing.assert_close(model(mm.cast(data, plain))["forces"], want)
        assert kernel_calls(before) == 1
        assert places() == {PLAIN}
    before = dispatch.calls.copy()
    for model in (plain, mt.restore(fast), mt.accelerate(plain, deterministic=True)):
        torch.testing.assert_close(model(mm.cast(data, plain))["forces"], want)
    assert not kernel_calls(before)
    assert "MACE's own code" in mt.report(mt.accelerate(plain, deterministic=True)).rows[0].runs


@pytest.mark.torchscript
@pytest.mark.usefixtures("reference_path")
def test_stress_is_maces(device):
    plain, data = model_and_data(device)
    fast = mt.accelerate(plain)
    want, got = (model(mm.cast(data, plain), compute_stress=True) for model in (plain, fast))
    for name in ("forces", "stress", "virials"):
        torch.testing.assert_close(got[name], want[name])


@pytest.mark.torchscript
@pytest.mark.usefixtures("reference_path")
def test_an_error_in_the_model_leaves_mace_alone(device):
    plain, data = model_and_data(device)
    fast = mt.accelerate(plain)
    broken = {name: t for name, t in data.items() if name != "edge_index"}
    with pytest.raises(KeyError, match="edge_index"):
        fast(mm.cast(broken, plain))
    assert places() == {PLAIN}


@pytest.mark.torchscript
@pytest.mark.usefixtures("reference_path")
def test_threads_do_not_take_the_function_from_each_other(device):
    plain, data = model_and_data(device)
    first, second = mt.accelerate(plain), mt.accelerate(plain)
    inside, go_on, seen = threading.Event(), threading.Event(), []

    def wait(module, args):
        inside.set()
        go_on.wait(60)

    first.node_embedding.register_forward_pre_hook(wait)
    thread = threading.Thread(target=lambda: seen.append(first(mm.cast(data, plain))["energy"].detach()))
    thread.start()
    assert inside.wait(60)
    want = second(mm.cast(data, plain))["energy"].detach()
    assert places() == {standin.vectors_and_lengths}, "the first model is still running"
    go_on.set()
    thread.join(60)
    torch.testing.assert_close(seen[0], want)
    assert places() == {PLAIN}


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_kernels_compile_without_spills(target):
    for name, stats in offline.compile_cases(kernels.offline_cases(target), target).items():
        assert (stats.spills, stats.stack) == (0, 0), (name, stats)
