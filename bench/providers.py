"""The same blocks by e3nn, cuEquivariance (cueq), OpenEquivariance (oeq) and mace_triton, behind one signature each.

conv_tp: call(x [N, dim_in1], y [E, dim_in2], w [E, weights], edge_index [2, E]) -> [N, dim_out]
linear: call(x [N, dim_in]) -> [N, dim_out], with `weight`, the flat parameter in e3nn's order
species_linear: call(x [N, dim_in], one_hot [N, Z]) -> [N, dim_out], with `weights`
radial_mlp, norm_mlp: call(x [E, features]) -> [E, weights of conv_tp], with `weights`
edge_vectors: call(positions [N, 3], edge_index [2, E], shifts [E, 3]) -> (vectors [E, 3], lengths [E, 1])
edge_embedding: call(vectors [E, 3]) -> (harmonics [E, 16], radial features, or weights of conv_tp)
symmetric_contraction: call(x [N, C, 16] in mul_ir or [N, 16, C] in ir_mul, one_hot [N, Z]) -> [N, dim_out], the same
model: a module called with MACE's dictionary

Every provider is built as MACE itself builds it (mace/modules/wrapper_ops.py and mace/cli/convert_e3nn_*.py) and
states the layout it works in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from types import SimpleNamespace

import torch
from e3nn import nn, o3
from mace.tools.torch_tools import default_dtype
from torch import Tensor

from mace_triton.study.backends import (  # noqa: F401  what benches ask for as providers'
    MODELS,
    MissingProviderError,
    cueq_of,
    matmul_precision,
    model_dtype,
    model_e3nn,
    need,
    need_precision,
)

NAMES = ("e3nn", "cueq", "oeq", "mace_triton")
STORAGE = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""precision -> dtype the radial weights of conv_tp are stored in."""


@dataclass(frozen=True)
class Block:
    """A built block: how to call it, the layouts of its input and output, and its weights if it owns some.

    weights_as_e3nn: whether they are e3nn's weights in e3nn's order, so that gradients can be compared.
    """

    call: Callable[..., Tensor]
    layout_in: str = "mul_ir"
    layout_out: str = "mul_ir"
    weights: tuple[Tensor, ...] = ()
    weights_as_e3nn: bool = True

    @property
    def weight(self) -> Tensor:
        """The only weight."""
        (weight,) = self.weights
        return weight


def _cue_irreps(irreps):
    import cuequivariance as cue
    from mace.tools.cg import O3_e3nn

    return cue.Irreps(O3_e3nn, str(irreps))


@lru_cache(maxsize=2)
def conv_e3nn(problem, precision: str, device: torch.device, variant: str = "") -> Block:
    """o3.TensorProduct on gathered features, then scatter_sum."""
    from mace.tools.scatter import scatter_sum

    need_precision("e3nn", precision, ("fp64", "fp32"))
    instructions = [(i, j, k, "uvu", True) for i, j, k in problem.instructions]
    with default_dtype(model_dtype(precision)):
        tp = o3.TensorProduct(
            problem.irreps_in1,
            problem.irreps_in2,
            problem.irreps_out,
            instructions=instructions,
            shared_weights=False,
            internal_weights=False,
        ).to(device)

    def call(x, y, w, edge_index):
        return scatter_sum(tp(x[edge_index[0]], y, w), edge_index[1], dim=0, dim_size=x.shape[0])

    return Block(call)


def conv_cueq(problem, precision: str, device: torch.device, variant: str = "") -> Block:
    """cuet.SegmentedPolynomial with gather and scatter fused in, ir_mul, as MACE's with_cueq_conv_fusion calls it."""
    cuet = cueq_of(device)
    import cuequivariance as cue

    method, dtype = "uniform_1d" if device.type == "cuda" else "naive", model_dtype(precision)
    irreps = (_cue_irreps(i) for i in (problem.irreps_in1, problem.irreps_in2, problem.irreps_out))
    with default_dtype(dtype):
        product = cue.descriptors.channelwise_tensor_product(*irreps).flatten_coefficient_modes().squeeze_modes()
        polynomial = cuet.SegmentedPolynomial(product.polynomial, math_dtype=dtype, method=method).to(device)

    def call(x, y, w, edge_index):
        return polynomial([w, x, y], {1: edge_index[0]}, {0: x}, {0: edge_index[1]})[0]

    return Block(call, "ir_mul", "ir_mul")


