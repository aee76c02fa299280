"""Swap MACE's modules for ours and back: `accelerate`, `restore`, and `report`, which says block by block what runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import mace  # noqa: F401  before e3nn, see mace_triton/__init__.py
import torch
from e3nn import nn, o3
from mace.calculators import foundations_models as foundations
from mace.modules import blocks, models
from mace.modules.irreps_tools import reshape_irreps
from mace.modules.radial import RadialMLP
from mace.modules.symmetric_contraction import SymmetricContraction as PlainContraction

from .coverage import HOSTS, foreign_reason, kept_reason
from .linear_problem import LinearProblem
from .nn import compile_ahead, edge_vectors
from .nn.conv import ConvTP, problem_of
from .nn.copies import copy_of
from .nn.edge_embedding import EdgeHarmonics, EdgeRadial, check_harmonics, kinds_of
from .nn.linear import IrrepsLinear
from .nn.norm_mlp import NormNet, problems_of
from .nn.radial_mlp import RadialNet
from .nn.radial_mlp import problem_of as radial_problem_of
from .nn.species_linear import SpeciesLinear
from .nn.species_linear import problem_of as species_problem_of
from .nn.symmetric_contraction import ReshapeIrreps, SymmetricContraction
from .nn.symmetric_contraction import problem_of as contraction_problem_of
from .ops import dispatch
from .precision import PRESETS, Precision

# e3nn's or MACE's class -> ours, and the check that it can stand in. Whoever the parent is, it calls them alike.
_EDGE = {o3.SphericalHarmonics: (EdgeHarmonics, check_harmonics), blocks.RadialEmbeddingBlock: (EdgeRadial, kinds_of)}
_OURS = (
    *(IrrepsLinear, ConvTP, RadialNet, NormNet, SpeciesLinear, SymmetricContraction, ReshapeIrreps),
    *(EdgeHarmonics, EdgeRadial),
)
MODELS = (models.MACE, models.AtomicDipolesMACE, models.AtomicDielectricMACE, models.EnergyDipolesMACE)


@dataclass(frozen=True)
class Inner:
    """Which linears of an interaction block read conv_tp's message, and which read linear_up's features beside it.

    last: the module whose result goes straight to `reshape`.
    """

    behind: str = "linear"
    beside: tuple[str, ...] = ()
    last: str = "linear"

    @property
    def layouts(self) -> dict[str, tuple[str, str]]:
        """Module -> (layout read, layout written): channels lie side by side from linear_up on, nobody else looks."""
        readers = dict.fromkeys((self.behind, *self.beside), ("ir_mul", "mul_ir"))
        return {"linear_up": ("mul_ir", "ir_mul"), "conv_tp": ("ir_mul", "ir_mul"), **readers}


BLOCKS: dict[type, Inner] = {
    blocks.RealAgnosticInteractionBlock: Inner(last="skip_tp"),
    blocks.RealAgnosticResidualInteractionBlock: Inner(),
    blocks.RealAgnosticDensityInteractionBlock: Inner(last="skip_tp"),
    blocks.RealAgnosticDensityResidualInteractionBlock: Inner(),
    blocks.RealAgnosticAttResidualInteractionBlock: Inner(),
    blocks.RealAgnosticResidualNonLinearInteractionBlock: Inner("linear_1", ("linear_res",), "linear_2"),
}

# Embeddings and readouts cost nothing beside the rest and their rounding goes straight into the energy (or every edge
# weight, or charges that act at any distance): as exact as the parameters, the readouts unless a policy says otherwise.
EXACT = (
    "node_embedding",
    "readouts",
    "embedding_readout",
    "source_embedding",
    "target_embedding",
    "conv_tp_weights",
    "density_fn",
    *("lr_source_maps", "fukui_source_map", "field_dependent_charges_maps", "local_electron_energy"),  # PolarMACE
    "les_readouts",
)
RADIAL = ("conv_tp_weights", "density_fn")

AMD_TERMS = 128
"""Longer symmetric contractions stay MACE's on AMD GPUs: see "Compile time" in docs/symmetric_contraction.md."""


