"""Kernels that are not compiled yet are noted, once each and for one thread only; then they compile side by side."""

import gc
import shutil
import sys
import threading

import mace_models as mm
import pytest
import torch
from test_engine import check
from test_mace_parity import EXACT, SMALL, close, e3nn_model, fast_model
from triton.compiler.compiler import CompiledKernel
from triton.runtime import build
from triton.runtime.jit import JITFunction

import mace_triton as mt
from mace_triton import compiling
from mace_triton.engine import Engine

pytestmark = pytest.mark.torchscript


class Compiled:
    """In the place of a CompiledKernel, which is loaded when it is asked how to run."""

    def __init__(self, loaded: list):
        self.loaded = loaded

    @property
    def run(self):
        self.loaded.append(threading.get_ident())


class Kernel:
    """In the place of a JITFunction."""

    def __init__(self, src: str = ""):
        self.compiled, self.threads, self.loaded, self.src = [], [], [], src

    def launch(self, key) -> object:
        return JITFunction._do_compile(self, key, "signature", "device", "constexprs", "options", "attrs", False)


@pytest.fixture
def kernel(monkeypatch) -> Kernel:
    def compile_now(self, key, *how):
        if key == "broken":
            raise RuntimeError("no such target")
        self.compiled.append((key, how))
        self.threads.append(threading.get_ident())
        return Compiled(self.loaded)

    monkeypatch.setattr(JITFunction, "_do_compile", compile_now)
    return Kernel()


def test_notes_each_kernel_once_and_compiles_it_elsewhere(kernel):
    other = Kernel()
    with compiling.noted() as jobs:
        assert [kernel.launch(key) for key in ("a", "b", "a")] == [None] * 3
        other.launch("a")
    assert kernel.compiled == []
    assert isinstance(kernel.launch("c"), Compiled)  # as before
    assert kernel.loaded == []
    compiling.together(jobs)
    how = ("signature", "device", "constexprs", "options", "attrs", False)
    assert sorted(kernel.compiled[1:]) == [("a", how), ("b", how)]
    assert other.compiled == [("a", how)]
    assert threading.get_ident() not in kernel.threads[1:]
    assert sorted(kernel.loaded) == sorted(kernel.threads[1:])


def test_the_longest_goes_first(kernel, monkeypatch):
    monkeypatch.setattr(compiling, "WORKERS", 1)
    order, kernels = [], [Kernel("x" * length) for length in (3, 90, 17)]
    for one in kernels:
        one.compiled = order
    with compiling.noted() as jobs:
        for length, one in zip((3, 90, 17), kernels, strict=True):
            one.launch(length)
    compiling.together(jobs)
    assert [length for length, _ in order] == [90, 17, 3]


LAUNCH = """
#include <Python.h>
static PyObject *launch(PyObject *self, PyObject *none) {{ return PyLong_FromLong({number}); }}
static PyMethodDef methods[] = {{{{"launch", launch, METH_NOARGS, ""}}, {{NULL, NULL, 0, NULL}}}};
static struct PyModuleDef definition = {{PyModuleDef_HEAD_INIT, "__triton_launcher", NULL, -1, methods}};
PyMODINIT_FUNC PyInit___triton_launcher(void) {{ return PyModule_Create(&definition); }}
"""


@pytest.mark.skipif(not (shutil.which("gcc") or shutil.which("clang")), reason="needs a C compiler")
def test_threads_that_load_launches_at_once_get_their_own(monkeypatch, tmp_path):
    """C modules as Triton makes them before 3.7, and loads anew for each kernel of the same signature."""

    def load(number: int):
        return build.compile_module_from_src(LAUNCH.format(number=number), "__triton_launcher")

    class Loaded:
        def __init__(self, number: int):
            self.number = number

        @property
        def run(self):
            got.append((self.number, load(self.number).launch()))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    got, signatures = [], 4
    assert [load(number).launch() for number in range(signatures)] == list(range(signatures))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        compiling.together({(0, i): compiling.Job(Loaded, (i % signatures,), -1, 0) for i in range(3000)})
    finally:
        sys.setswitchinterval(interval)
    assert len(got) == 3000
    assert all(asked == found for asked, found in got)