def conv_oeq(problem, precision: str, device: torch.device, variant: str = "") -> Block:
    """oeq.TensorProductConv with atomics (deterministic=False), mul_ir, as MACE's with_oeq_conv_fusion calls it."""
    need_precision("oeq", precision, ("fp64", "fp32"))
    if device.type != "cuda":
        raise MissingProviderError("oeq runs on a GPU only")
    oeq = need("openequivariance", "oeq")
    dtype = oeq.torch_to_oeq_dtype(model_dtype(precision))
    irreps = (o3.Irreps(i) for i in (problem.irreps_in1, problem.irreps_in2, problem.irreps_out))
    instructions = [(i, j, k, "uvu", True) for i, j, k in problem.instructions]
    spec = oeq.TPProblem(
        *irreps, instructions, shared_weights=False, internal_weights=False, irrep_dtype=dtype, weight_dtype=dtype
    )
    conv = oeq.TensorProductConv(spec, deterministic=False)
    return Block(lambda x, y, w, edge_index: conv(x, y, w, edge_index[1], edge_index[0]))


def conv_mace_triton(problem, precision: str, device: torch.device, variant: str = "") -> Block:
    """Our op in ir_mul, as accelerate() uses it; the graph plan is made once, in the first call."""
    from mace_triton.ops.channelwise_tp import channelwise_tp
    from mace_triton.ops.graph import graph_plan

    problem = replace(problem, layout_in="ir_mul", layout_out="ir_mul")
    deterministic = variant == "deterministic"

    def call(x, y, w, edge_index):
        graph = graph_plan(edge_index, x.shape[0], x.shape[0], by_sender=deterministic)
        return channelwise_tp(problem, x, y, w, graph, deterministic=deterministic)

    return Block(call, "ir_mul", "ir_mul")


def linear_e3nn(irreps_in: str, irreps_out: str, precision: str, device: torch.device, variant: str = "") -> Block:
    """o3.Linear, mul_ir."""
    need_precision("e3nn", precision, ("fp64", "fp32", "tf32"))
    with default_dtype(model_dtype(precision)):
        linear = o3.Linear(irreps_in, irreps_out).to(device)
    return Block(linear, weights=(linear.weight,))


def linear_cueq(irreps_in: str, irreps_out: str, precision: str, device: torch.device, variant: str = "") -> Block:
    """cuet.Linear(method="naive") in ir_mul, as MACE's wrapper builds it."""
    need_precision("cueq", precision, ("fp64", "fp32", "tf32"))
    cuet = cueq_of(device)
    import cuequivariance as cue

    with default_dtype(model_dtype(precision)):
        linear = cuet.Linear(
            _cue_irreps(irreps_in), _cue_irreps(irreps_out), layout=cue.ir_mul, shared_weights=True, method="naive"
        ).to(device)
    return Block(linear, "ir_mul", "ir_mul", (linear.weight,))


def linear_mace_triton(
    irreps_in: str, irreps_out: str, precision: str, device: torch.device, variant: str = ""
) -> Block:
    """Our IrrepsLinear; variant "mul_ir->ir_mul" (or another pair) sets the layouts, ir_mul on both sides otherwise."""
    from mace_triton.nn.linear import IrrepsLinear
    from mace_triton.precision import Precision

    layout_in, layout_out = variant.split("->") if variant else ("ir_mul", "ir_mul")
    with default_dtype(model_dtype(precision)):
        plain = o3.Linear(irreps_in, irreps_out)
    mode = Precision.parse(precision).linear
    linear = IrrepsLinear(plain, mode, layout_in=layout_in, layout_out=layout_out).to(device)
    return Block(linear, layout_in, layout_out, (linear.weight,))


