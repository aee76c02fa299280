"""The torch-sim model against plain MACE in FP64: batches of different sizes, batches that come back, dynamics."""

import copy
from types import SimpleNamespace

import mace_models as mm
import numpy as np
import pytest
import torch
from test_mace_parity import EXACT, SMALL, close, e3nn_model

pytestmark = pytest.mark.torchscript
ts = pytest.importorskip("torch_sim")

from mace_triton import torchsim  # noqa: E402
from mace_triton.engine import engine  # noqa: E402
from mace_triton.ops import dispatch  # noqa: E402
from mace_triton.water import water_box  # noqa: E402


def boxes(count: int) -> list:
    """Periodic crystals of 5, 8, ... atoms: torch-sim has one periodicity for all systems of a batch."""
    return [mm.random_structures(SMALL["elements"], seed=n, n_atoms=5 + 3 * n)[0] for n in range(count)]


def state_of(structures, device: torch.device):
    return ts.initialize_state(structures, device=device, dtype=torch.float64)


def check(ours: torchsim.MACETritonModel, plain, structures, device) -> None:
    got = ours(state_of(structures, device))
    want = mm.evaluate(plain, mm.batch_of(plain, structures))
    for key in ("energy", "forces", "stress"):
        assert got[key].dtype == ours.dtype
        close(got[key], want[key], EXACT, key)


def test_batches_come_and_go(device, reference_path):
    plain = e3nn_model("mp-medium", device)
    ours = torchsim.MACETritonModel(plain, precision="fp64", device=device)
    dispatch.calls.clear()
    check(ours, plain, boxes(3), device)
    backend = "triton" if device.type == "cuda" else "reference"
    assert dispatch.calls["channelwise_tp_pairs_fwd", backend] > 0
    check(ours, plain, boxes(2), device)
    first = ours._engines[1][1]
    check(ours, plain, boxes(3), device)
    assert ours._engines[0][1] is first
    for count in (1, 4, 5, 6):
        check(ours, plain, boxes(count), device)
    assert len(ours._engines) == torchsim.ENGINES


@pytest.mark.parametrize("short", ["shares", "error"])
def test_earlier_batches_give_their_memory_to_a_new_one(short, device, reference_path, monkeypatch):
    plain = e3nn_model("mp-small", device)
    ours = torchsim.MACETritonModel(plain, precision="fp64", device=device)
    run = engine.Engine._run

    def limited(self) -> bool:
        if len(ours._engines) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self)

    if short == "error":
        monkeypatch.setattr(engine.Engine, "_run", limited)
        if device.type == "cpu":  # Triton asks for them, too
            monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=2**40))
    else:
        monkeypatch.setattr(engine, "unused", lambda _: 1 if len(ours._engines) > 1 else None)
    for count in (1, 2, 3):
        check(ours, plain, boxes(count), device)
        assert len(ours._engines) == 1
        assert ours._engines[0][1].shares == 1


def test_a_batch_that_comes_back_forgets_no_other(device, reference_path, monkeypatch):
    plain = e3nn_model("mp-small", device)
    ours = torchsim.MACETritonModel(plain, precision="fp64", device=device)
    monkeypatch.setattr(engine, "unused", lambda _: 1)  # in shares, alone or not
    for count in (2, 1):
        check(ours, plain, boxes(count), device)
    monkeypatch.setattr(engine, "unused", lambda _: None)
    check(ours, plain, boxes(2), device)
    check(ours, plain, boxes(1), device)
    check(ours, plain, boxes(2), device)
    assert len(ours._engines) == 2


def test_atoms_that_change_in_place_are_noticed(device, reference_path):
    plain = e3nn_model("mp-small", device)
    ours = torchsim.MACETritonModel(plain, precision="fp64", device=device)
    structures = boxes(2)
    state = state_of(structures, device)
    ours(state)
    ours(state)
    assert len(ours._engines) == 1
    other = SMALL["elements"][0]
    state.atomic_numbers[:2] = other
    structures[0].numbers[:2] = other
    want = mm.evaluate(plain, mm.batch_of(plain, structures))
    close(ours(state)["energy"], want["energy"], EXACT, "energy")


def test_a_model_is_copied_without_its_engines(device, reference_path):
    ours = torchsim.MACETritonModel(e3nn_model("mp-small", device), precision="fp64", device=device)
    structures = boxes(2)
    wanted = ours(state_of(structures, device))
    again = copy.deepcopy(ours)
    assert (len(ours._engines), again._engines) == (1, [])
    close(again(state_of(structures, device))["forces"], wanted["forces"], EXACT, "forces")


def test_results_are_the_callers(device, reference_path):
    """The next step must not change what an earlier one gave."""
    ours = torchsim.MACETritonModel(e3nn_model("mp-small", device), precision="fp64", device=device)
    structures = boxes(2)
    before = ours(state_of(structures, device))
    kept = {key: value.clone() for key, value in before.items()}
    for atoms in structures:
        atoms.rattle(0.1, seed=1)
    after = ours(state_of(structures, device))
    assert not torch.equal(after["forces"], kept["forces"])
    for key, value in kept.items():
        assert torch.equal(before[key], value)


def test_runs_dynamics(device, reference_path):
    """NVE of the shipped water model by torch-sim's own runner: its last forces are those of its last positions."""
    ours = torchsim.MACETritonModel("water", precision="fp64", device=device)
    integrator = getattr(getattr(ts, "Integrator", None), "nve", None) or ts.nve
    start = ts.initialize_state(water_box(2), device=device, dtype=torch.float64)
    final = ts.integrate(start, ours, integrator=integrator, n_steps=20, temperature=300.0, timestep=0.0005)
    assert (final.positions - start.positions).abs().max() > 1e-3
    found = ours(final)
    close(found["forces"], final.forces, EXACT, "forces")
    close(found["energy"], final.energy, EXACT, "energy")
    assert len(ours._engines) == 1
    assert ours._engines[0][1].rebuilds < 10  # of 22 steps, with atoms that start far from rest


def test_bad_input_is_named(device, reference_path):
    ours = torchsim.MACETritonModel(e3nn_model("mp-small", device), precision="fp64", device=device)
    good = state_of(boxes(2), device)
    fields = {name: getattr(good, name) for name in ("positions", "atomic_numbers", "row_vector_cell", "pbc")}
    with pytest.raises(ValueError, match="system_idx must be sorted"):
        ours(SimpleNamespace(**fields, system_idx=good.system_idx.flip(0)))
    with pytest.raises(ValueError, match="device"):
        torchsim.MACETritonModel("water", device="tpu")
    assert np.isfinite(ours(state_of(boxes(1), device))["energy"].item())
