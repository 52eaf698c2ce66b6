"""Launch arguments that the Triton kernels of convolutions share."""

from __future__ import annotations

from torch import Tensor

from .._triton import blocks, power_of_2
from .._triton_product import Tiles
from .._triton_volume import axes
from .geometry import ConvGeometry


def window(weight: Tensor, geometry: ConvGeometry) -> tuple[int, ...]:
    """Kernel, stride, padding, dilation per axis."""
    return (
        *axes(weight.shape[2:]), *axes(geometry.stride), *axes(geometry.padding, 0),
        *axes(geometry.dilation),
    )  # fmt: skip


def is_long(*tensors: Tensor) -> bool:
    """Whether 32 bits are too few to count positions, or for offsets within a sample."""
    for t in tensors:
        span = sum((size - 1) * step for size, step in zip(t.shape[1:], t.stride()[1:]))
        if max(t.shape[0] * t.shape[2:].numel(), span) > 2**31 - 1024:
            return True
    return False


def with_warps(tile: Tiles, places: int) -> Tiles:
    """With warps enough that no thread holds more than eight of the places that the tile reads."""
    return tile._replace(warps=max(tile.warps, power_of_2(blocks(places, 8 * 32), 1, 8)))
