"""Kernels that are not compiled yet are noted, once each and for one thread only; then they compile side by side."""

import threading

import mace_models as mm
import pytest
import torch
from test_engine import check
from test_mace_parity import EXACT, SMALL, close, e3nn_model, fast_model
from triton.runtime.jit import JITFunction

import mace_triton as mt
from mace_triton import calculator
from mace_triton.engine import Engine, compiling, engine

pytestmark = pytest.mark.torchscript


class Kernel:
    """In the place of a JITFunction."""

    def __init__(self):
        self.compiled, self.threads = [], []

    def launch(self, key) -> object:
        return JITFunction._do_compile(self, key, "signature", "device", "constexprs", "options", "attrs", False)


@pytest.fixture
def kernel(monkeypatch) -> Kernel:
    def compile_now(self, key, *how):
        if key == "broken":
            raise RuntimeError("no such target")
        self.compiled.append((key, how))
        self.threads.append(threading.get_ident())
        return f"compiled {key}"

    monkeypatch.setattr(JITFunction, "_do_compile", compile_now)
    return Kernel()


def test_notes_each_kernel_once_and_compiles_it_elsewhere(kernel):
    other = Kernel()
    with compiling.noted() as jobs:
        assert [kernel.launch(key) for key in ("a", "b", "a")] == [None] * 3
        other.launch("a")
    assert kernel.compiled == []
    assert kernel.launch("c") == "compiled c"  # as before
    compiling.together(jobs)
    how = ("signature", "device", "constexprs", "options", "attrs", False)
    assert sorted(kernel.compiled[1:]) == [("a", how), ("b", how)]
    assert other.compiled == [("a", how)]
    assert threading.get_ident() not in kernel.threads[1:]


def test_other_threads_go_on_as_ever(kernel):
    found = []
    with compiling.noted() as jobs:
        thread = threading.Thread(target=lambda: found.append(kernel.launch("a")))
        thread.start()
        thread.join()
    assert found == ["compiled a"]
    assert jobs == {}


def test_an_error_waits_until_the_kernel_is_met_again(kernel):
    with compiling.noted() as jobs:
        kernel.launch("broken")
        kernel.launch("a")
    compiling.together(jobs)
    assert [key for key, _ in kernel.compiled] == ["a"]
    with pytest.raises(RuntimeError, match="no such target"):
        kernel.launch("broken")
    with pytest.raises(ZeroDivisionError), compiling.noted():
        raise ZeroDivisionError
    assert kernel.launch("b") == "compiled b"


def test_another_triton_compiles_as_it_will(monkeypatch):
    monkeypatch.delattr(JITFunction, "_do_compile")
    with compiling.noted() as jobs:
        assert not hasattr(JITFunction, "_do_compile")
    compiling.together(jobs)
    assert not hasattr(JITFunction, "_do_compile")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="without a GPU nothing is compiled")
def test_an_engine_notes_its_kernels(device, monkeypatch):
    """A number of channels that no other test has: its kernels are not compiled yet, whatever ran before."""
    noted = []
    monkeypatch.setattr(engine, "together", lambda jobs: noted.append(len(jobs)) or compiling.together(jobs))
    model, structures = e3nn_model("mp-medium", device, channels=11), mm.random_structures(SMALL["elements"], seed=1)
    fast = fast_model("mp-medium", device, channels=11)
    check(Engine(fast, structures), model, structures)
    assert len(noted) == 1
    assert noted[0] > 3
    check(Engine(fast, structures), model, structures)
    assert len(noted) == 1  # all were compiled


@pytest.mark.skipif(not torch.cuda.is_available(), reason="without a GPU nothing is compiled")
def test_a_calculators_first_step_compiles_side_by_side(device, monkeypatch):
    """Forward and way back: the step itself meets no kernel that is not compiled."""
    noted, met, compile_now = [], [], JITFunction._do_compile
    monkeypatch.setattr(calculator, "together", lambda jobs: noted.append(len(jobs)) or compiling.together(jobs))
    model, atoms = e3nn_model("mp-medium", device, channels=13), mm.random_structures(SMALL["elements"], seed=1)[0]
    want = mm.evaluate(model, mm.batch_of(model, [atoms]))
    atoms.calc = mt.MACETritonCalculator(model, precision="fp64", device="cuda")
    monkeypatch.setattr(
        JITFunction, "_do_compile", lambda self, *how: met.append(self.__name__) or compile_now(self, *how)
    )
    close(torch.tensor(atoms.get_forces(), device=device), want["forces"], EXACT, "forces")
    assert len(noted) == 1
    assert sum("_bwd" in name for name in met) > 1
    assert len(met) == noted[0]  # each once, in `together`
    atoms.rattle(0.01)
    atoms.get_forces()
    assert len(noted) == 1
