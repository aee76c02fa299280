"""MACE's energy and its gradient written out, kernel after kernel, without autograd.

For the models that people run: invariant or equivariant features, interactions of MACE's agnostic kinds with or without
density, linear and non-linear readouts, any number of layers and heads. What depends on the species alone is made once,
when the atoms are known; what depends on a length alone comes from tables (`radial.py`) together with its slope, once
for an edge and its way back; a readout gives its gradient with its energy. `uncovered` says what a model has that is
not covered; such a model takes MACE's own forward and autograd.
"""

from __future__ import annotations

import torch
from mace.modules import blocks, models

from ..nn.conv import ConvTP
from ..nn.edge_embedding import EdgeHarmonics, EdgeRadial
from ..nn.linear import IrrepsLinear
from ..nn.radial_mlp import RadialNet
from ..nn.species_linear import SpeciesLinear
from ..nn.symmetric_contraction import SymmetricContraction
from ..ops.channelwise_tp_pairs import add_forces, channelwise_tp_pairs
from ..ops.edge_embedding import edge_harmonics, edge_vectors
from ..ops.edge_filter import Edges
from ..ops.edge_forces import edge_forces
from ..ops.linear import lowp_weight
from ..ops.readout import fits, readout
from ..ops.species import SpeciesPlan, one_species, plan_of
from ..precision import TORCH_DTYPES, storage_for
from .radial import radial_of
from .shares import Share, Shares

OPS = torch.ops.mace_triton
EXACT = ("fp64", "ieee", "tf32x3")
DENSITY = (blocks.RealAgnosticDensityInteractionBlock, blocks.RealAgnosticDensityResidualInteractionBlock)
RESIDUAL = (blocks.RealAgnosticResidualInteractionBlock, blocks.RealAgnosticDensityResidualInteractionBlock)
INTERACTIONS = (blocks.RealAgnosticInteractionBlock, *DENSITY, *RESIDUAL)
PARTS = {
    "linear_up": IrrepsLinear,
    "conv_tp": ConvTP,
    "conv_tp_weights": RadialNet,
    "linear": IrrepsLinear,
    "skip_tp": SpeciesLinear,
}


def uncovered(model: torch.nn.Module) -> str:
    """What keeps a model from being written out, or an empty string."""
    if type(model) not in (models.MACE, models.ScaleShiftMACE):
        return f"{type(model).__name__} has more than an energy of local features"
    if getattr(model, "mace_triton", None) is None:
        return "the model is not accelerated"
    if model.mace_triton.deterministic:
        return "the order of sums is to be the same in every run"
    if type(model.radial_embedding) is not EdgeRadial:  # whose functions are the same both ways
        return "radial_embedding is MACE's own"
    if type(model.spherical_harmonics) is not EdgeHarmonics:
        return "spherical_harmonics is MACE's own"
    if hasattr(model, "joint_embedding"):
        return "the model embeds charges or the like"
    for inter, product in zip(model.interactions, model.products, strict=True):
        reason = _uncovered_layer(inter, product)
        if reason:
            return reason
    return next((reason for reason in map(_uncovered_readout, model.readouts) if reason), "")


def _uncovered_layer(inter: torch.nn.Module, product: torch.nn.Module) -> str:
    if type(inter) not in INTERACTIONS:
        return f"interaction block {type(inter).__name__}"
    for name, kind in PARTS.items():
        if type(getattr(inter, name)) is not kind:
            return f"{name} is MACE's own"
    contraction = product.symmetric_contractions
    if type(contraction) is not SymmetricContraction or type(product.linear) is not IrrepsLinear:
        return "symmetric_contractions is MACE's own"
    if type(inter) in DENSITY and type(inter.density_fn) is not RadialNet:
        return "density_fn is MACE's own"
    last = inter.skip_tp if type(inter) not in RESIDUAL else inter.linear
    if last.problem.layout_out != "ir_mul" or contraction.layout_out != "ir_mul":
        return "channels do not lie side by side"
    return ""


