"""How many places a step has for its edges, and what takes those that no edge has: idle edges, of idle atoms.

A bucket has some room, so that few steps need a new one, which means recording the graph anew.
"""

from __future__ import annotations

ROOM = 1.02
"""How much larger than its content a bucket is made."""
SLACK = 1.25
"""How much larger than need be it may become, as atoms part, before a smaller one is made."""
PAD = 256
"""Idle edges an idle atom."""


def bucket(count: int) -> int:
    """Places for `count` edges with some room, in steps of 128 or of less than a two hundredth."""
    wanted = int(count * ROOM) + 1
    step = max(128, 1 << (wanted // 512).bit_length())
    return -(-wanted // step) * step


def too_large(places: int, count: int) -> bool:
    """Whether so many places are far more than `count` edges need."""
    return places > SLACK * bucket(count)


def idle_atoms(places: int, count: int, walked: bool) -> int:
    """Atoms for the idle edges of a new bucket; walked: whether a program walks those of an atom, as autograd's do.

    Then there are enough for a bucket that has become too large, so that none has many. Else idle edges are in no row.
    """
    spare = int((1 - 1 / SLACK) * places) if walked else places - count
    return max(1, -(-spare // PAD))
