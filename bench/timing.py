"""How times are taken: warm-up, device events, the median, inputs rotated so that they do not stay in the L2 cache.

A GPU that waits for Python would be timed at Python's speed. So every burst of calls is queued behind a short sleep
on the device: when it ends, the calls are already waiting, and the events see the GPU alone. A burst that was queued
too slowly for that is taken again behind a longer sleep. Wall time is separate.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from mace_triton.doctor import device_events

Call = Callable[[], object]

WARMUP = 3  # TorchScript specialises in the second call; one is enough on a CPU, where bench runs only to be tested
BURST_MS = 2.0  # a burst lasts about this long, so that the resolution of the events does not matter
ROUNDS_MS = 300.0  # and all bursts together about this long
HOST_MS = 1000.0  # and Python needs no longer than about this to queue them
MAX_SLEEP_MS = 100.0  # the longest sleep that a burst is queued behind
CPU_CACHE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Timing:
    """Medians in milliseconds per call; `spread` is the interquartile range over the median of `gpu_ms`.

    host_bound: the calls could not be queued ahead of the GPU (they wait for it themselves, or Python is slower than
    MAX_SLEEP_MS), so `gpu_ms` holds waiting too.
    """

    gpu_ms: float
    wall_ms: float
    spread: float
    rounds: int
    host_bound: bool = False


@dataclass(frozen=True)
class KernelProfile:
    """Sum of the device time of all kernels, copies and fills in one call, their number, and the longest by name."""

    kernel_ms: float
    launches: int
    top: list[tuple[str, float, int]]


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache in bytes (a guess of 32 MiB on a CPU)."""
    if device.type != "cuda":
        return CPU_CACHE_BYTES
    return torch.cuda.get_device_properties(device).L2_cache_size


def sets_beyond_cache(bytes_per_set: int, device: torch.device) -> int:
    """How many input sets of this size hold three times the cache: between 1 and 32 on a GPU, 1 or 2 on a CPU."""
    wanted = max(1, math.ceil(3 * cache_bytes(device) / max(bytes_per_set, 1)))
    return min(wanted, 32 if device.type == "cuda" else 2)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def warm_up(calls: Sequence[Call], device: torch.device) -> None:
    """Call everything until compilation and first use are over."""
    for i in range(max(WARMUP if device.type == "cuda" else 1, len(calls))):
        calls[i % len(calls)]()
    synchronize(device)


def _wall_ms(call: Call, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def _host_ms(call: Call, device: torch.device) -> float:
    """How long Python takes to queue one call."""
    synchronize(device)
    start = time.perf_counter()
    call()
    elapsed = 1e3 * (time.perf_counter() - start)
    synchronize(device)
    return elapsed


@lru_cache(maxsize=1)
def _cycles_per_ms() -> float:
    """Device clock cycles in a millisecond, as the sleep kernel counts them."""
    cycles = 20_000_000
    torch.cuda._sleep(1000)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    torch.cuda._sleep(cycles)
    end.record()
    end.synchronize()
    return cycles / start.elapsed_time(end)


def _burst_ms(calls: Sequence[Call], n: int, first: int, host_ms: float) -> tuple[float, bool]:
    """Device time per call of n calls in a row, starting with input set `first`, and whether the GPU had to wait."""
    # Outputs stay alive for one rotation, or all calls would write the same few cache lines.
    outputs = deque(maxlen=len(calls))
    sleep_ms = min(1.5 * host_ms * n + 0.2, MAX_SLEEP_MS)
    while True:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(int(sleep_ms * _cycles_per_ms()))
        start.record()
        for i in range(n):
            outputs.append(calls[(first + i) % len(calls)]())
        end.record()
        late = start.query()  # the sleep was over before the last call was queued
        end.synchronize()
        if not late or sleep_ms >= MAX_SLEEP_MS:
            return start.elapsed_time(end) / n, late
        sleep_ms = min(2 * sleep_ms, MAX_SLEEP_MS)


def _summary(samples: list[float], wall: list[float], host_bound: bool = False) -> Timing:
    median = statistics.median(samples)
    low, _, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else (median,) * 3
    return Timing(median, statistics.median(wall), (high - low) / median, len(samples), host_bound)


def time_calls(calls: Sequence[Call], device: torch.device) -> Timing:
    """Median time of one call; `calls` do the same work on different inputs and are rotated.

    On a CPU `gpu_ms` is the wall time: there is only one clock.
    """
    warm_up(calls, device)
    wall = [_wall_ms(calls[i % len(calls)], device) for i in range(5)]
    if device.type != "cuda":
        return _summary(wall, wall)
    host_ms = min(_host_ms(calls[0], device) for _ in range(3))
    estimate = min(_burst_ms(calls, 1, i, host_ms)[0] for i in range(3))
    queued = max(1, int(MAX_SLEEP_MS / (1.5 * host_ms + 0.2)))  # calls that Python can queue during the longest sleep
    n = max(1, min(20, queued, math.ceil(BURST_MS / estimate)))
    rounds = int(max(5, min(25, ROUNDS_MS / (n * estimate), HOST_MS / (n * host_ms))))
    samples, late = zip(*(_burst_ms(calls, n, i * n, host_ms) for i in range(rounds)), strict=True)
    return _summary(list(samples), wall, host_bound=sum(late) > rounds // 2)


def time_wall(call: Call, device: torch.device, repeats: int = 7) -> float:
    """Median wall time in milliseconds, the device idle before and after each call."""
    warm_up([call], device)
    return statistics.median(_wall_ms(call, device) for _ in range(repeats if device.type == "cuda" else 3))


def profile(calls: Sequence[Call], device: torch.device) -> KernelProfile | None:
    """Device time (the median over `calls`, five at least) and launches of one warm call, by the profiler.

    None on a CPU.
    """
    if device.type != "cuda":
        return None
    repeats = max(5, len(calls))
    calls[-1]()
    synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
        for i in range(repeats):
            calls[i % len(calls)]()
        synchronize(device)
    found = ((event.time_range.start, event.name, event.time_range.elapsed_us() / 1e3) for event in device_events(prof))
    return _kernel_profile(list(found), repeats)


def _kernel_profile(found: list[tuple[float, str, float]], repeats: int) -> KernelProfile:
    """Of (start, name, ms) of the kernels of `repeats` calls. A GPU slows down at times: the median call counts."""
    total, number = Counter(), Counter()
    for _, name, ms in found:
        total[name] += ms / repeats
        number[name] += 1
    top = [(name[:100], round(ms, 4), number[name] // repeats) for name, ms in total.most_common(12)]
    launches, rest = divmod(len(found), repeats)
    if rest or not launches:  # calls that differ cannot be told apart
        return KernelProfile(sum(total.values()), launches, top)
    inside = [ms for _, _, ms in sorted(found)]
    each = [sum(inside[first : first + launches]) for first in range(0, len(inside), launches)]
    return KernelProfile(statistics.median(each), launches, top)


def free_memory(device: torch.device) -> int:
    """Drop what nothing refers to any more; bytes still allocated on the device (0 on a CPU)."""
    if device.type != "cuda":
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device)


def peak_mib(call: Call, device: torch.device) -> float | None:
    """Peak of allocated device memory during one call, everything that was there before included; None on a CPU."""
    if device.type != "cuda":
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 2**20


@lru_cache(maxsize=2)
def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second (read plus written) of a large copy on this device: the roofline of everything here."""
    count = (2**30 if device.type == "cuda" else 2**26) // 4
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    timing = time_calls([lambda: target.copy_(source)], device)
    return 2 * 4 * count / (timing.gpu_ms * 1e-3)