@dataclass
class Conversion:
    """What `accelerate` did to a model: the policy, and the reason for each module that stayed MACE's own."""

    precision: Precision
    deterministic: bool
    kept: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One module: name in the model, class, what runs it, in which precision, from which layout to which."""

    block: str
    module: str
    runs: str
    precision: str
    layout: str


@dataclass(frozen=True)
class Report:
    """What a model runs on, row by row in `rows`; str() is an aligned table."""

    title: str
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        cells = [("block", "module", "runs", "precision", "layout")]
        cells += [(r.block, r.module, r.runs, r.precision, r.layout) for r in self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(5)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        return "\n".join([self.title, *lines])


def accelerate(
    model: torch.nn.Module,
    precision: str | Precision | None = None,
    *,
    deterministic: bool = False,
    strict: bool = False,
) -> torch.nn.Module:
    """A copy of a MACE model whose blocks run on our kernels where they have one; `model` itself is untouched.

    The copy has MACE's class, attributes, forward and state dict (same keys, shapes and values): it trains, pickles
    and goes into `MACECalculator(models=...)` as before. Energies in eV and forces in eV/angstrom, as the model's.

    precision: "fp64", "fp32", "tf32", "bf16", "fp16", a policy file or a `Precision`; None keeps the model's own. The
    copy's parameters take the policy's dtype (FP32 master weights for the low-precision ones). An accelerated model
    is converted anew from its restored form. deterministic: the same bits on every run. strict: raise where a module
    that has a kernel could not use it, instead of keeping MACE's own code and saying so in `report`.

    Raises TypeError for what is no MACE model; ValueError for a cuEquivariance or OpenEquivariance model, an unknown
    precision, parameters of another dtype than float64 or float32, and under strict.
    """
    check_model(model)
    policy = _policy(model, precision)
    fast = restore(model).to(policy.torch_dtype)
    conversion = Conversion(policy, deterministic)
    layouts = _layouts(fast)
    for name, parent, child in list(_candidates(fast)):
        reason = _refusal(parent, child)
        if reason:
            conversion.kept[name] = reason
        else:
            _swap(fast, name, _replacement(name, parent, child, conversion, layouts))
    for name in [name for name in layouts if name.endswith(".reshape")]:
        _swap(fast, name, ReshapeIrreps(fast.get_submodule(name)))
    if strict and conversion.kept:
        lines = "\n".join(f"  {name}: {reason}" for name, reason in conversion.kept.items())
        raise ValueError(f"strict=True: these modules have a kernel but cannot use it\n{lines}")
    if not deterministic:
        edge_vectors.attach(fast)
    compile_ahead.attach(fast)
    fast.mace_triton = conversion
    return fast


def restore(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of an accelerated (or plain) MACE model on MACE's own e3nn modules: same weights, same dtype.

    Raises TypeError or ValueError for the models that `accelerate` refuses.
    """
    check_model(model)
    plain = copy_of(model)
    with torch.random.fork_rng(devices=[]):  # e3nn draws weights that the restored ones replace
        for name, module in list(plain.named_modules()):
            if isinstance(module, _OURS):
                _swap(plain, name, module.restore())
    edge_vectors.detach(plain)
    compile_ahead.detach(plain)
    plain.__dict__.pop("mace_triton", None)
    return plain


def report(model: torch.nn.Module) -> Report:
    """What each block of a model runs on: kernel or MACE's own code and why, precision, layout. `print` it.

    Raises TypeError or ValueError for the models that `accelerate` refuses.
    """
    check_model(model)
    conversion = getattr(model, "mace_triton", None)
    like = next(model.parameters())
    rows = [_row(name, module, conversion, like) for name, module in _blocks(model)]
    if conversion is not None:
        rows.insert(0, _vectors_row(model, like))
    name = type(model).__name__
    if conversion is None:
        return Report(f"{name}: plain MACE, not accelerated", tuple(rows))
    order = "deterministic" if conversion.deterministic else "sums in any order"
    return Report(f"{name}: precision {conversion.precision.name}, {order}", tuple(rows))


