"""Frozen description of MACE's symmetric contraction: a polynomial in the components of each channel.

    out[n, m, c] = sum over terms t of m:  coef[z_n, t, c] prod_{i in monomial t} x[n, i, c]

MACE writes it with tensors U and weights W, out = sum_nu U_nu[m, i1 .. i_nu, eta] W_nu[z, eta, c] x_i1 .. x_inu
(Batatia et al. 2022, eqs. 10 and 11). Products of features do not depend on their order, so all entries of U with the
same sorted indices are one term: 94 for scalars out of 16 components at correlation 3, 887 for 0e + 1o + 2e, instead of
the 4096 (nine times that) entries of U_3. The coefficient of a term is a fixed combination of the weights:

    coef[z, t, c] = sum over paths k of  table[t, k] weights[z, k, c]
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

    channels: C. dim_in, dim_out: components of a channel, read and written. paths: weights of a channel of one species.
    table: for each term the (path, factor) that make its coefficient; without it every term has a weight of its own.

    The terms are stored sorted, with their rows of the table, and their place is their number: the coefficients are
    [species, rows, C, PACK], term t at [t // PACK, :, t % PACK], with `rows` PACKs that hold all terms and zeros after
    them.

    Raises ValueError for a component or path outside its range, a monomial that is unsorted, empty, doubled or of a
    degree above MAX_DEGREE, more than MAX_TERMS terms, and a table of another length or with a path twice in a row.
    """

    channels: int
    dim_in: int
    dim_out: int
    terms: tuple[tuple[int, tuple[int, ...]], ...]
    paths: int | None = None
    table: tuple[tuple[tuple[int, float], ...], ...] | None = None

    def __post_init__(self):
        self._check_terms()
        reach = self.degree - 1
        # By prefix, then by monomial: all components of the output that want a monomial take it while it is there.
        order = sorted(range(len(self.terms)), key=lambda t: self._place(self.terms[t], reach))
        terms = tuple((self.terms[t][0], tuple(self.terms[t][1])) for t in order)
        if self.table is None:
            table = tuple(((number, 1.0),) for number in range(len(terms)))
            object.__setattr__(self, "paths", len(terms))
        else:
            self._check_table()
            table = tuple(tuple((int(k), float(factor)) for k, factor in self.table[t]) for t in order)
        object.__setattr__(self, "terms", terms)
        object.__setattr__(self, "table", table)
        _ = self.key, self.rows  # torch.compile cannot trace the first read of a cached property

    @staticmethod
    def _place(term: tuple[int, tuple[int, ...]], reach: int) -> tuple:
        return term[1][:reach], term[1][reach:], term[0]

    def __hash__(self) -> int:
        return hash(self.key)  # a string keeps its hash; kernels are looked up by their problem at every launch

    def _check_table(self) -> None:
        if len(self.table) != len(self.terms):
            raise ValueError(f"table: {len(self.table)} rows for {len(self.terms)} terms")
        if self.paths is None:
            raise ValueError("paths: say how many there are when you give a table")
        for row in self.table:
            found = [k for k, _ in row]
            if not all(0 <= k < self.paths for k in found):
                raise ValueError(f"table: row {row} must have paths within 0 .. {self.paths - 1}")
            if len(set(found)) < len(found):
                raise ValueError(f"table: row {row} has some path twice")

    def _check_terms(self) -> None:
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

    @cached_property
    def degree(self) -> int:
        """The largest number of factors, MACE's correlation."""
        return max((len(monomial) for _, monomial in self.terms), default=1)

    @cached_property
    def rows(self) -> int:
        """PACKs of coefficients that a channel of one species has."""
        return -(-len(self.terms) // PACK)

    @cached_property
    def key(self) -> str:
        """All of the problem as a string, for custom ops; `from_key` reads it. Factors are kept to the last bit."""
        factors = sorted({factor for row in self.table for _, factor in row})
        number = {factor: i for i, factor in enumerate(factors)}
        words = (
            f"{m}:{'.'.join(map(str, monomial))}:{','.join(f'{k}*{number[factor]}' for k, factor in row)}"
            for (m, monomial), row in zip(self.terms, self.table, strict=True)
        )
        sizes = (self.channels, self.dim_in, self.dim_out, self.paths)
        return "|".join((*map(str, sizes), ",".join(map(repr, factors)), ";".join(words)))

    @staticmethod
    @lru_cache(maxsize=256)
    def from_key(key: str) -> SymmetricContractionProblem:
        """The problem that `key` describes."""
        *sizes, factors, words = key.split("|")
        channels, dim_in, dim_out, paths = map(int, sizes)
        values, terms, table = [float(word) for word in factors.split(",") if word], [], []
        for word in filter(None, words.split(";")):
            m, monomial, row = word.split(":")
            terms.append((int(m), tuple(int(i) for i in monomial.split("."))))
            pairs = (pair.split("*") for pair in row.split(",") if pair)
            table.append(tuple((int(k), values[int(number)]) for k, number in pairs))
        return SymmetricContractionProblem(channels, dim_in, dim_out, tuple(terms), paths, tuple(table))

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
        entries = sum(map(len, self.table))
        ends = len({(m, row.last) for group in self.groups for row in group.rows for m, _ in row.entries})
        sums = sum(
            len({path for row in group.rows for _, term in row.entries for path, _ in self.table[term]})
            for group in self.groups
        )
        per_channel = {
            "forward": 2 * (terms + joins) + len(self.groups),
            "gradient of x": 2 * (terms + 2 * monomials + 2 * len(self.groups)),
            "gradient of weights": 2 * (entries + sums) + ends + len(self.groups),
        }
        return {stage: nodes * self.channels * count for stage, count in per_channel.items()}
