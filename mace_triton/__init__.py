"""mace_triton: Triton kernels for MACE.

>>> import mace_triton as mt
>>> fast = mt.accelerate(model, precision="fp32")
>>> print(mt.report(fast))
"""

import sys as _sys
from importlib import import_module as _import_module
from pathlib import Path as _Path
from types import ModuleType as _ModuleType

# A checkout keeps the kernels beside the package, a wheel keeps them inside it.
if not (_Path(__file__).parent / "kernels").is_dir() and (_Path(__file__).parent.parent / "kernels").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

import mace  # noqa: F401  sets what e3nn 0.4.4 needs to import under torch >= 2.6, so it comes first

__version__ = "0.1.0"

# Public name -> module that holds it, imported at first use.
_PUBLIC = {
    "accelerate": "convert",
    "restore": "convert",
    "report": "convert",
    "load_model": "convert",
    "Precision": "precision",
    "certify": "certify",
    "Certificate": "certify",
    "MACETritonCalculator": "calculator",
    "Engine": "engine",
    **dict.fromkeys(("mace_mp", "mace_off", "mace_omol", "mace_anicc", "mace_polar"), "loaders"),
}
__all__ = sorted(_PUBLIC)


class _Package(_ModuleType):
    """Importing a submodule binds its name here; it must not hide the public function of that name (certify)."""

    def __setattr__(self, name: str, value: object) -> None:
        is_module = name in _PUBLIC and isinstance(value, _ModuleType)
        super().__setattr__(name, getattr(value, name) if is_module else value)


_sys.modules[__name__].__class__ = _Package


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