def load_model(path_or_name: str | Path, device: str = "cpu") -> torch.nn.Module:
    """Load a MACE model from a .model file, or by name: MACE-MP ("medium", "medium-mpa-0", ...) or "off-medium".

    A named model is fetched once by MACE's own loader. A .model file is a pickle and can run code: open only files
    that you trust. Returns the model on `device`, with the dtype it was saved in.

    Raises FileNotFoundError for a path that does not exist and ValueError for a file that is no MACE model, for a
    model on another backend than e3nn, and for a device that is not there.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but torch sees no GPU: use device='cpu'")
    name = str(path_or_name)
    if name.startswith("off-") and name[4:] in foundations.mace_off_urls:
        return foundations.mace_off(model=name[4:], device=device, return_raw_model=True)
    path = Path(foundations.download_mace_mp_checkpoint(name) if name in foundations.mace_mp_urls else name)
    if not path.is_file():
        names = [*foundations.mace_mp_urls, *(f"off-{size}" for size in foundations.mace_off_urls)]
        raise FileNotFoundError(f"path_or_name: no file {name!r}; known model names are {', '.join(names)}")
    try:
        model = torch.load(path, map_location=device, weights_only=False)
    except Exception as error:  # unpickling fails in as many ways as there are files
        raise ValueError(f"{path} is no MACE model file ({type(error).__name__}: {error}){_EXPECTED}") from error
    if isinstance(model, dict):
        raise ValueError(f"{path} holds a dictionary ({', '.join(map(str, list(model)[:4]))}){_EXPECTED}")
    try:
        check_model(model)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return model


_EXPECTED = "; expected is the whole model as MACE's training saves it, NAME.model"


def check_model(model: object) -> None:
    """Raise TypeError or ValueError, with the remedy, unless `model` is a MACE model on e3nn modules (or ours)."""
    if isinstance(model, (str, Path)):
        raise TypeError(f"model is the path {str(model)!r}: pass mace_triton.load_model(path) instead")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is TorchScript (made for LAMMPS?): pass the .model file it was compiled from")
    if hasattr(model, "_orig_mod"):
        raise TypeError("model came from torch.compile: accelerate the model before compiling it")
    if hasattr(model, "models") and hasattr(model, "calculate"):
        raise TypeError("model is a calculator: pass its calculator.models[0]")
    if not isinstance(model, MODELS):
        raise TypeError(f"model must be a MACE model (MACE, ScaleShiftMACE, ...), got {type(model).__name__}")
    for name, module in model.named_modules():
        backend = _foreign_backend(module)
        if backend:
            raise ValueError(
                f"model was converted to {backend} ({name or type(module).__name__}); its weights lie in another "
                f"layout. Convert it back first: mace.cli.convert_{_CONVERTERS[backend]}_e3nn.run(model)"
            )


_CONVERTERS = {"cuEquivariance": "cueq", "OpenEquivariance": "oeq"}


def _foreign_backend(module: torch.nn.Module) -> str:
    package = type(module).__module__.split(".")[0]
    if package in ("cuequivariance_torch", "openequivariance"):
        return "cuEquivariance" if package.startswith("cu") else "OpenEquivariance"
    if hasattr(module, "layout_transpose_in") or getattr(getattr(module, "oeq_config", None), "enabled", False):
        return "OpenEquivariance"
    config = getattr(module, "cueq_config", None)
    if config is not None and (config.enabled or getattr(config, "layout_str", "mul_ir") != "mul_ir"):
        return "cuEquivariance"
    return ""


def _policy(model: torch.nn.Module, precision: str | Precision | None) -> Precision:
    if precision is not None:
        return Precision.parse(precision)
    dtype = next(model.parameters()).dtype
    names = {torch.float64: "fp64", torch.float32: "fp32"}
    if dtype not in names:
        raise ValueError(f"model has {dtype} parameters: name a precision, one of {sorted(PRESETS)}")
    return PRESETS[names[dtype]]


def _candidates(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, torch.nn.Module]]:
    """(name, user, module) of every module that has a kernel of ours; a list's modules are used by its parent."""
    for prefix, parent in model.named_modules():
        in_list = type(parent) is torch.nn.ModuleList
        user = model.get_submodule(prefix.rpartition(".")[0]) if in_list else parent
        for key, child in parent.named_children():
            is_conv = key == "conv_tp" and isinstance(child, o3.TensorProduct)
            is_skip = key == "skip_tp" and type(child) is o3.FullyConnectedTensorProduct
            is_radial = key in RADIAL and type(child) is nn.FullyConnectedNet
            plain = type(child) in (o3.Linear, PlainContraction, RadialMLP, *_EDGE)
            if not foreign_reason(user) and (plain or is_conv or is_skip or is_radial):
                yield f"{prefix}.{key}" if prefix else key, user, child


