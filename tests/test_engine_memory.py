"""Memory of the engine: weights made in shares, steps that do not fit, nothing that stays behind a step."""

import itertools
import weakref

import ase
import mace_models as mm
import numpy as np
import pytest
import torch
from test_engine import check, moved
from test_mace_parity import SMALL, e3nn_model, fast_model

from mace_triton.engine import Engine
from mace_triton.engine.buckets import bucket
from mace_triton.engine.memory import Footprint
from mace_triton.engine.shares import shares
from mace_triton.ops.edge_filter import Edges

pytestmark = pytest.mark.torchscript


@pytest.mark.parametrize("name", ["mp-large", "off-small", "agnostic", "density", "three-layers"])
def test_too_little_memory_for_all_weights(name, device, reference_path):
    """Weights are made in shares, however few receivers each has; idle atoms and moved ones change nothing."""
    model, structures = e3nn_model(name, device), mm.random_structures(SMALL["elements"], seed=1)
    found = Engine(fast_model(name, device), structures, memory=1, skin=0.6)
    assert found.shares == 1  # until atoms are looked at
    check(found, model, structures)
    assert found.shares > 2
    for by in (0.05, 0.4):
        check(found, model, moved(structures, by))
    assert found.rebuilds == 2
    enough = Engine(fast_model(name, device), structures, memory=1 << 40)
    check(enough, model, structures)
    assert enough.shares == 1


def test_shares_hold_all_receivers(device):
    """Cut by the edges that there are, two thirds of the candidates."""
    counts = 150 * torch.tensor([3, 0, 0, 9, 1, 40, 0, 0, 2, 2, 2, 2, 0, 7, 1, 0, 0])
    ptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32).to(device)
    near = torch.arange(int(ptr[-1]), device=device) % 3 > 0
    for number in (2, 3, 5, 256):
        found = shares(ptr, near, number)
        assert 1 < len(found) <= number
        assert (found.bounds[0], found.bounds[-1]) == (0, len(counts))
        assert all(bound % 4 == 0 for bound in found.bounds[:-1])  # aligned to 16 bytes
        most = max(int(counts[first:last].sum()) for first, last in itertools.pairwise(found.bounds)) * 2 // 3
        assert found.room == bucket(most)
        assert found.hold(ptr, near)
        assert not found.hold(ptr, torch.ones_like(near))
    for some, room in ((near, bucket(300)), (near & False, bucket(0))):
        found = shares(ptr[:3], some, 9)
        assert (found.bounds, found.room) == ([0, 2], room)


@pytest.mark.parametrize("number", [2, 3, 256])
@pytest.mark.parametrize("spare", [0, 300])
def test_shares_know_the_rows_of_their_edges(number, spare, device):
    """Of each edge the row of weights that are made for its pair; spare places are idle edges."""
    counts = torch.tensor([7, 0, 0, 9, 130, 40, 0, 0, 2, 2, 2, 2, 0, 70, 1, 0, 0])
    ptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32).to(device)
    edges = int(ptr[-1])
    found = shares(ptr, torch.ones(edges, dtype=torch.bool, device=device), number)
    idle = ptr.new_full((1,), edges)
    pair = torch.randint(1000, (edges + spare,), dtype=torch.int32, device=device)
    step = Edges(*[None] * 3, torch.cat((ptr, idle)), None, pair, *[None] * 3)
    assert not bool(found.overrun(step))
    parts = found.of(step)
    assert [(part.first, part.last) for part in parts] == list(itertools.pairwise(found.bounds))
    for part in parts:
        assert part.row_ptr.equal(ptr[part.first : part.last + 1])
        assert part.pair.shape == pair.shape
        assert 0 <= int(part.pair.min()) <= int(part.pair.max()) < len(part.place) <= found.room
        own = slice(int(ptr[part.first]), int(ptr[part.last]))
        assert part.place[part.pair[own].long()].equal(pair[own])
    longest = max(int(ptr[last] - ptr[first]) for first, last in itertools.pairwise(found.bounds))
    found.room = longest
    assert not bool(found.overrun(step))
    found.room = longest - 1
    assert bool(found.overrun(step))


@pytest.mark.parametrize("name", ["mp-small", "mp-large"])
def test_a_share_that_gets_too_many_edges_is_cut_anew(name, device, reference_path, monkeypatch):
    """Second neighbours of some chains come, of others go: the step has room for its edges, and a share has not."""
    monkeypatch.setattr(Footprint, "shares", lambda self, memory: 3)
    model = e3nn_model(name, device)
    chain = np.arange(8)[:, None] * np.array([[float(model.r_max), 0.0, 0.0]])

    def chains(first: float, others: float) -> list[ase.Atoms]:
        return [ase.Atoms("O8", spacing * chain) for spacing in (*[first] * 10, *[others] * 20)]

    found, evaluated = Engine(fast_model(name, device), chains(0.505, 0.495), memory=1, skin=3.0), []
    check(found, model, chains(0.505, 0.495))
    assert (found.shares, found.edges) == (3, 10 * 14 + 20 * 26)
    capacity, room, run = found.capacity, found._parts.room, found._run
    found._run = lambda: (run(), evaluated.append(found._got[-2:].tolist()))[0]
    check(found, model, chains(0.495, 0.505))
    edges = 10 * 26 + 20 * 14
    assert [(count, moved > 1) for count, moved in evaluated] == [(edges, True), (edges, False)]
    assert (found.shares, found.capacity, found.rebuilds) == (3, capacity, 2)
    assert not bool(found._parts.overrun(found._edges(found._moved())))
    assert found._parts.room == room


