"""Writes the Triton source of the channel-wise tensor product kernels for one problem (see `channelwise_tp.py`).

The generated text is Triton with every path and coefficient unrolled; `generated.py` imports it.

Triton's passes take a time that grows with the loads and stores of a kernel times a power of its operations. So a
product and the sum it goes into are one operation, the components of a slot are one load, by inline assembly (NVIDIA),
and their addresses are a constant away from a pointer that they share.
"""

from __future__ import annotations

from collections import defaultdict

import triton

from .generated import load_source, sum_of_products

LANES = 32
"""Of a warp."""


def plus(terms: list[str]) -> str:
    """Sum of the terms as source."""
    return " + ".join(terms).replace("+ -", "- ")


def times(value: float, name: str) -> str:
    """value * name as source, with the coefficient as a literal and +-1 left out."""
    return {1.0: name, -1.0: f"-{name}"}.get(value, f"{value!r} * {name}")


def pairs(path) -> list[tuple[int, int]]:
    """Live (m1, m2) of a path: those with a nonzero coefficient."""
    return sorted({(m1, m2) for m1, m2, _, _ in path.cg})


def partition(problem, budget: int) -> list[tuple[int, ...]]:
    """Split the paths into parts of one multiplicity with at most `budget` live (m1, m2) pairs each (or one unit).

    A part is one launch. Paths that share an output slot stay together; paths of one input slot stay neighbours.
    """
    units: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, path in enumerate(problem.paths):
        units[path.mul, path.slot3].append(number)
    ordered = sorted(units.items(), key=lambda unit: (unit[0][0], problem.paths[unit[1][0]].slot1, unit[1][0]))
    parts: list[tuple[int, ...]] = []
    size, mul = 0, None
    for (unit_mul, _), numbers in ordered:
        cost = sum(len(pairs(problem.paths[n])) for n in numbers)
        if unit_mul == mul and size + cost <= budget:
            parts[-1] += tuple(numbers)
            size += cost
        else:
            parts.append(tuple(numbers))
            size, mul = cost, unit_mul
    return parts


