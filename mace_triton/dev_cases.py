"""Random inputs of each op, its derivatives up to the second, and how far they may lie from the FP64 formula.

`mace-triton dev parity`, `time` and `tune` all begin here. A case knows its problem, its inputs, the op, the formula,
and the calls that are timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch

from . import (
    reference,
    reference_edge_embedding,
    reference_linear,
    reference_norm_mlp,
    reference_radial_mlp,
    reference_symmetric_contraction,
)
from .linear_problem import LinearProblem
from .ops import dispatch
from .ops.channelwise_tp import channelwise_tp
from .ops.edge_embedding import edge_harmonics, edge_radial, edge_vectors
from .ops.graph import graph_plan
from .ops.linear import linear, lowp_weight
from .ops.norm_mlp import norm_mlp
from .ops.radial_mlp import radial_mlp
from .ops.species import plan_of
from .ops.species_linear import species_linear
from .ops.symmetric_contraction import STORAGE, symmetric_contraction
from .precision import TORCH_DTYPES
from .problem import ChannelwiseTPProblem
from .symmetric_contraction_problem import SymmetricContractionProblem

HIDDEN = {"small": "{c}x0e", "medium": "{c}x0e+{c}x1o", "large": "{c}x0e+{c}x1o+{c}x2e"}
TARGET = "{c}x0e+{c}x1o+{c}x2e+{c}x3o"


def randn(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Normal random numbers on the generator's device; 16-bit ones are rounded FP32."""
    wide = torch.promote_types(dtype, torch.float32)
    return torch.randn(shape, generator=generator, device=generator.device, dtype=wide).to(dtype)


def tp_problem(shape: str, channels: int) -> ChannelwiseTPProblem:
    """conv_tp of a MACE-MP model's second layer, in the layout that accelerated models use."""
    irreps = (text.format(c=channels) for text in (HIDDEN[shape], "1x0e+1x1o+1x2e+1x3o", TARGET))
    return ChannelwiseTPProblem.from_mace(*irreps, layout_in="ir_mul", layout_out="ir_mul")


def contraction_problem(shape: str, channels: int) -> SymmetricContractionProblem:
    """The symmetric contraction behind a MACE-MP model's first layer, correlation 3."""
    from mace.modules.symmetric_contraction import SymmetricContraction

    from .nn.symmetric_contraction import problem_of

    irreps = (text.format(c=channels) for text in (TARGET, HIDDEN[shape]))
    return problem_of(SymmetricContraction(*irreps, 3, num_elements=1, use_reduced_cg=True))[0]


class ChannelwiseTP:
    """Random inputs of the channel-wise tensor product: `nodes` atoms with `degree` neighbours each."""

    TABLES = ("channelwise_tp_fwd", "channelwise_tp_bwd")
    STAGE_OF: ClassVar[dict[str, str]] = {"channelwise_tp_fwd": "forward", "channelwise_tp_bwd": "backward"}

    def __init__(self, shape: str, dtype: str, nodes: int, degree: int, channels: int, device: str, seed: int = 0):
        self.problem, self.generator = tp_problem(shape, channels), torch.Generator(device).manual_seed(seed)
        p, edges = self.problem, nodes * degree
        self.edge_index = torch.randint(nodes, (2, edges), device=device, generator=self.generator)
        self.graph = graph_plan(self.edge_index, nodes, nodes)
        store, like = TORCH_DTYPES[dtype], torch.float64 if dtype == "fp64" else torch.float32
        shapes = {
            "x": ((nodes, p.dim_in1), like),
            "y": ((edges, p.dim_in2), like),
            "w": ((edges, p.weight_numel), store),
        }
        self.inputs = {name: randn(*spec, self.generator) for name, spec in shapes.items()}
        self.operand_error = 0.0
        size, weight_size = like.itemsize, store.itemsize
        self.bytes, self.flops = p.min_bytes(nodes, nodes, edges, size, weight_size), p.flops(edges)

    def op(self, x, y, w) -> torch.Tensor:
        return channelwise_tp(self.problem, x, y, w, self.graph)

    def formula(self, x, y, w) -> torch.Tensor:
        return reference.channelwise_tp_fwd(self.problem, x, y, w, self.edge_index, self.graph.n_out)

    def lengths(self) -> dict[str, int]:
        """How many products are summed into one element, at most, by the letter of the result."""
        degree = int(self.edge_index[1].bincount().max())
        paths = self.problem.paths
        terms = max(len(path.cg) for path in paths)
        return {
            "out": degree * terms,
            "x": degree * terms * len(paths),
            "w": terms,
            "y": sum(p.mul * len(p.cg) for p in paths),
        }

    def stages(self) -> dict[str, Callable[[], object]]:
        """What is timed, by name."""
        ops, (x, y, w) = torch.ops.mace_triton, self.inputs.values()
        g = randn((self.graph.n_out, self.problem.dim_out), x.dtype, self.generator)
        a, b, q = (randn(t.shape, t.dtype, self.generator) for t in (x, y, w))
        rest = (*self.graph.tensors, self.problem.key)
        return {
            "forward": lambda: ops.channelwise_tp(x, y, w, *rest),
            "backward": lambda: ops.channelwise_tp_bwd(g, x, y, w, *rest, wrt_x=True),
            "double backward": lambda: ops.channelwise_tp_bwd_bwd(g, x, y, w, a, b, q, *rest),
        }


