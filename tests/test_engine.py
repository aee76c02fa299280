"""The engine against plain MACE in FP64, step after step: any family, changing weights, any policy, the calculator."""

import copy
import itertools

import ase
import mace_models as mm
import numpy as np
import pytest
import torch
from ase.calculators.calculator import all_changes
from mace.calculators import MACECalculator
from test_mace_parity import EXACT, SMALL, close, e3nn_model, fast_model, rms

import mace_triton as mt
from mace_triton.engine import Engine, Results
from mace_triton.ops import dispatch

pytestmark = pytest.mark.torchscript
BY_AUTOGRAD = ("att-residual", "nonlinear")
"""Models with blocks that the engine's chain of kernels does not have."""


def check(found: Engine, model: torch.nn.Module, structures: list[ase.Atoms], head: int = 0) -> None:
    """A step at the structures' positions and cells gives what the plain model gives for them."""
    cells = np.array([atoms.cell.array for atoms in structures])
    got = found.step(np.concatenate([atoms.positions for atoms in structures]), cells)
    batch = mm.batch_of(model, structures)
    if "head" in batch:
        batch["head"] = torch.full_like(batch["head"], head)
    want = mm.evaluate(model, batch)
    for key in ("energy", "energies", "forces", "stress"):
        np.testing.assert_array_equal(getattr(found.on_host(), key), getattr(got, key).double().cpu().numpy())
    close(got.energy, want["energy"], EXACT, "energy")
    close(got.energies, want["node_energy"], EXACT, "energies")
    close(got.forces, want["forces"], EXACT, "forces")
    for number, atoms in enumerate(structures):
        if atoms.pbc.all():
            close(got.stress[number], want["stress"][number], EXACT, "stress")


def moved(structures: list[ase.Atoms], by: float, seed: int = 0) -> list[ase.Atoms]:
    rng = np.random.default_rng(seed)
    copies = [atoms.copy() for atoms in structures]
    for atoms in copies:
        atoms.positions += by * rng.normal(size=atoms.positions.shape).clip(-2, 2)
    return copies


@pytest.mark.parametrize("name", ["mp-large", "off-small", *mm.BLOCKS])
def test_follows_mace(name, device, reference_path):
    model, structures = e3nn_model(name, device), mm.random_structures(SMALL["elements"], seed=1)
    structures[0].positions += 7.3  # atoms may be anywhere, not only in their cell
    heads = getattr(model, "heads", None) or ["Default"]
    found = Engine(fast_model(name, device), structures, head=heads[-1], skin=0.6)
    dispatch.calls.clear()
    check(found, model, structures, len(heads) - 1)
    backend = "triton" if device.type == "cuda" else "reference"
    assert dispatch.calls["edge_filter", backend] > 0
    forward = "channelwise_tp_fwd" if name in BY_AUTOGRAD else "channelwise_tp_pairs_fwd"
    assert dispatch.calls[forward, backend] > 0
    assert bool(found.autograd_because) == (name in BY_AUTOGRAD)
    for seed in range(3):
        check(found, model, moved(structures, 0.05, seed), len(heads) - 1)
    assert found.rebuilds == 1
    assert found.captures == (1 if device.type == "cuda" else 0)
    check(found, model, moved(structures, 0.4), len(heads) - 1)
    assert found.rebuilds == 2


@pytest.mark.parametrize("present", [(3,), (9, 1), (1, 6, 7, 8, 11)])
def test_only_species_that_are_there_have_weights(present, device, reference_path):
    elements = (1, 3, 6, 7, 8, 9, 11)
    model = mm.build("mp-medium", device=device, channels=8, elements=elements)
    structures = mm.random_structures(present, seed=5)
    found = Engine(mt.accelerate(model, "fp64", strict=True), structures)
    check(found, model, structures)
    assert found._chain.layers[0].contraction.coef.shape[0] == max(4, {1: 1, 2: 2, 5: 7}[len(present)])


PARTS = ("radial_embedding", "spherical_harmonics", "interactions.1.conv_tp_weights", "readouts.0.linear")


