"""Memory of the engine: weights made in shares, steps that do not fit, nothing that stays behind a step."""

import weakref

import mace_models as mm
import pytest
import torch
from test_engine import check, moved
from test_mace_parity import SMALL, e3nn_model, fast_model

from mace_triton.engine import Engine

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
    assert len(made) == 3 * sum(len(layer.parts) for layer in found._chain.layers)
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
