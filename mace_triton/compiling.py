"""Kernels compiled side by side, where Triton compiles each as it is met and the first step waits for all of them."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from triton.runtime import build
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Job:
    """A kernel to be compiled and loaded on the device of this number, -1 for none; `length` of its source."""

    compile_now: Callable[..., object]
    arguments: tuple
    device: int
    length: int

    def __call__(self) -> None:
        with torch.cuda.device(self.device):  # a thread begins on the first device
            kernel = self.compile_now(*self.arguments)
            getattr(kernel, "run", None)  # loads it; some versions of Triton compile C for its launch here


Jobs = dict[tuple, Job]
_one_thread = threading.RLock()
"""Held while launches are noted: two threads that put Triton's own function back could put back each other's."""
WORKERS = 12
"""At the most: Triton's own part, in Python, takes turns."""


@contextmanager
def noted() -> Iterator[Jobs]:
    """Inside, kernels that this thread launches and that are not compiled yet are noted instead, and do not run.

    What they would have written stays as it was, so nothing may read an address out of it. PyTorch's way back runs in
    threads of its own unless `torch.autograd.set_multithreading_enabled(False)`. Nothing is noted, and kernels compile
    as they are met, where this version of Triton compiles in another way.
    """
    jobs: Jobs = {}
    own = threading.get_ident()
    with _one_thread:
        compile_now = getattr(JITFunction, "_do_compile", None)
        if compile_now is None:
            yield jobs
            return

        def note(self, key, *how):
            if threading.get_ident() != own:
                return compile_now(self, key, *how)
            device = torch.cuda.current_device() if torch.cuda.is_available() else -1
            jobs[id(self), key] = Job(compile_now, (self, key, *how), device, len(getattr(self, "src", "")))
            return None  # Triton launches nothing then

        JITFunction._do_compile = note
        try:
            yield jobs
        finally:
            JITFunction._do_compile = compile_now


def together(jobs: Jobs) -> None:
    """Compile the kernels noted, as many at a time as there are processors, the longest first: all wait for it.

    An error is not raised here: the kernel is met again, and compiled then.
    """
    if not jobs:
        return
    _load_modules_apart()
    with ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1, WORKERS)) as pool:
        for job in [pool.submit(job) for job in sorted(jobs.values(), key=lambda job: -job.length)]:
            job.exception()


@contextmanager
def side_by_side() -> Iterator[Jobs]:
    """`noted`, and when it is left without an error, `together`."""
    with _no_collection():
        with noted() as jobs:
            yield jobs
        together(jobs)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Inside, Python looks for no cycles: it would all the time, as syntax trees are made by the ten thousand."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@cache
def _load_modules_apart() -> None:
    """From now on what Triton loads from C is a module of its own, whichever threads load.

    Before 3.7 Triton makes a C module for the launch of each signature, all of one name. Python has a single object for
    those of one name that were loaded before, and writes the functions of the last one into it. So a thread could find
    there the launch of another kernel: with other arguments, an error; with as many of other types, wrong numbers.
    """
    load, one_at_a_time = getattr(build, "_load_module_from_path", None), threading.Lock()
    if load is None:
        return

    def apart(name: str, path: str) -> ModuleType:
        module = ModuleType(name)
        with one_at_a_time:
            vars(module).update(vars(load(name, path)))
        return module

    build._load_module_from_path = apart
