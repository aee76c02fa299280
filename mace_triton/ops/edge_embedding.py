"""Vectors, spherical harmonics and radial features of edges as torch custom ops, with their derivatives.

Each derivative is an op of its own whose backward calls the next. GPU tensors (and, under Triton's interpreter, CPU
tensors) run `kernels/edge_vectors.py`, `edge_harmonics.py` and `edge_radial.py`, others `reference_edge_embedding.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference_edge_embedding as reference
from . import dispatch
from .graph import check_edges

LMAX = 3
BASES = ("bessel", "gaussian", "chebyshev")
TRANSFORMS = ("none", "agnesi", "soft")
MAX_WIDTH = 256


def _implementation(op: str, tensor: Tensor):
    """The kernels or the formulas, which have the same functions."""
    which = dispatch.backend(tensor)
    dispatch.count(op, which)
    if which == "reference":
        return reference
    from ..kernels import edge_harmonics, edge_radial, edge_vectors

    files = {"edge_harmonics": edge_harmonics, "edge_radial": edge_radial, "edge_vectors": edge_vectors}
    return next(file for name, file in files.items() if op.startswith(name))


@torch.library.custom_op("mace_triton::edge_vectors", mutates_args=())
def _vectors(x: Tensor, edge_index: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor]:
    tensors = (t.contiguous() for t in (x, edge_index, shifts))
    return _implementation("edge_vectors_fwd", x).vectors(*tensors)


@_vectors.register_fake
def _(x, edge_index, shifts):
    return shifts.new_empty(shifts.shape), shifts.new_empty(shifts.shape[0], 1)


@torch.library.custom_op("mace_triton::edge_vectors_bwd", mutates_args=())
def _vectors_bwd(gv: Tensor, gr: Tensor, v: Tensor, r: Tensor, edge_index: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    tensors = (t.contiguous() for t in (gv, gr, v, r, edge_index))
    return _implementation("edge_vectors_bwd", v).vectors_grad(*tensors, nodes)


@_vectors_bwd.register_fake
def _(gv, gr, v, r, edge_index, nodes):
    return v.new_empty(nodes, 3), v.new_empty(v.shape)


def _save_vectors(ctx, inputs, output):
    x, edge_index, _ = inputs
    ctx.nodes = x.shape[0]
    ctx.save_for_backward(*output, edge_index)


def _vectors_backward(ctx, gv, gr):
    gx, e = _vectors_bwd(gv, gr, *ctx.saved_tensors, ctx.nodes)
    return gx, None, e


def _save_vectors_bwd(ctx, inputs, output):
    _, gr, v, r, edge_index, _ = inputs
    ctx.save_for_backward(gr, v, r, edge_index)


def _vectors_bwd_backward(ctx, ax, ae):
    # The result is linear in gv and gr: a cotangent of it meets every edge as d, and e holds gr v / r beside gv.
    gr, v, r, edge_index = ctx.saved_tensors
    d = ax.index_select(0, edge_index[1]) - ax.index_select(0, edge_index[0]) + ae
    inverse = torch.where(r > 0, 1 / torch.where(r > 0, r, 1.0), 0.0)
    along = (d * v).sum(dim=1, keepdim=True) * inverse
    rate = gr * inverse
    return d, along, rate * d, -rate * along, None, None


_vectors.register_autograd(_vectors_backward, setup_context=_save_vectors)
_vectors_bwd.register_autograd(_vectors_bwd_backward, setup_context=_save_vectors_bwd)


@torch.library.custom_op("mace_triton::edge_harmonics", mutates_args=())
def _harmonics(v: Tensor, dim: int) -> Tensor:
    return _implementation("edge_harmonics_fwd", v).harmonics(v.contiguous(), dim)


@_harmonics.register_fake
def _(v, dim):
    return v.new_empty(v.shape[0], dim)


@torch.library.custom_op("mace_triton::edge_harmonics_bwd", mutates_args=())
def _harmonics_bwd(g: Tensor, v: Tensor) -> Tensor:
    return _implementation("edge_harmonics_bwd", v).harmonics_grad(g.contiguous(), v.contiguous())


@_harmonics_bwd.register_fake
def _(g, v):
    return v.new_empty(v.shape)


@torch.library.custom_op("mace_triton::edge_harmonics_bwd_bwd", mutates_args=())
def _harmonics_bwd_bwd(a: Tensor, g: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    tensors = (t.contiguous() for t in (a, g, v))
    return _implementation("edge_harmonics_bwd_bwd", v).harmonics_grad_grad(*tensors)


@_harmonics_bwd_bwd.register_fake
def _(a, g, v):
    return g.new_empty(g.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*(t for t in inputs if isinstance(t, Tensor)))


_harmonics.register_autograd(lambda ctx, g: (_harmonics_bwd(g, *ctx.saved_tensors), None), setup_context=_save)
_harmonics_bwd.register_autograd(lambda ctx, a: _harmonics_bwd_bwd(a, *ctx.saved_tensors), setup_context=_save)


@torch.library.custom_op("mace_triton::edge_radial", mutates_args=())
def _radial(
    r: Tensor,
    radius: Tensor,
    edge_index: Tensor,
    basis: Tensor,
    constants: Tensor,
    kind: str,
    transform: str,
    cut: bool,
) -> tuple[Tensor, Tensor]:
    edge = tuple(t.contiguous() for t in (radius, edge_index, basis, constants))
    return _implementation("edge_radial_fwd", r).radial(r.contiguous(), edge, (kind, transform, cut))


@_radial.register_fake
def _(r, radius, edge_index, basis, constants, kind, transform, cut):
    return r.new_empty(r.shape[0], basis.shape[0]), r.new_empty(0 if cut else r.shape[0], 1)


@torch.library.custom_op("mace_triton::edge_radial_bwd", mutates_args=())
def _radial_bwd(
    g: Tensor,
    gc: Tensor,
    r: Tensor,
    radius: Tensor,
    edge_index: Tensor,
    basis: Tensor,
    constants: Tensor,
    kind: str,
    transform: str,
    cut: bool,
) -> Tensor:
    g, gc, r, *edge = (t.contiguous() for t in (g, gc, r, radius, edge_index, basis, constants))
    return _implementation("edge_radial_bwd", r).radial_grad(g, gc, r, tuple(edge), (kind, transform, cut))


@_radial_bwd.register_fake
def _(g, gc, r, radius, edge_index, basis, constants, kind, transform, cut):
    return r.new_empty(r.shape)


@torch.library.custom_op("mace_triton::edge_radial_bwd_bwd", mutates_args=())
def _radial_bwd_bwd(
    a: Tensor,
    g: Tensor,
    gc: Tensor,
    r: Tensor,
    radius: Tensor,
    edge_index: Tensor,
    basis: Tensor,
    constants: Tensor,
    kind: str,
    transform: str,
    cut: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    a, g, gc, r, *edge = (t.contiguous() for t in (a, g, gc, r, radius, edge_index, basis, constants))
    return _implementation("edge_radial_bwd_bwd", r).radial_grad_grad(a, g, gc, r, tuple(edge), (kind, transform, cut))


@_radial_bwd_bwd.register_fake
def _(a, g, gc, r, radius, edge_index, basis, constants, kind, transform, cut):
    return g.new_empty(g.shape), gc.new_empty(gc.shape), r.new_empty(r.shape)


def _save_radial(ctx, inputs, output):
    *tensors, kind, transform, cut = inputs
    ctx.kinds = (kind, transform, cut)
    ctx.save_for_backward(*tensors)


def _radial_backward(ctx, g, gc):
    return _radial_bwd(g, gc, *ctx.saved_tensors, *ctx.kinds), *(None,) * 7


def _radial_bwd_backward(ctx, a):
    return *_radial_bwd_bwd(a, *ctx.saved_tensors, *ctx.kinds), *(None,) * 7


_radial.register_autograd(_radial_backward, setup_context=_save_radial)
_radial_bwd.register_autograd(_radial_bwd_backward, setup_context=_save_radial)


def _check_dtype(tensor: Tensor, name: str) -> None:
    if tensor.dtype not in (torch.float64, torch.float32):
        raise TypeError(f"{name} must be float64 or float32, got {tensor.dtype}")


def edge_vectors(x: Tensor, edge_index: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors x[receiver] - x[sender] + shift [E, 3] and their lengths [E, 1], in angstrom; differentiable.

    x [N, 3] and shifts [E, 3], float64 or float32 alike; edge_index [2, E] int64 or int32, (sender, receiver). As MACE
    0.3.16 `modules.utils.get_edge_vectors_and_lengths`; an edge of length zero gives its length's gradient to nobody.
    Sums over an atom's edges run in any order.

    Raises ValueError for another shape or device and an index out of range (asked once a graph), TypeError for a dtype.
    """
    _check_dtype(x, "x")
    if x.ndim != 2 or x.shape[1] != 3:
        raise ValueError(f"x must have shape [N, 3], got {list(x.shape)}")
    if shifts.ndim != 2 or shifts.shape[1] != 3:
        raise ValueError(f"shifts must have shape [E, 3], got {list(shifts.shape)}")
    if shifts.dtype != x.dtype:
        raise TypeError(f"shifts must have x's dtype {x.dtype}, got {shifts.dtype}")
    check_edges(edge_index, x.shape[0])
    if edge_index.shape[1] != shifts.shape[0]:
        raise ValueError(
            f"edge_index must have shape [2, {shifts.shape[0]}], as shifts has rows, got {list(edge_index.shape)}"
        )
    for name, tensor in (("edge_index", edge_index), ("shifts", shifts)):
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: move them together")
    return _vectors(x, edge_index, shifts)


