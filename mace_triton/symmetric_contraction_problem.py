"""Frozen description of MACE's symmetric contraction: a polynomial in the components of each channel.

    out[n, m, c] = sum over terms t of m:  coef[z_n, t, c] prod_{i in monomial t} x[n, i, c]

MACE writes it with tensors U and weights W, out = sum_nu U_nu[m, i1 .. i_nu, eta] W_nu[z, eta, c] x_i1 .. x_inu
(Batatia et al. 2022, eqs. 10 and 11). Products of features do not depend on their order, so all entries of U with the
same sorted indices are one term: 94 for scalars out of 16 components at correlation 3, 887 for 0e + 1o + 2e, instead of
the 4096 (nine times that) entries of U_3.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

PACK = 4
"""Terms whose coefficients lie side by side for each channel, so that a thread reads them at once."""
MAX_DEGREE = 4
MAX_TERMS = 2048


class Row(NamedTuple):
    """The terms that share one monomial, prefix times x[last]; `last` is None for the prefix alone."""

    last: int | None
    entries: tuple[tuple[int, int], ...]  # (component of the output, number of the term)


class Group(NamedTuple):
    """The terms whose monomials begin with `prefix`."""

    prefix: tuple[int, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class SymmetricContractionProblem:
    """`terms`: (component of the output, sorted input components of the monomial) of every term.

    channels: C. dim_in, dim_out: components of a channel, read and written. The terms are stored sorted, and their
    place is their number: the coefficients come as [species, rows, C, PACK], term t at [t // PACK, :, t % PACK], with
    `rows` PACKs that hold all terms and zeros after them.

    Raises ValueError for a component outside its range, a monomial that is unsorted, empty, doubled or of a degree
    above MAX_DEGREE, and more than MAX_TERMS terms.
    """

    channels: int
    dim_in: int
    dim_out: int
    terms: tuple[tuple[int, tuple[int, ...]], ...]

    def __post_init__(self):
        for m, monomial in self.terms:
            if not 0 <= m < self.dim_out:
                raise ValueError(f"terms: output component {m} is outside 0 .. {self.dim_out - 1}")
            if tuple(sorted(monomial)) != tuple(monomial) or not all(0 <= i < self.dim_in for i in monomial):
                raise ValueError(f"terms: monomial {monomial} must be sorted and within 0 .. {self.dim_in - 1}")
            if not 0 < len(monomial) <= MAX_DEGREE:
                raise ValueError(f"terms: monomial {monomial} must have between 1 and {MAX_DEGREE} factors")
        if len(set(self.terms)) < len(self.terms):
            raise ValueError("terms: some term stands there twice")
        if len(self.terms) > MAX_TERMS:
            raise ValueError(f"terms: {len(self.terms)} are too many for one kernel, at most {MAX_TERMS}")
        if self.channels < 1:
            raise ValueError(f"channels must be positive, got {self.channels}")
        reach = self.degree - 1
        # By prefix, then by monomial: all components of the output that want a monomial take it while it is there.
        order = sorted(self.terms, key=lambda term: (term[1][:reach], term[1][reach:], term[0]))
        object.__setattr__(self, "terms", tuple((m, tuple(monomial)) for m, monomial in order))
        _ = self.key, self.rows  # torch.compile cannot trace the first read of a cached property

    @property
    def degree(self) -> int:
        """The largest number of factors, MACE's correlation."""
        return max((len(monomial) for _, monomial in self.terms), default=1)

    @cached_property
    def rows(self) -> int:
        """PACKs of coefficients that a channel of one species has."""
        return -(-len(self.terms) // PACK)

    @cached_property
    def key(self) -> str:
        """All of the problem as a string, for custom ops; `from_key` reads it."""
        terms = ";".join(f"{m}:{'.'.join(map(str, monomial))}" for m, monomial in self.terms)
        return f"{self.channels}|{self.dim_in}|{self.dim_out}|{terms}"

    @staticmethod
    @lru_cache(maxsize=256)
    def from_key(key: str) -> SymmetricContractionProblem:
        """The problem that `key` describes."""
        *sizes, terms = key.split("|")
        pairs = (term.split(":") for term in terms.split(";") if term)
        table = tuple((int(m), tuple(int(i) for i in monomial.split("."))) for m, monomial in pairs)
        return SymmetricContractionProblem(*map(int, sizes), table)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The terms by prefix (the first degree - 1 factors) and by monomial."""
        found: dict[tuple[int, ...], dict[int | None, list[tuple[int, int]]]] = {}
        reach = self.degree - 1
        for number, (m, monomial) in enumerate(self.terms):
            last = monomial[reach] if len(monomial) > reach else None
            found.setdefault(monomial[:reach], {}).setdefault(last, []).append((m, number))
        return tuple(
            Group(prefix, tuple(Row(last, tuple(entries)) for last, entries in rows.items()))
            for prefix, rows in found.items()
        )

    def min_bytes(self, nodes: int, species: int, size: int) -> dict[str, int]:
        """Fewest bytes through device memory, inputs and outputs once; `species` that occur, `size` bytes a number."""
        x, out = (nodes * dim * self.channels * size for dim in (self.dim_in, self.dim_out))
        coef = species * self.rows * PACK * self.channels * size
        return {"forward": x + out + coef, "backward": 2 * x + out + 2 * coef}

    def flops(self, nodes: int) -> dict[str, int]:
        """Operations of the algorithm in kernels/symmetric_contraction.py, a multiply-add as two."""
        terms, monomials = len(self.terms), sum(len(group.rows) for group in self.groups)
        joins = sum(len({m for row in group.rows for m, _ in row.entries}) for group in self.groups)
        per_channel = 2 * (terms + joins) + len(self.groups)
        backward = 2 * (terms + 2 * monomials + 2 * len(self.groups)) + (2 * terms + monomials)
        return {"forward": nodes * self.channels * per_channel, "backward": nodes * self.channels * backward}
