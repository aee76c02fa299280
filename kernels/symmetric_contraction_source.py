"""Writes the Triton source of the symmetric contraction's kernels for one problem (see `symmetric_contraction.py`).

A program owns up to NODES nodes of one species at a time and BLOCK_C channels, one channel a thread; all components of
a channel are registers, [NODES, BLOCK_C]. The polynomial is unrolled. In a tangent kernel every variable v has a
derivative d_v beside it, and only derivatives are stored; the compiler drops what nobody reads.

Triton's passes take a time that grows with the square of the number of loads and stores in a kernel. So the components
of a node are one load, [DIM, NODES, C], taken apart in registers (`component`), results are one store. Coefficients
are read by inline assembly, four terms at once (`ptx`, NVIDIA). Elsewhere each is a load, and compilation takes its
time.
"""

from __future__ import annotations

import triton

from .generated import sum_of_products

HELPERS = '''\
@triton.jit
def component(bits, place, I: tl.constexpr, DTYPE: tl.constexpr):
    """Row I of a tile [DIM, NODES, C] that is given as integers: a sum with zeros, which the compiler removes."""
    return tl.sum(tl.where(place == I, bits, 0), axis=0).to(DTYPE, bitcast=True)


@triton.jit
def nodes_of_tile(ptr_ptr, size, Z: tl.constexpr, ZW: tl.constexpr):
    """(species, first, end) of this program's tile, at most `size` of the nodes sorted by species.

    Species z has the tiles from ptr[z] // size + z on; those that it does not need are empty.
    """
    number = tl.program_id(0)
    z = tl.arange(0, ZW)
    first = tl.load(ptr_ptr + z, mask=z < Z, other=0) // size + z
    species = tl.sum(((first <= number) & (z < Z)).to(tl.int32), axis=0) - 1
    start = tl.load(ptr_ptr + species)
    begin = start + (number - start // size - species) * size
    return species, begin, tl.minimum(begin + size, tl.load(ptr_ptr + species + 1))


@triton.jit
def load_pack(ptr):
    """Four neighbouring numbers of each thread, with PTX's vector loads."""
    if ptr.dtype.element_ty == tl.float32:
        return tl.inline_asm_elementwise(
            "ld.global.nc.v4.f32 {$0, $1, $2, $3}, [$4];", "=f,=f,=f,=f,l", [ptr],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1)
    else:
        return tl.inline_asm_elementwise(
            "ld.global.nc.v2.f64 {$0, $1}, [$4]; ld.global.nc.v2.f64 {$2, $3}, [$4 + 16];", "=d,=d,=d,=d,l", [ptr],
            dtype=(tl.float64, tl.float64, tl.float64, tl.float64), is_pure=True, pack=1)


@triton.jit
def opaque(x):
    """x. LLVM does not see that, and so does not make vectors of neighbouring sums, which costs 200 registers."""
    if x.dtype == tl.float32:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.inline_asm_elementwise("mov.b64 $0, $1;", "=d,d", [x], dtype=tl.float64, is_pure=True, pack=1)


'''
PACK = 4
TILE = 16
"""Sums that are stored together."""


