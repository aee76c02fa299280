"""Kernels compiled side by side, where Triton compiles each as it is met and the first step waits for all of them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

from triton.runtime.jit import JITFunction

Jobs = dict[tuple, Callable[[], object]]


@contextmanager
def noted() -> Iterator[Jobs]:
    """Inside, kernels that this thread launches and that are not compiled yet are noted instead, and do not run.

    What they would have written stays as it was, so nothing may read an address out of it. PyTorch's way back runs in
    threads of its own unless `torch.autograd.set_multithreading_enabled(False)`. Nothing is noted, and kernels compile
    as they are met, where this version of Triton compiles in another way.
    """
    jobs: Jobs = {}
    own, compile_now = threading.get_ident(), getattr(JITFunction, "_do_compile", None)
    if compile_now is None:
        yield jobs
        return

    def note(self, key, *how):
        if threading.get_ident() != own:
            return compile_now(self, key, *how)
        jobs[id(self), key] = partial(compile_now, self, key, *how)
        return None  # Triton launches nothing then

    JITFunction._do_compile = note
    try:
        yield jobs
    finally:
        JITFunction._do_compile = compile_now


def together(jobs: Jobs) -> None:
    """Compile the kernels noted, as many at a time as there are processors.

    An error is not raised here: the kernel is met again, and compiled then.
    """
    if not jobs:
        return
    with ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
        for job in [pool.submit(job) for job in jobs.values()]:
            job.exception()
