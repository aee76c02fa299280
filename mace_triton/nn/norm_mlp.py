"""MACE's RadialMLP (biased linears with layer norms between them) on our ops."""

from __future__ import annotations

import mace  # noqa: F401  before e3nn, see mace_triton/__init__.py
import torch
from mace.modules.radial import RadialMLP

from ..linear_problem import LinearProblem
from ..ops.linear import linear, lowp_weight
from ..ops.norm_mlp import WIDTHS, norm_mlp
from ..precision import LINEAR_MODES, mode_for
from .conv import as_plain, take_state
from .derived import Derived


class NormNet(RadialMLP):
    """MACE's `RadialMLP` with its first and last layer on the linear op and, in inference, those between them fused.

    It stays a RadialMLP (same attributes, state dict and pickling) and shares the tensors of `net`. mode: operand
    precision, as in `mace_triton.ops.linear.linear`; last_mode: of the last layer, `mode` where None.

    Where the layers between are trained, or have widths that `ops.norm_mlp` does not take, MACE's layers run instead.
    Raises TypeError when `net` is no plain RadialMLP, ValueError for an unknown mode and what `problems_of` refuses.
    """

    def __init__(self, net: RadialMLP, mode: str, last_mode: str | None = None):
        torch.nn.Module.__init__(self)
        if type(net) is not RadialMLP:
            raise TypeError(f"net must be MACE's RadialMLP, got {type(net).__name__}")
        for name, value in (("mode", mode), ("last_mode", last_mode or mode)):
            if value not in LINEAR_MODES:
                raise ValueError(f"{name} must be one of {LINEAR_MODES}, got {value!r}")
        problems = problems_of(net)
        take_state(self, net)
        self.problems, self.mode, self.last_mode = problems, mode, last_mode or mode
        self._packed, self._first, self._last = Derived(), Derived(), Derived()

    @property
    def depth(self) -> int:
        """The number of linear layers."""
        return len(self.net) // 3 + 1

    @property
    def fused(self) -> bool:
        """Whether the kernel takes the layers between the first and the last."""
        norms = [layer for layer in self.net if isinstance(layer, torch.nn.LayerNorm)]
        return len({(n.normalized_shape, n.eps) for n in norms}) == 1 and norms[0].normalized_shape[0] in WIDTHS

    @property
    def run_mode(self) -> str:
        """The mode for the weights' dtype: "fp64" after `.double()`, "tf32x3" after `.float()` of an FP64 network."""
        return mode_for(self.mode, self.net[-1].weight.dtype)

    @property
    def run_last_mode(self) -> str:
        """The same of the last layer."""
        return mode_for(self.last_mode, self.net[-1].weight.dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """inputs [E, hs[0]] -> [E, hs[-1]]."""
        layers = list(self.net)
        first, between, last = layers[0], layers[1:-1], layers[-1]
        if len(layers) == 1:
            return _linear(last, self.problems[0], inputs, self.run_last_mode, self._last)
        x = _linear(first, self.problems[0], inputs, self.run_mode, self._first)
        parameters = [p for layer in between for p in layer.parameters()]
        if self.fused and not (torch.is_grad_enabled() and any(p.requires_grad for p in parameters)):
            x = norm_mlp(x, *self._pack(between, parameters), eps=between[0].eps, mode=self.run_mode)
        else:
            for layer in between:
                x = layer(x)
        return _linear(last, self.problems[1], x, self.run_last_mode, self._last)

    def _pack(self, between: list[torch.nn.Module], parameters: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """hidden, bias, gain and shift as `ops.norm_mlp` takes them."""
        if torch.compiler.is_compiling():
            return _stack(between)
        return self._packed.get(parameters, lambda: _stack(between))

    def restore(self) -> RadialMLP:
        """MACE's module with the same tensors."""
        return as_plain(RadialMLP, self, "problems", "mode", "last_mode", "_packed", "_first", "_last")


def _linear(layer: torch.nn.Linear, problem: LinearProblem, x: torch.Tensor, mode: str, kept: Derived) -> torch.Tensor:
    def copies() -> tuple[torch.Tensor, torch.Tensor]:
        weight = layer.weight.t().reshape(-1)
        return weight, lowp_weight(weight, mode, problem)

    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and layer.weight.requires_grad):
        weight, lowp = layer.weight.t().reshape(-1), None
    else:
        weight, lowp = kept.get((layer.weight,), copies, mode)
    scale = layer.in_features**0.5  # the op divides by the root of the fan-in, as e3nn's linears
    return linear(problem, x, weight, mode=mode, bias=layer.bias, scale=scale, weight_lowp=lowp)


def _stack(between: list[torch.nn.Module]) -> tuple[torch.Tensor, ...]:
    norms, linears = between[::3], between[2::3]
    gain, shift = (torch.stack([getattr(norm, key) for norm in norms]) for key in ("weight", "bias"))
    hidden, bias = gain.new_empty(0, gain.shape[1], gain.shape[1]), gain[:0]
    if linears:
        hidden, bias = torch.stack([layer.weight.t() for layer in linears]), torch.stack([m.bias for m in linears])
    return hidden, bias, gain, shift


def problems_of(net: RadialMLP) -> list[LinearProblem]:
    """The linear problems of the first and the last layer; one where they are the same.

    Raises ValueError for layers that are not PyTorch's own in MACE's order, or without bias.
    """
    layers = list(net.net)
    kinds = [torch.nn.Linear, torch.nn.LayerNorm, torch.nn.SiLU]
    if len(layers) % 3 != 1 or any(type(layer) is not kinds[n % 3] for n, layer in enumerate(layers)):
        raise ValueError("net: its layers are wrapped (LoRA?); mace.modules.lora.merge_lora_weights unwraps them")
    if any(layer.bias is None for layer in layers if not isinstance(layer, torch.nn.SiLU)):
        raise ValueError("net: its linears and layer norms must have a bias")
    # Of scalars both layouts are the same; ir_mul has the faster tiles.
    scalars = {"biases": (True,), "layout_in": "ir_mul", "layout_out": "ir_mul"}
    ends = layers[:1] if len(layers) == 1 else [layers[0], layers[-1]]
    return [LinearProblem(f"{m.in_features}x0e", f"{m.out_features}x0e", **scalars) for m in ends]