class Writer:
    """Lines of one kernel. `tangent`: derivatives beside the values, except of the names in `constant`."""

    def __init__(self, problem, tangent: bool, constant: str = "", ptx: bool = False):
        self.problem, self.tangent, self.constant, self.ptx = problem, tangent, constant, ptx
        self.lines: list[str] = []
        self.indent = "    "
        self.started: set[str] = set()
        self.loaded = 0

    def emit(self, line: str) -> None:
        self.lines.append(self.indent + line)

    def add(self, name: str, *factors: str, fresh: bool = False, value: bool = True) -> None:
        """name += product of the factors (name = ... at first, or where `fresh`), and the same for its derivative.

        value: False leaves the derivative alone to be summed.
        """
        names = [(name, [factors])] if value else []
        if self.tangent:
            names.append((f"d_{name}", self._derivative(factors)))
        for variable, products in names:
            if fresh or variable not in self.started:
                self.started.add(variable)
                self.emit(f"{variable} = {sum_of_products('', products) or 'zero'}")
            elif products:
                self.emit(f"{variable} = {sum_of_products(variable, products)}")

    def _derivative(self, factors: tuple[str, ...]) -> list[tuple[str, ...]]:
        """The products whose sum it is."""
        varying = (i for i, factor in enumerate(factors) if factor[0] not in self.constant)
        return [(*factors[:i], f"d_{factors[i]}", *factors[i + 1 :]) for i in varying]

    def coefficient(self, term: int) -> str:
        """The name of a term's coefficient, loaded with its neighbours when the first of them is asked for."""
        while self.loaded <= term:
            for prefix in ("", "d_") if self.tangent and "c" not in self.constant else ("",):
                (self._load_pack if self.ptx else self._load_each)(prefix)
            self.loaded += PACK
        return f"c{term}"

    def _load_pack(self, prefix: str) -> None:
        names = ", ".join(f"{prefix}c{self.loaded + i}" for i in range(PACK))
        self.emit(f"{names} = load_pack({prefix}coef + {self.loaded} * C)")

    def _load_each(self, prefix: str) -> None:
        for term in range(self.loaded, self.loaded + PACK):
            self.emit(f"{prefix}c{term} = tl.load({prefix}coef + {self.loaded} * C + {term - self.loaded})")

    def load(self, name: str, pointer: str, dim: int) -> None:
        """The components of the nodes as name0, name1, ..., and the tangent's beside them."""
        self.fetch(name, pointer, dim)
        self.unpack(name, dim)

    def _loaded(self, name: str) -> list[str]:
        return [name, f"d_{name}"] if self.tangent and name not in self.constant else [name]

    def fetch(self, name: str, pointer: str, dim: int) -> None:
        """Only the loads: all components of a node as one tile, {name}_tile."""
        row = f"row{triton.next_power_of_2(dim)}"
        for variable in self._loaded(name):
            ptr = pointer if variable == name else f"{pointer.removesuffix('_ptr')}_tangent_ptr"
            place = f"{ptr} + node * {dim} * C + {row} * C + lane"
            self.emit(f"{variable}_tile = tl.load({place}, mask=inside & ({row} < {dim}), other=0.0)")

    def unpack(self, name: str, dim: int) -> None:
        """The tiles of `fetch` taken apart."""
        for variable in self._loaded(name):
            self.emit(f"bits = {variable}_tile.to(ACC).to(INT, bitcast=True)")
            for i in range(dim):
                self.emit(f"{variable}{i} = component(bits, row{triton.next_power_of_2(dim)}, {i}, ACC)")

    def store(self, name: str, pointer: str, dim: int) -> None:
        """The variables name0, name1, ... as the components of the nodes; zero where a variable never appeared."""
        prefix, width = "d_" if self.tangent else "", triton.next_power_of_2(dim)
        self.emit(f"tile = tl.zeros(({width}, NODES, BLOCK_C), ACC)")
        for i in range(dim):
            if f"{prefix}{name}{i}" in self.started:
                self.emit(f"tile = tl.where(row{width} == {i}, {prefix}{name}{i}[None, :, :], tile)")
        self.emit(
            f"tl.store({pointer} + node * {dim} * C + row{width} * C + lane, "
            f"tile.to({pointer}.dtype.element_ty), mask=inside & (row{width} < {dim}))"
        )

    def rows(self, *dims: int) -> None:
        for width in sorted({triton.next_power_of_2(dim) for dim in dims}):
            self.emit(f"row{width} = tl.arange(0, {width})[:, None, None]")


def _kernel(name: str, out: Writer, pointers: list[str], *numbers: str) -> str:
    """The whole source. Were the tensors known to be aligned, a thread would get four channels instead of one."""
    data = [name for name in pointers if name not in ("perm_ptr", "ptr_ptr")]
    words = ("C", "Z", "ZW", "NODES", "BLOCK_C", "ACC", "INT")
    arguments = ", ".join((*pointers, *numbers, *(f"{word}: tl.constexpr" for word in words)))
    head = f"@triton.jit(do_not_specialize={list(numbers)!r}, do_not_specialize_on_alignment={data!r})\n"
    return HELPERS + head + f"def {name}_kernel({arguments}):\n" + "\n".join(out.lines) + "\n"


def _begin(out: Writer, size: str) -> None:
    """The channel block is the slow axis: neighbouring programs read the same coefficients."""
    out.emit(f"species, begin, end = nodes_of_tile(ptr_ptr, {size}, Z, ZW)")
    out.emit("if begin >= end:")
    out.emit("    return")
    out.emit("channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)")
    out.emit("lane = channel[None, None, :]")
    out.emit("zero = tl.zeros((NODES, BLOCK_C), ACC)")
    out.rows(out.problem.dim_in, out.problem.dim_out)


def _nodes(out: Writer, first: str) -> None:
    """The nodes at `first` and after it in the order of their species; those beyond the tile are read as zeros."""
    out.emit(f"number = {first} + tl.arange(0, NODES)")
    out.emit("node = tl.load(perm_ptr + number, mask=number < end, other=0).to(tl.int64)[None, :, None]")
    out.emit("inside = (lane < C) & (number < end)[None, :, None]")