def test_other_threads_go_on_as_ever(kernel):
    found = []
    with compiling.noted() as jobs:
        thread = threading.Thread(target=lambda: found.append(kernel.launch("a")))
        thread.start()
        thread.join()
    assert [type(one) for one in found] == [Compiled]
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
    assert isinstance(kernel.launch("b"), Compiled)


def test_another_triton_compiles_as_it_will(monkeypatch):
    monkeypatch.delattr(JITFunction, "_do_compile")
    with compiling.noted() as jobs:
        assert not hasattr(JITFunction, "_do_compile")
    compiling.together(jobs)
    assert not hasattr(JITFunction, "_do_compile")


def test_one_thread_notes_at_a_time():
    """Two that each put back what they had found would leave the notes of one of them in Triton for good."""
    before, inside, go_on = JITFunction._do_compile, threading.Event(), threading.Event()

    def first() -> None:
        with compiling.noted():
            inside.set()
            go_on.wait(5)

    def second() -> None:
        inside.wait(5)
        go_on_soon.start()
        with compiling.noted(), compiling.noted():  # the same thread may
            one.join(5)

    go_on_soon = threading.Timer(0.3, go_on.set)
    one, two = threading.Thread(target=first), threading.Thread(target=second)
    for thread in (one, two):
        thread.start()
    for thread in (one, two):
        thread.join(10)
        assert not thread.is_alive()
    assert JITFunction._do_compile is before


def test_side_by_side_compiles_on_leaving(kernel):
    assert gc.isenabled()
    with compiling.side_by_side() as jobs:
        assert kernel.launch("a") is None
        assert kernel.compiled == []
        assert not gc.isenabled()
    assert gc.isenabled()
    assert len(jobs) == len(kernel.compiled) == len(kernel.loaded) == 1
    with pytest.raises(ZeroDivisionError), compiling.side_by_side():
        raise ZeroDivisionError(kernel.launch("b"))
    assert gc.isenabled()
    assert len(kernel.compiled) == 1
    assert isinstance(kernel.launch("b"), Compiled)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="without a GPU nothing is compiled")
def test_an_engine_notes_its_kernels(device, batches):
    """A number of channels that no other test has: its kernels are not compiled yet, whatever ran before."""
    model, structures = e3nn_model("mp-medium", device, channels=11), mm.random_structures(SMALL["elements"], seed=1)
    fast = fast_model("mp-medium", device, channels=11)
    check(Engine(fast, structures), model, structures)
    assert len(batches) == 1
    assert batches[0] > 3
    check(Engine(fast, structures), model, structures)
    assert len(batches) == 1  # all were compiled


@pytest.mark.skipif(not torch.cuda.is_available(), reason="without a GPU nothing is loaded")
def test_kernels_are_loaded_side_by_side(device, monkeypatch):
    """After it, the first launch has nothing left to make."""
    loaded, init = [], CompiledKernel._init_handles

    def noticed(self):
        if self.module is None:
            loaded.append(threading.get_ident())
        init(self)

    monkeypatch.setattr(CompiledKernel, "_init_handles", noticed)
    atoms = mm.random_structures(SMALL["elements"], seed=1)[0]
    Engine(fast_model("mp-medium", device, channels=19), atoms).step()
    ours = [thread for thread in loaded if thread == threading.get_ident()]
    assert len(loaded) - len(ours) > 3
    assert len(ours) <= 6  # the filter of edges, which runs for real before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="without a GPU nothing is compiled")
def test_maces_way_compiles_side_by_side(device, batches, monkeypatch):
    """Forward and way back: the step itself meets no kernel that is not compiled."""
    met, compile_now = [], JITFunction._do_compile
    model, atoms = e3nn_model("mp-medium", device, channels=13), mm.random_structures(SMALL["elements"], seed=1)[0]
    want = mm.evaluate(model, mm.batch_of(model, [atoms]))
    atoms.calc = mt.MACETritonCalculator(model, precision="fp64", device="cuda", skin=None)
    monkeypatch.setattr(
        JITFunction, "_do_compile", lambda self, *how: met.append(self.__name__) or compile_now(self, *how)
    )
    close(torch.tensor(atoms.get_forces(), device=device), want["forces"], EXACT, "forces")
    assert len(batches) == 1
    assert sum("_bwd" in name for name in met) > 1
    assert len(met) == batches[0]  # each once, in `together`
    atoms.rattle(0.01)
    atoms.get_forces()
    assert len(batches) == 1
