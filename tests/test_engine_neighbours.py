"""The engine's edges as atoms and cells move: any cell, strains, buckets that grow and shrink, candidates in time."""

import ase
import mace_models as mm
import numpy as np
import pytest
from test_engine import BY_AUTOGRAD, check, moved
from test_mace_parity import SMALL, e3nn_model, fast_model

from mace_triton.engine import Engine
from mace_triton.engine.buckets import bucket, too_large

pytestmark = pytest.mark.torchscript


@pytest.mark.parametrize("pbc", [(True, True, False), (False, False, True), (True, True, True), (False, False, False)])
def test_any_cell(pbc, device, reference_path):
    """Triclinic, smaller than the cutoff, periodic in some directions."""
    atoms = mm.random_structures(SMALL["elements"], seed=2)[0]
    atoms.pbc = pbc
    model = e3nn_model("mp-medium", device)
    found = Engine(fast_model("mp-medium", device), atoms)
    check(found, model, [atoms])
    check(found, model, moved([atoms], 0.3))


@pytest.mark.parametrize("systems", [1, 3])
def test_a_cell_that_breathes(systems, device, reference_path):
    """Candidates follow small strains, volume and shape alike, with atoms that move; large ones ask for new ones."""
    start = [mm.random_structures(SMALL["elements"], seed=seed)[0] for seed in range(systems)]
    model, found = e3nn_model("mp-medium", device), Engine(fast_model("mp-medium", device), start, skin=1.5)
    rng = np.random.default_rng(0)
    check(found, model, start)
    for size in (0.01, 0.02, 0.03):
        strained = moved(start, 0.05)
        for atoms in strained:
            atoms.set_cell(atoms.cell.array @ (np.eye(3) + size * rng.uniform(-1, 1, (3, 3))), scale_atoms=True)
        check(found, model, strained)
    assert found.rebuilds == 1
    for factor, rebuilds in ((0.8, 2), (1.2, 2), (0.7, 3)):  # nothing comes nearer in a cell that grows
        for atoms in strained:
            atoms.set_cell(factor * atoms.cell.array, scale_atoms=True)
        check(found, model, strained)
        assert found.rebuilds == rebuilds


def test_strain_is_told_from_motion(device, reference_path):
    """A cell that shrinks under atoms that stay is motion of the atoms in it: candidates are found anew in time."""
    atoms = mm.random_structures(SMALL["elements"], seed=3)[0]
    model, found = e3nn_model("mp-medium", device), Engine(fast_model("mp-medium", device), atoms, skin=0.3)
    check(found, model, [atoms])
    for _ in range(6):
        atoms.set_cell(0.985 * atoms.cell.array)
        check(found, model, [atoms])
    assert found.rebuilds > 1


def test_the_bucket_grows_and_the_step_is_repeated(device, reference_path):
    """Chains shrink a little: the candidates hold, but second neighbours come within the cutoff, twice the edges."""
    model = e3nn_model("mp-small", device)
    spacing = 0.505 * float(model.r_max)
    chains = [ase.Atoms("O8", np.arange(8)[:, None] * np.array([[spacing, 0.0, 0.0]])) for _ in range(30)]
    found = Engine(fast_model("mp-small", device), chains, skin=3.0)
    check(found, model, chains)
    before, evaluated = found.capacity, []
    assert before < 30 * 26
    run = found._run
    found._run = lambda: (run(), evaluated.append(found._got[-2:].tolist()))
    for chain in chains:
        chain.positions *= 0.98
    check(found, model, chains)
    assert evaluated == [[30 * 26, 0], [30 * 26, 0]]  # too many of them, with candidates that hold; then room for all
    assert found.capacity >= 30 * 26
    assert found.rebuilds == 2


@pytest.mark.parametrize("name", ["mp-small", "nonlinear"])
def test_the_bucket_shrinks_where_atoms_part(name, device, reference_path):
    """Chains whose third neighbours leave, then second ones. Until it does, idle edges take the places."""
    model = e3nn_model(name, device)
    chain = np.arange(8)[:, None] * np.array([[float(model.r_max), 0.0, 0.0]])
    found, first = None, 0
    for spacing, neighbours in ((0.3, 36), (0.33, 36), (0.35, 26), (0.6, 14), (0.3, 36)):
        chains = [ase.Atoms("O8", spacing * chain) for _ in range(30)]
        found = found or Engine(fast_model(name, device), chains, skin=0.1)
        check(found, model, chains)
        first = first or found.capacity
        assert found.edges == 30 * neighbours
        assert found.capacity == (first if neighbours == 36 else bucket(found.edges))
    assert too_large(bucket(30 * 36), 30 * 26)
    chains = [ase.Atoms("O8", spacing * chain) for spacing in (0.35, *[0.3] * 29)]
    check(found, model, chains)
    assert found.edges < 30 * 36
    assert found.capacity == first
    assert bool(found.autograd_because) == (name in BY_AUTOGRAD)


@pytest.mark.parametrize("kind", ["runs", "breathes"])
def test_atoms_that_go_on_find_their_candidates_in_time(kind, device, reference_path):
    """No step of a smooth motion is evaluated twice."""
    model, atoms = e3nn_model("mp-small", device), mm.random_structures(SMALL["elements"], seed=4)[0]
    found, evaluated = Engine(fast_model("mp-small", device), atoms, skin=0.6), [0]
    run, velocity = found._run, np.random.default_rng(0).normal(size=atoms.positions.shape).clip(-2, 2)
    found._run = lambda: (run(), evaluated.__setitem__(0, evaluated[0] + 1))[0]
    for step in range(40):
        atoms.positions += 0.02 * velocity
        if kind == "breathes":
            atoms.set_cell((1 + 0.004 * np.cos(step)) * atoms.cell.array, scale_atoms=True)
        found.step(atoms.positions, atoms.cell.array[None])
        assert evaluated[0] == step + 1
    assert 3 <= found.rebuilds <= 12
    check(found, model, [atoms])


def test_without_a_skin_candidates_are_found_in_every_step(device, reference_path):
    atoms = mm.random_structures(SMALL["elements"], seed=5)[0]
    model, found = e3nn_model("mp-small", device), Engine(fast_model("mp-small", device), atoms, skin=0.0)
    for seed in range(3):
        check(found, model, moved([atoms], 0.1, seed))
    assert found.rebuilds == 3