def map_lengths(problem: LinearProblem, nodes: int) -> dict[str, int]:
    """How many products of a linear map are summed into one element, at most, by the letter of the result."""
    width = max(block.slot_in.mul for block in problem.blocks)
    return {"out": width, "x": width, "w": max(block.slot_in.dim for block in problem.blocks) * nodes}


class Linear:
    """Random inputs of the linear map hidden -> hidden, which is MACE's linear_up; `degree` plays no role."""

    TABLES = ("linear_fwd", "linear_wgrad")
    STAGE_OF: ClassVar[dict[str, str]] = {"linear_fwd": "forward", "linear_wgrad": "gradient of weights"}
    STAGES = ("forward", "gradient of x", "gradient of weights")
    MODES: ClassVar[dict[str, str]] = {"fp64": "fp64", "fp32": "tf32x3", "bf16": "bf16"}
    OPERAND_ERROR: ClassVar[dict[str, float]] = {"fp64": 0.0, "tf32x3": 2**-20, "bf16": 2**-7}

    def __init__(self, shape: str, dtype: str, nodes: int, degree: int, channels: int, device: str, seed: int = 0):
        nodes, self.problem = self.rows_and_problem(shape, nodes, degree, channels)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.mode, self.nodes = self.MODES[dtype], nodes
        like = torch.float64 if dtype == "fp64" else torch.float32
        shapes = {"x": (nodes, self.problem.dim_in), "w": (self.problem.weight_numel,)}
        self.inputs = {name: randn(size, like, self.generator) for name, size in shapes.items()}
        self.operand_error = self.OPERAND_ERROR[self.mode]
        work, flops = self.problem.min_bytes(nodes, like.itemsize, like.itemsize), self.problem.flops(nodes)
        self.bytes, self.flops = (dict.fromkeys(self.STAGES, n["forward"]) for n in (work, flops))

    @staticmethod
    def rows_and_problem(shape: str, nodes: int, degree: int, channels: int) -> tuple[int, LinearProblem]:
        """How many rows x has, and the map."""
        hidden = HIDDEN[shape].format(c=channels)
        return nodes, LinearProblem(hidden, hidden, layout_in="mul_ir", layout_out="ir_mul")

    def op(self, x, w) -> torch.Tensor:
        return linear(self.problem, x, w, mode=self.mode)

    def formula(self, x, w) -> torch.Tensor:
        return reference_linear.linear(self.problem, x, w, "fp64")

    def lengths(self) -> dict[str, int]:
        """How many products are summed into one element, at most, by the letter of the result."""
        return map_lengths(self.problem, self.nodes)

    def stages(self) -> dict[str, Callable[[], object]]:
        """What is timed, by name."""
        ops, (x, w) = torch.ops.mace_triton, self.inputs.values()
        g = randn((self.nodes, self.problem.dim_out), x.dtype, self.generator)
        low, rest = lowp_weight(w, self.mode), (self.problem.key, self.mode, 1.0)
        return {
            "forward": lambda: ops.linear(x, w, low, None, None, *rest),
            "gradient of x": lambda: ops.linear_grad_x(g, w, low, *rest),
            "gradient of weights": lambda: ops.linear_grad_w(x, g, *rest),
        }