def contraction_e3nn(irreps_in: str, irreps_out: str, n_elements: int, precision: str, device: torch.device) -> Block:
    """MACE's own SymmetricContraction, correlation 3, reduced coupling basis (MACE's default), weights of seed 0."""
    from mace.modules.symmetric_contraction import SymmetricContraction

    need_precision("e3nn", precision, ("fp64", "fp32", "tf32"))
    with default_dtype(torch.float64), torch.random.fork_rng():
        torch.manual_seed(0)
        module = SymmetricContraction(
            o3.Irreps(irreps_in), o3.Irreps(irreps_out), correlation=3, num_elements=n_elements, use_reduced_cg=True
        )
    module = module.to(device=device, dtype=model_dtype(precision))
    return Block(module, weights=_contraction_weights(module))


def _contraction_weights(module: torch.nn.Module) -> tuple[Tensor, ...]:
    """In one order for MACE's module and ours."""
    from mace_triton.nn.symmetric_contraction import parameters_of

    return tuple(parameters_of(module))


def contraction_cueq(irreps_in: str, irreps_out: str, n_elements: int, precision: str, device: torch.device) -> Block:
    """cuet.SymmetricContraction as MACE's wrapper builds it, with the weights of `contraction_e3nn`, ir_mul."""
    need_precision("cueq", precision, ("fp64", "fp32", "tf32"))
    cuet = cueq_of(device)
    import cuequivariance as cue
    from mace.cli.convert_e3nn_cueq import transfer_symmetric_contractions

    dtype = model_dtype(precision)
    with default_dtype(dtype):
        module = cuet.SymmetricContraction(
            _cue_irreps(irreps_in),
            _cue_irreps(irreps_out),
            layout_in=cue.ir_mul,
            layout_out=cue.ir_mul,
            contraction_degree=3,
            num_elements=n_elements,
            original_mace=False,
            dtype=dtype,
            math_dtype=dtype,
        ).to(device)
    plain = contraction_e3nn(irreps_in, irreps_out, n_elements, precision, device).call
    weights = {f"products.0.symmetric_contractions.{name}": value for name, value in plain.state_dict().items()}
    moved: dict[str, Tensor] = {}
    n_outputs, products = len(o3.Irreps(irreps_out)), [SimpleNamespace(symmetric_contractions=plain)]
    with torch.no_grad(), default_dtype(dtype):
        transfer_symmetric_contractions(weights, moved, n_outputs - 1, products, 3, 1, True, True)
        module.weight.copy_(moved["products.0.symmetric_contractions.weight"].reshape(module.weight.shape))

    def call(x, one_hot):
        # MACE derives the species index in every call, so it is part of the time.
        return module(x.flatten(1), one_hot.argmax(dim=-1).int())

    return Block(call, "ir_mul", "ir_mul", (module.weight,), weights_as_e3nn=False)


def contraction_mace_triton(
    irreps_in: str, irreps_out: str, n_elements: int, precision: str, device: torch.device
) -> Block:
    """Our SymmetricContraction around `contraction_e3nn`. Weights are combined once, nodes sorted by species once a
    structure: neither is part of the time."""
    from mace_triton.nn.symmetric_contraction import SymmetricContraction

    need_precision("mace_triton", precision, ("fp64", "fp32"))
    module = SymmetricContraction(contraction_e3nn(irreps_in, irreps_out, n_elements, precision, device).call, "ir_mul")
    weights = _contraction_weights(module)
    return Block(lambda x, one_hot: module(x.transpose(1, 2), one_hot), "ir_mul", "ir_mul", weights)


def species_linear_e3nn(
    irreps_in: str, irreps_out: str, n_elements: int, precision: str, device: torch.device
) -> Block:
    """o3.FullyConnectedTensorProduct with one-hot species, weights of seed 0, mul_ir."""
    need_precision("e3nn", precision, ("fp64", "fp32", "tf32"))
    with default_dtype(torch.float64), torch.random.fork_rng():
        torch.manual_seed(0)
        module = o3.FullyConnectedTensorProduct(irreps_in, f"{n_elements}x0e", irreps_out)
    module = module.to(device=device, dtype=model_dtype(precision))
    return Block(module, weights=(module.weight,))


