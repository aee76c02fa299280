"""Writes the Triton source of the symmetric contraction's kernels for one problem (see `symmetric_contraction.py`).

A program owns one node (or, for the gradient of the coefficients, the nodes of one tile) and BLOCK_C channels, one
channel a thread; all components of a channel are registers. The polynomial is unrolled. In a tangent kernel every
variable v has a derivative d_v beside it, and only derivatives are stored; the compiler drops what nobody reads.

Triton's passes take a time that grows with the square of the number of loads and stores in a kernel. So the components
of a node are one load, [DIM, C], taken apart in registers (`component`), results are one store. Coefficients are read
by inline assembly, four terms at once (`ptx`, NVIDIA). Elsewhere each is a load, and compilation takes its time.
"""

from __future__ import annotations

import triton

HELPERS = '''\
@triton.jit
def component(bits, place, I: tl.constexpr, DTYPE: tl.constexpr):
    """Row I of a tile [DIM, C] that is given as integers: a sum with zeros, which the compiler removes."""
    return tl.sum(tl.where(place == I, bits, 0), axis=0).to(DTYPE, bitcast=True)


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


'''
PACK = 4
TILE = 16
"""Terms that are stored together."""


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
        names = [(name, [" * ".join(factors)])] if value else []
        if self.tangent:
            names.append((f"d_{name}", self._derivative(factors)))
        for variable, terms in names:
            if fresh or variable not in self.started:
                self.started.add(variable)
                self.emit(f"{variable} = {' + '.join(terms) or 'zero'}")
            elif terms:
                self.emit(f"{variable} += {' + '.join(terms)}")

    def _derivative(self, factors: tuple[str, ...]) -> list[str]:
        terms = []
        for i, factor in enumerate(factors):
            if factor[0] not in self.constant:
                terms.append(" * ".join((*factors[:i], f"d_{factor}", *factors[i + 1 :])))
        return terms

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
        """The components of one node as name0, name1, ..., and the tangent's beside them."""
        variables = [(name, pointer)]
        if self.tangent and name not in self.constant:
            variables.append((f"d_{name}", f"{pointer.removesuffix('_ptr')}_tangent_ptr"))
        width = triton.next_power_of_2(dim)
        for variable, ptr in variables:
            mask = f"inside & (row{width} < {dim})" if width != dim else f"inside & (row{width} >= 0)"
            self.emit(f"tile = tl.load({ptr} + node * {dim} * C + row{width} * C + lane, mask={mask}, other=0.0)")
            self.emit("bits = tile.to(ACC).to(INT, bitcast=True)")
            for i in range(dim):
                self.emit(f"{variable}{i} = component(bits, row{width}, {i}, ACC)")

    def store(self, name: str, pointer: str, dim: int) -> None:
        """The variables name0, name1, ... as the components of one node; zero where a variable never appeared."""
        prefix, width = "d_" if self.tangent else "", triton.next_power_of_2(dim)
        self.emit(f"tile = tl.zeros(({width}, BLOCK_C), ACC)")
        for i in range(dim):
            if f"{prefix}{name}{i}" in self.started:
                self.emit(f"tile = tl.where(row{width} == {i}, {prefix}{name}{i}[None, :], tile)")
        self.emit(
            f"tl.store({pointer} + node * {dim} * C + row{width} * C + lane, "
            f"tile.to({pointer}.dtype.element_ty), mask=inside & (row{width} < {dim}))"
        )

    def rows(self, *dims: int) -> None:
        for width in sorted({triton.next_power_of_2(dim) for dim in dims}):
            self.emit(f"row{width} = tl.arange(0, {width})[:, None]")


def _kernel(name: str, out: Writer, pointers: list[str]) -> str:
    """The whole source. Were the tensors known to be aligned, a thread would get four channels instead of one."""
    data = [name for name in pointers if name not in ("species_ptr", "perm_ptr", "tile_ptr")]
    constants = "C: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr, INT: tl.constexpr"
    head = f"@triton.jit(do_not_specialize_on_alignment={data!r})\n"
    head += f"def {name}_kernel({', '.join(pointers)}, {constants}):\n"
    return HELPERS + head + "\n".join(out.lines) + "\n"


