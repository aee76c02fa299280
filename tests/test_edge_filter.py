"""Edges within the cutoff out of candidates: kernels against the formulas and against a plain search."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mace_triton import reference_edge_filter as reference
from mace_triton.engine.neighbours import candidates, in_order, padded
from mace_triton.kernels import edge_filter as kernels
from mace_triton.kernels import offline
from mace_triton.ops import dispatch
from mace_triton.ops.edge_filter import Candidates, edge_filter

CUTOFF, FAR = 2.0, 6.0


def twins(receiver: torch.Tensor, sender: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """The twin of each pair, in the order in which they are given."""
    order, twin = in_order(receiver, sender, unit, 1 + max([0, *receiver.tolist(), *sender.tolist()]))
    return torch.empty_like(twin).index_copy_(0, order, order[twin])


def candidates_of(x: torch.Tensor, nodes: int, degree: int, spare: int) -> Candidates:
    """Random candidates: `degree` a node but for the first, which has none; duplicates and self pairs among them."""
    counts = torch.full((nodes,), degree)
    counts[0] = 0
    ptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    total = int(ptr[-1])
    sender = torch.randint(nodes, (total + spare,)).to(torch.int32)
    unit = torch.randint(-1, 2, (total + spare, 3)).to(x.dtype)
    rows = torch.repeat_interleave(torch.arange(nodes), counts, output_size=total)
    twin = torch.arange(total + spare)
    twin[:total] = twins(rows, sender[:total].long(), unit[:total])
    return Candidates(*(t.to(x.device) for t in (ptr, sender, 1.5 * unit, unit, twin.to(torch.int32))))


def filtered(x: torch.Tensor, pairs: Candidates, capacity: int, idle: int, was=None, places: int | None = None):
    return edge_filter(
        x,
        x if was is None else was,
        pairs,
        x.new_full((1,), 0.5),
        cutoff=CUTOFF,
        capacity=capacity,
        pairs=capacity + 1 if places is None else places,
        idle=idle,
        far=FAR,
    )


def search(x: torch.Tensor, pairs: Candidates) -> list[tuple]:
    """(sender, receiver, unit shift) of every near candidate, one after another."""
    found = []
    for i in range(pairs.ptr.shape[0] - 1):
        for k in range(int(pairs.ptr[i]), int(pairs.ptr[i + 1])):
            s = int(pairs.sender[k])
            if (x[i] - x[s] + pairs.shift[k]).norm() < CUTOFF:
                found.append((s, i, *pairs.unit_shift[k].tolist()))
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("room", [0, 1, 70, 500, -3])
def test_finds_what_a_search_finds(dtype, room, device):
    nodes, idle = 9, 3
    x = torch.randn(nodes + idle, 3, dtype=dtype, device=device)
    pairs = candidates_of(x, nodes, 150, spare=20)
    wanted = search(x, pairs)
    capacity = len(wanted) + room
    dispatch.calls.clear()
    edges = filtered(x, pairs, capacity, idle)
    assert set(dispatch.calls) == {("edge_filter", "triton")}
    assert int(edges.count) == len(wanted)
    assert float(edges.moved) == 0
    kept = min(capacity, len(wanted))
    got = [(*pair, *unit) for pair, unit in zip(edges.edge_index.T.tolist(), edges.unit_shifts.tolist(), strict=True)]
    assert got[:kept] == wanted[:kept]
    torch.testing.assert_close(edges.shifts[:kept], 1.5 * edges.unit_shifts[:kept])
    pads = edges.edge_index[:, kept:]
    assert torch.equal(pads[0], pads[1])
    assert ((pads >= nodes) & (pads < nodes + idle)).all()
    assert (edges.shifts[kept:].norm(dim=1) == FAR).all()
    receivers = edges.edge_index[1]
    ptr = torch.searchsorted(receivers.contiguous(), torch.arange(nodes + idle + 1, device=device))
    assert torch.equal(edges.row_ptr.long(), ptr.clamp(max=kept))
    assert torch.equal(edges.plan(torch.arange(capacity, device=device)).receiver_ptr.long(), ptr)
    assert torch.equal(edges.sender.long(), edges.edge_index[0])
    check_pairs(edges, kept)
    for one, two in zip(
        edges,
        reference.edge_filter(x, x, tuple(pairs), x.new_full((1,), 0.5), CUTOFF, capacity, capacity + 1, idle, FAR),
        strict=True,
    ):
        assert torch.equal(one, two)


def check_pairs(edges, kept: int) -> None:
    """Edges share a pair exactly if one is the other's way back; every pair knows one of its edges."""
    lines = [(*ends, *unit) for ends, unit in zip(edges.edge_index.T.tolist(), edges.unit_shifts.tolist(), strict=True)]
    backs = [(r, s, *(-u for u in unit)) for s, r, *unit in lines]
    by_pair: dict[int, list[int]] = {}
    for number, pair in enumerate(edges.pair[:kept].tolist()):
        by_pair.setdefault(pair, []).append(number)
    for members in by_pair.values():
        assert len(members) <= 2
        assert len(members) == 1 or lines[members[0]] == backs[members[1]]
    alone = [members[0] for members in by_pair.values() if len(members) == 1]
    for number in alone if kept == int(edges.count) else ():  # its way back is not there, or there several times
        same = backs[number] == lines[number]
        assert same or lines[:kept].count(backs[number]) != 1 or lines[:kept].count(lines[number]) != 1
    first = edges.edge_of.tolist()
    for pair, members in by_pair.items():
        assert first[pair] in members
    assert (edges.pair[kept:] == len(first) - 1).all()
    assert first[-1] == edges.pair.shape[0] - 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_full_list_has_half_as_many_pairs(dtype, device):
    x = 4.0 * torch.rand(30, 3, dtype=dtype, device=device)
    cells, periodic = 4.0 * torch.eye(3, dtype=torch.float64, device=device)[None], torch.ones(1, 3, dtype=torch.bool)
    found, is_near = candidates(x[:28].double(), cells, periodic, [28], 3.0, CUTOFF)
    assert (found.twin != torch.arange(len(found.twin), device=device)).all()
    assert is_near.equal(neighbour_vectors(x, found).norm(dim=1) < CUTOFF)
    near = int(is_near.sum())
    pairs = padded(found, len(found.sender) + 5)
    pairs = pairs._replace(shift=pairs.shift.to(dtype), unit_shift=pairs.unit_shift.to(dtype))
    edges = filtered(x, pairs, near + 10, 2, places=near // 2 + 1)
    assert int(edges.count) == near
    check_pairs(edges, near)
    assert int(edges.pair[:near].max()) == near // 2 - 1


def neighbour_vectors(x: torch.Tensor, found: Candidates) -> torch.Tensor:
    receiver = torch.repeat_interleave(found.ptr.diff().long())
    return x[receiver] - x[found.sender.long()] + found.shift.to(x.dtype)


def test_of_pairs_that_are_listed_twice_one_has_a_twin():
    ends = torch.tensor([0, 1, 1, 2, 2, 0]), torch.tensor([1, 0, 0, 2, 2, 1])
    unit = torch.zeros(6, 3)
    unit[3, 0], unit[4, 0] = 1.0, -1.0
    found = twins(*ends, unit).tolist()
    assert found[3:5] == [4, 3]
    assert all(found[found[k]] == k for k in range(6))
    assert sum(found[k] != k for k in (0, 1, 2, 5)) == 2
    assert twins(*(e[:0] for e in ends), unit[:0]).tolist() == []


def test_pairs_too_many_to_number_come_in_rows_without_twins():
    ends = torch.tensor([2, 0, 1, 0, 2]), torch.tensor([0, 2, 1, 1, 0])
    unit = torch.zeros(5, 3)
    unit[0, 0], unit[1, 0] = 1e6, -1e6  # 2e6 + 1 unit shifts a direction
    order, twin = in_order(*ends, unit, atoms=3)
    assert order.tolist() == [1, 3, 2, 0, 4]
    assert twin.tolist() == list(range(5))


@pytest.mark.parametrize("capacity", [300, 5])
def test_idle_nodes_share_the_idle_edges(capacity, device):
    """As many each, and none in a row, so that no program walks them however many there are."""
    x = torch.zeros(2 + 4, 3, device=device)
    x[1] = 100.0
    pairs = candidates_of(x, 2, 1, spare=0)
    edges = filtered(x, pairs, capacity, 4)
    spare, each = capacity - int(edges.count), -(-(capacity - int(edges.count)) // 4)
    assert edges.row_ptr[2:].tolist() == [int(edges.count)] * 5
    rows = edges.plan(torch.arange(capacity, device=device)).receiver_ptr.diff().tolist()[2:]
    assert sum(rows) == spare
    assert rows[0] == each
    assert max(rows) == each


@pytest.mark.parametrize(
    ("far", "moved"), [(0.0, 0), (0.35, 0), (0.36, 0.5184), (0.49, 0.9604), (0.51, 2), (float("nan"), 2)]
)
def test_notices_atoms_that_left_their_place(far, moved, device):
    """How far the one that went furthest has gone; others that go less change nothing."""
    x = torch.randn(6, 3, device=device)
    was, pairs = x.clone(), candidates_of(x, 5, 4, spare=0)
    was[3, 0] += 0.5 * far
    was[4, 1] += far
    found = filtered(x, pairs, 50, 1, was).moved
    assert float(found) == pytest.approx(moved, rel=1e-5)
    want = reference.edge_filter(x, was, tuple(pairs), x.new_full((1,), 0.5), CUTOFF, 50, 51, 1, FAR)[-1]
    assert want.dtype == found.dtype
    torch.testing.assert_close(found, want)
    idle = x.clone()
    idle[5] += 10.0  # an idle atom, which nobody asks
    assert float(filtered(x, pairs, 50, 1, idle).moved) == 0


def test_without_a_skin_who_stays_has_not_moved(device):
    x = torch.randn(6, 3, device=device)
    pairs, still, was = candidates_of(x, 5, 4, spare=0), x.new_zeros(1), x.clone()
    was[2, 2] += 1e-3
    for before, moved in ((x, 0), (was, 2)):
        found = edge_filter(x, before, pairs, still, cutoff=CUTOFF, capacity=50, pairs=51, idle=1, far=FAR)
        assert float(found.moved) == moved


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_size(data, device):
    nodes, idle, degree = (data.draw(st.integers(1, high)) for high in (6, 5, 300))
    spare, capacity = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 400))
    x = torch.randn(nodes + idle, 3, device=device)
    pairs = candidates_of(x, nodes, degree, spare)
    want = reference.edge_filter(x, x, tuple(pairs), x.new_full((1,), 0.5), CUTOFF, capacity, capacity + 1, idle, FAR)
    for one, two in zip(filtered(x, pairs, capacity, idle), want, strict=True):
        assert torch.equal(one, two)


def test_bad_input_is_named(device):
    x = torch.randn(4, 3, device=device)
    pairs = candidates_of(x, 3, 2, spare=0)
    with pytest.raises(ValueError, match="capacity, pairs and idle"):
        filtered(x, pairs, 0, 1)
    with pytest.raises(ValueError, match="x and was"):
        filtered(x[:2], pairs, 5, 1)
    with pytest.raises(ValueError, match="must all be float32 or all float64"):
        filtered(x.double(), pairs, 5, 1)
    with pytest.raises(ValueError, match="must be int32"):
        filtered(x, pairs._replace(sender=pairs.sender.long()), 5, 1)
    with pytest.raises(ValueError, match="twin"):
        filtered(x, pairs._replace(twin=pairs.twin[1:]), 5, 1)
    with pytest.raises(ValueError, match="shift and unit_shift"):
        filtered(x, pairs._replace(shift=pairs.shift[1:]), 5, 1)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_kernels_compile_without_spills(target):
    for name, stats in offline.compile_cases(kernels.offline_cases(target), target).items():
        assert (stats.spills, stats.stack) == (0, 0), (name, stats)