class Writer:
    """The source of one kernel for the paths `numbers` of `problem`, BLOCK_C = `block_c` channels a program.

    ahead: how many edges ahead of its use a weight row is asked for from device memory, 0 for not at all, None where
    PTX is not understood. paired: the edges lie sorted, and perm holds the rows of their weights, which an edge and its
    way back share. widen: PTX's loads give FP32 for 16 bits.
    """

    def __init__(
        self,
        problem,
        numbers: tuple[int, ...],
        block_c: int,
        ahead: int | None,
        paired: bool = False,
        widen: bool = False,
    ):
        self.ahead, self.paired, self.widen = ahead, paired, widen
        self.problem = problem
        self.paths = [(n, problem.paths[n]) for n in numbers]
        self.mul = problem.paths[numbers[0]].mul
        self.block_c = block_c
        masked = self.mul % block_c != 0
        self.load_mask, self.store_mask = (", mask=mask, other=0.0", ", mask=mask") if masked else ("", "")
        self.x_parts = sorted({(p.slot1, m1) for _, p in self.paths for m1, _ in pairs(p)})
        self.y_parts = sorted({(p.slot2, m2) for _, p in self.paths for _, m2 in pairs(p)})
        # A lane with one channel of its own: PTX's loads are as wide as Triton's. Beyond the last channel Triton masks.
        self.ptx = ahead is not None and block_c == LANES and not masked
        self.loads: dict[tuple[int, ...], str] = {}
        self.lines: list[str] = []
        self.started: set[str] = set()
        self.depth = 0

    def emit(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def add(self, name: str, *products: tuple[str, str], fresh: bool = False) -> None:
        """name += the products (name = ... at first, or where `fresh`)."""
        start = name if name in self.started and not fresh else ""
        self.emit(f"{name} = {sum_of_products(start, list(products))}")
        self.started.add(name)

    def text(self) -> str:
        loads = [load_source(name, offsets, self.widen) for offsets, name in self.loads.items()]
        return "".join(loads) + "\n".join(self.lines) + "\n"

    def row(self, name: str, start: str, slots: list) -> None:
        """Pointers of this program's channels in a row that begins at `start`: one for each stride of its slots."""
        for stride in sorted({slot.stride_c for slot in slots}):
            self.emit(f"{name}{stride} = {start} + {'c' if stride == 1 else f'c * {stride}'}")

    def pointer(self, row: str, slot, m: int) -> str:
        """Component m of a slot for the channels c of this program, as pointer source."""
        return f"{row}{slot.stride_c} + {slot.offset + m * slot.stride_m}"

    def load(self, names: list[str], row: str, offsets: list[int]) -> None:
        """The numbers at `offsets` from the pointer `row` as variables of these names, as they are stored."""
        if not self.ptx:
            for name, offset in zip(names, offsets, strict=True):
                self.emit(f"{name} = tl.load({row} + {offset}{self.load_mask})")
            return
        relative = tuple(offset - offsets[0] for offset in offsets)
        load = self.loads.setdefault(relative, f"load_{'_'.join(map(str, relative))}")
        self.emit(f"{', '.join(names)} = {load}({row} + {offsets[0]})")

    def load_slot(self, names: list[str], row: str, slot, components: list[int]) -> None:
        """Components m of a slot, as `load` does it."""
        self.load(names, f"{row}{slot.stride_c}", [slot.offset + m * slot.stride_m for m in components])

    def head(self, name: str, pointers: str) -> None:
        self.emit("@triton.jit")
        arguments = [f"{p}_ptr" for p in pointers.split()]
        constants = ", ".join(f"{name}: tl.constexpr" for name in ("ACC", "BLOCK_C", "SPLIT"))
        self.emit(f"def {name}({', '.join(arguments)}, {constants}):")
        self.depth += 1
        blocks = triton.cdiv(self.mul, self.block_c)
        self.emit(f"block = tl.program_id(0) % {blocks}")
        self.emit(f"split = tl.program_id(0) // {blocks} % SPLIT")
        self.emit(f"node = (tl.program_id(0) // ({blocks} * SPLIT)).to(tl.int64)")
        self.emit("c = block * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C] channels")
        if self.store_mask:
            self.emit(f"mask = c < {self.mul}")
        self.emit("begin = tl.load(receiver_ptr + node)")
        self.emit("end = tl.load(receiver_ptr + node + 1)")
        self.emit("if SPLIT > 1:")
        self.emit("    chunk = tl.cdiv(end - begin, SPLIT)")
        self.emit("    begin += split * chunk")
        self.emit("    end = tl.minimum(end, begin + chunk)")

    def index(self, when: str, position: str) -> None:
        """Edge, row of its weights and sender at a position in the sorted list, as variables named by `when`."""
        self.emit(f"p{when} = tl.load(perm_ptr + {position})")
        self.emit(f"e{when} = {position}" if self.paired else f"e{when} = p{when}")
        self.emit(f"s{when} = tl.load(sender_ptr + {position})")

    def rows(self, when: str) -> None:
        """Row pointers of the operands: x, a by sender; y, b by edge; w, q, d by the row of its weights."""
        problem = self.problem
        of = {
            "x": (f"s{when}", problem.dim_in1),
            "y": (f"e{when}", problem.dim_in2),
            "w": (f"p{when}", problem.weight_numel),
        }
        for letter, kind in zip(self.operands, self.kinds, strict=True):
            row, width = of[kind]
            start = f"{letter}_ptr + {row}.to(tl.int64) * {width}"
            if kind == "x":
                self.row(f"{letter}_row", start, [problem.slots1[slot] for slot, _ in self.x_parts])
            else:
                self.emit(f"{letter}_row = {start} + {'lane' if kind == 'y' else 'c'}")

    def loop(self, operands: str) -> None:
        """Open the loop over the receiver's edges: edge e from sender s.

        Loads run one edge ahead: a register is filled for the next edge as soon as this edge has used it (`fill`), so
        that memory latency hides behind the arithmetic of a whole edge without a second set of registers. What was
        loaded becomes ACC in the edge that uses it (`take`); where loads `widen` it has to be there at the end of this
        one. The rows of y and b travel as one vector and are handed to all lanes by a gather.
        """
        self.operands = operands
        self.kinds = [{"a": "x", "b": "y", "q": "w", "d": "w"}.get(letter, letter) for letter in operands]
        width = triton.next_power_of_2(self.problem.dim_in2)
        self.emit(f"lane = tl.arange(0, {width})")
        self.lane_mask = "" if width == self.problem.dim_in2 else f", mask=lane < {self.problem.dim_in2}, other=0.0"
        self.emit("place = tl.arange(0, BLOCK_C)")
        self.emit("last = tl.maximum(end - 1, 0)")
        self.index("", "tl.minimum(begin, last)")
        self.index("_next", "tl.minimum(begin + 1, last)")
        self.rows("")
        self.fill_y()
        for slot in dict.fromkeys(slot for slot, _ in self.x_parts):
            self.fill_x(slot)
        for n, _ in self.paths:
            self.fill_w(n)
        self.prepare_prefetch()
        self.emit("for k in range(begin, end):")
        self.depth += 1
        self.prefetch()
        self.rows("_next")
        self.index("_then", "tl.minimum(k + 2, last)")
        for letter in self.letters("y"):
            self.emit(f"{letter}_all = {letter}_next.to(ACC)")
            for slot, m in self.y_parts:
                position = f"tl.full([BLOCK_C], {self.problem.slots2[slot].offset + m}, tl.int32)"
                self.emit(f"{letter}{slot}_{m} = tl.gather({letter}_all, {position}, 0)")
        self.fill_y()

    def prepare_prefetch(self) -> None:
        """Each lane takes one path: the place of its weights in a row of w."""
        if self.ahead:
            self.emit("offset = place")
            for position, (_, path) in enumerate(self.paths):
                self.emit(f"offset = tl.where(place == {position}, {path.weight} + block * BLOCK_C, offset)")

    def prefetch(self) -> None:
        """Ask the L2 cache for the rows of y and w of a later edge; a hint, which changes no result.

        The rows lie scattered over gigabytes, and the registers hold only one edge in flight: too little to hide the
        latency of device memory, enough for that of L2. One instruction a row: lane i asks for the weights of path i.
        """
        if not self.ahead:
            return
        self.emit(f"place_far = tl.minimum(k + {self.ahead}, last)")
        self.emit("far = tl.load(perm_ptr + place_far).to(tl.int64)")
        for letter, kind in zip(self.operands, self.kinds, strict=True):
            if kind != "x":
                width, lanes = {
                    "y": (self.problem.dim_in2, f"tl.minimum(place, {self.problem.dim_in2 - 1})"),
                    "w": (self.problem.weight_numel, f"tl.where(place < {len(self.paths)}, offset, block * BLOCK_C)"),
                }[kind]
                row = "place_far.to(tl.int64)" if self.paired and kind == "y" else "far"
                pointers = f"{letter}_ptr + {row} * {width} + {lanes}"
                asm = '"prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l"'
                self.emit(f"tl.inline_asm_elementwise({asm}, [{pointers}], dtype=tl.int32, is_pure=False, pack=1)")

    def close(self) -> None:
        """End the body of the loop: the next edge becomes this one."""
        self.emit("e, p, s, e_next, p_next, s_next = e_next, p_next, s_next, e_then, p_then, s_then")
        self.depth -= 1

    def letters(self, kind: str) -> list[str]:
        return [letter for letter, k in zip(self.operands, self.kinds, strict=True) if k == kind]

    def components(self, slot: int) -> list[int]:
        return [m for i, m in self.x_parts if i == slot]

    def fill_x(self, slot: int) -> None:
        components = self.components(slot)
        for letter in self.letters("x"):
            names = [f"{letter}{slot}_{m}_next" for m in components]
            self.load_slot(names, f"{letter}_row", self.problem.slots1[slot], components)

    def fill_y(self) -> None:
        for letter in self.letters("y"):
            self.emit(f"{letter}_next = tl.load({letter}_row{self.lane_mask})")

    def fill_w(self, n: int) -> None:
        for letter in self.letters("w"):
            self.load([f"{letter}{n}_next"], f"{letter}_row", [self.problem.paths[n].weight])

    def readers(self, n: int) -> list[int]:
        """The paths that read n's slot of x."""
        return [i for i, path in self.paths if path.slot1 == self.problem.paths[n].slot1]

    def last_reader(self, n: int) -> bool:
        """Whether no path after n reads n's slot of x."""
        return n == self.readers(n)[-1]

    def take(self, n: int) -> None:
        """Path n begins: what was loaded for this edge, in ACC; the features at the first path that reads them."""
        slot = self.problem.paths[n].slot1
        taken = [f"{letter}{n}" for letter in self.letters("w")]
        if n == self.readers(n)[0]:
            taken += [f"{letter}{slot}_{m}" for letter in self.letters("x") for m in self.components(slot)]
        for name in taken:
            self.emit(f"{name} = {name}_next.to(ACC)")

    def used(self, n: int) -> None:
        """Path n is done with this edge: fill its weights, and its features if no later path reads them."""
        self.fill_w(n)
        if self.last_reader(n):
            self.fill_x(self.problem.paths[n].slot1)

    def store_channel_sums(self, values: dict[int, str], store: str) -> None:
        """Hand to `store` the sums over the BLOCK_C channels of values[i], zero where there is none, for place i.

        A butterfly on all values at once: each step halves the values a lane holds and the lanes that hold a value, so
        16 sums over 32 lanes take 16 shuffles instead of 80.
        """
        width = triton.next_power_of_2(self.problem.dim_in2)
        held = [values.get(i, "zero") for i in range(width)]
        self.emit("zero = tl.zeros([BLOCK_C], ACC)")
        distance = self.block_c // 2
        while distance:
            other = f"tl.gather({{}}, place ^ {distance}, 0)"
            if len(held) == 1:
                self.emit(f"total = {held[0]} + {other.format(held[0])}")
                held = ["total"]
            else:
                half = len(held) // 2
                self.emit(f"upper = (place & {distance}) != 0")
                for i in range(half):
                    low, high = held[i], held[i + half]
                    self.emit(f"sent = tl.where(upper, {low}, {high})")
                    self.emit(f"fold{half}_{i} = tl.where(upper, {high}, {low}) + {other.format('sent')}")
                held = [f"fold{half}_{i}" for i in range(half)]
            distance //= 2
        copies = self.block_c // width
        keep = f"(place % {copies} == 0) & (place // {copies} < {self.problem.dim_in2})"
        self.emit(store.format(f"place // {copies}", held[0], keep))


def forward_source(
    problem, numbers: tuple[int, ...], block_c: int, tangent: bool, ahead: int | None, paired: bool = False
) -> str:
    """`channelwise_tp_fwd_kernel`, or with `tangent` its derivative along (a, b, q); with `paired` of weights in pairs.

    Each of SPLIT programs of a node sums a share of its edges into a plane of its own of out [SPLIT, nodes, dim_out].
    """
    # Loads that widen are issued earlier in the edge before: measured to be faster here, slower in the other kernels.
    out = Writer(problem, numbers, block_c, ahead, paired, widen=not tangent)
    operands = "xaybwq" if tangent else "xyw"
    name = f"channelwise_tp_fwd{'_tangent' * tangent}{'_pairs' * paired}_kernel"
    out.head(name, " ".join(operands) + " out receiver perm sender")
    for n, path in out.paths:
        for m1, m2 in pairs(path):
            out.emit(f"A{n}_{m1}_{m2} = tl.zeros([BLOCK_C], ACC)")
            out.started.add(f"A{n}_{m1}_{m2}")
    out.loop(operands)
    for n, path in out.paths:
        out.take(n)
        for m1 in range(2 * path.l1 + 1):
            x, a = f"x{path.slot1}_{m1}", f"a{path.slot1}_{m1}"
            out.emit(f"z = w{n} * {x}")
            if tangent:
                out.add("zt", (f"w{n}", a), (f"q{n}", x), fresh=True)
            for m2 in [m2 for n1, m2 in pairs(path) if n1 == m1]:
                y, b = f"y{path.slot2}_{m2}", f"b{path.slot2}_{m2}"
                out.add(f"A{n}_{m1}_{m2}", *([("zt", y), ("z", b)] if tangent else [("z", y)]))
        out.used(n)
    out.close()
    blocks = triton.cdiv(out.mul, block_c)
    out.emit(f"nodes = tl.num_programs(0) // ({blocks} * SPLIT)")
    plane_row = f"out_ptr + (split.to(tl.int64) * nodes + node) * {problem.dim_out}"
    out.row("out_row", plane_row, [problem.slots3[path.slot3] for _, path in out.paths])
    sums: dict[tuple[int, int], list[str]] = defaultdict(list)
    for n, path in out.paths:
        for m1, m2, m3, value in path.cg:
            sums[path.slot3, m3].append(times(value, f"A{n}_{m1}_{m2}"))
    for (slot, m3), terms in sorted(sums.items()):
        out.emit(f"tl.store({out.pointer('out_row', problem.slots3[slot], m3)}, {plus(terms)}{out.store_mask})")
    return out.text()


def _backward_path(out: Writer, n: int, path, tangent: bool, wrt_x: bool) -> None:
    """One path of the backward's loop body: gw, and what it adds to gx and gy."""
    w, q = f"w{n}", f"q{n}"
    for m1 in range(2 * path.l1 + 1):
        x, a, gx = f"x{path.slot1}_{m1}", f"a{path.slot1}_{m1}", f"gx{path.slot1}_{m1}"
        if tangent:
            _contract(out, "u", n, path, m1, "y")
            _contract(out, "v", n, path, m1, "b")
            out.add("gw", ("v", x), ("u", a), fresh=not m1)
            if wrt_x:
                out.add(gx, (w, "v"), (q, "u"))
            _add_gy(out, n, path, m1, (w, a), (q, x))
        else:
            _add_gy(out, n, path, m1, (w, x))  # first of all: registers are short
            _contract(out, "u", n, path, m1, "y")
            out.add("gw", ("u", x), fresh=not m1)
            if wrt_x:
                out.add(gx, (w, "u"))


def _add_gy(out: Writer, n: int, path, m1: int, *z: tuple[str, str]) -> None:
    """gy[m2] += G_p[m1, m2] z for the sum of products z."""
    out.add("z", *z, fresh=True)
    for m2 in [m2 for n1, m2 in pairs(path) if n1 == m1]:
        out.add(f"gy{path.slot2}_{m2}", (f"G{n}_{m1}_{m2}", "z"))


def _contract(out: Writer, name: str, n: int, path, m1: int, letter: str) -> None:
    """name = sum_m2 G_p[m1, m2] y[m2], with y or its tangent b."""
    products = [(f"G{n}_{m1}_{m2}", f"{letter}{path.slot2}_{m2}") for n1, m2 in pairs(path) if n1 == m1]
    out.add(name, *products, fresh=True)


def _load_gradient(out: Writer) -> None:
    """G_p[m1, m2] of every path, from the gradient of the node's result."""
    slots = out.problem.slots3
    out.row("g_row", f"g_ptr + node * {out.problem.dim_out}", [slots[path.slot3] for _, path in out.paths])
    for n, path in out.paths:
        components = list(range(2 * path.l3 + 1))
        out.load_slot([f"g{m3}" for m3 in components], "g_row", slots[path.slot3], components)
        for m3 in components:
            out.emit(f"g{m3} = g{m3}.to(ACC)")
        for pair in pairs(path):
            terms = [times(value, f"g{m3}") for m1, m2, m3, value in path.cg if (m1, m2) == pair]
            out.emit(f"G{n}_{pair[0]}_{pair[1]} = {plus(terms)}")


GX_STORES = {
    "atomic": 'tl.atomic_add({0}, {1}{2}, sem="relaxed")',
    "edge": "tl.store({0}, {1}{2})",
    "edge_add": "tl.store({0}, tl.load({0}{3}) + {1}{2})",
}
"""How the gradient of x leaves: added to the sender's row; one row an edge; added to that row (a later part)."""


def backward_source(
    problem,
    numbers: tuple[int, ...],
    block_c: int,
    gx: str,
    gy_rows: tuple[int, int] | None,
    tangent: bool,
    ahead: int | None,
    begun: frozenset[int] = frozenset(),
) -> str:
    """`channelwise_tp_bwd_kernel`, or with `tangent` its derivative along (a, b, q) at fixed g.

    gx: "atomic", "edge" or "none" to leave it out. begun: slots of gx that earlier parts have written, to whose rows
    an "edge" adds; rows of the others hold nothing yet. gy_rows: (first, all) partial sums of gy an edge, where the
    channel blocks of this part begin and how many those of all parts are; None to add them up by atomics.
    """
    out = Writer(problem, numbers, block_c, ahead)
    operands = "xaybwq" if tangent else "xyw"
    name = "channelwise_tp_bwd_tangent_kernel" if tangent else "channelwise_tp_bwd_kernel"
    out.head(name, "g " + " ".join(operands) + " gx gy gw receiver perm sender")
    _load_gradient(out)
    out.loop(operands)
    out.emit(f"gw_row = gw_ptr + e.to(tl.int64) * {problem.weight_numel} + c")
    _gx_row(out, "s" if gx == "atomic" else "e")
    for n, path in out.paths:
        out.take(n)
        _backward_path(out, n, path, tangent, gx != "none")
        out.emit(f"tl.store(gw_row + {path.weight}, gw{out.store_mask})")
        out.used(n)
        if gx != "none" and out.last_reader(n):
            _store_gx(out, path, "edge_add" if gx == "edge" and path.slot1 in begun else gx)
    _store_gy(out, gy_rows)
    out.close()
    return out.text()


def _gx_row(out: Writer, row: str) -> None:
    slots = [out.problem.slots1[slot] for slot, _ in out.x_parts]
    out.row("gx_row", f"gx_ptr + {row}.to(tl.int64) * {out.problem.dim_in1}", slots)


def _store_gx(out: Writer, path, how: str) -> None:
    """The gradient of the slot of x that the path reads, in one of the ways of GX_STORES."""
    for m in range(2 * path.l1 + 1):
        pointer = out.pointer("gx_row", out.problem.slots1[path.slot1], m)
        out.emit(GX_STORES[how].format(pointer, f"gx{path.slot1}_{m}", out.store_mask, out.load_mask))


def _store_gy(out: Writer, rows: tuple[int, int] | None) -> None:
    """The sums of gy over the channels, into partial sums (see `backward_source`) or by atomics."""
    width, slots = out.problem.dim_in2, out.problem.slots2
    if rows is None:
        store = f'tl.atomic_add(gy_ptr + e.to(tl.int64) * {width} + {{}}, {{}}, mask={{}}, sem="relaxed")'
    else:
        row = f"gy_ptr + (e.to(tl.int64) * {rows[1]} + {rows[0]} + block) * {width}"
        store = f"tl.store({row} + {{}}, {{}}, mask={{}})"
    out.store_channel_sums({slots[i].offset + m: f"gy{i}_{m}" for i, m in out.y_parts}, store)


def forces_source(problem, numbers: tuple[int, ...], block_c: int, wrt_x: bool, ahead: int | None) -> str:
    """`channelwise_tp_forces_kernel`: the backward where a weight's gradient is wanted along one direction only.

    d = dw/dr is the slope of the weights with the length of the edge, and gr = sum_p,c d gw takes the place of gw.
    Weights are those of pairs. gx, gy and gr are added to by atomics; gx is left out without `wrt_x`.
    """
    out = Writer(problem, numbers, block_c, ahead, paired=True)
    out.head("channelwise_tp_forces_kernel", "g x y w d gx gy gr receiver perm sender")
    _load_gradient(out)
    out.loop("xywd")
    _gx_row(out, "s")
    for n, path in out.paths:
        out.take(n)
        _backward_path(out, n, path, False, wrt_x)
        out.add("rate", (f"d{n}", "gw"))
        out.used(n)
        if wrt_x and out.last_reader(n):
            _store_gx(out, path, "atomic")
    out.emit('tl.atomic_add(gr_ptr + e, tl.sum(rate, axis=0), sem="relaxed")')
    _store_gy(out, None)
    out.close()
    return out.text()
