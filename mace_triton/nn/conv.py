"""MACE's `conv_tp` with its gather and scatter, on the channel-wise tensor product op."""

from __future__ import annotations

import math

import mace  # noqa: F401  before e3nn, see mace_triton/__init__.py
import torch
from e3nn import o3

from ..ops.channelwise_tp import channelwise_tp
from ..ops.graph import graph_plan
from ..precision import STORAGE, TORCH_DTYPES, storage_for
from ..problem import ChannelwiseTPProblem


def problem_of(tp: o3.TensorProduct, layout_in: str = "mul_ir", layout_out: str = "mul_ir") -> ChannelwiseTPProblem:
    """The problem that an e3nn tensor product of MACE's kind poses.

    Raises ValueError for weights of its own or shared ones, an instruction that is not a weighted "uvu", a path weight
    other than MACE's sqrt(2 l3 + 1), and whatever `ChannelwiseTPProblem` refuses.
    """
    if tp.internal_weights or tp.shared_weights:
        raise ValueError("tp: weights must come with each edge (internal_weights=False, shared_weights=False)")
    for number, ins in enumerate(tp.instructions):
        if ins.connection_mode != "uvu" or not ins.has_weight:
            raise ValueError(f"tp: instruction {number} is {ins.connection_mode!r}; supported is 'uvu' with weights")
        expected = math.sqrt(tp.irreps_out[ins.i_out].ir.dim)
        if not math.isclose(ins.path_weight, expected, rel_tol=1e-6):
            raise ValueError(
                f"tp: instruction {number} has path weight {ins.path_weight:.6g}, supported is sqrt(2 l + 1) = "
                f"{expected:.6g} (a slot of the output for every path)"
            )
    triples = tuple((ins.i_in1, ins.i_in2, ins.i_out) for ins in tp.instructions)
    return ChannelwiseTPProblem(
        str(tp.irreps_in1), str(tp.irreps_in2), str(tp.irreps_out), triples, layout_in, layout_out
    )


class ConvTP(o3.TensorProduct):
    """An e3nn TensorProduct whose forward also gathers and sums, as MACE calls it where `conv_fusion` is set.

    It stays an `o3.TensorProduct` (same attributes, state dict and pickling) and shares the tensors of `tp`.

    tp: MACE's conv_tp. storage: "fp64", "fp32", "bf16" or "fp16", the dtype of the radial weights inside the product;
    16 bits hold only beside float32 features. layout_in, layout_out: "mul_ir" or "ir_mul", of the node features and of
    the message. deterministic: the same bits on every run.

    Raises TypeError when tp is no plain TensorProduct and ValueError for what `problem_of` refuses.
    """

    def __init__(
        self,
        tp: o3.TensorProduct,
        storage: str = "fp32",
        layout_in: str = "mul_ir",
        layout_out: str = "mul_ir",
        deterministic: bool = False,
    ):
        torch.nn.Module.__init__(self)
        if type(tp) is not o3.TensorProduct:
            raise TypeError(f"tp must be an e3nn.o3.TensorProduct, got {type(tp).__name__}")
        if storage not in STORAGE:
            raise ValueError(f"storage must be one of {STORAGE}, got {storage!r}")
        problem = problem_of(tp, layout_in, layout_out)
        take_state(self, tp)
        self.problem = problem
        self.storage = storage
        self.deterministic = deterministic

    @property
    def run_storage(self) -> str:
        """The storage for the model's dtype: "fp64" after `.double()`, "fp32" after `.float()` of an FP64 model."""
        return storage_for(self.storage, self.output_mask.dtype)

    def forward(
        self,
        node_feats: torch.Tensor,
        edge_attrs: torch.Tensor,
        tp_weights: torch.Tensor,
        edge_index: torch.Tensor,
    ) -> torch.Tensor:
        """node_feats [N, dim_in1], edge_attrs [E, dim_in2], tp_weights [E, weight_numel], edge_index [2, E] (sender,
        receiver) -> messages summed on the receiver, [N, dim_out]."""
        n = node_feats.shape[0]
        tp_weights = tp_weights.to(TORCH_DTYPES[self.run_storage])
        graph = graph_plan(edge_index, n, n, by_sender=self.deterministic)
        return channelwise_tp(self.problem, node_feats, edge_attrs, tp_weights, graph, deterministic=self.deterministic)

    def restore(self) -> o3.TensorProduct:
        """The plain e3nn module with the same tensors; it expects and gives mul_ir."""
        return as_plain(o3.TensorProduct, self, "problem", "storage", "deterministic")


def take_state(target: torch.nn.Module, source: torch.nn.Module) -> None:
    """Give `target` the attributes, parameters, buffers and children of `source`."""
    # e3nn's compiled code carries the Clebsch-Gordan buffers that are part of the state dict, so all of it moves along.
    for name, value in source.__dict__.items():
        target.__dict__[name] = value.copy() if name in ("_modules", "_parameters", "_buffers") else value


def as_plain(kind: type, module: torch.nn.Module, *own: str) -> torch.nn.Module:
    """A module of class `kind` with the state of `module`, less the attributes `own` that only ours has."""
    plain = kind.__new__(kind)
    torch.nn.Module.__init__(plain)
    take_state(plain, module)
    for name in own:
        if hasattr(plain, name):  # modules that were pickled by an earlier version lack some
            delattr(plain, name)
    return plain
