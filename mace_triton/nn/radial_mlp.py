"""MACE's radial network, e3nn's FullyConnectedNet, on our ops."""

from __future__ import annotations

import mace  # noqa: F401  before e3nn, see mace_triton/__init__.py
import torch
from e3nn import nn
from e3nn.nn._fc import _Layer as Layer

from ..linear_problem import LinearProblem
from ..ops.linear import linear, lowp_weight
from ..ops.radial_mlp import MAX_IN, WIDTHS, radial_mlp
from ..precision import LINEAR_MODES, STORAGE, TORCH_DTYPES, mode_for, storage_for
from .conv import as_plain, take_state
from .derived import Derived


class RadialNet(nn.FullyConnectedNet):
    """`e3nn.nn.FullyConnectedNet` with its last layer on the linear op and its hidden layers fused.

    It stays an e3nn FullyConnectedNet (same attributes, state dict and pickling) and shares the tensors of `net`.
    mode: operand precision of the hidden layers, as in `mace_triton.ops.linear.linear`; last_mode: of the last layer,
    `mode` where None. storage: "fp64", "fp32", "bf16" or "fp16", what the result is written in.

    Hidden layers of widths that `ops.radial_mlp` does not take run as e3nn's.
    Raises TypeError when `net` is no plain FullyConnectedNet, ValueError for an unknown mode or storage, and for an
    activation of the last layer or other variances than e3nn's defaults.
    """

    def __init__(self, net: nn.FullyConnectedNet, mode: str, last_mode: str | None = None, storage: str = "fp32"):
        torch.nn.Module.__init__(self)
        if type(net) is not nn.FullyConnectedNet:
            raise TypeError(f"net must be an e3nn.nn.FullyConnectedNet, got {type(net).__name__}")
        for name, value, words in (
            ("mode", mode, LINEAR_MODES),
            ("last_mode", last_mode or mode, LINEAR_MODES),
            ("storage", storage, STORAGE),
        ):
            if value not in words:
                raise ValueError(f"{name} must be one of {words}, got {value!r}")
        problem, norm = problem_of(net)
        take_state(self, net)
        self.problem, self.norm = problem, norm
        self.mode, self.last_mode, self.storage = mode, last_mode or mode, storage
        self._packed, self._last_copy = Derived(), Derived()

    @property
    def layers(self) -> list[torch.nn.Module]:
        return list(self._modules.values())

    @property
    def depth(self) -> int:
        """The number of linear layers."""
        return len(self.layers)

    @property
    def fused(self) -> bool:
        """Whether the kernel takes the hidden layers."""
        return self.norm is not None

    @property
    def run_mode(self) -> str:
        """The mode for the weights' dtype: "fp64" after `.double()`, "tf32x3" after `.float()` of an FP64 network."""
        return mode_for(self.mode, self.layers[-1].weight.dtype)

    @property
    def run_last_mode(self) -> str:
        """The same of the last layer."""
        return mode_for(self.last_mode, self.layers[-1].weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Radial features x [E, width_in] -> the weights of conv_tp [E, width_out]."""
        return self._last(self.hidden(x), self.layers[-1].weight)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """Radial features x [E, width_in] -> what the last layer reads [E, H]."""
        if self.fused:
            return radial_mlp(x, *self._hidden_weights(), norm=self.norm, mode=self.run_mode)
        for layer in self.layers[:-1]:
            x = layer(x)
        return x

    def _last(self, h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The last layer, h [E, H] -> [E, width_out] in the storage of the convolution."""
        mode, stored = self.run_last_mode, storage_for(self.storage, weight.dtype)
        flat, lowp = weight.reshape(-1), None
        trained = torch.is_grad_enabled() and weight.requires_grad
        if not trained and not torch.compiler.is_compiling():
            lowp = self._last_copy.get((weight,), lambda: lowp_weight(flat, mode, self.problem), mode)
        return linear(self.problem, h, flat, mode=mode, weight_lowp=lowp, out_dtype=TORCH_DTYPES[stored])

    def _hidden_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The hidden layers' weights over the square root of their fan-in: [width_in, H] and [L - 1, H, H]."""
        weights = [layer.weight for layer in self.layers[:-1]]
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(w.requires_grad for w in weights)):
            return _pack(weights)
        return self._packed.get(weights, lambda: _pack(weights))

    def restore(self) -> nn.FullyConnectedNet:
        """The plain e3nn network with the same tensors."""
        return as_plain(
            nn.FullyConnectedNet, self, "problem", "norm", "mode", "last_mode", "storage", "_packed", "_last_copy"
        )


def _pack(weights: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    first, *rest = (w / w.shape[0] ** 0.5 for w in weights)
    width = first.shape[1]
    return first, torch.stack(rest) if rest else first.new_empty(0, width, width)


def problem_of(net: nn.FullyConnectedNet) -> tuple[LinearProblem, float | None]:
    """The linear problem of the last layer, and the activation's norm where the kernel takes the hidden layers.

    Raises ValueError for layers that are not e3nn's own, an activation of the last layer, and for other variances than
    e3nn's defaults.
    """
    *hidden, last = net._modules.values()
    if any(type(layer) is not Layer for layer in (*hidden, last)):
        raise ValueError("net: its layers are wrapped (LoRA?); mace.modules.lora.merge_lora_weights unwraps them")
    if last.act is not None:
        raise ValueError("net: its last layer has an activation, which is not supported")
    if any(variance != 1 for layer in (*hidden, last) for variance in (layer.var_in, layer.var_out)):
        raise ValueError("net: variance_in and variance_out must be 1")
    # Of scalars both layouts are the same; ir_mul has the faster tiles.
    problem = LinearProblem(f"{int(last.h_in)}x0e", f"{int(last.h_out)}x0e", layout_in="ir_mul", layout_out="ir_mul")
    width = net.hs[1]
    square = len(set(net.hs[1:-1])) == 1 and width in WIDTHS and net.hs[0] <= MAX_IN
    silu = all(getattr(layer.act, "f", None) is torch.nn.functional.silu for layer in hidden)
    return problem, float(hidden[0].act.cst) if hidden and square and silu else None