def _nodes_of_program(out: Writer) -> None:
    _begin(out, "NODES")
    _nodes(out, "begin")
    # A channel beyond the last one reads the last one's coefficients, so that these loads need no mask.
    rows = out.problem.rows * PACK
    place = f"species.to(tl.int64) * {rows} * C + {PACK} * tl.minimum(channel, C - 1)[None, :]"
    out.emit(f"coef = coef_ptr + {place}")
    if out.tangent and "c" not in out.constant:
        out.emit(f"d_coef = coef_tangent_ptr + {place}")


def _prefix(out: Writer, prefix: tuple[int, ...]) -> tuple[str, ...]:
    """The product of the prefix as factors: none, the one component, or the variable p."""
    if len(prefix) < 2:
        return tuple(f"x{i}" for i in prefix)
    out.add("p", *(f"x{i}" for i in prefix), fresh=True)
    return ("p",)


def forward_source(problem, ptx: bool, tangent: bool, coef_tangent: bool = False) -> str:
    """out_m = sum over prefixes p of p (c_p + sum_k c_pk x_k); tangent: its derivative along tangents of x and coef."""
    out = Writer(problem, tangent, "" if coef_tangent else "c", ptx)
    _nodes_of_program(out)
    out.load("x", "x_ptr", problem.dim_in)
    for group in problem.groups:
        prefix, sums = _prefix(out, group.prefix), set()
        for row in group.rows:
            last = () if row.last is None else (f"x{row.last}",)
            for m, term in row.entries:
                out.add(f"s{m}", out.coefficient(term), *last, fresh=m not in sums)
                sums.add(m)
        for m in sorted(sums):
            out.add(f"o{m}", *prefix, f"s{m}")
    out.store("o", "out_ptr", problem.dim_out)
    pointers = ["x_ptr", "coef_ptr", *_tangents(tangent, coef_tangent), "out_ptr", "perm_ptr", "ptr_ptr"]
    return _kernel("symmetric_contraction_fwd" + ("_tangent" if tangent else ""), out, pointers)


def _tangents(tangent: bool, coef_tangent: bool) -> list[str]:
    return ["x_tangent_ptr", *(["coef_tangent_ptr"] if coef_tangent else [])] if tangent else []


def backward_source(problem, ptx: bool, tangent: bool, coef_tangent: bool = False) -> str:
    """gx: with a_k = sum_m g_m c_mpk and b = sum_k a_k x_k (c_p for the prefix alone), gx_k += a_k p, and gx_i of the
    prefix's components gets b times the prefix without x_i."""
    out = Writer(problem, tangent, "g" if coef_tangent else "gc", ptx)
    _nodes_of_program(out)
    out.load("x", "x_ptr", problem.dim_in)
    out.load("g", "g_ptr", problem.dim_out)
    for group in problem.groups:
        prefix = _prefix(out, group.prefix)
        for number, row in enumerate(group.rows):
            for i, (m, term) in enumerate(row.entries):
                out.add("a", out.coefficient(term), f"g{m}", fresh=i == 0)
            last = () if row.last is None else (f"x{row.last}",)
            if group.prefix:
                out.add("b", "a", *last, fresh=number == 0)
            if row.last is not None:
                out.add(f"y{row.last}", "a", *prefix)
        for place, i in enumerate(group.prefix):
            others = (f"x{j}" for other, j in enumerate(group.prefix) if other != place)
            out.add(f"y{i}", "b", *others)
    out.store("y", "gx_ptr", problem.dim_in)
    pointers = ["g_ptr", "x_ptr", "coef_ptr", *_tangents(tangent, coef_tangent), "gx_ptr", "perm_ptr", "ptr_ptr"]
    return _kernel("symmetric_contraction_bwd" + ("_tangent" if tangent else ""), out, pointers)


def parts(problem, budget: int, products: bool) -> list[tuple[int, int]]:
    """[first, end) of the paths of each part of the weights' gradient: as many as fit, at least one.

    A path needs a register for its sum; the products g_m x_k, where they are held, are shared.
    """
    held_by: list[set] = [set() for _ in range(problem.paths)]
    for (m, monomial), row in zip(problem.terms, problem.table, strict=True):
        for path, _ in row if products else ():
            held_by[path].add((m, monomial[-1] if len(monomial) == problem.degree else None))
    found, first, held = [], 0, set()
    for path, own in enumerate(held_by):
        if path > first and path + 1 - first + len(held | own) > budget:
            found.append((first, path))
            first, held = path, set()
        held |= own
    return [*found, (first, problem.paths)] if problem.paths else []


def _by_path(problem, group, part: tuple[int, int]) -> dict[int, list[tuple[int, int | None, float]]]:
    """The entries (m, k, factor) of a group's terms in the table, by path."""
    found: dict[int, list] = {}
    for row in group.rows:
        for m, term in row.entries:
            for path, factor in problem.table[term]:
                if part[0] <= path < part[1]:
                    found.setdefault(path, []).append((m, row.last, factor))
    return found