@pytest.mark.parametrize("part", [*PARTS, "readouts.1.linear_2"])
def test_a_part_that_stayed_maces_is_not_written_out(part, device, reference_path):
    """The chain would run it as ours; MACE's forward runs it as it is."""
    model, fast = e3nn_model("mp-medium", device), copy.deepcopy(fast_model("mp-medium", device))
    parent, _, name = part.rpartition(".")
    setattr(fast.get_submodule(parent), name, copy.deepcopy(model.get_submodule(part)))
    atoms = mm.random_structures(SMALL["elements"], seed=7)[0]
    found = Engine(fast, atoms)
    check(found, model, [atoms])
    assert found.autograd_because


def test_positions_that_are_not_finite_are_refused_and_forgotten(device, reference_path):
    atoms = mm.random_structures(SMALL["elements"], seed=6)[0]
    model, found = e3nn_model("mp-small", device), Engine(fast_model("mp-small", device), atoms)
    check(found, model, [atoms])
    wrong = atoms.positions.copy()
    wrong[0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        found.step(wrong)
    check(found, model, [atoms])
    with pytest.raises(ValueError, match="not finite"):
        found.step(atoms.positions, np.full((1, 3, 3), np.inf))
    check(found, model, [atoms])


def test_a_step_that_cannot_be_recorded_runs_without(device, reference_path, monkeypatch):
    def refuse():
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    atoms = mm.random_structures(SMALL["elements"], seed=15)[0]
    found = Engine(fast_model("mp-small", device), atoms)
    found._recording = True  # on a CPU too
    monkeypatch.setattr(found, "_warm_up", lambda: None)
    monkeypatch.setattr(found, "_record", refuse)
    with pytest.warns(RuntimeWarning, match="kernel by kernel, slower: CUDA error: operation not permitted"):
        found.step()
    for seed in range(2):
        check(found, e3nn_model("mp-small", device), moved([atoms], 0.05, seed))
    assert found._graph is None


def test_weights_that_change_are_noticed(device, reference_path):
    plain = mm.build("mp-small", device=device, **SMALL)
    fast, atoms = mt.accelerate(plain, strict=True), mm.random_structures(SMALL["elements"], seed=7)[0]
    found = Engine(fast, atoms)
    check(found, plain, [atoms])
    for model in (plain, fast):
        with torch.no_grad():
            model.interactions[0].linear.weight.mul_(1.1)
            model.products[0].symmetric_contractions.contractions[0].weights_max.mul_(0.9)
    check(found, plain, [atoms])
    for model in (plain, fast):
        model.scale_shift.scale.mul_(1.2)
        weight = model.interactions[1].linear_up.weight
        model.interactions[1].linear_up.weight = torch.nn.Parameter(0.7 * weight.detach())
    check(found, plain, [atoms])
    other = mt.accelerate(mm.build("mp-small", device=device, seed=5, **SMALL), strict=True)
    plain.readouts[0], fast.readouts[0] = (mt.restore(other).readouts[0], other.readouts[0])
    check(found, plain, [atoms])
    assert all(p.requires_grad for p in fast.parameters())


def test_tables_are_made_once_for_the_same_weights(device, reference_path):
    fast = copy.deepcopy(fast_model("mp-small", device, "fp32"))
    atoms = mm.random_structures(SMALL["elements"], seed=7)[0]
    found = Engine(fast, atoms)
    before = found.step().forces.clone()
    (one,) = found._tables.values()
    found._pairs = None
    found._find()
    (two,) = found._tables.values()
    assert two is one
    assert found._write_out().radial.tables[0] is one[0][0]
    with torch.no_grad():
        next(fast.interactions[0].conv_tp_weights.parameters()).mul_(1.3)
    after, fresh = found.step().forces.clone(), Engine(fast, atoms).step().forces
    (three,) = found._tables.values()
    assert three is not one
    close(after, fresh, 1e-5, "forces")
    assert rms(after - before) > 1e-2 * rms(before)


BLOCKS = mt.Precision("blocks", "fp32", "tf32", "fp32", contraction="bf16", features="bf16", product="tf32x3")


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", BLOCKS])
def test_policies_are_those_of_the_model(precision, device, reference_path):
    """As far from FP64 as the model's own forward: edges lie in another order here, and a rounding that falls the other
    way moves all that follows, so the two differ from each other by as much. Energies are added up in FP64. In FP32 the
    engine is nearer: it rounds differences of positions, MACE the positions, and that is most of the model's error."""
    errors = {key: [] for key in itertools.product(("engine", "model"), ("forces", "energies"))}
    exact = e3nn_model("mp-medium", device, channels=64)
    fast = fast_model("mp-medium", device, precision, channels=64)
    for seed in range(4):
        atoms = mm.random_structures(SMALL["elements"], seed=seed, n_atoms=12)[0]
        want, own = (mm.evaluate(model, mm.batch_of(model, [atoms])) for model in (exact, fast))
        got = Engine(fast, atoms).step()
        for ours, theirs in (("forces", "forces"), ("energies", "node_energy")):
            errors["engine", ours].append(getattr(got, ours).double() - want[theirs])
            errors["model", ours].append(own[theirs].double() - want[theirs])
        assert got.energy.dtype == torch.float64
        close(got.energy, got.energies.sum()[None], 1e-14, "energy")
    found = {key: rms(torch.cat(parts)) for key, parts in errors.items()}
    least = found["model", "forces"] / (8 if precision == "fp32" else 2)
    assert least <= found["engine", "forces"] <= 2 * found["model", "forces"]
    assert found["engine", "energies"] <= 2 * found["model", "energies"]


def test_readouts_in_low_precision_take_maces_way(device, reference_path):
    policy = mt.Precision("readout", "fp32", "tf32x3", "fp32", readout="bf16")
    found = Engine(fast_model("mp-medium", device, policy), mm.random_structures(SMALL["elements"], seed=1))
    found.step()
    assert found.autograd_because == "a readout with biases, or in low precision"


@pytest.mark.parametrize("name", ["mp-medium", *BY_AUTOGRAD])
def test_a_bond_is_as_exact_far_from_the_origin(name, device, reference_path):
    """FP32 positions 1000 angstrom away would have a spacing of 6e-5 angstrom."""
    exact, atoms = e3nn_model(name, device), mm.random_structures(SMALL["elements"], seed=4)[0]
    want = mm.evaluate(exact, mm.batch_of(exact, [atoms]))
    found = Engine(fast_model(name, device, "fp32"), atoms)
    for far in (0.0, 1000.0):
        got = found.step(atoms.positions + far)
        assert got.forces.dtype == torch.float32
        assert rms(got.forces - want["forces"]) < 3e-6 * rms(want["forces"])
        assert rms(got.stress - want["stress"]) < 3e-6 * rms(want["stress"])


def test_a_line_says_what_takes_maces_forward(device, reference_path, caplog):
    structures = mm.random_structures(SMALL["elements"], seed=1)
    for name, lines in (("mp-small", 0), ("nonlinear", 1)):
        caplog.clear()
        found = Engine(fast_model(name, device), structures, skin=0.6)
        for by in (0.0, 0.4, 0.8):
            found.step(np.concatenate([atoms.positions for atoms in moved(structures, by)]))
        assert [record.getMessage().count("interaction block") for record in caplog.records] == [1] * lines


def test_deterministic_models_repeat_their_bits(device, reference_path):
    """Step after step, new candidates included, by two engines and by the calculator."""
    exact = e3nn_model("mp-large", device)
    fast = mt.accelerate(exact, "fp32", deterministic=True)
    structures = mm.random_structures(SMALL["elements"], seed=1)
    engines = [Engine(fast, structures, skin=0.6) for _ in range(2)]
    for by in (0.0, 0.05, 0.4, 0.45):
        places = moved(structures, by)
        one, two = (found.step(np.concatenate([atoms.positions for atoms in places])) for found in engines)
        assert all(
            torch.equal(getattr(one, key), getattr(two, key)) for key in ("energy", "energies", "forces", "stress")
        )
        want = mm.evaluate(exact, mm.batch_of(exact, places))["forces"]
        assert rms(one.forces - want) < 1e-4 * rms(want)
    assert engines[0].rebuilds > 1
    assert "order of sums" in engines[0].autograd_because
    calculators = [
        mt.MACETritonCalculator(exact, precision="fp32", device=device.type, deterministic=True) for _ in "ab"
    ]
    for by in (0.0, 0.05):
        forces = [results_of(calculator, moved(structures[:1], by)[0])["forces"] for calculator in calculators]
        np.testing.assert_array_equal(*forces)
    assert [len(calculator.engines) for calculator in calculators] == [1, 1]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_runs_where_gradients_are_off(mode, device, reference_path):
    atoms = mm.random_structures(SMALL["elements"], seed=14)[0]
    fast = fast_model("mp-small", device)
    with mode():
        found = Engine(fast, atoms)
        first = found.step().forces.clone()
        later = found.step(atoms.positions + 1.0).forces.clone()
    want = mm.evaluate(e3nn_model("mp-small", device), mm.batch_of(e3nn_model("mp-small", device), [atoms]))["forces"]
    close(first, want, EXACT, "forces")
    close(later, want, EXACT, "forces")


def test_bad_input_is_named(device):
    fast = fast_model("mp-small", device)
    atoms = mm.random_structures(SMALL["elements"], seed=9)[0]
    with pytest.raises(ValueError, match="structures is empty"):
        Engine(fast, [])
    with pytest.raises(ValueError, match="atoms is empty"):
        Engine(fast, ase.Atoms())
    with pytest.raises(ValueError, match="does not know"):
        Engine(fast, ase.Atoms("Au"))
    with pytest.raises(ValueError, match="skin"):
        Engine(fast, atoms, skin=-1.0)
    with pytest.raises(ValueError, match="positions must have shape"):
        Engine(fast, atoms).step(atoms.positions[1:])
    with pytest.raises(ValueError, match="positions must have shape"):
        Engine(fast, atoms).step(atoms.positions.T)
    with pytest.raises(ValueError, match="cells must have shape"):
        Engine(fast, atoms).step(cells=atoms.cell.array)
    with pytest.raises(ValueError, match="head 'typo'"):
        Engine(fast, atoms, head="typo")
    with pytest.raises(ValueError, match="pass head="):
        Engine(fast_model("multi-head", device), atoms)


def results_of(calculator, atoms: ase.Atoms) -> dict:
    atoms = atoms.copy()
    atoms.calc = calculator
    atoms.get_forces()
    atoms.get_stress()
    return calculator.results


@pytest.mark.parametrize("members", [1, 2])
def test_calculator_gives_what_mace_gives(members, device, reference_path):
    """Everything in MACECalculator's results, in its shapes, for atoms of changing kinds and numbers."""
    models = [mm.build("mp-medium", device=device, seed=seed, **SMALL) for seed in range(members)]
    theirs = MACECalculator(models=models, device=device.type, default_dtype="float64")
    ours = mt.MACETritonCalculator(models, precision="fp64", device=device.type, skin=0.5)
    kinds = mm.random_structures(SMALL["elements"], seed=10) + mm.random_structures(SMALL["elements"], seed=11)
    for number, atoms in enumerate(kinds):
        for seed in range(3):  # the first of all by the engine, others from the second time on
            place, before = moved([atoms], 0.05, seed)[0], list(ours.engines)
            again = bool(before) and len(before[0].structures[0]) == len(atoms)
            want, got = results_of(theirs, place), results_of(ours, place)
            assert (before != ours.engines) == (not again and (seed > 0 or number == 0))
            assert got.keys() == want.keys()
            for key, value in want.items():
                if "stress" in key and not atoms.pbc.all():
                    continue  # MACE divides by the volume of a box of its own
                assert np.shape(got[key]) == np.shape(value), key
                scale = max(np.abs(value).max(), 1e-3)
                assert np.abs(np.asarray(got[key]) - value).max() <= EXACT * scale, key
    assert len(ours.engines) == members


CHANGES = {
    "positions": lambda atoms: atoms.positions.__setitem__((0, 0), np.nextafter(atoms.positions[0, 0], 9e9)),
    "cell": lambda atoms: atoms.set_cell(1.01 * atoms.cell.array),
    "numbers": lambda atoms: atoms.numbers.__setitem__(slice(None), atoms.numbers[::-1].copy()),
    "pbc": lambda atoms: atoms.set_pbc((True, True, False)),
    "initial_charges": lambda atoms: atoms.set_initial_charges(np.ones(len(atoms))),
    "initial_magmoms": lambda atoms: atoms.set_initial_magnetic_moments(np.ones(len(atoms))),
    "info": lambda atoms: atoms.info.update(field=np.ones(3)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_calculator_notices_every_change(name, device, reference_path):
    atoms = mm.random_structures(SMALL["elements"], seed=2)[0]
    atoms.info["field"] = np.zeros(3)
    ours = mt.MACETritonCalculator(e3nn_model("mp-small", device), precision="fp64", device=device.type)
    assert ours.check_state(atoms) == all_changes
    atoms.calc, asked = ours, []
    step = ours.calculate
    ours.calculate = lambda *arguments: (asked.append(1), step(*arguments))
    for _ in range(2):
        atoms.get_forces(), atoms.get_stress()
    assert len(asked) == 1
    CHANGES[name](atoms)
    assert ours.check_state(atoms) == [name]
    atoms.get_forces()
    assert len(asked) == 2
    assert ours.check_state(atoms) == []


def test_calculator_leaves_to_mace_what_reads_more_than_atoms(device, reference_path):
    model = mm.build("mp-small", device=device, **SMALL)
    atoms = mm.random_structures(SMALL["elements"], seed=12)[0]
    ours = mt.MACETritonCalculator(model, device=device.type)
    stepwise = mt.MACETritonCalculator(model, device=device.type, skin=None)
    for place in (atoms, moved([atoms], 0.05)[0]):
        wanted = results_of(ours, place)["forces"]
        np.testing.assert_allclose(results_of(stepwise, place)["forces"], wanted, rtol=0, atol=1e-10)
    assert stepwise.engines == []
    assert len(ours.engines) == 1
    ours.models[0].joint_embedding, ours.engines = torch.nn.Identity(), []
    ours.results = {}
    with pytest.raises(AttributeError, match="embedding_specs"):  # MACE asks which; an engine would not
        results_of(ours, atoms)
    assert ours.engines == []


def test_a_calculator_is_copied_without_its_engines(device, reference_path):
    model = mm.build("mp-small", device=device, **SMALL)
    atoms = mm.random_structures(SMALL["elements"], seed=12)[0]
    ours = mt.MACETritonCalculator(model, precision="fp64", device=device.type)
    for place in (atoms, moved([atoms], 0.05)[0]):
        wanted = results_of(ours, place)["forces"]
    again = copy.deepcopy(ours)
    assert (len(ours.engines), again.engines) == (1, [])
    again.results = {}
    np.testing.assert_allclose(results_of(again, place)["forces"], wanted, rtol=0, atol=1e-10)
    assert len(again.engines) == 1


def test_certificate_of_a_calculator_is_of_what_it_runs(device, reference_path):
    """A wrong engine fails it, whatever the model's own forward gives."""
    model = mm.build("mp-small", device=device, **SMALL)
    atoms = mm.random_structures(SMALL["elements"], seed=13)[0]
    ours = mt.MACETritonCalculator(model, precision="fp64", device=device.type, skin=1.0)
    assert ours.certify(atoms).passed
    on_host = ours.engines[0].on_host

    def off():
        right = on_host()
        return Results(right.energy, right.energies, right.forces + 1e-3, right.stress)

    ours.engines[0].on_host = off
    certificate = ours.certify(atoms)
    assert not certificate.passed
    assert certificate.force_rmse == pytest.approx(1.0, rel=1e-3)
    ours.skin = None
    assert ours.certify(atoms).passed


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_steps_on_a_gpu_that_is_not_the_current_one():
    structures = mm.random_structures(SMALL["elements"], seed=1)
    for device in map(torch.device, ("cuda:1", "cuda:0", "cuda:1")):
        model, found = e3nn_model("mp-large", device), Engine(fast_model("mp-large", device), structures, skin=0.6)
        with torch.cuda.device(0):
            for seed in range(3):
                check(found, model, moved(structures, 0.3 * seed, seed))
        assert found.captures > 0
        assert found.positions.device == device
