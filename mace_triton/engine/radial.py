"""All that depends on an edge's length alone: hidden layers of the radial networks, densities.

In molecular dynamics the weights are fixed, so these are so many functions of one number. A `Table` holds them as cubic
polynomials on intervals fine enough that the tables' error is below the rounding of the numbers themselves; it is
measured where the polynomials are worst, between the knots, and the intervals are halved until it is. Energies stay
differentiable: forces are those of the tables. Where no table is fine enough, or there are too many kinds of atoms, or
numbers are FP64, a `Network` evaluates the model's own modules.
"""

from __future__ import annotations

import torch

from ..nn.edge_embedding import EdgeRadial
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
        if what == "hidden":
            h = features
            for layer in list(network._modules.values())[:-1]:
                h = layer(h)
        else:
            h = torch.tanh(network(features) ** 2)
        found.append(h if cutoff is None else h * cutoff)
    return found


class Network:
    """The functions by the model's own modules; backward by autograd of these few."""

    def __init__(self, embedding: torch.nn.Module, networks: list, numbers: torch.Tensor, attrs: torch.Tensor):
        self.embedding, self.networks, self.numbers, self.attrs = embedding, networks, numbers, attrs

    def forward(self, r: torch.Tensor, edge_index: torch.Tensor) -> list[torch.Tensor]:
        """The functions [E, H] at r [E, 1]."""
        with torch.enable_grad():
            self._r = r.detach().requires_grad_(True)
            features, cutoff = self.embedding(self._r, self.attrs, edge_index, self.numbers)
            self._found = []
            for network, what in self.networks:
                h = network.hidden(features) if what == "hidden" else torch.tanh(network(features) ** 2)
                self._found.append(h if cutoff is None else h * cutoff)
        return [h.detach() for h in self._found]

    def backward(self, grads: list[torch.Tensor]) -> torch.Tensor:
        """The gradient [E, 1] of r."""
        (gr,) = torch.autograd.grad(self._found, self._r, grads)
        self._r = self._found = None
        return gr


class Table:
    """The functions by tables; `table_of` makes them."""

    def __init__(self, tables: list[torch.Tensor], kind: torch.Tensor, per_angstrom: float):
        self.tables, self.kind, self.per_angstrom = tables, kind, per_angstrom

    def forward(self, r: torch.Tensor, edge_index: torch.Tensor) -> list[torch.Tensor]:
        """The functions [E, H] at r [E, 1]."""
        self._edges = r, edge_index
        return [radial_table(r, t, edge_index, self.kind, per_angstrom=self.per_angstrom) for t in self.tables]

    def backward(self, grads: list[torch.Tensor]) -> torch.Tensor:
        """The gradient [E, 1] of r."""
        r, edge_index = self._edges
        rest = edge_index, self.kind, self.per_angstrom
        parts = [
            torch.ops.mace_triton.radial_table_bwd(g, r, t, *rest) for g, t in zip(grads, self.tables, strict=True)
        ]
        return sum(parts[1:], parts[0])


def radial_of(embedding, networks: list, numbers, attrs: torch.Tensor, r_max: float) -> Table | Network:
    """The functions of (network, "hidden" or "density"), for nodes with one-hot attrs [N, Z]."""
    network = Network(embedding, networks, numbers, attrs)
    if attrs.dtype != torch.float32 or not isinstance(embedding, EdgeRadial):
        return network
    if not all(isinstance(net, RadialNet) for net, _ in networks):
        return network
    present, kind = attrs.argmax(1).unique(return_inverse=True)
    if not hasattr(embedding, "distance_transform"):
        present, kind = present[:1], torch.zeros_like(kind)
    if len(present) > KINDS:
        return network
    one_hot = torch.eye(attrs.shape[1], dtype=torch.float64)[present.cpu()]
    plain = [(net.restore().cpu().double(), what) for net, what in networks]
    evaluate = _Exact(embedding.restore().cpu().double(), plain, numbers.cpu(), one_hot)
    for power in FINENESS:
        tables = evaluate.tables(r_max, power)
        if tables is not None:
            tables = [t.to(attrs.device, attrs.dtype).contiguous() for t in tables]
            return Table(tables, kind.to(torch.int32), 2.0**power)
    return network


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
                u = torch.ones_like(h, requires_grad=True)  # d<u, h>/dr is linear in u: its gradient by u is dh/dr
                (along,) = torch.autograd.grad((h * u).sum(), lengths, create_graph=True)
                (slope,) = torch.autograd.grad(along.sum(), u, retain_graph=True)
                found.append(tuple(t.detach().view(kinds, kinds, points, -1) for t in (h, slope)))
        return found
