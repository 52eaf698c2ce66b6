"""Which elements meet in a convolution (csrc/cuda/conv_window.cuh), counted per axis.

    large position = small position * stride - padding + tap * dilation

A product that reads the small side and makes the large one ("up") runs in phases by the remainder
of the large position modulo the stride: no position meets a tap that does not exist.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from .launch import ceil_div


@dataclass(frozen=True)
class Axis:
    """Counts of one axis, over all phases."""

    positions: int  # of one phase, those beyond the target included
    phases: int
    most_taps: int  # of a phase
    meetings: int  # pairs (position, tap) whose source exists
    real_meetings: int  # those of positions that exist
    touched: int  # source positions that somebody reads


def down(large: int, small: int, kernel: int, stride: int, padding: int, dilation: int) -> Axis:
    sources = [
        s
        for q in range(small)
        for j in range(kernel)
        if 0 <= (s := q * stride - padding + j * dilation) < large
    ]
    return Axis(small, 1, kernel, len(sources), len(sources), len(set(sources)))


def up(large: int, small: int, kernel: int, stride: int, padding: int, dilation: int) -> Axis:
    common = math.gcd(stride, dilation)
    step, reach, count = stride // common, dilation // common, ceil_div(large, stride)
    meetings = real = 0
    touched: set[int] = set()
    for phase in range(stride):
        first = 0
        while first < step and (phase + padding - first * dilation) % stride:
            first += 1
        if first >= min(step, kernel):
            continue
        taps = ceil_div(kernel - first, step)
        origin = (phase + padding - first * dilation) // stride
        for q in range(count):
            sources = [s for j in range(taps) if 0 <= (s := q + origin - j * reach) < small]
            meetings += len(sources)
            real += len(sources) * (q * stride + phase < large)
            touched.update(sources)
    return Axis(count, stride, ceil_div(kernel, step), meetings, real, len(touched))


def _product(axes: list[Axis], name: str) -> int:
    return math.prod(getattr(axis, name) for axis in axes)


@dataclass(frozen=True)
class Window:
    """The axes together."""

    axes: list[Axis]
    samples: int

    @property
    def positions(self) -> int:
        """Of one phase, of every sample."""
        return self.samples * _product(self.axes, "positions")

    @property
    def phases(self) -> int:
        return _product(self.axes, "phases")

    @property
    def most_taps(self) -> int:
        return _product(self.axes, "most_taps")

    @property
    def meetings(self) -> int:
        return self.samples * _product(self.axes, "meetings")

    @property
    def real_meetings(self) -> int:
        return self.samples * _product(self.axes, "real_meetings")

    @property
    def touched(self) -> int:
        return self.samples * _product(self.axes, "touched")


@dataclass(frozen=True)
class Geometry:
    """The two sides of a convolution; ``x`` is the small one when it is transposed."""

    x: Tensor
    z: Tensor
    weight: Tensor
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    groups: int

    @property
    def large(self) -> Tensor:
        return self.z if self.transposed else self.x

    @property
    def small(self) -> Tensor:
        return self.x if self.transposed else self.z

    @property
    def large_channels(self) -> int:
        """Of one group, as below."""
        return self.large.shape[1] // self.groups

    @property
    def small_channels(self) -> int:
        return self.small.shape[1] // self.groups

    @property
    def taps(self) -> int:
        return math.prod(self.weight.shape[2:])

    @property
    def flops(self) -> int:
        return 2 * self.small.numel() * math.prod(self.weight.shape[1:])

    def _window(self, axis) -> Window:
        sizes = zip(
            self.large.shape[2:], self.small.shape[2:], self.weight.shape[2:],
            self.stride, self.padding, self.dilation,
        )  # fmt: skip
        return Window([axis(*s) for s in sizes], self.x.shape[0])

    @cached_property
    def down(self) -> Window:
        return self._window(down)

    @cached_property
    def up(self) -> Window:
        return self._window(up)
