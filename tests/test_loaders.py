"""The functions that fetch MACE's foundation models: what they ask MACE for, and what they make of it. No network."""

import inspect
import sys
import types

import mace_models as mm
import numpy as np
import pytest
import torch
from ase.calculators.calculator import Calculator
from mace.calculators import MACECalculator, foundations_models

import mace_triton as mt

pytestmark = [pytest.mark.usefixtures("reference_path"), pytest.mark.torchscript]
SMALL = {"channels": 8, "elements": (1, 6, 8)}


@pytest.fixture
def asked(monkeypatch) -> dict:
    """What MACE's functions were called with; they give a small model instead of a large one."""
    found = {}

    def stand_in(name):
        signature = inspect.signature(getattr(foundations_models, name))

        def load(**arguments):
            signature.bind(**arguments)  # MACE takes these
            assert arguments.pop("return_raw_model") is True
            found[name] = arguments
            heads = {"heads": ["omol"]} if name == "mace_omol" else {}
            return mm.build("mp-small", **SMALL, **heads)

        return load

    for name in ("mace_mp", "mace_off", "mace_omol", "mace_anicc"):
        monkeypatch.setattr(foundations_models, name, stand_in(name))
    return found


@pytest.mark.parametrize(
    ("name", "key"), [("mace_mp", "model"), ("mace_off", "model"), ("mace_omol", "model"), ("mace_anicc", "model_path")]
)
def test_gives_a_calculator_on_our_kernels(name, key, asked, device):
    atoms = mm.random_structures(SMALL["elements"], seed=1)[0]
    ours = getattr(mt, name)("medium", precision="fp64", device=device.type, skin=0.5)
    assert asked == {name: {key: "medium", "device": device.type}}
    assert isinstance(ours, mt.MACETritonCalculator)
    assert ours.skin == 0.5
    assert ours.models[0].mace_triton.precision.name == "fp64"
    plain = mm.build("mp-small", **SMALL, **({"heads": ["omol"]} if name == "mace_omol" else {}))
    atoms.calc = MACECalculator(models=plain.to(device), device=device.type, default_dtype="float64")
    wanted = atoms.get_forces()
    atoms.calc = ours
    np.testing.assert_allclose(atoms.get_forces(), wanted, rtol=0, atol=1e-10)


def test_defaults(asked):
    assert mt.mace_mp().models[0].mace_triton.precision.name == "fp32"
    assert asked["mace_mp"]["model"] is None
    assert next(mt.mace_off(precision=None).models[0].parameters()).dtype == torch.float64  # the model's own


def test_dispersion_is_added(asked, monkeypatch):
    made = {}

    class D3(Calculator):
        implemented_properties = ("energy", "forces")

        def __init__(self, **arguments):
            super().__init__()
            made.update(arguments)

        def calculate(self, atoms, properties, changes):
            self.results = {"energy": 1.0, "forces": np.ones((len(atoms), 3))}

    atoms = mm.random_structures(SMALL["elements"], seed=1)[0]
    monkeypatch.setitem(sys.modules, "torch_dftd", None)
    with pytest.raises(ImportError, match="torch-dftd"):
        mt.mace_mp(device="cpu", dispersion=True)
    module = types.SimpleNamespace(TorchDFTD3Calculator=D3)
    monkeypatch.setitem(sys.modules, "torch_dftd", types.SimpleNamespace(torch_dftd3_calculator=module))
    monkeypatch.setitem(sys.modules, "torch_dftd.torch_dftd3_calculator", module)
    atoms.calc = mt.mace_mp(device="cpu", precision="fp64", dispersion=True, dispersion_xc="blyp")
    both = atoms.get_forces()
    atoms.calc = mt.mace_mp(device="cpu", precision="fp64")
    np.testing.assert_allclose(both, atoms.get_forces() + 1)
    assert (made["xc"], made["device"], made["dtype"]) == ("blyp", "cpu", torch.float64)


def test_polar_asks_for_its_type(monkeypatch):
    """The model itself needs what is not everywhere (see test_families.py)."""
    monkeypatch.setattr(foundations_models, "mace_polar", lambda **arguments: arguments)
    monkeypatch.setattr("mace_triton.loaders.MACETritonCalculator", lambda plain, **arguments: (plain, arguments))
    plain, arguments = mt.mace_polar("polar-1-s", device="cpu")
    assert plain == {"model": "polar-1-s", "device": "cpu", "return_raw_model": True}
    assert arguments == {"precision": "fp32", "device": "cpu", "model_type": "PolarMACE"}
