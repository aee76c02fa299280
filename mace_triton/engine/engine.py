"""One step of molecular dynamics as the GPU alone would take it.

Everything that a step needs lies in buffers whose addresses never change: positions, candidates for edges, the edges
themselves in a bucket with some room. So a step is one CUDA graph: filter the candidates, run the model on the edges,
differentiate. The host copies positions in, starts the graph and reads two numbers: how many edges were near, and
whether an atom has left the skin for which the candidates hold. Where either is wrong the bucket grows or the
candidates are found anew, and the same step runs again; its first result is never shown.

Edges that fill the bucket belong to idle atoms in a system of their own, and are longer than the cutoff. For the model
they are ordinary edges without weight, so any model that MACE can build runs here.

On a CPU the same functions run one after another, without a graph.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import ase
import mace  # noqa: F401  before e3nn, see mace_triton/__init__.py
import numpy as np
import torch
from mace.data import KeySpecification
from mace.tools import torch_geometric

from ..certify import check_structure, graph_of, pick_head
from ..compiling import side_by_side
from ..nn import edge_vectors as stand_in
from ..nn.copies import copy_of
from ..ops import graph, species
from ..ops.edge_embedding import edge_vectors
from ..ops.edge_filter import Candidates, Edges, edge_filter
from . import neighbours
from .buckets import bucket, idle_atoms, too_large
from .chain import Chain, uncovered
from .memory import Footprint, footprint, unused
from .shares import Shares, shares
from .weights import Weights

LOG = logging.getLogger(__name__)
LESS = 0.7
"""Of the memory that a step was thought to take: what it may take where it did not fit."""
SKIN = 1.5
"""Angstrom: with less, water finds neighbours so often that steps take longer (docs/engine.md)."""
BEYOND = 4.0
"""`moved` of a step that wants new candidates though no atom went far."""
WARM_UP = 3
"""Evaluations before capture: TorchScript takes two to settle, and kernels compile in the first."""


@dataclass(frozen=True)
class Results:
    """energy [B] float64 (eV), energies [N] float64 of the atoms (eV), forces [N, 3] (eV/angstrom) and stress [B, 3, 3]
    (eV/angstrom^3), None if it was not asked for, and without meaning for what is not periodic.

    From `Engine.step`: tensors on the model's device, valid until the next step. From `Engine.on_host`: float64 arrays.
    """

    energy: torch.Tensor | np.ndarray
    energies: torch.Tensor | np.ndarray
    forces: torch.Tensor | np.ndarray
    stress: torch.Tensor | np.ndarray | None


class Engine:
    """Energies, forces and stress of the same atoms again and again, as molecular dynamics asks for them.

    model: a MACE model with energies, best an accelerated one; a frozen copy is used. structures: one or several
    `ase.Atoms`; elements, periodicity and, in `atoms.info`, what the model reads beside the atoms stay as they are.
    head: of a model with several. stress: whether it is computed. skin: angstrom, how much longer than the cutoff the
    candidates are; atoms may go half of it before these are found anew. keys: MACE's specification of where charges and
    the like lie in `atoms.info` and `atoms.arrays`; None: where MACECalculator looks for them. memory: bytes for a
    step; None: what the GPU has free. Where that is too little for the weights of all edges, they are made in shares,
    which is slower.

    A model that was accelerated with deterministic=True gives the same bits for the same history of steps.

    Weights, buffers and modules of `model` that change between steps are noticed.

    Raises ValueError for an empty list, a structure without atoms, an element or a head that the model does not know.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        model: torch.nn.Module,
        structures: ase.Atoms | Sequence[ase.Atoms],
        *,
        head: str | None = None,
        stress: bool = True,
        skin: float = SKIN,
        keys: KeySpecification | None = None,
        memory: int | None = None,
    ):
        self.structures = [structures] if isinstance(structures, ase.Atoms) else list(structures)
        if not self.structures:
            raise ValueError("structures is empty: there must be at least one")
        for atoms in self.structures:
            check_structure(atoms, [int(z) for z in model.atomic_numbers])
        if skin < 0:
            raise ValueError(f"skin must not be negative, got {skin}")
        self._source, self._weights, self._memory = model, None, memory
        first = next(model.parameters())
        self.device, self.dtype = first.device, first.dtype
        self.cutoff, self.skin, self.stress = float(model.r_max), skin, stress
        self.head, self.keys = pick_head(list(getattr(model, "heads", None) or ["Default"]), head), keys
        self.sizes = [len(atoms) for atoms in self.structures]
        self.atoms = sum(self.sizes)
        self.periodic = torch.tensor(np.array([atoms.pbc for atoms in self.structures]))
        positions = np.concatenate([atoms.positions for atoms in self.structures])
        self.positions = torch.tensor(positions, dtype=torch.float64, device=self.device)
        self._cells = np.array([atoms.cell.array for atoms in self.structures])
        self.rebuilds = self.captures = self.capacity = 0
        self._graph = self._pairs = self._chain = self._parts = None
        self.autograd_because, self._recording = "", self.device.type == "cuda"
        pinned = {"dtype": torch.float64, "pin_memory": self.device.type == "cuda"}
        self._sent = torch.empty(self.atoms, 3, **pinned)
        systems = len(self.sizes)
        self._system = torch.arange(systems).repeat_interleave(torch.tensor(self.sizes)).to(self.device)
        # What changes with the cells goes to the device in one piece.
        self._told = torch.empty(1 + 19 * systems, **pinned)
        self._heard = torch.empty_like(self._told, device=self.device)
        self._reach, *rest = self._heard.split((1, 9 * systems, 9 * systems, systems))
        self.cells, self._strains = (part.view(systems, 3, 3) for part in rest[:2])
        self._per_volume = rest[2].view(systems, 1, 1)
        self._got = torch.empty(systems + 4 * self.atoms + (9 * systems if stress else 0) + 2, **pinned)

    def _take_weights(self) -> None:
        """A frozen copy of the model as it is; what was made for the last one is gone."""
        self._weights, self._graph, self._pairs, self._tables = Weights(self._source), None, None, {}
        self.model = copy_of(self._source).requires_grad_(False).eval()

    @torch.inference_mode(False)
    def step(self, positions=None, cells=None) -> Results:
        """Results at `positions` [N, 3] (angstrom) in `cells` [B, 3, 3], arrays or tensors; None: as they were.

        Raises ValueError for another shape and for positions or cells that are not finite, torch.OutOfMemoryError, with
        what would fit, where the GPU's memory is too small.
        """
        if self._weights is None:
            self._take_weights()
        with torch.cuda.device_of(self.positions):  # vesin searches on the current device, whatever it is given
            return self._step(positions, cells)

    def _step(self, positions, cells) -> Results:
        fresh = self._pairs is None
        if positions is not None:
            positions = _like(positions, self.positions, "positions")
            if not positions.is_cuda:
                positions = self._sent.copy_(positions)
            self.positions.copy_(positions, non_blocking=True)  # the end of the step waits for it
            fresh = fresh or self._watch.leaving
        if cells is not None:
            cells = _like(cells, self.cells, "cells").cpu().double().numpy()
            if not np.array_equal(cells, self._cells):
                self._cells = cells.copy()
                fresh = fresh or not self._strain()
        if fresh:
            self._find()
        for _ in range(4):
            if not self._run_in_memory():
                self._take_weights()
                self._find()
                continue
            count, moved = self._got[-2:].tolist()
            if count <= self.capacity and moved <= 1:
                self._watch.see(moved)
                return self.results
            self._find(int(count))
        raise RuntimeError("the neighbours of this step do not settle; please report the structure")

    def renew(self, memory: int | None = None) -> None:
        """Give all buffers back; the next step makes new ones, for `memory` bytes (None: what is free then)."""
        self._memory = memory
        self._graph = self._chain = self._pairs = None
        self._clear()

    def _run_in_memory(self) -> bool:
        """`_run`, in as many shares as it takes: gaps between what is allocated are in no estimate."""
        while True:
            try:
                return self._run()
            except torch.OutOfMemoryError as error:
                said = ". ".join(str(error).split(". ")[:3])
            if not self._in_more_shares():  # not above, where the error holds on to all that there was
                raise torch.OutOfMemoryError(f"{self._needs()} ({said})")

    def _in_more_shares(self) -> bool:
        """Whether weights can be made in more shares than they were; then the next run does."""
        if self.autograd_because:
            return False
        before = self.shares
        self.renew(int(LESS * self._footprint().in_shares(before)))
        self._find()
        if self.shares > before:
            LOG.warning("a step did not fit into the GPU's memory; weights are now made in %d shares", self.shares)
        return self.shares > before

    def _needs(self) -> str:
        """What a step would have needed, for whoever has too little memory."""
        text = f"a step of {self.atoms} atoms with {self.capacity} edges does not fit into the GPU's memory"
        return text if self.autograd_because else f"{text}: {self._footprint().verdict(self.shares, self.device)}"

    def _footprint(self) -> Footprint:
        return footprint(self.model, self.atoms, self.capacity, self._listed)

    def on_host(self) -> Results:
        """The results of the last step as arrays of their own."""
        systems, atoms, flat = len(self.sizes), self.atoms, self._got.numpy().copy()
        energy, energies, rest = flat[:systems], flat[systems : systems + atoms], flat[systems + atoms : -2]
        stress = rest[3 * atoms :].reshape(systems, 3, 3) if self.stress else None
        return Results(energy, energies, rest[: 3 * atoms].reshape(-1, 3), stress)

    @property
    def edges(self) -> int:
        """How many edges the last step had."""
        return int(self._got[-2])

    @property
    def shares(self) -> int:
        """In how many shares the weights of edges are made; 1: all at once."""
        return len(self._parts) if self._parts else 1

    @property
    def candidates(self) -> int:
        """How many pairs are near enough to be edges until they are found anew."""
        return self._listed

    def _find(self, room: int = 0) -> None:
        """Candidates for the positions as they are, and buffers for them, and for `room` edges, if these do not fit."""
        self.cells.copy_(torch.from_numpy(self._cells))
        if not (self.positions.isfinite().all() and np.isfinite(self._cells).all()):
            raise ValueError("positions or cells are not finite")
        self.rebuilds += 1
        reach, within = self.cutoff + self.skin, self.cutoff * (1 + 2e-6)  # no edge of `_edges` is left out
        pairs, near = neighbours.candidates(self.positions, self.cells, self.periodic, self.sizes, reach, within)
        number = max(int(near.sum()), room)
        if too_large(self.capacity, number):
            self.capacity = 0
        self._listed = pairs.sender.shape[0]
        alone = int((pairs.twin == torch.arange(self._listed, device=self.device)).sum())
        full = self._pairs is None or self._listed > self._pairs.sender.shape[0] or number > self.capacity
        full = full or bool(self._parts and not self._parts.hold(pairs.ptr, near))
        if full or self._pair_places(alone) > self._twins:
            self._allocate(pairs, near, number, alone)
        else:
            fitting = neighbours.padded(pairs, self._pairs.sender.shape[0])
            for old, new in zip(self._pairs, fitting, strict=True):
                old.copy_(new)
            self._set_cells(self._data)
        self._first, self._of_pair = (self.positions.clone(), self._cells.copy()), None
        self._was[: self.atoms] = self.positions
        self._reach.fill_(0.5 * self.skin)
        self._watch = neighbours.Watch()

    def _strain(self) -> bool:
        """Take the candidates along to the cells as they are; False where that cannot be done.

        Strained by F, the atoms stand where they were, times F. No pair gets shorter than the smallest singular value
        of F times what it was, so those not listed stay beyond the cutoff while no atom goes further from there than
        half of what is left of the skin.
        """
        positions, cells = self._first
        if not (bool(self.periodic.all()) and np.isfinite(self._cells).all()):
            return False
        strains = np.linalg.solve(cells, self._cells)
        shortest = float(np.linalg.svd(strains, compute_uv=False).min())
        left = 0.5 * (shortest * (self.cutoff + self.skin) - self.cutoff)
        if not left > 0.25 * self.skin:
            return False
        told = (left, self._cells, strains, 0.5 / np.abs(np.linalg.det(self._cells)))
        np.concatenate([np.ravel(part) for part in told], out=self._told.numpy())
        self._heard.copy_(self._told, non_blocking=True)  # the end of the step waits for it
        neighbours.strain(positions, self._strains, self._system, self._was[: self.atoms])
        if self._of_pair is None and len(self.sizes) > 1:
            self._of_pair = self._system.repeat_interleave(self._pairs.ptr.diff(), output_size=self._listed)
        units, shifts = (part[: self._listed] for part in (self._pairs.unit_shift, self._pairs.shift))
        neighbours.strain(units, self.cells, self._of_pair, shifts)
        self._data["cell"].view(-1, 3, 3)[:-1] = self.cells
        return True

    def _pair_places(self, alone: int) -> int:
        """Places for all pairs of as many edges as there is room for, of which `alone` have no twin, and one more."""
        return (self.capacity + alone) // 2 + 1

    def _allocate(self, pairs: Candidates, near: torch.Tensor, number: int, alone: int) -> None:
        """Buffers with room for `number` edges out of these pairs; the graph that used the old ones is gone."""
        self._graph = self._chain = self._parts = None
        self.capacity = max(bucket(number), self.capacity)
        self._twins = -(-self._pair_places(alone) // 128) * 128
        told, self.autograd_because = self.autograd_because, uncovered(self.model)
        if self.autograd_because not in ("", told):
            LOG.warning("a step of this model takes MACE's own forward and autograd: %s", self.autograd_because)
        self.idle = idle_atoms(self.capacity, number, bool(self.autograd_because))
        self._pairs = neighbours.padded(pairs, bucket(pairs.sender.shape[0]))
        self._perm = torch.arange(self.capacity, dtype=torch.int32, device=self.device)
        self._data = self._batch()
        self._species = species.species_plan(self._data["node_attrs"])
        if not self.autograd_because:
            self._parts = self._shared_out(pairs, near)
            head = list(getattr(self.model, "heads", None) or ["Default"]).index(self.head)
            self._write_out = partial(Chain, self.model, self._data, self._species, head, self._parts, self._tables)
            self._chain = None if self._recording else self._write_out()  # else with all that a graph holds
        self._idle = self._data["positions"][self.atoms :].double()
        self._was = torch.cat((self.positions, self._idle))
        heads = self._data["head"][self._data["batch"]]
        e0 = self.model.atomic_energies_fn(self._data["node_attrs"]).gather(1, heads[:, None])
        self.atomic_energies = e0[: self.atoms, 0].double().cpu().numpy()
        starts, longest = np.cumsum([0, *self.sizes]), max(self.sizes)
        places = starts[:-1, None] + np.arange(longest)
        places[places >= starts[1:, None]] = self.atoms  # where a zero stands
        self._places = torch.tensor(places, device=self.device)

    def _shared_out(self, pairs: Candidates, near: torch.Tensor) -> Shares | None:
        """The shares in which weights are made; none where memory is enough for all of them."""
        memory = unused(self.device) if self._memory is None else self._memory
        number = 1 if memory is None else self._footprint().shares(memory)
        return shares(pairs.ptr, near, number) if number > 1 else None

    def _batch(self) -> dict[str, torch.Tensor]:
        """MACE's input for the structures and the idle atoms behind them; the edges are not those of a step."""
        row = 3.0 * self.cutoff * np.array([self.idle, 1, 1])  # periodic: in the open MACE searches a box far larger
        far = np.linspace(0.0, 1.0, self.idle, endpoint=False)[:, None] * row * np.eye(3)[0]
        idle = ase.Atoms(np.full(self.idle, self.structures[0].numbers[0]), far, cell=row, pbc=True)
        idle.info.update(self.structures[0].info)
        systems = (*self.structures, idle)
        rest = self.head, self.dtype, self.keys
        graphs = [graph_of(self.model, atoms, *rest, cutoff=self._unread(atoms)) for atoms in systems]
        data = torch_geometric.Batch.from_data_list(graphs).to(self.device).to_dict()
        data = {key: value for key, value in data.items() if torch.is_tensor(value)}
        data = {key: value.to(self.dtype) if value.is_floating_point() else value for key, value in data.items()}
        data["pbc"].view(-1, 3)[-1] = False
        data["cell"].view(-1, 3, 3)[-1] = 3.0 * self.cutoff * torch.eye(3, device=self.device)
        self._set_cells(data)
        return data

    def _unread(self, atoms: ase.Atoms) -> float:
        """A cutoff for edges that nobody reads: with about an atom in each of its cubes they are soon found.

        Where a direction is not periodic the box that MACE puts around the atoms depends on it: it is the model's then.
        """
        return min(self.cutoff, (atoms.cell.volume / len(atoms)) ** (1 / 3)) if atoms.pbc.all() else self.cutoff

    def _set_cells(self, data: dict[str, torch.Tensor]) -> None:
        """The cells of periodic systems; the others keep the box that MACE puts around them."""
        cells, whole = data["cell"].view(-1, 3, 3)[:-1], self.periodic.all(dim=1).to(self.device)
        cells.copy_(torch.where(whole[:, None, None], self.cells.to(self.dtype), cells))
        a, b, c = torch.where(whole[:, None, None], self.cells, cells.double()).unbind(1)
        self._per_volume.copy_(0.5 / (torch.linalg.cross(a, b) * c).sum(1).abs()[:, None, None])

    def _run(self) -> bool:
        """Evaluate the buffers: by the graph on a GPU, else one kernel after another. Whether that was with the weights
        as they are, which is asked while the GPU works.
        """
        if self._recording and self._graph is None:
            self._graph = self._recorded()
        if self._graph is None:
            self._evaluate()
        else:
            self._graph.replay()
        self._got.copy_(self._all, non_blocking=True)
        same = self._weights.same()
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return same

    def _recorded(self) -> torch.cuda.CUDAGraph | None:
        """The step as a CUDA graph; None, with a warning, for a model that does what a graph cannot hold."""
        self._warm_up()
        self._clear()  # a graph has memory of its own, as much again
        try:
            recorded = self._record()
            self.captures += 1
            return recorded
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._recording = False
            reason = str(error).splitlines()[0]
            message = f"this model's step does not go into a CUDA graph and runs kernel by kernel, slower: {reason}"
            warnings.warn(message, RuntimeWarning, stacklevel=4)
            return None

    def _warm_up(self) -> None:
        """Compile what the step needs and run it, on a stream of its own as CUDA graphs want it."""
        if not self.autograd_because:
            self._compile()
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._evaluate()
        torch.cuda.current_stream(self.device).wait_stream(stream)

    def _compile(self) -> None:
        """Write the model out; what kernels are not compiled yet a first evaluation finds out, and then they are."""
        self._edges(self._moved())  # for real: its kernels read places out of what the ones before them wrote
        with side_by_side() as jobs:
            self._chain = self._write_out()
            self._evaluate()
        if jobs:  # which did not run
            self._chain = self._write_out()
        self._clear()  # the warm-up's stream cannot use what was freed on this one

    def _clear(self) -> None:
        """Give memory back; results may lie in the segment of a large tensor, which would stay for them."""
        self.results = self._all = None
        torch.cuda.empty_cache()

    def _record(self) -> torch.cuda.CUDAGraph:
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded, stream=torch.cuda.Stream(self.device)):  # the default is of one device for all
            self._evaluate()
        return recorded

    def _evaluate(self) -> None:
        """Edges, model, derivatives; what it leaves in `results` and `_all` is overwritten by the next replay."""
        self.results = self._all = None
        x = self._moved()
        edges = self._edges(x)
        energies, gx, virial = (self._by_autograd if self._chain is None else self._chain)(x, edges)
        energies, forces = energies[: self.atoms], -gx[: self.atoms]
        energy = self._by_system(energies)
        stress = self._stress(self._by_system(virial[: self.atoms].double())) if self.stress else None
        self.results = Results(energy, energies, forces, stress)
        moved = edges.moved
        if self._parts:  # a share without room for its edges asks for new candidates, and so for new shares
            moved = moved + BEYOND * self._parts.overrun(edges)
        values = (energy, energies, forces, *(() if stress is None else (stress,)), edges.count, moved)
        self._all = torch.cat([value.double().flatten() for value in values])

    def _moved(self) -> torch.Tensor:
        """Positions [N + idle, 3] in FP64, whatever the model's dtype: only their differences may be rounded."""
        return torch.cat((self.positions, self._idle))

    def _edges(self, x: torch.Tensor) -> Edges:
        return edge_filter(
            x,
            self._was,
            self._pairs,
            self._reach,
            cutoff=self.cutoff * (1 + 1e-6),  # beyond the model's own, where an edge weighs nothing
            capacity=self.capacity,
            pairs=self._twins,
            idle=self.idle,
            far=3.0 * self.cutoff,
        )

    @torch.enable_grad()
    def _by_autograd(self, x: torch.Tensor, edges: Edges) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """MACE's own forward, differentiated; the virials [N, 3, 3] are None where no stress is asked for."""
        x, shifts = x.detach().requires_grad_(True), edges.shifts.detach().requires_grad_(self.stress)
        exact = {"shifts": shifts, "unit_shifts": edges.unit_shifts, "positions": x}
        given = {key: value.to(self.dtype) for key, value in exact.items()} | {"edge_index": edges.edge_index}
        with ExitStack() as stack:
            stack.enter_context(graph.given(edges.plan(self._perm)))
            stack.enter_context(species.given(self._data["node_attrs"], self._species))
            if stand_in.attached(self.model):  # else MACE subtracts what is rounded already
                found = (t.to(self.dtype) for t in edge_vectors(x, edges.edge_index, shifts))
                stack.enter_context(stand_in.given(edges.edge_index, *found))
            out = self.model(self._data | given, compute_force=False)
        # MACE differentiates by a strain, whose way back through `cell[batch[sender]]` adds all edges to one place.
        gx, *along = torch.autograd.grad(out["energy"].sum(), (x, shifts) if self.stress else (x,))
        virial = self._virial(x.detach(), edges, along[0]) if self.stress else None
        return out["node_energy"].detach(), gx.to(self.dtype), virial

    def _virial(self, x: torch.Tensor, edges: Edges, gradient: torch.Tensor) -> torch.Tensor:
        """The edges' vectors times the gradients [E, 3] by them, as dyads, summed over each receiver's."""
        sender, receiver = edges.edge_index
        vectors = x.index_select(0, receiver) - x.index_select(0, sender) + edges.shifts
        dyads = (vectors[:, :, None] * gradient[:, None, :]).flatten(1)  # all FP64
        rows = edges.row_ptr.long()  # summed in order, not by atomic additions
        return torch.segment_reduce(dyads, "sum", offsets=rows, axis=0, unsafe=True).view(-1, 3, 3)

    def _by_system(self, values: torch.Tensor) -> torch.Tensor:
        """Sums of values [N, ...] over the atoms of each system, always in the same order."""
        if len(self.sizes) == 1:
            return values.sum(0, keepdim=True)
        zero = torch.zeros_like(values[:1])
        return torch.cat((values, zero))[self._places].sum(1)

    def _stress(self, virial: torch.Tensor) -> torch.Tensor:
        """dE/dstrain [B, 3, 3] over the volume, symmetric."""
        return (virial + virial.transpose(1, 2)) * self._per_volume


def _like(given, buffer: torch.Tensor, name: str) -> torch.Tensor:
    """`given` as a tensor; ValueError unless it has the buffer's shape."""
    given = torch.as_tensor(given).detach()
    if given.shape != buffer.shape:
        raise ValueError(f"{name} must have shape {list(buffer.shape)}, got {list(given.shape)}")
    return given