def _node_of_program(out: Writer) -> None:
    """The channel block is the slow axis: neighbouring programs read the same coefficients."""
    out.emit("channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]")
    out.emit("lane = channel[None, :]")
    out.emit("inside = lane < C")
    out.emit("zero = tl.zeros((BLOCK_C,), ACC)")
    out.emit("node = tl.load(perm_ptr + tl.program_id(0)).to(tl.int64)")
    out.emit("species = tl.load(species_ptr + node).to(tl.int64)")
    # A channel beyond the last one reads the last one's coefficients, so that these loads need no mask.
    place = f"species * {out.problem.rows * PACK} * C + {PACK} * tl.minimum(channel, C - 1)"
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
    _node_of_program(out)
    out.rows(problem.dim_in, problem.dim_out)
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
    pointers = ["x_ptr", "coef_ptr", *_tangents(tangent, coef_tangent), "out_ptr", "species_ptr", "perm_ptr"]
    return _kernel("symmetric_contraction_fwd" + ("_tangent" if tangent else ""), out, pointers)


def _tangents(tangent: bool, coef_tangent: bool) -> list[str]:
    return ["x_tangent_ptr", *(["coef_tangent_ptr"] if coef_tangent else [])] if tangent else []


def backward_source(problem, ptx: bool, tangent: bool, coef_tangent: bool = False) -> str:
    """gx: with a_k = sum_m g_m c_mpk and b = sum_k a_k x_k (c_p for the prefix alone), gx_k += a_k p, and gx_i of the
    prefix's components gets b times the prefix without x_i."""
    out = Writer(problem, tangent, "g" if coef_tangent else "gc", ptx)
    _node_of_program(out)
    out.rows(problem.dim_in, problem.dim_out)
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
    pointers = ["g_ptr", "x_ptr", "coef_ptr", *_tangents(tangent, coef_tangent), "gx_ptr", "species_ptr", "perm_ptr"]
    return _kernel("symmetric_contraction_bwd" + ("_tangent" if tangent else ""), out, pointers)


def parts(problem, budget: int) -> list[tuple[int, int]]:
    """[first, end) of the groups of each part of the coefficients' gradient: at most `budget` terms, or one group."""
    found, first, size = [], 0, 0
    for number, group in enumerate(problem.groups):
        terms = sum(len(row.entries) for row in group.rows)
        if size and size + terms > budget:
            found.append((first, number))
            first, size = number, 0
        size += terms
    return [*found, (first, len(problem.groups))] if problem.groups else []


def coef_source(problem, part: tuple[int, int], tangent: bool) -> str:
    """Sums over the nodes of a tile of g_m times the monomial of each term of the part, [tile, term, C]."""
    out = Writer(problem, tangent, "g")
    groups = problem.groups[slice(*part)]
    terms = sorted(term for group in groups for row in group.rows for _, term in row.entries)
    prefix_d = "d_" if tangent else ""
    out.emit("tile_number = tl.program_id(0)")
    out.emit("lane = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]")
    out.emit("inside = lane < C")
    out.emit("zero = tl.zeros((BLOCK_C,), ACC)")
    out.rows(problem.dim_in, problem.dim_out, TILE)
    out.emit("first = tl.load(tile_ptr + tile_number)")
    out.emit("end = tl.load(tile_ptr + tile_number + 1)")
    for term in terms:
        out.emit(f"{prefix_d}w{term} = zero")
        out.started |= {f"w{term}", f"d_w{term}"}
    out.emit("for k in range(first, end):")
    out.indent *= 2
    out.emit("node = tl.load(perm_ptr + k).to(tl.int64)")
    out.load("x", "x_ptr", problem.dim_in)
    out.load("g", "g_ptr", problem.dim_out)
    for group in groups:
        prefix = _prefix(out, group.prefix)
        for row in group.rows:
            out.add("t", *prefix, *(() if row.last is None else (f"x{row.last}",)), fresh=True)
            for m, term in row.entries:
                out.add(f"w{term}", f"g{m}", "t", value=not tangent)
    out.indent = out.indent[: len(out.indent) // 2]
    out.emit(f"place = part_ptr + tile_number.to(tl.int64) * {problem.rows * PACK} * C + lane")
    for start in range(0, len(terms), TILE):
        block = terms[start : start + TILE]
        out.emit(f"tile = tl.zeros(({TILE}, BLOCK_C), ACC)")
        for i, term in enumerate(block):
            out.emit(f"tile = tl.where(row{TILE} == {i}, {prefix_d}w{term}[None, :], tile)")
        out.emit(f"tl.store(place + ({block[0]} + row{TILE}) * C, tile, mask=inside & (row{TILE} < {len(block)}))")
    pointers = ["g_ptr", "x_ptr", *_tangents(tangent, False), "part_ptr", "perm_ptr", "tile_ptr"]
    return _kernel("symmetric_contraction_coef" + ("_tangent" if tangent else ""), out, pointers)
