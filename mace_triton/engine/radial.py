"""All that depends on an edge's length alone: hidden layers of the radial networks, densities.

In molecular dynamics the weights are fixed, so these are so many functions of one number. A `Table` holds them as cubic
polynomials on intervals fine enough that the tables' error is below the rounding of the numbers themselves; it is
measured where the polynomials are worst, and the intervals are halved until it is. Slopes are those of the polynomials,
so that forces stay the exact derivative of the energy. Where no table is fine enough, or there are too many kinds of
atoms, or numbers are FP64, a `Network` evaluates the model's own modules.
"""

from __future__ import annotations

import copy

import torch

from ..nn.radial_mlp import RadialNet
from ..ops.radial_table import MAX_WIDTH, radial_table

FINENESS = (8, 9, 10, 11)
"""Intervals an angstrom, as powers of two."""
TOLERANCE = 2.0**-24
"""Largest error of a table, in units of the largest value; of the slopes four times that, of the largest slope."""
BESIDE = 0.5 - 12.0**-0.5
"""Where in an interval the slopes of a cubic are off most; its values are in the middle."""
KINDS = 6
"""Kinds of atoms up to which pairs have tables of their own."""
NEAR = 1e-4
"""Angstrom: the knot at zero, where some functions are 0 / 0."""


def functions(embedding, networks: list, numbers, lengths, attrs, edge_index) -> list[torch.Tensor]:
    """[E, H] for each (network, what): its hidden layers for "hidden", its density for "density"."""
    features, cutoff = embedding(lengths, attrs, edge_index, numbers)
    found = []
    for network, what in networks:
        h = _hidden(network, features) if what == "hidden" else torch.tanh(network(features) ** 2)
        found.append(h if cutoff is None else h * cutoff)
    return found


