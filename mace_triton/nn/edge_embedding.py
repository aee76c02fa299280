"""e3nn's spherical harmonics and MACE's radial embedding on the edge embedding ops."""

from __future__ import annotations

import mace  # noqa: F401  before e3nn, see mace_triton/__init__.py
import torch
from e3nn import o3
from mace.modules import blocks, radial

from ..ops.edge_embedding import LMAX, edge_harmonics, edge_radial
from .conv import as_plain, take_state
from .derived import Derived

BASES = {
    radial.BesselBasis: ("bessel", "bessel_weights"),
    radial.GaussianBasis: ("gaussian", "gaussian_weights"),
    radial.ChebychevBasis: ("chebyshev", "n"),
}
"""MACE's class -> the op's word for it, and the buffer that counts its functions."""
TRANSFORMS = {radial.AgnesiTransform: ("agnesi", ("a", "q", "p")), radial.SoftTransform: ("soft", ("alpha",))}
"""MACE's class -> the op's word for it, and its constants in the op's order."""


class EdgeHarmonics(o3.SphericalHarmonics):
    """`e3nn.o3.SphericalHarmonics` as MACE builds it (unit vectors, "component", l = 0 .. lmax) on our kernel.

    It stays e3nn's class. Raises TypeError when `module` is no plain SphericalHarmonics, and ValueError for another
    normalisation, lmax above 3, or other l than all from 0 on.
    """

    def __init__(self, module: o3.SphericalHarmonics):
        torch.nn.Module.__init__(self)
        if type(module) is not o3.SphericalHarmonics:
            raise TypeError(f"module must be an e3nn.o3.SphericalHarmonics, got {type(module).__name__}")
        check_harmonics(module)
        take_state(self, module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Vectors x [E, 3] -> [E, (lmax + 1)^2]."""
        return edge_harmonics(x, self._lmax)

    def restore(self) -> o3.SphericalHarmonics:
        """e3nn's module."""
        return as_plain(o3.SphericalHarmonics, self)


def check_harmonics(module: o3.SphericalHarmonics) -> None:
    """Raise ValueError for harmonics that the kernel does not make."""
    if not module.normalize or module.normalization != "component":
        raise ValueError("harmonics: supported are normalize=True and normalization='component'")
    if not module._is_range_lmax or not 1 <= module._lmax <= LMAX:
        raise ValueError(f"harmonics: l must be 0 .. lmax with lmax 1 .. {LMAX}, got {module._ls_list}")


class EdgeRadial(blocks.RadialEmbeddingBlock):
    """MACE's RadialEmbeddingBlock on our kernel: basis, distance transform and cutoff in one launch.

    It stays MACE's class (same attributes, buffers and state dict). Raises TypeError when `module` is no plain
    RadialEmbeddingBlock, and ValueError for what `kinds_of` refuses.
    """

    def __init__(self, module: blocks.RadialEmbeddingBlock):
        torch.nn.Module.__init__(self)
        if type(module) is not blocks.RadialEmbeddingBlock:
            raise TypeError(f"module must be MACE's RadialEmbeddingBlock, got {type(module).__name__}")
        kinds = kinds_of(module)
        take_state(self, module)
        self.kinds, self._constants = kinds, Derived()

    def forward(
        self,
        edge_lengths: torch.Tensor,
        node_attrs: torch.Tensor,
        edge_index: torch.Tensor,
        atomic_numbers: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """edge_lengths [E, 1], node_attrs [N, species], edge_index [2, E], atomic_numbers [species] -> features [E, K],
        and the cutoff [E, 1] where the features do not hold it."""
        kind, transform, cut = self.kinds
        radius = None
        if transform != "none":
            radius = self.distance_transform.covalent_radii[atomic_numbers[node_attrs.argmax(dim=1)]]
        if torch.compiler.is_compiling():
            constants = _pack(self)
        else:
            constants = self._constants.get(list(self.buffers()), lambda: _pack(self))
        basis = getattr(self.bessel_fn, BASES[type(self.bessel_fn)][1]).reshape(-1)
        options = {"kind": kind, "transform": transform, "cut": cut, "radius": radius, "edge_index": edge_index}
        return edge_radial(edge_lengths, basis, constants, **options)

    def restore(self) -> blocks.RadialEmbeddingBlock:
        """MACE's module with the same buffers."""
        return as_plain(blocks.RadialEmbeddingBlock, self, "kinds", "_constants")


def kinds_of(module: blocks.RadialEmbeddingBlock) -> tuple[str, str, bool]:
    """(basis, transform, cut) of a radial embedding, in the words of the op.

    Raises ValueError for an unknown basis, transform or cutoff, and for trainable ones.
    """
    basis, transform = module.bessel_fn, getattr(module, "distance_transform", None)
    if type(basis) not in BASES:
        raise ValueError(f"radial: basis {type(basis).__name__} is not known")
    if transform is not None and type(transform) not in TRANSFORMS:
        raise ValueError(f"radial: distance transform {type(transform).__name__} is not known")
    if type(module.cutoff_fn) is not radial.PolynomialCutoff:
        raise ValueError(f"radial: cutoff {type(module.cutoff_fn).__name__} is not known")
    if list(module.parameters()):
        raise ValueError("radial: its basis or distance transform is trained, and the kernel gives them no gradient")
    word = "none" if transform is None else TRANSFORMS[type(transform)][0]
    return BASES[type(basis)][0], word, bool(getattr(module, "apply_cutoff", True))


def _pack(module: blocks.RadialEmbeddingBlock) -> torch.Tensor:
    """The op's constants [6] float64: r_max, p, the basis' factor, then those of the transform."""
    basis, cutoff = module.bessel_fn, module.cutoff_fn
    factor = getattr(basis, "prefactor", None)
    if factor is None:  # a plain number, or none at all
        factor = cutoff.r_max.new_full((), getattr(basis, "coeff", 0.0), dtype=torch.float64)
    transform = getattr(module, "distance_transform", None)
    rest = [] if transform is None else [getattr(transform, name) for name in TRANSFORMS[type(transform)][1]]
    packed = torch.stack([number.double().reshape(()) for number in (cutoff.r_max, cutoff.p, factor, *rest)])
    return torch.nn.functional.pad(packed, (0, 6 - len(packed)))