def _refusal(parent: torch.nn.Module, child: torch.nn.Module) -> str:
    """Why `child` stays MACE's own, or an empty string."""
    kind = type(parent)
    if isinstance(parent, blocks.InteractionBlock) and kind not in BLOCKS:
        return f"interaction block {kind.__name__} is not known"
    if kind.__module__ not in HOSTS and type(child) not in _EDGE:
        return f"{kind.__module__}.{kind.__name__} may use it in its own way"
    try:
        problem = _problem(child)
    except (TypeError, ValueError) as error:
        return str(error)
    if torch.version.hip and isinstance(child, PlainContraction) and len(problem.terms) > AMD_TERMS:
        return f"{len(problem.terms)} terms would compile for minutes on an AMD GPU"
    return ""


def _problem(module: torch.nn.Module) -> object:
    """The module's problem, whatever its layout; TypeError or ValueError where it has none."""
    if type(module) in _EDGE:
        return _EDGE[type(module)][1](module)
    if isinstance(module, PlainContraction):
        return contraction_problem_of(module)[0]
    if isinstance(module, o3.FullyConnectedTensorProduct):
        return species_problem_of(module)[0]
    if isinstance(module, nn.FullyConnectedNet):
        return radial_problem_of(module)[0]
    if isinstance(module, RadialMLP):
        return problems_of(module)[0]
    return problem_of(module) if isinstance(module, o3.TensorProduct) else LinearProblem.from_module(module)


def _layouts(model: torch.nn.Module) -> dict[str, tuple[str, str]]:
    """Full module name -> (layout read, layout written), of the blocks that take ir_mul inside."""
    layouts = {}
    for prefix, block in model.named_modules():
        inner, found = BLOCKS.get(type(block)), {}
        if inner and _takes_ir_mul(block, inner):
            found.update(inner.layouts)
        if inner and _reshapes_ir_mul(block, inner):
            found[inner.last] = (found.get(inner.last, ("mul_ir",))[0], "ir_mul")
            found["reshape"] = ("ir_mul", "ir_mul")
        if type(block) is blocks.EquivariantProductBasisBlock and _contracts_to_ir_mul(block):
            found |= {"symmetric_contractions": ("ir_mul", "ir_mul"), "linear": ("ir_mul", "mul_ir")}
        layouts.update({f"{prefix}.{key}": pair for key, pair in found.items()})
    return layouts


def _reshapes_ir_mul(block: torch.nn.Module, inner: Inner) -> bool:
    """Whether the block's last linear can hand its result to `reshape` with the channels side by side."""
    last, reshape = getattr(block, inner.last, None), block.reshape
    linears = (o3.Linear, o3.FullyConnectedTensorProduct)
    if type(last) not in linears or type(reshape) is not reshape_irreps or _refusal(block, last):
        return False
    return last.irreps_out == reshape.irreps and len({mul for mul, _ in reshape.irreps}) == 1


