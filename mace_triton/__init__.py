"""mace_triton: Triton kernels for MACE.

>>> import mace_triton as mt
>>> fast = mt.accelerate(model, precision="fp32")
>>> print(mt.report(fast))
"""

from pathlib import Path as _Path

# A checkout keeps the kernels beside the package, a wheel keeps them inside it.
if not (_Path(__file__).parent / "kernels").is_dir() and (_Path(__file__).parent.parent / "kernels").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

import mace  # noqa: F401  sets what e3nn 0.4.4 needs to import under torch >= 2.6, so it comes first

__version__ = "0.1.0"
