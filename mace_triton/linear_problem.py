"""Frozen description of an equivariant linear map: which slots feed which, where the weights lie, the fan-in factors.

Same conventions as e3nn 0.4.4 `o3.Linear`: one weight block [mul_in, mul_out] per instruction (slot in, slot out),
packed one after another in instruction order, and a path weight alpha = 1/sqrt(fan-in) per instruction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

from e3nn import o3

from .problem import Slot, check_layout, parse_irreps, slots_of

PATH_NORMALIZATIONS = ("element", "path")


class Segment(NamedTuple):
    """One block of the reduction of a group: `mul` channels read at `offset`, weights packed from `weight`."""

    offset: int
    mul: int
    weight: int


class Group(NamedTuple):
    """One slot that is written: its place, 2l+1 = `dim`, the fan-in factor, and the segments summed into it.

    `bias` is the offset of its biases, or -1 where it has none.
    """

    offset: int
    mul: int
    dim: int
    bias: int
    alpha: float
    segments: tuple[Segment, ...]


class Block(NamedTuple):
    """The weights of one instruction: [slot_in.mul, slot_out.mul] from `weight` on, times `alpha`."""

    slot_in: Slot
    slot_out: Slot
    weight: int
    alpha: float


@dataclass(frozen=True)
class LinearProblem:
    """out[n, slot_out, w, m] = sum over instructions of alpha sum_u W[u, w] x[n, slot_in, u, m], plus biases on 0e.

    irreps_in, irreps_out: e3nn irreps strings. instructions: (slot in, slot out) pairs; None means every pair of equal
    irreps, as in e3nn. biases: one bool per slot of irreps_out, () for none. path_normalization: "element" (fan-in is
    the sum of mul_in over all instructions into that output) or "path" (number of instructions times mul_in).
    A slot of irreps_out that no instruction feeds is zero.

    Raises ValueError for irreps that do not parse, an unknown layout or normalization, an instruction outside the
    irreps or between different irreps, a bias on a slot that is not 0e.
    """

    irreps_in: str
    irreps_out: str
    instructions: tuple[tuple[int, int], ...] | None = None
    biases: tuple[bool, ...] = ()
    path_normalization: str = "element"
    layout_in: str = "mul_ir"
    layout_out: str = "mul_ir"

    def __post_init__(self):
        irreps_in, irreps_out = parse_irreps(self.irreps_in, "irreps_in"), parse_irreps(self.irreps_out, "irreps_out")
        check_layout(self.layout_in, "layout_in")
        check_layout(self.layout_out, "layout_out")
        if self.path_normalization not in PATH_NORMALIZATIONS:
            raise ValueError(
                f"path_normalization must be one of {PATH_NORMALIZATIONS}, got {self.path_normalization!r}"
            )
        pairs = self.instructions
        if pairs is None:
            pairs = [(i, j) for i, a in enumerate(irreps_in) for j, b in enumerate(irreps_out) if a.ir == b.ir]
        pairs = tuple((int(i), int(j)) for i, j in pairs)
        for number, (i, j) in enumerate(pairs):
            if not (0 <= i < len(irreps_in) and 0 <= j < len(irreps_out)):
                raise ValueError(f"instructions[{number}] = {(i, j)} points outside {irreps_in} -> {irreps_out}")
            if irreps_in[i].ir != irreps_out[j].ir:
                raise ValueError(f"instructions[{number}]: {irreps_in[i].ir} cannot feed {irreps_out[j].ir}")
        biases = tuple(bool(b) for b in self.biases) or (False,) * len(irreps_out)
        if len(biases) != len(irreps_out):
            raise ValueError(f"biases: one bool per slot of {irreps_out}, got {len(biases)}")
        for bias, mul_ir in zip(biases, irreps_out, strict=True):
            if bias and not mul_ir.ir.is_scalar():
                raise ValueError(f"biases: only 0e slots can have a bias, {mul_ir} cannot")
        for name, value in (
            ("irreps_in", str(irreps_in)),
            ("irreps_out", str(irreps_out)),
            ("instructions", pairs),
            ("biases", biases),
        ):
            object.__setattr__(self, name, value)
        # torch.compile cannot trace the first read of a cached property, so what an op's caller reads is made here.
        _ = self.key, self.dim_in, self.dim_out, self.weight_numel, self.bias_numel

    @classmethod
    def from_module(cls, module: o3.Linear, layout_in: str = "mul_ir", layout_out: str = "mul_ir") -> LinearProblem:
        """The problem an `e3nn.o3.Linear` solves.

        Raises ValueError for external or unshared weights, `f_in`/`f_out`, and path weights that neither normalization
        of e3nn gives.
        """
        if not isinstance(module, o3.Linear):
            raise ValueError(f"module must be an e3nn.o3.Linear, got {type(module).__name__}")
        if module.weight_numel and not (module.internal_weights and module.shared_weights):
            raise ValueError(f"module: {module} has external weights; only internal, shared weights are supported")
        if module.weight.dim() != 1:
            raise ValueError(f"module: {module} was built with f_in/f_out, which is not supported")
        paths = [ins for ins in module.instructions if ins.i_in >= 0]
        with_bias = {ins.i_out for ins in module.instructions if ins.i_in < 0}
        for normalization in PATH_NORMALIZATIONS:
            problem = cls(
                str(module.irreps_in),
                str(module.irreps_out),
                tuple((ins.i_in, ins.i_out) for ins in paths),
                tuple(i in with_bias for i in range(len(module.irreps_out))),
                normalization,
                layout_in,
                layout_out,
            )
            if all(math.isclose(a, ins.path_weight) for a, ins in zip(problem.alphas, paths, strict=True)):
                return problem
        raise ValueError(f"module: the path weights of {module} follow no e3nn normalization; rebuild the o3.Linear")

    @cached_property
    def slots_in(self) -> tuple[Slot, ...]:
        return slots_of(o3.Irreps(self.irreps_in), self.layout_in)

    @cached_property
    def slots_out(self) -> tuple[Slot, ...]:
        return slots_of(o3.Irreps(self.irreps_out), self.layout_out)

    @cached_property
    def alphas(self) -> tuple[float, ...]:
        """1/sqrt(fan-in), one per instruction."""
        muls = [self.slots_in[i].mul for i, _ in self.instructions]
        fans = []
        for number, (_, j) in enumerate(self.instructions):
            siblings = [mul for mul, (_, other) in zip(muls, self.instructions, strict=True) if other == j]
            fans.append(sum(siblings) if self.path_normalization == "element" else len(siblings) * muls[number])
        return tuple(1.0 / math.sqrt(fan) if fan else 1.0 for fan in fans)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The weight blocks in packing order; empty ones are left out."""
        blocks, weight = [], 0
        for (i, j), alpha in zip(self.instructions, self.alphas, strict=True):
            a, b = self.slots_in[i], self.slots_out[j]
            if a.mul and b.mul:
                blocks.append(Block(a, b, weight, alpha))
            weight += a.mul * b.mul
        return tuple(blocks)

    @cached_property
    def bias_offsets(self) -> tuple[int, ...]:
        """Where the biases of each slot of irreps_out start in the packed bias, -1 for none."""
        offsets, start = [], 0
        for bias, slot in zip(self.biases, self.slots_out, strict=True):
            offsets.append(start if bias else -1)
            start += slot.mul if bias else 0
        return tuple(offsets)

    @cached_property
    def uniform(self) -> bool:
        """True when alpha depends neither on the instruction into an output nor on that out of an input.

        Then the kernels apply it once, to the sum. Otherwise the weights are multiplied by `alphas` beforehand.
        """
        by_slot: dict[Slot, set[float]] = {}
        for block in self.blocks:
            by_slot.setdefault(("in", block.slot_in.offset), set()).add(block.alpha)
            by_slot.setdefault(("out", block.slot_out.offset), set()).add(block.alpha)
        return all(len(alphas) == 1 for alphas in by_slot.values())

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """What the forward writes: one group per slot of irreps_out."""
        return tuple(
            self._group(slot, bias, [(b.slot_in, b) for b in self.blocks if b.slot_out == slot])
            for slot, bias in zip(self.slots_out, self.bias_offsets, strict=True)
            if slot.mul
        )

    @cached_property
    def groups_transposed(self) -> tuple[Group, ...]:
        """What the transposed map (the gradient of x) writes: one group per slot of irreps_in."""
        return tuple(
            self._group(slot, -1, [(b.slot_out, b) for b in self.blocks if b.slot_in == slot])
            for slot in self.slots_in
            if slot.mul
        )

    def _group(self, slot: Slot, bias: int, sources: list[tuple[Slot, Block]]) -> Group:
        alpha = sources[0][1].alpha if sources and self.uniform else 1.0
        segments = tuple(Segment(source.offset, source.mul, block.weight) for source, block in sources)
        return Group(slot.offset, slot.mul, slot.dim, bias, alpha, segments)

    @cached_property
    def dim_in(self) -> int:
        return o3.Irreps(self.irreps_in).dim

    @cached_property
    def dim_out(self) -> int:
        return o3.Irreps(self.irreps_out).dim

    @cached_property
    def weight_numel(self) -> int:
        return sum(b.slot_in.mul * b.slot_out.mul for b in self.blocks)

    @cached_property
    def bias_numel(self) -> int:
        return sum(slot.mul for slot, bias in zip(self.slots_out, self.biases, strict=True) if bias)

    @cached_property
    def key(self) -> str:
        pairs = ",".join(f"{i}.{j}" for i, j in self.instructions)
        biases = "".join(str(int(b)) for b in self.biases)
        layouts = (self.path_normalization, self.layout_in, self.layout_out)
        return "|".join((self.irreps_in, self.irreps_out, pairs, biases, *layouts))

    @staticmethod
    @cache
    def from_key(key: str) -> LinearProblem:
        irreps_in, irreps_out, pairs, biases, normalization, layout_in, layout_out = key.split("|")
        instructions = tuple(tuple(int(n) for n in pair.split(".")) for pair in pairs.split(",") if pair)
        flags = tuple(flag == "1" for flag in biases)
        return LinearProblem(irreps_in, irreps_out, instructions, flags, normalization, layout_in, layout_out)

    def min_bytes(self, n_nodes: int, size: int = 4, weight_size: int = 4) -> dict[str, int]:
        """Fewest bytes through device memory: every input read once, every output written once."""
        x, out, w = n_nodes * self.dim_in * size, n_nodes * self.dim_out * size, self.weight_numel * weight_size
        return {"forward": x + out + w, "backward": 2 * x + out + 2 * w}

    def flops(self, n_nodes: int) -> dict[str, int]:
        """Floating-point operations (a fused multiply-add counts two); backward is for x and for the weights."""
        forward = 2 * n_nodes * sum(b.slot_in.mul * b.slot_out.mul * b.slot_in.dim for b in self.blocks)
        return {"forward": forward, "backward": 2 * forward}