class LinearScalars(Linear):
    """Random inputs of the radial network's last layer, 64 scalars of each edge to the weights of conv_tp."""

    TABLES = ("linear_scalars_fwd", "linear_scalars_bwd")
    STAGE_OF: ClassVar[dict[str, str]] = {"linear_scalars_fwd": "forward", "linear_scalars_bwd": "gradient of x"}

    @staticmethod
    def rows_and_problem(shape: str, nodes: int, degree: int, channels: int) -> tuple[int, LinearProblem]:
        width = tp_problem(shape, channels).weight_numel
        return nodes * degree, LinearProblem("64x0e", f"{width}x0e", layout_in="ir_mul", layout_out="ir_mul")


class RadialMLP:
    """Random inputs of the hidden layers of MACE-MP's radial network, the same for every shape."""

    TABLES = ("radial_mlp_fwd", "radial_mlp_bwd")
    STAGE_OF: ClassVar[dict[str, str]] = {"radial_mlp_fwd": "forward", "radial_mlp_bwd": "gradient of x"}
    FEATURES, WIDTH, LAYERS, NORM = 10, 64, 3, 1.679

    def __init__(self, shape: str, dtype: str, nodes: int, degree: int, channels: int, device: str, seed: int = 0):
        self.generator, edges = torch.Generator(device).manual_seed(seed), nodes * degree
        like = torch.float64 if dtype == "fp64" else torch.float32
        self.mode = "fp64" if dtype == "fp64" else "tf32x3"  # low precision spares these layers
        sizes = self.sizes()
        self.weights = {name: randn(size, like, self.generator) / size[-2] ** 0.5 for name, size in sizes.items()}
        self.inputs = {"x": randn((edges, self.FEATURES), like, self.generator)}
        self.operand_error = Linear.OPERAND_ERROR[self.mode]
        self.bytes = {"forward": edges * (self.FEATURES + (self.LAYERS + 1) * self.WIDTH) * like.itemsize}
        self.flops = {"forward": 2 * edges * sum(w.numel() for w in self.weights.values())}

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the op's weights."""
        return {"first": (self.FEATURES, self.WIDTH), "hidden": (self.LAYERS - 1, self.WIDTH, self.WIDTH)}

    def op(self, x) -> torch.Tensor:
        return radial_mlp(x, **self.weights, norm=self.NORM, mode=self.mode)

    def formula(self, x) -> torch.Tensor:
        weights = (w.double() for w in self.weights.values())
        return reference_radial_mlp.radial_mlp(x, *weights, self.NORM, "fp64")[0]

    def lengths(self) -> dict[str, int]:
        """How many products are summed into one element, at most, by the letter of the result."""
        return dict.fromkeys(("out", "x"), self.LAYERS * self.WIDTH)

    def stages(self) -> dict[str, Callable[[], object]]:
        """What is timed, by name."""
        ops, (x,), rest = torch.ops.mace_triton, self.inputs.values(), (*self.weights.values(), self.NORM, self.mode)
        out, z = ops.radial_mlp(x, *rest, False)
        g = randn(out.shape, out.dtype, self.generator)
        return {
            "forward": lambda: ops.radial_mlp(x, *rest, False),
            "gradient of x": lambda: ops.radial_mlp_bwd(g, x, z, *rest),
        }


class NormMLP(RadialMLP):
    """Random inputs of what lies between the first and the last layer of MACE's RadialMLP, the same for every shape."""

    TABLES = ("norm_mlp_fwd", "norm_mlp_bwd")
    STAGE_OF: ClassVar[dict[str, str]] = {"norm_mlp_fwd": "forward", "norm_mlp_bwd": "gradient of x"}
    FEATURES, EPS = RadialMLP.WIDTH, 1e-5

    def sizes(self) -> dict[str, tuple[int, ...]]:
        more, width, layers = self.LAYERS - 1, self.WIDTH, self.LAYERS
        return {
            "hidden": (more, width, width),
            "bias": (more, width),
            "gain": (layers, width),
            "shift": (layers, width),
        }

    def op(self, x) -> torch.Tensor:
        return norm_mlp(x, **self.weights, eps=self.EPS, mode=self.mode)

    def formula(self, x) -> torch.Tensor:
        weights = (w.double() for w in self.weights.values())
        return reference_norm_mlp.norm_mlp(x, *weights, self.EPS, "fp64")[0]

    def stages(self) -> dict[str, Callable[[], object]]:
        """What is timed, by name."""
        ops, (x,), rest = torch.ops.mace_triton, self.inputs.values(), (*self.weights.values(), self.EPS, self.mode)
        out, z = ops.norm_mlp(x, *rest)
        g = randn(out.shape, out.dtype, self.generator)
        return {
            "forward": lambda: ops.norm_mlp(x, *rest),
            "gradient of x": lambda: ops.norm_mlp_bwd(g, z, x, *rest),
        }


