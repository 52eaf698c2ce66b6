"""The least time that data-sheet rates allow: a bound from below, for comparisons between designs.

Launch latency, ramps, caches that miss and units that wait are not in it.
"""

from __future__ import annotations

from collections.abc import Iterable

from .devices import Gpu
from .launch import Launch


def seconds(launch: Launch, gpu: Gpu) -> tuple[float, str]:
    """(time, what bounds it) of one launch: distinct bytes at full bandwidth, or its FLOPs."""
    memory = launch.distinct / gpu.bandwidth
    compute = launch.flops / gpu.flops[launch.unit]
    return (memory, "memory") if memory >= compute else (compute, "compute")


def total(launches: Iterable[Launch], gpu: Gpu) -> tuple[float, str]:
    """Launches one after the other; the bound is that of the longest."""
    times = [seconds(launch, gpu) for launch in launches]
    return sum(t for t, _ in times), max(times)[1] if times else "memory"