def _contracts_to_ir_mul(block: torch.nn.Module) -> bool:
    """Whether a product block's contraction and linear have kernels and agree on what they hand over."""
    contraction, linear = block.symmetric_contractions, block.linear
    if type(contraction) is not PlainContraction or type(linear) is not o3.Linear:
        return False
    if _refusal(block, contraction) or _refusal(block, linear):
        return False
    return linear.irreps_in == contraction.irreps_out


def _takes_ir_mul(block: torch.nn.Module, inner: Inner) -> bool:
    """Whether all modules of the chain have a kernel and agree slot by slot on what they hand over."""
    parts = {key: getattr(block, key, None) for key in inner.layouts}
    conv = parts.pop("conv_tp")
    if type(conv) is not o3.TensorProduct or any(type(part) is not o3.Linear for part in parts.values()):
        return False
    if any(_refusal(block, part) for part in (conv, *parts.values())):
        return False
    _split_like(block, inner.behind, conv.irreps_out)
    features = [parts["linear_up"].irreps_out, *(parts[key].irreps_in for key in inner.beside)]
    return getattr(block, inner.behind).irreps_in == conv.irreps_out and all(f == conv.irreps_in1 for f in features)


def _split_like(block: torch.nn.Module, key: str, irreps: o3.Irreps) -> None:
    # Models saved by older versions of MACE have `irreps` simplified in this linear (5 slots of 128x1o are 640x1o).
    # In mul_ir, and with one output slot per irrep, that is the same map with the same packed weights; in ir_mul the
    # slots must be told apart.
    linear = getattr(block, key)
    distinct = len({ir for _, ir in linear.irreps_out}) == len(linear.irreps_out)
    if linear.irreps_in == irreps or linear.irreps_in != irreps.simplify() or linear.bias_numel or not distinct:
        return
    with torch.random.fork_rng(devices=[]):
        split = o3.Linear(irreps, linear.irreps_out)
    split.weight, split.bias, split.output_mask = linear.weight, linear.bias, linear.output_mask
    setattr(block, key, split.train(linear.training))


def _replacement(
    name: str,
    parent: torch.nn.Module,
    module: torch.nn.Module,
    conversion: Conversion,
    layouts: dict[str, tuple[str, str]],
) -> torch.nn.Module:
    policy = conversion.precision
    layout_in, layout_out = layouts.get(name, ("mul_ir", "mul_ir"))
    if type(module) in _EDGE:
        return _EDGE[type(module)][0](module)
    if isinstance(module, PlainContraction):
        agnostic = getattr(parent, "use_agnostic_product", False)
        return SymmetricContraction(module, layout_out, agnostic, policy.contraction)
    if isinstance(module, o3.FullyConnectedTensorProduct):
        return SpeciesLinear(module, policy.linear, layout_in, layout_out)
    if isinstance(module, o3.TensorProduct):
        # Other networks write `dtype`: a copy to the storage would cost more than it saves.
        written = isinstance(parent.conv_tp_weights, nn.FullyConnectedNet)
        storage = policy.tensor_product if written else policy.dtype
        return ConvTP(module, storage, layout_in, layout_out, conversion.deterministic)
    exact = any(part in EXACT for part in name.split("."))
    mode = PRESETS[policy.dtype].linear if exact else policy.linear
    if isinstance(module, nn.FullyConnectedNet):
        if name.endswith(".conv_tp_weights"):
            return RadialNet(module, mode, policy.radial, policy.tensor_product)
        return RadialNet(module, mode, storage=policy.dtype)  # a density divides: no low precision
    if isinstance(module, RadialMLP):
        return NormNet(module, mode, policy.radial if name.endswith(".conv_tp_weights") else None)
    mode = {"readouts": policy.readout, "products": policy.product}.get(name.partition(".")[0], mode)
    gathered = name in layouts and name.endswith(".linear_up") and not BLOCKS[type(parent)].beside
    return IrrepsLinear(module, mode, layout_in, layout_out, policy.features if gathered else policy.dtype)