class EdgeEmbedding:
    """Random edges of 0.5 to 6 angstrom: vectors, harmonics to l = 3, 10 Bessel functions, whatever the shape."""

    TABLES = ("edge_vectors", "edge_harmonics", "edge_radial")
    STAGE_OF: ClassVar[dict[str, str]] = {
        "edge_vectors": "vectors",
        "edge_harmonics": "harmonics",
        "edge_radial": "radial",
    }
    KINDS: ClassVar[dict[str, object]] = {"kind": "bessel", "transform": "none", "cut": True}
    FEATURES, R_MAX = 10, 6.0

    def __init__(self, shape: str, dtype: str, nodes: int, degree: int, channels: int, device: str, seed: int = 0):
        self.generator, edges = torch.Generator(device).manual_seed(seed), nodes * degree
        like = torch.float64 if dtype == "fp64" else torch.float32
        direction = torch.nn.functional.normalize(randn((edges, 3), like, self.generator))
        lengths = 0.5 + 5.5 * torch.rand(edges, 1, dtype=like, device=device, generator=self.generator)
        x = randn((nodes, 3), like, self.generator)
        self.edge_index = torch.randint(nodes, (2, edges), device=device, generator=self.generator)
        self.shifts = direction * lengths - (x[self.edge_index[1]] - x[self.edge_index[0]])
        self.inputs = {"x": x}
        self.basis = math.pi / self.R_MAX * torch.arange(1, self.FEATURES + 1, dtype=like, device=device)
        factor = math.sqrt(2 / self.R_MAX)
        self.constants = torch.tensor([self.R_MAX, 5, factor, 0, 0, 0], dtype=torch.float64, device=device)
        self.operand_error = 0.0 if dtype == "fp64" else 2**-20  # the angle, up to 10 pi, is rounded before its sine
        self.bytes = {"forward": edges * (3 + 3 + 16 + 1 + self.FEATURES) * like.itemsize}
        self.flops = {}

    def op(self, x) -> torch.Tensor:
        v, r = edge_vectors(x, self.edge_index, self.shifts)
        features, _ = edge_radial(r, self.basis, self.constants, **self.KINDS)
        return torch.cat((edge_harmonics(v, 3), features), dim=1)

    def formula(self, x) -> torch.Tensor:
        v, r = reference_edge_embedding.vectors(x, self.edge_index, self.shifts.double())
        edge = (v.new_empty(0), torch.empty(2, 0, dtype=torch.int64), self.basis.double(), self.constants)
        features, _ = reference_edge_embedding.radial(r, edge, tuple(self.KINDS.values()))
        return torch.cat((reference_edge_embedding.harmonics(v, 16), features), dim=1)

    def lengths(self) -> dict[str, int]:
        """How many products are summed into one element, at most, by the letter of the result."""
        degree = int(self.edge_index.flatten().bincount().max())
        return {"out": 16, "x": degree * (16 + self.FEATURES)}

    def stages(self) -> dict[str, Callable[[], object]]:
        """What is timed, by name."""
        ops, (x,) = torch.ops.mace_triton, self.inputs.values()
        v, r = ops.edge_vectors(x, self.edge_index, self.shifts)
        g = randn((v.shape[0], 16), v.dtype, self.generator)
        edge = (r.new_empty(0), torch.empty(2, 0, dtype=torch.int64, device=r.device), self.basis, self.constants)
        gf, rest = g[:, : self.FEATURES].contiguous(), (*edge, *self.KINDS.values())
        back = (v, r, v, r, self.edge_index, x.shape[0])
        return {
            "vectors": lambda: ops.edge_vectors(x, self.edge_index, self.shifts),
            "vectors, backward": lambda: ops.edge_vectors_bwd(*back),
            "harmonics": lambda: ops.edge_harmonics(v, 16),
            "harmonics, backward": lambda: ops.edge_harmonics_bwd(g, v),
            "radial": lambda: ops.edge_radial(r, *rest),
            "radial, backward": lambda: ops.edge_radial_bwd(gf, r[:0], r, *rest),
        }


