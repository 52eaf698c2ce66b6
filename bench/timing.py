"""Interleaved timing: A B C A B C ..., so that drift of the machine hits every variant alike."""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[], Any]
L2_FLUSH_BYTES = 256 << 20  # larger than the L2 cache of every current GPU


REUSED_BYTES = 32 << 20  # glibc's largest threshold; bigger blocks are mapped afresh each time


def settle_allocator() -> bool:
    """Put glibc's malloc where a long run leads it: blocks under 32 MiB are reused. Left to itself
    it drifts there, and the time of one and the same product jumps by a quarter on the way.

    Returns:
        False where the C library has no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    return mallopt is not None and bool(
        mallopt(m_mmap_threshold, REUSED_BYTES) and mallopt(m_trim_threshold, 2**31 - 1)
    )


@dataclass(frozen=True)
class Plan:
    """How long to measure."""

    repeats: int = 15  # rounds
    min_sample: float = 0.03  # seconds; short runs are repeated back to back within a sample
    warmup: int = 3

    @classmethod
    def quick(cls) -> Plan:
        return cls(repeats=3, min_sample=0.0005, warmup=1)


def cpu_sample(run: Run, inner: int) -> float:
    """Seconds per run over ``inner`` back-to-back runs."""
    start = time.perf_counter()
    for _ in range(inner):
        run()
    return (time.perf_counter() - start) / inner


class CudaSample:
    """As :func:`cpu_sample`, by CUDA events, starting from a flushed L2 cache."""

    def __init__(self) -> None:
        self._flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def __call__(self, run: Run, inner: int) -> float:
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        start.record()
        for _ in range(inner):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / inner


def sampler(device: str) -> Callable[[Run, int], float]:
    return CudaSample() if device == "cuda" else cpu_sample


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()  # what exists now need not be looked at between rounds
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def interleave(
    runs: dict[str, Run],
    plan: Plan,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, list[float]]:
    """Seconds per run of every variant, one entry per round."""
    sample = sampler(device)
    inner: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in runs}
    with no_garbage_collection():
        for name, run in runs.items():
            progress(f"warm-up {name}")
            sample(run, plan.warmup)
            estimate = max(sample(run, 1), 1e-7)
            inner[name] = max(1, math.ceil(plan.min_sample / estimate))
        for round_number in range(plan.repeats):
            progress(f"round {round_number + 1}/{plan.repeats}")
            for name, run in runs.items():
                run()  # in its own caches and free lists, not in what the variant before left
                times[name].append(sample(run, inner[name]))
            gc.collect()
    return times


def percentile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics, q in [0, 100]."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * q / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def paired_ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Median over rounds of (time / base time of the same round)."""
    return statistics.median(t / b for t, b in zip(times, base))
