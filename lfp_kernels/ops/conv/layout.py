"""Memory layouts of [N, C, *spatial] tensors, by the rule of csrc/cpu/memory_format.h."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def strided_channels_last(t: Tensor) -> bool:
    """Whether the strides say channels last, as torch reads them: where sizes of 1 make both
    layouts the same memory, the strides decide."""
    if t.dim() not in (4, 5) or t.stride(1) == 0:
        return False
    least = 0
    for d in (1, *range(t.dim() - 1, 1, -1), 0):
        if t.shape[d] == 0 or t.stride(d) < least:
            return False
        if d == 0 and least == t.stride(1):
            return False
        least = t.stride(d) * t.shape[d]
    return True


def empty(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    """Dense and uninitialised, in the layout that an operator answers in."""
    if not channels_last:
        return like.new_empty(shape)
    layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def channels_last(x: Tensor) -> Tensor:
    """``x`` [N, C, H, W] or [N, C, D, H, W] in channels-last layout, strides included.

    ``x.to(memory_format=torch.channels_last)`` leaves the strides of a one-channel image as they
    are, and every layer after it would then choose the plain layout.
    """
    if strided_channels_last(x):
        return x
    layout = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    x = x.contiguous(memory_format=layout)
    if strided_channels_last(x):
        return x
    return x.as_strided(x.shape, torch.empty(x.shape, device="meta", memory_format=layout).stride())