def _factors(out: Writer, part: tuple[int, int]) -> dict[float, str]:
    """Names of the table's factors. They are tensors, as Triton 3.6 rounds a literal in `tl.fma` to FP32."""
    used = {factor for row in out.problem.table for path, factor in row if part[0] <= path < part[1]}
    names = {factor: f"f{number}" for number, factor in enumerate(sorted(used))}
    for factor, name in names.items():
        out.emit(f"{name} = tl.full((NODES, BLOCK_C), {factor!r}, ACC)")
    return names


def _sums_of_products(out: Writer, part: tuple[int, int], names: dict[float, str]) -> None:
    """w_path += p (sum of factors times g_m x_k), for every prefix p: fewest operations, all g_m x_k are held."""
    made: set[str] = set()
    for group in out.problem.groups:
        paths = _by_path(out.problem, group, part)
        prefix = _prefix(out, group.prefix) if paths else ()
        for path, entries in paths.items():
            for i, (m, last, factor) in enumerate(entries):
                product = f"g{m}" if last is None else f"h{m}_{last}"
                if last is not None and product not in made:
                    made.add(product)
                    out.add(product, f"g{m}", f"x{last}", fresh=True)
                out.add("s", names[factor], product, fresh=i == 0)
            out.add(f"w{path}", *prefix, "s", value=not out.tangent)


def _sums_of_terms(out: Writer, part: tuple[int, int], names: dict[float, str]) -> None:
    """w_path += factor times (monomial g_m), for every term: more operations, but only the sums are held."""
    for group in out.problem.groups:
        if not _by_path(out.problem, group, part):
            continue
        prefix = _prefix(out, group.prefix)
        for row in group.rows:
            out.add("t", *prefix, *(() if row.last is None else (f"x{row.last}",)), fresh=True)
            for m, term in row.entries:
                entries = [(path, factor) for path, factor in out.problem.table[term] if part[0] <= path < part[1]]
                if entries:
                    out.add("v", "t", f"g{m}", fresh=True)
                for path, factor in entries:
                    out.add(f"w{path}", names[factor], "v", value=not out.tangent)


def weights_source(problem, ptx: bool, part: tuple[int, int], tangent: bool, products: bool) -> str:
    """Sums over the nodes of a tile of what each path's weight is multiplied by, [tile, path, C]."""
    out = Writer(problem, tangent, "gf")
    prefix, paths = "d_" if tangent else "", range(*part)
    _begin(out, "size")
    for path in paths:
        # Not `zero`: Triton does not carry a variable from one turn to the next that it takes for another one's alias.
        out.emit(f"{prefix}w{path} = tl.zeros((NODES, BLOCK_C), ACC)")
        out.started |= {f"w{path}", f"d_w{path}"}
    names = _factors(out, part)
    operands = (("x", "x_ptr", problem.dim_in), ("g", "g_ptr", problem.dim_out))
    if tangent:
        out.emit("for k in range(begin, end, NODES):")
        out.indent *= 2
        _nodes(out, "k")
        for operand in operands:
            out.load(*operand)
    else:  # there are registers to ask for the next nodes before these are worked on
        _nodes(out, "begin")
        for operand in operands:
            out.fetch(*operand)
        out.emit("for k in range(begin, end, NODES):")
        out.indent *= 2
        for name, _, dim in operands:
            out.unpack(name, dim)
        _nodes(out, "k + NODES")
        for operand in operands:
            out.fetch(*operand)
    (_sums_of_products if products else _sums_of_terms)(out, part, names)
    for path in paths if ptx else ():
        out.emit(f"{prefix}w{path} = opaque({prefix}w{path})")
    out.indent = out.indent[: len(out.indent) // 2]
    out.emit(f"place = part_ptr + tl.program_id(0).to(tl.int64) * {problem.paths} * C + channel[None, :]")
    out.emit(f"row = tl.arange(0, {TILE})[:, None]")
    for start in range(0, len(paths), TILE):
        block = paths[start : start + TILE]
        out.emit(f"tile = tl.zeros(({TILE}, BLOCK_C), ACC)")
        for i, path in enumerate(block):
            out.emit(f"tile = tl.where(row == {i}, tl.sum({prefix}w{path}, axis=0)[None, :], tile)")
        out.emit(f"tl.store(place + ({block[0]} + row) * C, tile, mask=(row < {len(block)}) & (channel < C)[None, :])")
    pointers = ["g_ptr", "x_ptr", *_tangents(tangent, False), "part_ptr", "perm_ptr", "ptr_ptr"]
    return _kernel("symmetric_contraction_weights" + ("_tangent" if tangent else ""), out, pointers, "size")
