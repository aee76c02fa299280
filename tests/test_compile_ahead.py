"""A model's first call of a kind comes twice: first of a copy, for what it compiles, and only once is it to be seen."""

import copy
import pickle

import mace_models as mm
import pytest
import torch
from test_mace_parity import EXACT, SMALL, close, e3nn_model, fast_model
from torch.utils.hooks import RemovableHandle
from triton.runtime.jit import JITFunction

import mace_triton as mt
from mace_triton.nn import compile_ahead
from mace_triton.nn.compile_ahead import CompileAhead
from mace_triton.ops import dispatch

pytestmark = [pytest.mark.torchscript, pytest.mark.usefixtures("reference_path")]


@pytest.fixture
def ahead(monkeypatch) -> list[dict]:
    """Flags of the calls made ahead, by models on a CPU too."""
    made, compile_now, device = [], compile_ahead._compile, compile_ahead._device

    def noticed(model, data, args, kwargs, flags):
        made.append(flags)
        compile_now(model, data, args, kwargs, flags)

    monkeypatch.setattr(compile_ahead, "_compile", noticed)
    monkeypatch.setattr(compile_ahead, "_device", lambda data: device(data) or data["positions"].device)
    return made


def new_model(device) -> torch.nn.Module:
    return copy.deepcopy(fast_model("mp-medium", device))


def hooks_of(model) -> list[CompileAhead]:
    return [hook for hook in model._forward_pre_hooks.values() if isinstance(hook, CompileAhead)]


def test_each_kind_of_call_once_and_with_the_same_results(device, ahead):
    plain, fast = e3nn_model("mp-medium", device), new_model(device)
    batch = mm.random_batch(plain)
    for _ in range(2):
        for flags in ({}, {"compute_stress": True}, {"training": True}):
            want, got = (model(mm.cast(batch, plain), **flags) for model in (plain, fast))
            for key in ("energy", "forces", *(["stress"] if flags.get("compute_stress") else [])):
                close(got[key].detach(), want[key].detach(), EXACT, key)
    assert ahead == [{}, {"compute_stress": True}, {"training": True}]
    fast(mm.cast(batch, plain), True)
    fast(data=mm.cast(batch, plain), compute_stress=True)
    assert len(ahead) == 3  # by name or in order, it is the same call
    with torch.no_grad():
        fast(mm.cast(batch, plain), compute_force=False)
    assert ahead[3:] == [{"compute_force": False}]


def test_the_call_ahead_leaves_no_trace(device, ahead):
    fast = new_model(device)
    batch, seen, gradients = mm.random_batch(fast), [], []
    inner = fast.interactions[0].linear_up
    inner.register_forward_hook(lambda *_: seen.append("forward"))
    for p in fast.parameters():
        p.register_hook(lambda _: gradients.append("gradient"))
    state = {key: value.clone() for key, value in fast.state_dict().items()}
    given = mm.cast(batch, fast)
    before, random = dispatch.calls.copy(), torch.get_rng_state()
    out = fast(given, training=True)
    assert len(ahead) == 1
    assert seen == ["forward"]
    assert not gradients
    assert all(p.grad is None for p in fast.parameters())
    first, before = dispatch.calls - before, dispatch.calls.copy()
    fast(mm.cast(batch, fast), training=True)
    assert first == dispatch.calls - before
    assert first.total() > 0
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[key]) for key, value in fast.state_dict().items())
    out["forces"].sum().backward()
    assert gradients


def test_what_is_likely_to_be_asked_next_is_done_ahead(device, ahead, monkeypatch):
    """The way back through the forces of a training step, and that through energies which a call leaves to its user."""
    run, alone = [], compile_ahead._alone

    def noticed(model):
        copied = alone(model)
        for number, p in enumerate(copied.parameters()):
            p.register_hook(lambda _, number=number: run.append(number))
        return copied

    monkeypatch.setattr(compile_ahead, "_alone", noticed)
    fast = new_model(device)
    data = mm.random_batch(fast)
    fast(mm.cast(data, fast), training=True)
    assert len(set(run)) > 10
    asked, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **how: asked.append(how) or grad(*args, **how))
    given = mm.cast(data, fast)
    given["positions"].requires_grad_(True)
    fast(given, compute_force=False)
    assert asked == [{"allow_unused": True}]


