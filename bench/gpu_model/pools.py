"""Pools (csrc/cuda/pool_tiles.cuh, pool.cu, max_pool*.cu).

A block owns a tile of one side of the pool and stages what its windows need of the other one in
shared memory: only the steps along the leading axis that two tiles share are read twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lfp_kernels.ops.conv.layout import strided_channels_last

from .devices import Gpu
from .launch import Launch, accumulator, ceil_div, in_format, type_name, wide

AXES = 3
MAX_STAGE, PLANE_STAGE, SLAB_STAGE = 96 * 1024, 32 * 1024, 64 * 1024
TILE_ELEMENTS, SLAB_BYTES, POOL_BLOCKS = 8192, 32, 512


class Tiling:
    """How the blocks cut [outer, A, P, Q, inner] of the side that they own; struct Tiling."""

    def __init__(
        self, own: list[int], outer: int, inner: int, pack: int, element: int, whole: bool,
        stage: Callable[[int], int],
    ) -> None:  # fmt: skip
        slab = min(inner, max(pack, SLAB_BYTES // element))
        wanted = PLANE_STAGE if inner == 1 else SLAB_STAGE
        length, step = own[0], own[1] * own[2]
        steps = length
        if not whole:
            while steps > 1 and (
                stage(steps) * slab > wanted or steps * step * slab > 2 * TILE_ELEMENTS
            ):
                steps -= max(steps // 8, 1)
            steps = ceil_div(length, ceil_div(length, steps))
            while (
                steps < length and inner == 1 and steps * step % pack
                and length * step % pack == 0 and stage(steps + 1) <= MAX_STAGE
            ):  # fmt: skip
                steps += 1
        while whole and inner > 1 and slab > pack and stage(steps) * slab > MAX_STAGE:
            slab //= 2
        planes = 1
        if steps == length and inner == 1:
            most = min(
                TILE_ELEMENTS // max(length * step, 1), wanted // max(stage(steps), 1),
                outer // POOL_BLOCKS,
            )  # fmt: skip
            planes = max(most, 1)
            if planes >= pack:
                planes -= planes % pack
        self.steps, self.length = steps, length
        self.cuts = ceil_div(length, steps)
        self.blocks = ceil_div(outer, planes) * self.cuts * ceil_div(inner, slab)
        size = stage(steps) * slab * planes
        self.shared = size if size <= MAX_STAGE else 0

    def regions(self) -> list[tuple[int, int]]:
        """The steps [begin, end) of each cut."""
        s = self.steps
        return [(k * s, min(k * s + s, self.length)) for k in range(self.cuts)]

    def rows(self, source: Callable[[int, int], int], all_rows: int) -> int:
        """Steps of the other side that all cuts read; those of a whole plane read all."""
        whole = self.cuts == 1
        return all_rows if whole else sum(source(b, e) for b, e in self.regions())


@dataclass(frozen=True)
class Cover:
    """Outputs first(i) .. last(i) - 1 are those whose windows may hold input i."""

    out: int
    scale: int
    low: int
    high: int
    divisor: int

    def first(self, i: int) -> int:
        return max(i * self.scale + self.low, 0) // self.divisor

    def last(self, i: int) -> int:
        return min(max(i * self.scale + self.high, 0) // self.divisor, self.out)

    def rows(self, begin: int, end: int) -> int:
        return self.last(end - 1) - self.first(begin)

    def reach(self, steps: int) -> int:
        return min(((steps - 1) * self.scale + self.high - self.low) // self.divisor + 1, self.out)


def _padded(values: Any, fill: int) -> list[int]:
    values = list(values)
    return [fill] * (AXES - len(values)) + values


def _order(inner: list[int], out: list[int]) -> list[int]:
    """leading_axes_first."""
    order = [0, 1, 2]
    for k in range(AXES - 1):
        if inner[order[0]] != 1 or out[order[0]] != 1:
            break
        head = order[: AXES - k]
        order = head[1:] + head[:1] + order[AXES - k :]
    return order


def _reordered(order: list[int], *lists: list[int]) -> list[list[int]]:
    return [[values[k] for k in order] for values in lists]


def max_pool_forward(a: dict[str, Any], gpu: Gpu, results: Any) -> list[Launch]:
    x, (out, winner) = a["x"], results
    if out.numel() == 0:
        return []
    last, element = strided_channels_last(x), x.element_size()
    sides = [_padded(t.shape[2:], 1) for t in (x, out)]
    window = [_padded(a[n], f) for n, f in (("kernel", 1), ("stride", 1), ("padding", 0))]
    sizes = _reordered(_order(*sides), *sides, *window, _padded(a["dilation"], 1))
    inside, outside, kernel, stride, padding, dilation = sizes
    extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilation)]
    inner = x.shape[1] if last else 1
    outer = x.shape[0] * x.shape[1] // inner
    pack = wide(element)
    packed = inner == 1 or inner % pack == 0
    step = inside[1] * inside[2]

    def stage(steps: int) -> int:
        rows = (steps - 1) * stride[0] + extent[0]
        return (inside[0] if steps == outside[0] else min(rows, inside[0])) * step * element

    def source(begin: int, end: int) -> int:
        first = max(begin * stride[0] - padding[0], 0)
        return min((end - 1) * stride[0] - padding[0] + extent[0], inside[0]) - first

    overlap = any(e > s for e, s in zip(extent, stride))
    tiling = Tiling(outside, outer, inner, pack if packed else 1, element, False, stage)
    direct = packed and inner > 1 and not overlap
    if not direct and not (packed and tiling.shared):
        tiling = Tiling(outside, outer, inner, 1, element, False, stage)
        packed, direct = False, not tiling.shared
    if direct:  # every window reads its places
        places = math.prod(
            sum(0 <= o * s - p + k * d < i for o in range(n) for k in range(size))
            for i, n, size, s, p, d in zip(inside, outside, kernel, stride, padding, dilation)
        )
        read = outer * inner * places * element
    else:
        read = outer * inner * step * tiling.rows(source, inside[0]) * element
    flags = f"<{type_name(element)}, {pack if packed else 1},"
    launch = Launch("max_pool_kernel", (flags,), tiling.blocks, 256, 0 if direct else tiling.shared)
    launch.load("x", read, min(read, x.nbytes))
    launch.store("out", out.nbytes)
    launch.store("winner", winner.nbytes)
    return [*in_format([x], last), launch]


def max_pool_redistribute(a: dict[str, Any], gpu: Gpu, result: Tensor) -> list[Launch]:
    reward, indices = a["reward"], a["indices"]
    if result.numel() == 0:
        return []
    last, element = strided_channels_last(indices), reward.element_size()
    inside, outside = _padded(result.shape[2:], 1), _padded(reward.shape[2:], 1)
    inside, outside = _reordered(_order(inside, outside), inside, outside)
    tiles = indices.element_size() == 1
    narrow = tiles or math.prod(inside) <= 1 << 16
    inner = reward.shape[1] if last else 1
    outer = reward.shape[0] * reward.shape[1] // inner
    size = inside[0] // outside[0]
    cover = Cover(outside[0], 1, 0, size, size)  # of windows that tile
    step = outside[1] * outside[2]

    def stage(steps: int) -> int:
        part = tiles and steps != inside[0]
        rows = cover.reach(steps) if part else outside[0]
        return rows * step * (element + (2 if narrow else 4))

    pack = wide(element) if inner == 1 else min(wide(element), 4)
    packed = inner == 1 or inner % pack == 0
    for width in (pack if packed else 1, 1):
        tiling = Tiling(inside, outer, inner, width, element, not tiles, stage)
        if tiling.shared:
            break
    else:
        raise NotImplementedError("max_pool_redistribute whose planes do not fit is not modelled")
    rows = tiling.rows(cover.rows, outside[0])
    launch = Launch(
        "give_kernel", (f"<{type_name(element)}, {width},",), tiling.blocks, 256, tiling.shared + 16
    )
    for name, t in (("reward", reward), ("indices", indices)):
        launch.load(name, outer * inner * step * rows * t.element_size(), t.nbytes)
    launch.store("input reward", result.nbytes)
    return [*in_format([reward, indices], last), launch]


def _spread(
    a: dict[str, Any], cover: Callable[[int, int, int], Cover], result: Tensor
) -> list[Launch]:
    x, reward = a["x"], a["reward"]
    if x.numel() == 0:
        return []
    last, element = strided_channels_last(x), x.element_size()
    sides = [_padded(t.shape[2:], 1) for t in (x, reward)]
    order = _order(*sides)
    inside, outside = _reordered(order, *sides)
    outputs = cover(order[0], inside[0], outside[0])
    inner = x.shape[1] if last else 1
    outer = x.numel() // math.prod(inside) // inner
    step = outside[1] * outside[2]

    def stage(steps: int) -> int:
        rows = outside[0] if steps == inside[0] else outputs.reach(steps)
        return rows * step * accumulator(element)

    packed = inner == 1 or inner % wide(element) == 0
    for pack in (wide(element) if packed else 1, 1):
        tiling = Tiling(inside, outer, inner, pack, element, False, stage)
        if tiling.shared:
            break
    else:
        raise NotImplementedError("an average pool whose windows do not fit is not modelled")
    rows = tiling.rows(outputs.rows, outside[0])
    launch = Launch(
        "spread_kernel", (f"<{type_name(element)},", f" {pack},"), tiling.blocks, 256, tiling.shared
    )
    signals = [reward] if a["chain"] & 1 else [reward, a["z"]]
    for name, t in zip(("reward", "z"), signals):
        launch.load(name, outer * inner * step * rows * element, t.nbytes)
    launch.load("x", x.nbytes)
    launch.store("input reward", x.nbytes)
    return [*in_format([x, *signals], last), launch]


def avg_pool_redistribute(a: dict[str, Any], gpu: Gpu, result: Tensor) -> list[Launch]:
    kernel, stride = _padded(a["kernel"], 1), _padded(a["stride"], 1)
    padding = _padded(a["padding"], 0)

    def cover(axis: int, inside: int, outside: int) -> Cover:
        k, s, p = kernel[axis], stride[axis], padding[axis]
        return Cover(outside, 1, p - k + s, p + s, s)

    return _spread(a, cover, result)


def adaptive_avg_pool_redistribute(a: dict[str, Any], gpu: Gpu, result: Tensor) -> list[Launch]:
    def cover(axis: int, inside: int, outside: int) -> Cover:
        return Cover(outside, outside, 0, outside + inside - 1, inside)

    return _spread(a, cover, result)