def species_linear_cueq(
    irreps_in: str, irreps_out: str, n_elements: int, precision: str, device: torch.device
) -> Block:
    """cuet.FullyConnectedTensorProduct(method="naive") in ir_mul, as MACE's wrapper builds it."""
    need_precision("cueq", precision, ("fp64", "fp32", "tf32"))
    cuet = cueq_of(device)
    import cuequivariance as cue

    irreps = (_cue_irreps(i) for i in (irreps_in, f"{n_elements}x0e", irreps_out))
    with default_dtype(model_dtype(precision)):
        module = cuet.FullyConnectedTensorProduct(
            *irreps, layout=cue.ir_mul, shared_weights=True, internal_weights=True, method="naive"
        ).to(device)
    plain = species_linear_e3nn(irreps_in, irreps_out, n_elements, precision, device)
    with torch.no_grad():
        module.weight.copy_(plain.weight.reshape(module.weight.shape))
    return Block(module, "ir_mul", "ir_mul", (module.weight,))


def species_linear_mace_triton(
    irreps_in: str, irreps_out: str, n_elements: int, precision: str, device: torch.device
) -> Block:
    """Our SpeciesLinear around `species_linear_e3nn`, in mul_ir, as accelerate() uses it."""
    from mace_triton.nn.species_linear import SpeciesLinear
    from mace_triton.precision import Precision

    plain = species_linear_e3nn(
        irreps_in, irreps_out, n_elements, "fp64" if precision == "fp64" else "fp32", device
    ).call
    module = SpeciesLinear(plain, Precision.parse(precision).linear)
    return Block(module, weights=(module.weight,))


def radial_mlp_e3nn(widths: tuple[int, ...], precision: str, device: torch.device) -> Block:
    """e3nn.nn.FullyConnectedNet with silu, weights of seed 0, as all providers of MACE use it."""
    need_precision("e3nn", precision, ("fp64", "fp32", "tf32"))
    with default_dtype(torch.float64), torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.FullyConnectedNet(list(widths), torch.nn.functional.silu)
    net = net.to(device=device, dtype=model_dtype(precision))
    return Block(net, weights=tuple(net.parameters()))


def radial_mlp_mace_triton(widths: tuple[int, ...], precision: str, device: torch.device) -> Block:
    """Our RadialNet around `radial_mlp_e3nn`, in the modes and the storage that accelerate() gives it."""
    from mace_triton.nn.radial_mlp import RadialNet
    from mace_triton.precision import PRESETS

    policy = PRESETS[precision]
    plain = radial_mlp_e3nn(widths, policy.dtype, device).call
    net = RadialNet(plain, PRESETS[policy.dtype].linear, policy.linear, policy.tensor_product)
    return Block(net, weights=tuple(net.parameters()))


def norm_mlp_e3nn(widths: tuple[int, ...], precision: str, device: torch.device) -> Block:
    """MACE's RadialMLP, weights of seed 0, as all providers of MACE use it."""
    from mace.modules.radial import RadialMLP

    need_precision("e3nn", precision, ("fp64", "fp32", "tf32"))
    with default_dtype(torch.float64), torch.random.fork_rng():
        torch.manual_seed(0)
        net = RadialMLP(list(widths))
    net = net.to(device=device, dtype=model_dtype(precision))
    return Block(net, weights=tuple(net.parameters()))


def norm_mlp_mace_triton(widths: tuple[int, ...], precision: str, device: torch.device) -> Block:
    """Our NormNet around `norm_mlp_e3nn`, in the modes that accelerate() gives it."""
    from mace_triton.nn.norm_mlp import NormNet
    from mace_triton.precision import PRESETS

    policy = PRESETS[precision]
    plain = norm_mlp_e3nn(widths, policy.dtype, device).call
    net = NormNet(plain, PRESETS[policy.dtype].linear, policy.linear)
    return Block(net, weights=tuple(net.parameters()))


