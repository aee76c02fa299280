"""Tile choices of every kernel, in one table.

`tiles.json` beside this file maps  op -> [rule, ...]; a rule is {"when": {...}, "block": {...}, "num_warps": n,
"num_stages": n}. The first rule whose `when` fits the call is taken. A `when` value is compared for equality, or, for
a key that ends in `_max`, the call's value of the stem must not exceed it. Every call also has `arch`, "sm_90" for
instance, so that a tile which fits one GPU can be kept from the others. The table is written by
`mace-triton dev tune`, never behind the user's back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

TABLE = Path(__file__).with_name("tiles.json")
TAGS = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""dtype -> its name in the rules."""


@dataclass(frozen=True)
class Tile:
    """Block sizes (a sorted tuple of name, value), warps and pipeline stages of one launch."""

    block: tuple[tuple[str, int], ...]
    num_warps: int = 4
    num_stages: int = 1

    @classmethod
    def of(cls, num_warps: int = 4, num_stages: int = 1, **block: int) -> Tile:
        return cls(tuple(sorted(block.items())), num_warps, num_stages)

    def __getitem__(self, name: str) -> int:
        return dict(self.block)[name]


_forced: dict[str, Tile] = {}


@lru_cache(maxsize=1)
def table() -> dict[str, list[dict]]:
    """The stored rules, by op."""
    return json.loads(TABLE.read_text())


@lru_cache(maxsize=1)
def current_arch() -> str:
    """This machine's GPU as the rules name it: "sm_90", "gfx942", or "cpu"."""
    if not torch.cuda.is_available():
        return "cpu"
    if torch.version.hip:
        return torch.cuda.get_device_properties().gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def _fits(when: dict, call: dict) -> bool:
    return all(call[k[:-4]] <= v if k.endswith("_max") else call[k] == v for k, v in when.items())


def choose(op: str, *, arch: str | None = None, **call) -> Tile:
    """The tile for one launch of `op`; `call` describes it (dtype="fp32", nodes=1536, ...). arch: this machine's GPU.

    Raises KeyError naming the op when the table has no rule that fits.
    """
    if op in _forced:
        return _forced[op]
    call["arch"] = arch or current_arch()
    for rule in table().get(op, ()):
        if _fits(rule["when"], call):
            return Tile.of(rule["num_warps"], rule["num_stages"], **rule["block"])
    raise KeyError(f"kernels/tiles.json has no rule for {op} with {call}; add one or run `mace-triton dev tune {op}`")


@contextmanager
def forced(op: str, tile: Tile) -> Iterator[None]:
    """Use `tile` for `op` inside the block (tests and tuning)."""
    before = _forced.get(op)
    _forced[op] = tile
    try:
        yield
    finally:
        if before is None:
            del _forced[op]
        else:
            _forced[op] = before