def test_shares_have_room_for_edges_at_the_cutoff(device, reference_path, monkeypatch):
    """Just beyond the model's cutoff they weigh nothing, but take places."""
    monkeypatch.setattr(Footprint, "shares", lambda self, memory: 3)
    model = e3nn_model("mp-small", device)
    spacing = (1 + 5e-7) * float(model.r_max)
    chains = [ase.Atoms("O8", np.arange(8)[:, None] * np.array([[spacing, 0.0, 0.0]])) for _ in range(30)]
    found = Engine(fast_model("mp-small", device), chains, memory=1)
    check(found, model, chains)
    assert (found.shares, found.edges, found.rebuilds) == (3, 30 * 14, 1)


def held_by(thing: object, seen: set[int]) -> set[torch.Tensor]:
    """Tensors that an object's attributes and their items lead to, modules left out."""
    if id(thing) in seen or isinstance(thing, torch.nn.Module):
        return set()
    seen.add(id(thing))
    if torch.is_tensor(thing):
        return {thing}
    parts = thing if isinstance(thing, (list, tuple)) else getattr(thing, "__dict__", {}).values()
    return set().union(*(held_by(part, seen) for part in parts))


@pytest.mark.parametrize("memory", [None, 1])
@pytest.mark.parametrize("name", ["mp-large", "density"])
def test_nothing_of_a_step_is_kept_beside_its_results(name, memory, device, reference_path):
    """A graph's memory is taken beside what a step before it has left."""
    found = Engine(fast_model(name, device), mm.random_structures(SMALL["elements"], seed=1), memory=memory, skin=0.6)
    found.step()
    chain = found._write_out()
    before = held_by(chain, set())
    chain(found._moved(), found._edges(found._moved()))
    assert len(before) > 20
    assert {id(tensor) for tensor in held_by(chain, set())} == {id(tensor) for tensor in before}


def test_weights_of_one_share_are_gone_before_the_next(device, reference_path, monkeypatch):
    found = Engine(fast_model("mp-large", device), mm.random_structures(SMALL["elements"], seed=1), memory=1, skin=0.6)
    found.step()
    made, alive = [], []
    for layer in found._chain.layers:

        def forward(h: torch.Tensor, make=layer.last.forward) -> torch.Tensor:
            alive.append(sum(weights() is not None for weights in made))
            out = make(h)
            made.append(weakref.ref(out))
            return out

        monkeypatch.setattr(layer.last, "forward", forward)
    found._evaluate()
    assert len(made) == 3 * len(found._chain.layers) * found.shares
    assert max(alive) == 1  # a share's weights, when their slopes are made


def too_large(found: Engine, fits: int, monkeypatch) -> list[int]:
    """Makes steps in fewer than `fits` shares run out of memory; in how many they were tried."""
    run, tried = found._run, []

    def limited() -> bool:
        tried.append(found.shares)
        if found.shares < fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much.")
        return run()

    monkeypatch.setattr(found, "_run", limited)
    return tried


def test_a_step_that_does_not_fit_is_taken_in_shares(device, reference_path, monkeypatch, caplog):
    model, structures = e3nn_model("mp-large", device), mm.random_structures(SMALL["elements"], seed=6)
    found = Engine(fast_model("mp-large", device), structures, skin=0.6)
    check(found, model, structures)
    tried = too_large(found, 3, monkeypatch)
    for by in (0.05, 0.4):
        check(found, model, moved(structures, by))
    assert tried[0] == 1
    assert found.shares == tried[-1] >= 3
    assert tried[:-2] == sorted(set(tried[:-2]))  # more and more, until it fits
    assert f"made in {found.shares} shares" in caplog.text


def test_too_little_memory_says_what_would_fit(device, reference_path, monkeypatch):
    atoms = mm.random_structures(SMALL["elements"], seed=6)[0]
    real = torch.cuda.get_device_properties(device) if device.type == "cuda" else None  # Triton asks for them, too
    for name, memory in (("mp-small", 2**10), ("mp-small", 2**50), ("nonlinear", 2**10)):
        card = type("Card", (), {"total_memory": memory, "__getattr__": lambda _, asked: getattr(real, asked)})()
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, card=card: card)
        found = Engine(fast_model(name, device), atoms)
        tried = too_large(found, 1 << 30, monkeypatch)
        with pytest.raises(torch.OutOfMemoryError, match=r"does not fit.* \(CUDA out of memory") as raised:
            found.step()
        assert ("would fit" in str(raised.value)) == (name == "mp-small" and memory == 2**10)
        assert len(tried) == 1 or name == "mp-small"
