"""Frozen descriptions of the operations: irreps, paths, Clebsch-Gordan nonzeros, layouts.

A problem has no device and no dtype. The same object feeds the kernels, the reference, the tests and the benches,
and it is the one place that rejects what is unsupported. Every problem turns into a short string (`key`) and back
(`from_key`), so that a torch custom op can carry it as a plain argument.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property

import mace  # noqa: F401  before e3nn, see mace_triton/__init__.py
import torch
from e3nn import o3

LAYOUTS = ("mul_ir", "ir_mul")
MAX_L = 3
MAX_DIM_IN2 = 32  # the kernels hand a row of harmonics around among 32 lanes


def check_layout(layout: str, name: str = "layout") -> str:
    """Return `layout` if it is "mul_ir" or "ir_mul", else raise ValueError naming the argument."""
    if layout not in LAYOUTS:
        raise ValueError(f"{name} must be one of {LAYOUTS}, got {layout!r}")
    return layout


def parse_irreps(irreps, name: str) -> o3.Irreps:
    """e3nn irreps from a string or an Irreps; ValueError names the argument `name`."""
    try:
        return o3.Irreps(str(irreps))
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"{name}: {irreps!r} is not an irreps string such as '128x0e+128x1o'") from error


@cache
def cg_nonzeros(l1: int, l2: int, l3: int) -> tuple[tuple[int, int, int, float], ...]:
    """Nonzeros (m1, m2, m3, value) of sqrt(2 l3 + 1) w3j(l1, l2, l3), e3nn's real basis and "component" normalisation.

    Values are computed in FP64 and are the path-weighted coefficients e3nn's TensorProduct applies for a `uvu` path
    (path weight sqrt(2 l3 + 1), no fan-in).
    """
    w3j = o3.wigner_3j(l1, l2, l3, dtype=torch.float64) * math.sqrt(2 * l3 + 1)
    return tuple(
        (m1, m2, m3, float(w3j[m1, m2, m3]))
        for m1 in range(2 * l1 + 1)
        for m2 in range(2 * l2 + 1)
        for m3 in range(2 * l3 + 1)
        if abs(float(w3j[m1, m2, m3])) > 1e-12
    )


@dataclass(frozen=True)
class Slot:
    """One `mul x ir` block of an irreps vector: where it starts and how its components are strided."""

    offset: int
    mul: int
    l: int
    parity: int
    layout: str

    @property
    def dim(self) -> int:
        return 2 * self.l + 1

    @property
    def stride_m(self) -> int:
        return self.mul if self.layout == "ir_mul" else 1

    @property
    def stride_c(self) -> int:
        return 1 if self.layout == "ir_mul" else self.dim


def slots_of(irreps: o3.Irreps, layout: str) -> tuple[Slot, ...]:
    """The blocks of `irreps` in storage order; element (m, c) of a slot lies at offset + m stride_m + c stride_c."""
    return tuple(Slot(s.start, mul, ir.l, ir.p, layout) for (mul, ir), s in zip(irreps, irreps.slices(), strict=True))


@dataclass(frozen=True)
class TPPath:
    """One channel-wise path: out[slot_out] += w x[slot_1] (CG) y[slot_2]; `weight` is its offset in W[e, :]."""

    slot1: int
    slot2: int
    slot3: int
    l1: int
    l2: int
    l3: int
    mul: int
    weight: int

    @property
    def cg(self) -> tuple[tuple[int, int, int, float], ...]:
        return cg_nonzeros(self.l1, self.l2, self.l3)


@dataclass(frozen=True)
class ChannelwiseTPProblem:
    """out[i, p, m3, c] = sum_{e -> i} w[e, p, c] sum_{m1, m2} C_p[m1, m2, m3] x[s(e), m1, c] y[e, m2].

    Strings are e3nn irreps. `instructions` are (slot in x, slot in y, slot in out), every one of e3nn mode "uvu" with
    a weight per channel; W[e] holds them one after another in this order, `mul` weights each.

    Raises ValueError for irreps that do not parse, y irreps with a multiplicity other than 1 or with more than 32
    components, an instruction whose multiplicities or irreps do not fit, l > 3.
    """

    irreps_in1: str
    irreps_in2: str
    irreps_out: str
    instructions: tuple[tuple[int, int, int], ...]
    layout_in: str = "mul_ir"
    layout_out: str = "mul_ir"

    def __post_init__(self):
        check_layout(self.layout_in, "layout_in")
        check_layout(self.layout_out, "layout_out")
        for name in ("irreps_in1", "irreps_in2", "irreps_out"):
            irreps = parse_irreps(getattr(self, name), name)
            object.__setattr__(self, name, str(irreps))
            if len(irreps) and irreps.lmax > MAX_L:
                raise ValueError(f"{name}: l = {irreps.lmax} in {irreps}; supported are l <= {MAX_L}")
        if self.dim_in2 > MAX_DIM_IN2:
            raise ValueError(f"irreps_in2: dimension {self.dim_in2}; supported are at most {MAX_DIM_IN2}")
        if any(slot.mul != 1 for slot in self.slots2):
            raise ValueError(f"irreps_in2: every multiplicity must be 1 (spherical harmonics), got {self.irreps_in2}")
        for number, (i, j, k) in enumerate(self.instructions):
            if not (0 <= i < len(self.slots1) and 0 <= j < len(self.slots2) and 0 <= k < len(self.slots3)):
                raise ValueError(f"instructions[{number}] = {(i, j, k)} points outside the irreps")
            a, b, c = self.slots1[i], self.slots2[j], self.slots3[k]
            if a.mul != c.mul:
                raise ValueError(f"instructions[{number}]: 'uvu' needs equal multiplicities, got {a.mul} and {c.mul}")
            if c.parity != a.parity * b.parity or not abs(a.l - b.l) <= c.l <= a.l + b.l:
                raise ValueError(
                    f"instructions[{number}]: l = {a.l} x {b.l} does not give l = {c.l}, or parities differ"
                )

    @classmethod
    def from_mace(cls, irreps_in1, irreps_in2, irreps_target, **layouts) -> ChannelwiseTPProblem:
        """The problem of a MACE interaction block: `tp_out_irreps_with_instructions(in1, in2, target)`."""
        from mace.modules.irreps_tools import tp_out_irreps_with_instructions

        in1, in2 = parse_irreps(irreps_in1, "irreps_in1"), parse_irreps(irreps_in2, "irreps_in2")
        out, instructions = tp_out_irreps_with_instructions(in1, in2, parse_irreps(irreps_target, "irreps_target"))
        return cls(str(in1), str(in2), str(out), tuple(tuple(i[:3]) for i in instructions), **layouts)

    @cached_property
    def slots1(self) -> tuple[Slot, ...]:
        return slots_of(o3.Irreps(self.irreps_in1), self.layout_in)

    @cached_property
    def slots2(self) -> tuple[Slot, ...]:
        return slots_of(o3.Irreps(self.irreps_in2), "ir_mul")

    @cached_property
    def slots3(self) -> tuple[Slot, ...]:
        return slots_of(o3.Irreps(self.irreps_out), self.layout_out)

    @cached_property
    def paths(self) -> tuple[TPPath, ...]:
        paths, weight = [], 0
        for i, j, k in self.instructions:
            a, b, c = self.slots1[i], self.slots2[j], self.slots3[k]
            paths.append(TPPath(i, j, k, a.l, b.l, c.l, a.mul, weight))
            weight += a.mul
        return tuple(paths)

    @cached_property
    def dim_in1(self) -> int:
        return o3.Irreps(self.irreps_in1).dim

    @cached_property
    def dim_in2(self) -> int:
        return o3.Irreps(self.irreps_in2).dim

    @cached_property
    def dim_out(self) -> int:
        return o3.Irreps(self.irreps_out).dim

    @cached_property
    def weight_numel(self) -> int:
        return sum(path.mul for path in self.paths)

    @cached_property
    def key(self) -> str:
        instructions = ",".join(f"{i}.{j}.{k}" for i, j, k in self.instructions)
        return "|".join(
            (self.irreps_in1, self.irreps_in2, self.irreps_out, instructions, self.layout_in, self.layout_out)
        )

    @staticmethod
    @cache
    def from_key(key: str) -> ChannelwiseTPProblem:
        in1, in2, out, instructions, layout_in, layout_out = key.split("|")
        triples = tuple(tuple(int(n) for n in t.split(".")) for t in instructions.split(",") if t)
        return ChannelwiseTPProblem(in1, in2, out, triples, layout_in, layout_out)

    def min_bytes(self, n_in: int, n_out: int, n_edges: int, size: int = 4, weight_size: int = 4) -> dict[str, int]:
        """Fewest bytes through device memory: every input read once, every output written once (indices included)."""
        x, y, w = n_in * self.dim_in1 * size, n_edges * self.dim_in2 * size, n_edges * self.weight_numel * weight_size
        out, index = n_out * self.dim_out * size, n_edges * 8
        return {"forward": x + y + w + out + index, "backward": 2 * (x + y + w) + out + index}

    def flops(self, n_edges: int) -> dict[str, int]:
        """Floating-point operations of the uncoupled algorithm (a fused multiply-add counts two)."""
        pairs = sum(p.mul * len({(m1, m2) for m1, m2, _, _ in p.cg}) for p in self.paths)
        products = sum(p.mul * (2 * p.l1 + 1) for p in self.paths)
        return {"forward": n_edges * (2 * pairs + products), "backward": n_edges * (4 * pairs + 5 * products)}