class SpeciesLinear:
    """Random inputs of skip_tp, hidden -> hidden, two species, hydrogen twice as often; `degree` plays no role."""

    TABLES = ("species_linear_fwd", "species_linear_wgrad")
    STAGE_OF: ClassVar[dict[str, str]] = {
        "species_linear_fwd": "forward",
        "species_linear_wgrad": "gradient of weights",
    }

    def __init__(self, shape: str, dtype: str, nodes: int, degree: int, channels: int, device: str, seed: int = 0):
        hidden = HIDDEN[shape].format(c=channels)
        self.problem, self.generator = LinearProblem(hidden, hidden), torch.Generator(device).manual_seed(seed)
        self.mode, self.nodes, count = Linear.MODES[dtype], nodes, 2
        like = torch.float64 if dtype == "fp64" else torch.float32
        self.plan = plan_of(torch.arange(nodes, device=device) % 3 // 2, count)
        shapes = {"x": (nodes, self.problem.dim_in), "w": (count, self.problem.weight_numel)}
        self.inputs = {name: randn(size, like, self.generator) for name, size in shapes.items()}
        self.operand_error = Linear.OPERAND_ERROR[self.mode]
        work = self.problem.min_bytes(nodes, like.itemsize, count * like.itemsize)
        flops = self.problem.flops(nodes)
        self.bytes, self.flops = (dict.fromkeys(Linear.STAGES, n["forward"]) for n in (work, flops))

    def op(self, x, w) -> torch.Tensor:
        return species_linear(self.problem, x, w, self.plan, mode=self.mode)

    def formula(self, x, w) -> torch.Tensor:
        rows = [reference_linear.linear(self.problem, x, own, "fp64") for own in w]
        return torch.stack(rows)[self.plan.species.long(), torch.arange(self.nodes, device=x.device)]

    def lengths(self) -> dict[str, int]:
        """How many products are summed into one element, at most, by the letter of the result."""
        return map_lengths(self.problem, self.nodes)

    def stages(self) -> dict[str, Callable[[], object]]:
        """What is timed, by name."""
        ops, (x, w) = torch.ops.mace_triton, self.inputs.values()
        g = randn((self.nodes, self.problem.dim_out), x.dtype, self.generator)
        low, rest = lowp_weight(w, self.mode), (*self.plan, self.problem.key, self.mode, 1.0)
        return {
            "forward": lambda: ops.species_linear(x, w, low, *rest),
            "gradient of x": lambda: ops.species_linear_grad_x(g, w, low, *rest),
            "gradient of weights": lambda: ops.species_linear_grad_w(x, g, *rest),
        }


class SymmetricContraction:
    """Random inputs of the symmetric contraction, two species, hydrogen twice as often; `degree` plays no role."""

    TABLES = ("symmetric_contraction_fwd", "symmetric_contraction_bwd", "symmetric_contraction_weights")
    STAGE_OF: ClassVar[dict[str, str]] = {
        "symmetric_contraction_fwd": "forward",
        "symmetric_contraction_bwd": "gradient of x",
        "symmetric_contraction_weights": "gradient of weights",
    }

    def __init__(self, shape: str, dtype: str, nodes: int, degree: int, channels: int, device: str, seed: int = 0):
        self.problem, self.generator = contraction_problem(shape, channels), torch.Generator(device).manual_seed(seed)
        p, store = self.problem, TORCH_DTYPES[dtype]
        self.plan = plan_of(torch.arange(nodes, device=device) % 3 // 2, 2)
        self.inputs = {
            "x": randn((nodes, p.dim_in, channels), store, self.generator),
            "w": randn((2, p.paths, channels), STORAGE[store], self.generator),
        }
        self.nodes, self.operand_error = nodes, 0.0
        work, flops = p.min_bytes(nodes, 2, store.itemsize), p.flops(nodes)
        self.bytes, self.flops = {"forward": work["forward"]}, flops

    def op(self, x, w) -> torch.Tensor:
        return symmetric_contraction(self.problem, x, w, self.plan)

    def formula(self, x, w) -> torch.Tensor:
        coef = reference_symmetric_contraction.combine(self.problem, w)
        return reference_symmetric_contraction.symmetric_contraction_fwd(self.problem, x, coef, self.plan.species)

    def lengths(self) -> dict[str, int]:
        """How many products are summed into one element, at most, by the letter of the result."""
        entries = sum(map(len, self.problem.table))
        return {"out": entries, "x": entries, "w": entries * self.nodes}

    def stages(self) -> dict[str, Callable[[], object]]:
        """What is timed, by name."""
        ops, (x, w) = torch.ops.mace_triton, self.inputs.values()
        g = randn((self.nodes, self.problem.dim_out, self.problem.channels), x.dtype, self.generator)
        plan, key = self.plan, self.problem.key
        coef = ops.symmetric_contraction_combine([w], plan.ptr, key)
        return {
            "coefficients": lambda: ops.symmetric_contraction_combine([w], plan.ptr, key),
            "forward": lambda: ops.symmetric_contraction(x, w, coef, *plan, key),
            "gradient of x": lambda: ops.symmetric_contraction_bwd(g, x, w, coef, *plan, key, True, False),
            "gradient of weights": lambda: ops.symmetric_contraction_bwd(g, x, w, coef, *plan, key, False, True),
        }


CASES = {
    "channelwise_tp": ChannelwiseTP,
    "linear": Linear,
    "linear_scalars": LinearScalars,
    "radial_mlp": RadialMLP,
    "norm_mlp": NormMLP,
    "edge_embedding": EdgeEmbedding,
    "species_linear": SpeciesLinear,
    "symmetric_contraction": SymmetricContraction,
}


SAFETY = 8.0
"""Errors are taken at their largest element, a few times the typical one."""


def compare(case) -> list[tuple[str, float, float]]:
    """(result, error, allowed) of every derivative up to the second.

    The error is the largest |result - reference|, less one rounding of the stored result, over the root mean square of
    the reference. Allowed is SAFETY (u + eps sqrt(n)): u of the operands' rounding, eps of the sums' dtype, n products
    in a sum, whose errors add up at random.
    """
    before = dispatch.calls.copy()
    like = {**case.inputs, "out": case.op(**case.inputs)}
    seeds = {name: randn(t.shape, t.dtype, case.generator) for name, t in like.items()}
    results = derivatives(case.op, case.inputs, seeds)
    ran = dispatch.calls - before
    if not ran or any(which != "triton" for _, which in ran):
        raise RuntimeError(f"parity: the kernels did not run, but {dict(ran)}")
    exact = derivatives(case.formula, *({k: t.double() for k, t in group.items()} for group in (case.inputs, seeds)))
    lengths, rows = case.lengths(), []
    for name, expected in exact.items():
        got = results[name]
        sums = torch.finfo(torch.float64 if got.dtype == torch.float64 else torch.float32).eps
        letter = "out" if name in ("out", "dg") else name[1]
        excess = (got.double() - expected).abs() - torch.finfo(got.dtype).eps * expected.abs()
        error = float(excess.clamp_min(0).amax() / expected.square().mean().sqrt())
        terms = lengths[letter] * (3 if name.startswith("d") else 1)
        rows.append((name, error, SAFETY * (case.operand_error + sums * math.sqrt(terms))))
    return rows


def derivatives(function, inputs: dict, seeds: dict) -> dict:
    """out; gx, ...: its gradients for the output gradient g; dg, dx, ...: theirs for random cotangents."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    g = seeds["out"].detach().requires_grad_()
    out = function(**leaves)
    first = torch.autograd.grad(out, tuple(leaves.values()), g, create_graph=True)
    second = torch.autograd.grad(first, (g, *leaves.values()), [seeds[name] for name in leaves])
    names = ["out", *(f"g{name}" for name in leaves), "dg", *(f"d{name}" for name in leaves)]
    return {name: t.detach() for name, t in zip(names, (out, *first, *second), strict=True)}


def wrong(rows: list[tuple[str, float, float]]) -> list[str]:
    """The results that are off (NaN is)."""
    return [name for name, error, allowed in rows if not error <= allowed]