def test_no_call_ahead(device, ahead, monkeypatch):
    """Hessians, LAMMPS, and nothing on a GPU that could compile."""
    fast = new_model(device)
    data = mm.random_batch(fast, n_atoms=2)
    assert fast(mm.cast(data, fast), compute_hessian=True)["hessian"] is not None
    for wrong in ({"lammps_mliap": True}, {"no_such_flag": 1}):
        with pytest.raises((TypeError, KeyError, AttributeError)):
            fast(mm.cast(data, fast), **wrong)
    with pytest.raises((TypeError, KeyError, AttributeError)):
        fast()
    assert ahead == []
    monkeypatch.undo()
    cpu = new_model(torch.device("cpu"))
    cpu(mm.cast(mm.random_batch(cpu), cpu))
    assert [hook.seen for hook in hooks_of(cpu)] == [set()]


def test_an_error_is_that_of_the_call_itself(device, ahead):
    fast = new_model(device)
    data = mm.cast(mm.random_batch(fast), fast)
    data["edge_index"] = data["edge_index"] + 1000
    with pytest.raises((ValueError, IndexError, RuntimeError)) as ours:
        fast(dict(data))
    compile_ahead.detach(fast)
    with pytest.raises(type(ours.value)) as plain:
        fast(dict(data))
    assert str(plain.value) == str(ours.value)
    assert len(ahead) == 1


def test_copies_begin_anew_and_restored_models_have_none(device, ahead):
    fast = new_model(device)
    data = mm.random_batch(fast)
    fast(mm.cast(data, fast))
    (hook,) = hooks_of(fast)
    assert len(hook.seen) == 1
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), mt.accelerate(fast)):
        assert [h.seen for h in hooks_of(other)] == [set()]
    assert next(iter(fast._forward_pre_hooks.values())) is hook  # before MACE's functions are changed
    restored = mt.restore(fast)
    assert not restored._forward_pre_hooks
    assert not restored._forward_pre_hooks_with_kwargs
    assert hooks_of(mt.accelerate(restored, deterministic=True))


def test_hooks_given_to_a_loaded_model_leave_ours_in_place(device, ahead, monkeypatch):
    """In a process that loads it PyTorch numbers hooks from zero, as it did where the model was accelerated."""
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    written = pickle.dumps(mt.accelerate(e3nn_model("mp-medium", device)))
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    loaded, seen = pickle.loads(written), []
    ours = list(loaded._forward_pre_hooks.values())
    for _ in range(5):
        loaded.register_forward_pre_hook(lambda model, args: seen.append(len(args)))
    assert list(loaded._forward_pre_hooks.values())[: len(ours)] == ours
    loaded(mm.cast(mm.random_batch(loaded), loaded))
    assert seen == [1] * 5
    assert len(ahead) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="without a GPU nothing is compiled")
@pytest.mark.parametrize("training", [False, True])
def test_a_models_call_meets_no_kernel_that_is_not_compiled(device, training, batches, monkeypatch):
    """Numbers of channels that no other test has, and the first call's results."""
    met, compile_now = [], JITFunction._do_compile
    monkeypatch.setattr(JITFunction, "_do_compile", lambda self, *how: met.append(self) or compile_now(self, *how))
    channels = 21 if training else 23
    plain, fast = (make("mp-medium", device, channels=channels) for make in (e3nn_model, fast_model))
    structures = mm.random_structures(SMALL["elements"], seed=1)
    found = []
    for model in (plain, fast):
        out = model(mm.batch_of(model, structures), training=training)
        found.append([out["energy"].detach(), out["forces"].detach()])
        if training:
            (out["energy"].sum() + out["forces"].square().sum()).backward()
            found[-1] += [model.interactions[0].linear_up.weight.grad, model.products[1].linear.weight.grad]
    for got, want in zip(*reversed(found), strict=True):
        close(got, want, EXACT, "results")
    assert len(batches) == 1
    assert batches[0] > 3
    assert len(met) == batches[0]  # each once, in `together`