def _uncovered_readout(module: torch.nn.Module) -> str:
    if type(module) is blocks.LinearReadoutBlock:
        return "" if _scalars(module.linear) else "a readout with biases, or in low precision"
    if type(module) is not blocks.NonLinearReadoutBlock:
        return f"readout {type(module).__name__}"
    first, second, acts = module.linear_1, module.linear_2, module.non_linearity.acts
    if not (_scalars(first) and _scalars(second)):
        return "a readout with biases, or in low precision"
    if len(acts) != 1 or getattr(acts[0], "f", None) is not torch.nn.functional.silu:
        return "a readout whose gate is not silu"
    return "" if fits(first.problem.blocks[0].slot_in.mul, first.problem.dim_out) else "a readout that is too wide"


def _scalars(module: torch.nn.Module) -> bool:
    """Whether a linear module is ours, exact, and one matrix from the scalars, which come first, without biases."""
    if type(module) is not IrrepsLinear or module.bias_numel or len(module.problem.blocks) != 1:
        return False
    if module.run_mode not in EXACT:
        return False
    return module.problem.blocks[0].slot_in.offset == 0 and module.problem.blocks[0].slot_in.dim == 1


class _Map:
    """A linear module with fixed weights and a factor."""

    def __init__(self, module: IrrepsLinear, scale: float = 1.0):
        self.problem, self.mode, self.scale = module.problem, module.run_mode, scale
        self.stored = TORCH_DTYPES[module.run_storage]
        self.weight, self.bias = module.weight.detach().contiguous(), module.bias if module.bias_numel else None
        self.lowp = lowp_weight(self.weight, self.mode, self.problem)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        rest = (self.bias, residual, self.problem.key, self.mode, self.scale, self.stored)
        return OPS.linear(x, self.weight, self.lowp, *rest)

    def backward(self, g: torch.Tensor) -> torch.Tensor:
        return OPS.linear_grad_x(g, self.weight, self.lowp, self.problem.key, self.mode, self.scale)


class _LastLayer(_Map):
    """The last layer of a radial network, which writes in the storage of the convolution."""

    def __init__(self, net: RadialNet):
        weight = net.layers[-1].weight.detach()
        self.problem, self.mode, self.scale = net.problem, net.run_last_mode, 1.0
        self.weight = weight.reshape(-1).contiguous()
        self.lowp = lowp_weight(self.weight, self.mode, self.problem)
        self.stored = TORCH_DTYPES[storage_for(net.storage, weight.dtype)]

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        rest = (None, None, self.problem.key, self.mode, self.scale, self.stored)
        return OPS.linear(h, self.weight, self.lowp, *rest)