def edge_harmonics(v: Tensor, lmax: int) -> Tensor:
    """Y [E, (lmax + 1)^2] of the directions of v [E, 3]: real spherical harmonics with |Y_l|^2 = 2l + 1.

    float64 or float32; lmax 1 to 3. The convention is e3nn's (y, z, x order, "component"). Differentiable twice. A
    vector of length zero has Y_l = 0 beyond l = 0 and a zero gradient.

    Raises ValueError for another shape or lmax, TypeError for another dtype.
    """
    if v.ndim != 2 or v.shape[1] != 3:
        raise ValueError(f"v must have shape [E, 3], got {list(v.shape)}")
    if not 1 <= lmax <= LMAX:
        raise ValueError(f"lmax must be 1 .. {LMAX}, got {lmax}")
    _check_dtype(v, "v")
    return _harmonics(v, (lmax + 1) ** 2)


def edge_radial(
    r: Tensor,
    basis: Tensor,
    constants: Tensor,
    *,
    kind: str,
    transform: str = "none",
    cut: bool = True,
    radius: Tensor | None = None,
    edge_index: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Radial features f_k = B_k(T(r)) c(r) [E, K] of lengths r [E, 1] in angstrom: basis, transform, cutoff.

    kind: "bessel" (factor sin(w_k t) / t), "gaussian" (exp(factor (t - w_k)^2)) or "chebyshev" (degrees 1 to K), with
    basis = w [K] in r's dtype. transform: "none", "agnesi" or "soft", of lengths measured by the covalent radii
    radius [N] of the atoms that edge_index [2, E] names. constants [6] float64: r_max and p of the polynomial cutoff,
    factor, then a, q, p of Agnesi or alpha of Soft. cut: whether the cutoff multiplies the features; if not, it is the
    second result [E, 1], which is None otherwise. Differentiable twice in r alone. Formulas: MACE 0.3.16
    `modules.radial`, `RadialEmbeddingBlock`.

    Raises ValueError (kind, transform, shape, device, gradients asked of basis or constants) or TypeError (dtype).
    """
    if kind not in BASES:
        raise ValueError(f"kind must be one of {BASES}, got {kind!r}")
    if transform not in TRANSFORMS:
        raise ValueError(f"transform must be one of {TRANSFORMS}, got {transform!r}")
    if r.ndim != 2 or r.shape[1] != 1:
        raise ValueError(f"r must have shape [E, 1], got {list(r.shape)}")
    if basis.ndim != 1 or not 0 < basis.shape[0] <= MAX_WIDTH:
        raise ValueError(f"basis must have shape [1 .. {MAX_WIDTH}], got {list(basis.shape)}")
    _check_dtype(r, "r")
    if basis.dtype != r.dtype:
        raise TypeError(f"basis must have r's dtype {r.dtype}, got {basis.dtype}")
    if constants.shape != (6,) or constants.dtype != torch.float64:
        raise TypeError(f"constants must be float64 [6], got {constants.dtype} {list(constants.shape)}")
    if transform == "none":
        radius, edge_index = r.new_empty(0), torch.empty(2, 0, dtype=torch.int64, device=r.device)
    elif radius is None or edge_index is None:
        raise ValueError(f"radius, edge_index: transform {transform!r} needs both")
    elif edge_index.shape != (2, r.shape[0]):
        raise ValueError(f"edge_index must have shape [2, {r.shape[0]}], as r has rows, got {list(edge_index.shape)}")
    for name, tensor in (("basis", basis), ("constants", constants), ("radius", radius), ("edge_index", edge_index)):
        if tensor.device != r.device:
            raise ValueError(f"{name} is on {tensor.device}, r on {r.device}: move them together")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: this op differentiates r alone; detach it, or use MACE's own module")
    features, cutoff = _radial(r, radius, edge_index, basis, constants, kind, transform, cut)
    return features, None if cut else cutoff