def _edge_modules(width: int, r_max: float, precision: str, device: torch.device) -> list[torch.nn.Module]:
    """MACE's spherical harmonics and radial embedding, as MACE-MP-0 has them."""
    from mace.modules.blocks import RadialEmbeddingBlock

    dtype = model_dtype(precision)
    with default_dtype(dtype):
        irreps = o3.Irreps.spherical_harmonics(3)
        harmonics = o3.SphericalHarmonics(irreps, normalize=True, normalization="component")
        return [harmonics.to(device), RadialEmbeddingBlock(r_max, width, num_polynomial_cutoff=5).to(device)]


def _edge_block(harmonics, radial, network: Block | None) -> Block:
    def call(vectors):
        lengths = torch.linalg.norm(vectors, dim=-1, keepdim=True)
        features, _ = radial(lengths, None, None, None)  # atoms matter to distance transforms alone
        return harmonics(vectors), features if network is None else network.call(features)

    return Block(call, weights=() if network is None else network.weights)


def edge_embedding_e3nn(widths: tuple[int, ...], r_max: float, precision: str, device: torch.device) -> Block:
    """Eager MACE: norm, o3.SphericalHarmonics, RadialEmbeddingBlock and, for several widths, FullyConnectedNet."""
    need_precision("e3nn", precision, ("fp64", "fp32", "tf32"))
    network = radial_mlp_e3nn(widths, precision, device) if len(widths) > 1 else None
    return _edge_block(*_edge_modules(widths[0], r_max, precision, device), network)


def edge_embedding_mace_triton(widths: tuple[int, ...], r_max: float, precision: str, device: torch.device) -> Block:
    """The same with our modules around e3nn's and MACE's."""
    from mace_triton.nn.edge_embedding import EdgeHarmonics, EdgeRadial

    network = radial_mlp_mace_triton(widths, precision, device) if len(widths) > 1 else None
    harmonics, radial = _edge_modules(widths[0], r_max, precision, device)
    return _edge_block(EdgeHarmonics(harmonics), EdgeRadial(radial), network)


def edge_vectors_e3nn(precision: str) -> Block:
    """MACE's function."""
    need_precision("e3nn", precision, ("fp64", "fp32"))
    from mace.modules.utils import get_edge_vectors_and_lengths

    return Block(get_edge_vectors_and_lengths)


def edge_vectors_mace_triton(precision: str) -> Block:
    """The op that stands in for it."""
    need_precision("mace_triton", precision, ("fp64", "fp32"))
    from mace_triton.ops.edge_embedding import edge_vectors

    return Block(edge_vectors)


BUILDERS: dict[str, dict[str, Callable]] = {
    "conv_tp": {"e3nn": conv_e3nn, "cueq": conv_cueq, "oeq": conv_oeq, "mace_triton": conv_mace_triton},
    "linear": {"e3nn": linear_e3nn, "cueq": linear_cueq, "mace_triton": linear_mace_triton},
    "species_linear": {
        "e3nn": species_linear_e3nn,
        "cueq": species_linear_cueq,
        "mace_triton": species_linear_mace_triton,
    },
    "edge_embedding": {"e3nn": edge_embedding_e3nn, "mace_triton": edge_embedding_mace_triton},
    "edge_vectors": {"e3nn": edge_vectors_e3nn, "mace_triton": edge_vectors_mace_triton},
    "norm_mlp": {"e3nn": norm_mlp_e3nn, "mace_triton": norm_mlp_mace_triton},
    "radial_mlp": {"e3nn": radial_mlp_e3nn, "mace_triton": radial_mlp_mace_triton},
    "symmetric_contraction": {
        "e3nn": contraction_e3nn,
        "cueq": contraction_cueq,
        "mace_triton": contraction_mace_triton,
    },
    "model": MODELS,
}


def builder(kind: str, provider: str) -> Callable:
    """The function that builds block `kind` by `provider`; MissingProviderError where it offers no such block."""
    if provider not in BUILDERS[kind]:
        raise MissingProviderError(f"{provider} has no {kind}")
    return BUILDERS[kind][provider]
