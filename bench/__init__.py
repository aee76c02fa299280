"""Benchmarks against e3nn, cuEquivariance and OpenEquivariance.

`pytest bench/ --benchmark-only` or, for the bars alone, `python -m bench.bars`.
"""

import mace_triton  # noqa: F401  before e3nn: it imports mace, which sets what e3nn 0.4.4 needs under torch >= 2.6