class _SpeciesMap:
    """`skip_tp` with fixed weights, of nodes whose species are known; `present`: the rows of weights of the plan's."""

    def __init__(self, module: SpeciesLinear, plan: SpeciesPlan, present: torch.Tensor):
        self.weights = module.weights().detach()[present]
        mode = module.run_mode
        lowp = lowp_weight(self.weights, mode) if mode in ("bf16", "fp16") else None
        self.operands, self.rest = (self.weights, lowp, *plan), (module.problem.key, mode, module.scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return OPS.species_linear(x, *self.operands, *self.rest)

    def backward(self, g: torch.Tensor) -> torch.Tensor:
        return OPS.species_linear_grad_x(g, *self.operands, *self.rest)


class _Contraction:
    """The symmetric contraction with fixed weights; features and results in ir_mul. `present`: as in `_SpeciesMap`."""

    def __init__(self, module: SymmetricContraction, plan: SpeciesPlan, present: torch.Tensor):
        self.problem, self.coef = module.problem, module.coefficients(None if module.agnostic else present)
        self.plan = one_species(plan.species.shape[0], plan.species.device) if module.agnostic else plan
        self.stored = TORCH_DTYPES[module.run_storage]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.x = x.view(-1, self.problem.dim_in, self.problem.channels).to(self.stored)
        out = OPS.symmetric_contraction(self.x, None, self.coef, *self.plan, self.problem.key)
        return out.view(x.shape[0], -1).to(x.dtype)

    def backward(self, g: torch.Tensor) -> torch.Tensor:
        dtype, g = g.dtype, g.view(-1, self.problem.dim_out, self.problem.channels).to(self.stored)
        rest, x = (None, self.coef, *self.plan, self.problem.key, True, False), self.x
        self.x = None  # nothing of a step is kept: beside what a graph holds there is no room for it
        gx, _ = OPS.symmetric_contraction_bwd(g, x, *rest)
        return gx.view(g.shape[0], -1).to(dtype)


class _Readout:
    """A readout of one head; `scale` is that of the energy."""

    def __init__(self, module: torch.nn.Module, head: int, heads: int, scale: float):
        if type(module) is blocks.LinearReadoutBlock:
            self.first, last = None, _matrix(module.linear)[:, head]
        else:
            hidden = _matrix(module.linear_1)
            units = slice(*(hidden.shape[1] // heads * number for number in (head, head + 1)))
            self.first = hidden[:, units].contiguous()
            last = _matrix(module.linear_2)[units, head] * module.non_linearity.acts[0].cst
        self.last = (scale * last).contiguous()

    def forward(self, x: torch.Tensor, before: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return readout(x, self.first, self.last, before)


def _matrix(module: IrrepsLinear) -> torch.Tensor:
    """The matrix [in, out] of a linear module's scalars, which come first."""
    (block,) = module.problem.blocks
    shape = block.slot_in.mul, block.slot_out.mul
    return block.alpha * module.weight.detach()[block.weight :][: shape[0] * shape[1]].view(shape)


class _Layer:
    """One interaction with its product. kinds: what `_present` gives.

    constant: the node features [N, C] of the first layer, made once.
    keeps: whether the weights of pairs stay from forward to backward; made anew they cost a few percent of a step, and
    those of the last layer, which are needed at once, nothing.
    """

    def __init__(self, inter, product, kinds: tuple, constant: torch.Tensor | None, keeps: bool):
        self.keeps = keeps
        self.residual, self.density = type(inter) in RESIDUAL, type(inter) in DENSITY
        self.up = _Map(inter.linear_up)
        self.last, self.conv = _LastLayer(inter.conv_tp_weights), inter.conv_tp.problem
        self.linear = _Map(inter.linear, 1.0 if self.density else 1.0 / float(inter.avg_num_neighbors))
        self.skip = _SpeciesMap(inter.skip_tp, *kinds)
        self.contraction, self.out = _Contraction(product.symmetric_contractions, *kinds), _Map(product.linear)
        self.shortened, self.constant = self.residual and product.use_sc, constant is not None
        if self.constant:
            self._take(constant)

    def _take(self, feats: torch.Tensor) -> None:
        """What message and shortcut read of the node features."""
        self.x, self.shortcut = self.up.forward(feats), self.skip.forward(feats) if self.shortened else None

    def forward(
        self, feats: torch.Tensor, y: torch.Tensor, radial: list, edges: Edges, parts: list[Share]
    ) -> torch.Tensor:
        """Node features -> the next ones; radial: (hidden layer, its slope), and those of the density if there is one;
        parts: shares of receivers whose weights are made together, none if all are.

        What the way back reads is kept until then.
        """
        if not self.constant:
            self._take(feats)
        self.y, self.radial, self.edges, self.parts = y, radial, edges, parts
        message = self._shared_messages() if self.parts else self._messages()
        if self.density:
            each = radial[1][0].index_select(0, edges.pair)
            total = torch.zeros_like(message[:, :1]).index_add_(0, edges.edge_index[1], each)
            self.share, self.message = 1.0 / (total + 1.0), message
            message = message * self.share
        if not self.residual:
            message = self.skip.forward(message)
        return self.out.forward(self.contraction.forward(message), self.shortcut)

    def _messages(self) -> torch.Tensor:
        """[N, C]: what the receivers get, behind the linear map."""
        edges, w = self.edges, self.last.forward(self.radial[0][0])
        self.w = w if self.keeps else None
        order = edges.row_ptr, edges.sender, edges.pair
        return self.linear.forward(channelwise_tp_pairs(self.conv, self.x, self.y, w, *order))

    def _shared_messages(self) -> torch.Tensor:
        """The same, share by share; idle atoms, behind the last one, get nothing."""
        found = [self._message_of(part) for part in self.parts]
        idle = self.x.shape[0] - self.parts[-1].last
        return torch.cat((*found, found[0].new_zeros(idle, found[0].shape[1])))

    def _message_of(self, part: Share) -> torch.Tensor:
        """Of one share, whose weights are gone before the next one's are made."""
        w, order = self.last.forward(self.radial[0][0].index_select(0, part.place)), (part.row_ptr, self.edges.sender)
        return self.linear.forward(channelwise_tp_pairs(self.conv, self.x, self.y, w, *order, part.pair))

    def _spread(self, gm: torch.Tensor, *sums: torch.Tensor | None) -> None:
        """The gradient gm [N, C] of the messages: to senders' x, harmonics and lengths."""
        edges, (h, slope) = self.edges, self.radial[0]
        gm, w, d = self.linear.backward(gm), self.w if self.keeps else self.last.forward(h), self.last.forward(slope)
        add_forces(self.conv, gm, self.x, self.y, w, d, *sums, edges.row_ptr, edges.sender, edges.pair)

    def _spread_of(self, part: Share, gm: torch.Tensor, *sums: torch.Tensor | None) -> None:
        """Of one share, whose weights are gone before the next one's are made."""
        w, d = (self.last.forward(t.index_select(0, part.place)) for t in self.radial[0])
        own, order = self.linear.backward(gm[part.first : part.last]), (part.row_ptr, self.edges.sender, part.pair)
        add_forces(self.conv, own, self.x, self.y, w, d, *sums, *order)

    def backward(self, g: torch.Tensor, gy: torch.Tensor, gr: torch.Tensor) -> torch.Tensor | None:
        """Gradient of the result -> that of the features, None for constant ones; adds to those of y and lengths."""
        edges = self.edges
        gm = self.contraction.backward(self.out.backward(g))
        if not self.residual:
            gm = self.skip.backward(gm)
        if self.density:
            gtotal = -(gm * self.message).sum(1, keepdim=True) * self.share.square()
            gr += gtotal.index_select(0, edges.edge_index[1]) * self.radial[1][1].index_select(0, edges.pair)
            gm = gm * self.share
        sums = None if self.constant else gr.new_zeros(self.x.shape), gy, gr
        for part in self.parts:
            self._spread_of(part, gm, *sums)
        if not self.parts:
            self._spread(gm, *sums)
        self.w = self.y = self.radial = self.edges = self.parts = self.message = self.share = None
        if self.constant:
            return None
        self.x = self.shortcut = None
        gfeats = self.up.backward(sums[0])
        return gfeats + self.skip.backward(g) if self.shortened else gfeats


class _Repulsion:
    """MACE's repulsion of close pairs: its own module, and autograd of it alone."""

    def __init__(self, module: torch.nn.Module, scale: float, attrs: torch.Tensor, numbers: torch.Tensor):
        self.module, self.scale, self.attrs, self.numbers = module, scale, attrs, numbers

    def __call__(self, r: torch.Tensor, edge_index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(energies [N] float64, their gradient [E, 1] by r)."""
        with torch.enable_grad():
            r = r.detach().requires_grad_(True)
            energies = self.scale * self.module(r, self.attrs, edge_index, self.numbers)
            (gr,) = torch.autograd.grad(energies.sum(), r)
        return energies.detach().double(), gr


def _present(plan: SpeciesPlan) -> tuple[SpeciesPlan, torch.Tensor]:
    """The plan with only the species that have nodes, and which these are: a model has weights for many more.

    Filled up to a power of two with the last one, as kernels are compiled for a number of species.
    """
    found = plan.species.unique()
    count = min(plan.count, max(4, 1 << (len(found) - 1).bit_length()))
    present = torch.nn.functional.pad(found.long(), (0, count - len(found)), value=int(found[-1]))
    return plan_of(torch.searchsorted(found, plan.species), count), present


class Chain:
    """A model's energy and gradient for atoms whose species are known.

    model: one that `uncovered` has nothing against. data: MACE's input for the atoms; its edges are not read. head: the
    number of the one in use. parts: shares of the atoms whose edges' weights are made together; none: all are. tables:
    see `radial_of`.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: torch.nn.Module,
        data: dict[str, torch.Tensor],
        plan: SpeciesPlan,
        head: int,
        parts: Shares | None = None,
        tables: dict | None = None,
    ):
        attrs, heads = data["node_attrs"], len(getattr(model, "heads", None) or ["Default"])
        scale, shift = _scale_shift(model, head)
        self.start = model.atomic_energies_fn(attrs)[:, head].double() + shift
        feats = model.node_embedding(attrs)
        self.dtype = feats.dtype
        self.parts, last, kinds = parts, len(model.interactions) - 1, _present(plan)
        pairs = zip(model.interactions, model.products, strict=True)
        self.layers = [
            _Layer(*pair, kinds, None if n else feats, n == last and not parts) for n, pair in enumerate(pairs)
        ]
        found = [_Readout(module, head, heads, scale) for module in model.readouts]
        alone = len(found) == 1 and len(self.layers) > 1
        self.readouts = [None] * (len(self.layers) - 1) + found if alone else found
        self.lmax = int(model.spherical_harmonics._lmax)
        repels = hasattr(model, "pair_repulsion_fn")
        self.repulsion = _Repulsion(model.pair_repulsion_fn, scale, attrs, model.atomic_numbers) if repels else None
        networks = []
        for inter, layer in zip(model.interactions, self.layers, strict=True):
            networks.append((inter.conv_tp_weights, "hidden"))
            if layer.density:
                networks.append((inter.density_fn, "density"))
        rest = model.atomic_numbers, attrs, float(model.r_max), tables
        self.radial = radial_of(model.radial_embedding, networks, *rest)

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, edges: Edges) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(energies [N] float64, gx [N, 3], virial [N, 3, 3]) at positions x [N, 3] float64; see `edge_forces`.

        Vectors are differences of FP64 numbers, rounded once: a bond's error does not grow with the box.
        """
        v, r = (t.to(self.dtype) for t in edge_vectors(x, edges.edge_index, edges.shifts))
        y = edge_harmonics(v, self.lmax)
        gradients = torch.zeros(y.numel() + r.numel(), dtype=r.dtype, device=x.device)
        gy, gr = gradients[: y.numel()].view_as(y), gradients[y.numel() :].view_as(r)
        energies = self.start
        if self.repulsion is not None:
            pair_energies, pull = self.repulsion(r, edges.edge_index)
            energies, gr = energies + pair_energies, gr.add_(pull)
        ends = edges.edge_index if self.radial.alike else edges.edge_index.index_select(1, edges.edge_of)
        radial = iter(self.radial(r.index_select(0, edges.edge_of), ends))
        feats, slopes, parts = None, [], self.parts.of(edges) if self.parts else []
        for layer, reader in zip(self.layers, self.readouts, strict=True):
            own = [next(radial) for _ in range(1 + layer.density)]
            feats, slope = layer.forward(feats, y, own, edges, parts), None
            if reader is not None:
                energies, slope = reader.forward(feats, energies)
            slopes.append(slope)
        g = None
        for layer, slope in zip(reversed(self.layers), reversed(slopes), strict=True):
            g = slope if g is None else g if slope is None else g + slope
            g = layer.backward(g, gy, gr)
        return energies, *edge_forces(gy, gr, v, edges.row_ptr, edges.sender)


def _scale_shift(model: torch.nn.Module, head: int) -> tuple[float, float]:
    """Factor and constant of a head's interaction energy."""
    block = getattr(model, "scale_shift", None)
    if block is None:
        return 1.0, 0.0
    scale, shift = (torch.atleast_1d(value)[head].item() for value in (block.scale, block.shift))
    return scale, shift