def _swap(model: torch.nn.Module, name: str, new: torch.nn.Module) -> None:
    """Put `new` in the place of the module `name`; MACE calls conv_tp with the edges where conv_fusion is set."""
    prefix, _, key = name.rpartition(".")
    parent = model.get_submodule(prefix)
    new.train(getattr(parent, key).training)
    setattr(parent, key, new)
    if isinstance(new, ConvTP):
        parent.conv_fusion = True
    elif key == "conv_tp":
        del parent.conv_fusion


_SWAPPABLE = (o3.Linear, o3.TensorProduct, PlainContraction, RadialMLP, *_EDGE)


def _blocks(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The modules that `report` has a row for; of another package's module only the whole."""
    whole = ()
    for name, module in model.named_modules():
        if name.startswith(whole):
            continue
        if foreign_reason(module):
            whole = (*whole, f"{name}.")
        known = isinstance(module, (*_OURS, *_SWAPPABLE)) or kept_reason(module)
        if known and not isinstance(module, ReshapeIrreps):
            yield name, module


def _row(name: str, module: torch.nn.Module, conversion: Conversion | None, like: torch.Tensor) -> Row:
    """The row of one module of a model whose parameters are like `like`."""
    kind, dtype = type(module).__name__, str(like.dtype).removeprefix("torch.")
    if isinstance(module, (IrrepsLinear, SpeciesLinear)):
        layout = f"{module.problem.layout_in} -> {module.problem.layout_out}"
        kernel = "linear" if isinstance(module, IrrepsLinear) else "species_linear"
        stored = getattr(module, "run_storage", dtype)
        precision = module.run_mode + (f", {stored} result" if stored in ("bf16", "fp16") else "")
        return Row(name, kind, _runs(kernel, module.output_mask), precision, layout)
    if isinstance(module, ConvTP):
        layout = f"{module.problem.layout_in} -> {module.problem.layout_out}"
        runs = _runs("channelwise_tp", module.output_mask)
        return Row(name, kind, runs, f"{module.run_storage} weights", layout)
    if isinstance(module, (NormNet, RadialNet)):
        kernel = "norm_mlp" if isinstance(module, NormNet) else "radial_mlp"
        precision = f"{module.run_mode}, last layer {module.run_last_mode}"
        return Row(name, kind, _network(module, kernel), precision, "mul_ir")
    if isinstance(module, SymmetricContraction):
        runs = _runs("symmetric_contraction", module.contractions[0].weights_max)
        precision = dtype + (f", {module.run_storage} features" if module.run_storage in ("bf16", "fp16") else "")
        return Row(name, kind, runs, precision, f"ir_mul -> {module.layout_out}")
    if isinstance(module, (EdgeHarmonics, EdgeRadial)):
        kernel = "edge_harmonics" if isinstance(module, EdgeHarmonics) else "edge_radial"
        return Row(name, kind, _runs(kernel, like), dtype, "mul_ir")
    reason = "not accelerated"
    if conversion is not None:
        reason = conversion.kept.get(name) or kept_reason(module) or "no kernel for this use of it"
    return Row(name, kind, f"MACE's own code: {reason}", dtype, "mul_ir")


def _vectors_row(model: torch.nn.Module, like: torch.Tensor) -> Row:
    """The row of the edge vectors, for which MACE has a function and no module."""
    attached = edge_vectors.attached(model)
    runs = _runs("edge_vectors", like) if attached else "MACE's own code: its sum over edges keeps their order"
    return Row("edge vectors", edge_vectors.NAME, runs, str(like.dtype).removeprefix("torch."), "mul_ir")


def _network(module: RadialNet | NormNet, kernel: str) -> str:
    """What runs the layers of a network: its kernel the hidden ones, or the linear op all there are."""
    weight = next(module.parameters())
    linear = _runs("linear", weight)
    if module.depth == 1:
        return linear
    return _runs(kernel, weight) if module.fused else f"MACE's own code, last layer {linear}"


def _runs(kernel: str, tensor: torch.Tensor) -> str:
    triton = dispatch.backend(tensor) == "triton"
    return f"kernels/{kernel}.py" if triton else f"{kernel}, reference formulas on the CPU"