def _hidden(network: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the last layer of a network, ours or e3nn's, reads."""
    if isinstance(network, RadialNet):
        return network.hidden(x)
    for layer in list(network._modules.values())[:-1]:
        x = layer(x)
    return x


class Network:
    """The functions by the model's own modules, their slopes by autograd of these few."""

    alike = False

    def __init__(self, embedding: torch.nn.Module, networks: list, numbers: torch.Tensor, attrs: torch.Tensor):
        self.embedding, self.networks, self.numbers, self.attrs = embedding, networks, numbers, attrs

    @torch.enable_grad()
    def __call__(self, r: torch.Tensor, edge_index: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(h, dh/dr) [P, H] of each function at r [P, 1] between the atoms edge_index [2, P]."""
        r = r.detach().requires_grad_(True)
        found = functions(self.embedding, self.networks, self.numbers, r, self.attrs, edge_index)
        return [(h.detach(), slopes(h, r)) for h in found]


def slopes(h: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """dh/dr [P, H] for h [P, H] of r [P, 1], row by row: <u, dh/dr> is linear in u, and so its gradient by u."""
    u = torch.ones_like(h, requires_grad=True)
    (along,) = torch.autograd.grad((h * u).sum(), r, create_graph=True)
    return torch.autograd.grad(along.sum(), u, retain_graph=True)[0]


class Table:
    """The functions by tables; `radial_of` makes them."""

    def __init__(self, tables: list[torch.Tensor], kind: torch.Tensor, per_angstrom: float):
        self.tables, self.kind, self.per_angstrom = tables, kind, per_angstrom
        self.alike = tables[0].shape[0] == 1
        """Whether all atoms are of one kind, so that nobody asks which an edge joins."""

    def __call__(self, r: torch.Tensor, edge_index: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(h, dh/dr) [P, H] of each function at r [P, 1] between the atoms edge_index [2, P]."""
        return [radial_table(r, t, edge_index, self.kind, per_angstrom=self.per_angstrom) for t in self.tables]


def radial_of(
    embedding, networks: list, numbers, attrs: torch.Tensor, r_max: float, kept: dict | None = None
) -> Table | Network:
    """The functions of (network, "hidden" or "density"), for nodes with one-hot attrs [N, Z].

    kept: tables that were made, by the kinds of atoms, as they take longer than all else of a chain. They are of these
    networks with these weights; whoever keeps them sees to that.
    """
    network = Network(embedding, networks, numbers, attrs)
    if attrs.dtype != torch.float32:
        return network
    present, kind = attrs.argmax(1).unique(return_inverse=True)
    if not hasattr(embedding, "distance_transform"):
        present, kind = present[:1], torch.zeros_like(kind)
    if len(present) > KINDS:
        return network
    kept, key = {} if kept is None else kept, tuple(present.tolist())
    if key not in kept:
        one_hot = torch.eye(attrs.shape[1], dtype=torch.float64)[present.cpu()]
        tables, per_angstrom = _tables(embedding, networks, numbers.cpu(), one_hot, r_max)
        kept[key] = [t.to(attrs.device, attrs.dtype).contiguous() for t in tables], per_angstrom
    tables, per_angstrom = kept[key]
    return Table(tables, kind.to(torch.int32), per_angstrom) if tables else network


def _tables(embedding, networks: list, numbers, one_hot: torch.Tensor, r_max: float) -> tuple[list, float]:
    """(a table of each function for every pair of kinds, intervals an angstrom); none where none were fine enough."""
    evaluate = _Exact(_exact(embedding), [(_exact(net), what) for net, what in networks], numbers, one_hot)
    for power in FINENESS:
        tables = evaluate.tables(r_max, power)
        if tables is not None:
            return tables, 2.0**power
    return [], 0.0


def _exact(module) -> torch.nn.Module:
    """An FP64 copy on the CPU of the module that ours stands in for."""
    return copy.deepcopy(module.restore()).cpu().double()  # what it restores shares its children


class _Exact:
    """The functions and their slopes in FP64, for every pair of kinds."""

    def __init__(self, embedding, networks: list, numbers, one_hot: torch.Tensor):
        self.parts, self.one_hot = (embedding, networks, numbers), one_hot

    def tables(self, r_max: float, power: int) -> list[torch.Tensor] | None:
        """Tables [S, S, K, 4, H] of 2^power intervals an angstrom; None where they are not good enough."""
        step = 2.0**-power
        count = int(-(-r_max // step))
        knots = (step * torch.arange(count + 1, dtype=torch.float64)).clamp(min=NEAR)
        samples = (self(knots), self(knots[:-1] + 0.5 * step), self(knots[:-1] + BESIDE * step))
        found = []
        for (value, slope), (inner, _), (_, beside) in zip(*samples, strict=True):
            if value.shape[-1] > MAX_WIDTH:
                return None
            a, b, da, db = value[:, :, :-1], value[:, :, 1:], step * slope[:, :, :-1], step * slope[:, :, 1:]
            table = torch.stack((a, da, 3 * (b - a) - 2 * da - db, 2 * (a - b) + da + db), dim=3)
            # The first interval begins at NEAR and is not asked.
            middle = sum(0.5**n * table[..., n, :] for n in range(4)) - inner
            if not middle[:, :, 1:].abs().max() <= TOLERANCE * value.abs().max():
                return None
            slopes = sum(n * BESIDE ** (n - 1) * table[..., n, :] for n in (1, 2, 3)) / step - beside
            if not slopes[:, :, 1:].abs().max() <= 4 * TOLERANCE * slope.abs().max():
                return None
            found.append(table)
        return found

    def __call__(self, r: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(values, slopes) [S, S, len(r), H] of each function."""
        embedding, networks, numbers = self.parts
        kinds, points = len(self.one_hot), len(r)
        sender, receiver = torch.cartesian_prod(torch.arange(kinds), torch.arange(kinds)).view(-1, 2).T
        edge_index = torch.stack((sender, receiver)).repeat_interleave(points, dim=1)
        lengths = r.repeat(kinds * kinds)[:, None].requires_grad_(True)
        found = []
        with torch.enable_grad():
            for h in functions(embedding, networks, numbers, lengths, self.one_hot, edge_index):
                both = h.detach(), slopes(h, lengths)
                found.append(tuple(t.view(kinds, kinds, points, -1) for t in both))
        return found
