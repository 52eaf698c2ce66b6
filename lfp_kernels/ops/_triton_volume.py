"""Places in tensors [N, C, D, H, W] for the Triton kernels; 1-d and 2-d: leading axes of size 1."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor


def axes(values: Sequence[int], fill: int = 1) -> tuple[int, ...]:
    """One value per axis D, H, W; ``fill`` for the missing leading ones."""
    return (*(fill,) * (3 - len(values)), *values)


def strides(t: Tensor) -> tuple[int, ...]:
    """Of N, C, D, H, W."""
    return t.stride(0), t.stride(1), *axes(t.stride()[2:], 0)


@triton.jit
def place_of(i, channels, depth, height, width, LAST: tl.constexpr):
    """(n, c, d, h, w) of element i of a dense [N, C, D, H, W]; LAST: in channels-last order."""
    if LAST:
        c = i % channels
        i = i // channels
    w = i % width
    i = i // width
    h = i % height
    i = i // height
    d = i % depth
    i = i // depth
    if not LAST:
        c = i % channels
        i = i // channels
    return i, c, d, h, w


@triton.jit
def offset_of(n, c, d, h, w, s_n, s_c, s_d, s_h, s_w):
    """Offset of a place in a tensor of these strides."""
    return (
        n.to(tl.int64) * s_n
        + c.to(tl.int64) * s_c
        + d.to(tl.int64) * s_d
        + h.to(tl.int64) * s_h
        + w.to(tl.int64) * s_w
    )
