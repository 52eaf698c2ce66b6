"""Pools in Triton, 1 to 3 dimensions; triton_kernels.py says what is computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...rules import Rule
from .._triton import (
    arranged_like,
    blocks,
    launch,
    prologue_code,
    registers,
)
from .._triton_volume import axes, strides
from ..conv.layout import empty, strided_channels_last
from . import output_shape, tiles
from .triton_kernels import (
    average_kernel,
    give_flat_kernel,
    give_tiles_kernel,
    max_kernel,
    reach_kernel,
)

_BLOCK = 512  # elements of a program: 4 per thread, each with its places in registers
_INT32 = 2**31 - _BLOCK  # up to here places are counted in 32 bits


def _is_long(count: int, sizes: Sequence[int], outputs: Sequence[int]) -> bool:
    """Whether 32 bits are too few for places, or for products of a position and a size."""
    return count > _INT32 or any(2 * (i + 1) * (o + 1) > _INT32 for i, o in zip(sizes, outputs))


def avg_forward(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Tensor:
    """ATen's own kernels."""
    if x.dim() == 3:  # F.avg_pool1d takes no divisor
        kernel, stride, padding = (1, *kernel), (1, *stride), (0, *padding)
        out = F.avg_pool2d(
            x.unsqueeze(2), kernel, stride, padding, ceil_mode, count_include_pad, divisor
        )
        return out.squeeze(2)
    pool = F.avg_pool2d if x.dim() == 4 else F.avg_pool3d
    return pool(x, kernel, stride, padding, ceil_mode, count_include_pad, divisor)


def _average(
    x: Tensor, z: Tensor, reward: Tensor, rule: Rule, below: Rule | None, signal_in: bool,
    window: tuple[int, ...], covers: tuple[int, ...], divisor: int, adaptive: bool, include: bool,
) -> Tensor:  # fmt: skip
    """``window`` = kernel, stride, padding of each axis."""
    last = strided_channels_last(x)
    out = empty(x, x.shape, last)
    count = out.numel()
    launch(
        average_kernel, blocks(count, _BLOCK), x, arranged_like(out, x), z, reward, out, count,
        x.shape[1], *axes(x.shape[2:]), *axes(reward.shape[2:]), *window, *covers, divisor,
        *strides(reward), *strides(z), rule.stabilizer,
        1.0 if below is None else below.stabilizer, ADAPTIVE=adaptive, INCLUDE=include,
        PROLOGUE=prologue_code(rule, signal_in), RULE=rule.code, SIGNAL_OUT=below is not None,
        LAST=last, LONG=_is_long(count, x.shape[2:], reward.shape[2:]), BLOCK=_BLOCK,
        num_warps=8,
    )  # fmt: skip
    return out


def avg_redistribute(
    x: Tensor,
    z: Tensor,
    reward: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
    rule: Rule,
    below: Rule | None,
    signal_in: bool,
) -> Tensor:
    window = (*axes(kernel), *axes(stride), *axes(padding, 0))
    covers = axes([(k - 1) // s + 1 for k, s in zip(kernel, stride)])
    return _average(
        x, z, reward, rule, below, signal_in, window, covers, divisor or 0, False,
        count_include_pad,
    )  # fmt: skip


def adaptive_avg_redistribute(
    x: Tensor, z: Tensor, reward: Tensor, rule: Rule, below: Rule | None, signal_in: bool
) -> Tensor:
    covers = axes([_most_windows(i, o) for i, o in zip(x.shape[2:], reward.shape[2:])])
    return _average(
        x, z, reward, rule, below, signal_in, (1, 1, 1, 1, 1, 1, 0, 0, 0), covers, 0, True, False
    )


def _most_windows(size: int, outputs: int) -> int:
    """No position of an axis lies in more windows of an adaptive pool."""
    if size % outputs == 0:
        return 1
    return outputs // size if outputs % size == 0 else outputs // size + 2


def max_forward(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    shape = output_shape(x, kernel, stride, padding, dilation, ceil_mode)
    last = strided_channels_last(x)
    out = empty(x, shape, last)
    tiled = tiles(x, kernel, stride, padding, dilation, shape)
    long = x.shape[2:].numel() > 2**31 - 1
    dtype = torch.uint8 if tiled else torch.int64 if long else torch.int32
    indices = torch.empty_like(out, dtype=dtype)
    count = out.numel()
    launch(
        max_kernel, blocks(count, _BLOCK), x, x, out, indices, count, x.shape[1],
        *axes(x.shape[2:]), *axes(shape[2:]), *axes(kernel), *axes(stride), *axes(padding, 0),
        *axes(dilation),
        *strides(x), TILES=tiled, LAST=last, LONG=long or count > _INT32, BLOCK=_BLOCK,
        num_warps=4, **registers(128),
    )  # fmt: skip
    return out, indices


def max_redistribute(reward: Tensor, indices: Tensor, input_shape: Sequence[int]) -> Tensor:
    last = strided_channels_last(indices)
    out = empty(reward, input_shape, last)
    size, outputs = axes(input_shape[2:]), axes(reward.shape[2:])
    if out.numel() == 0:
        return out
    if reward.numel() == 0:
        return out.zero_()
    shared = (
        out.numel(), out.shape[1], *size, *outputs, *strides(reward), *strides(indices),
    )  # fmt: skip
    long = _is_long(out.numel(), size, outputs)
    programs = blocks(out.numel(), _BLOCK)
    meta = {"LAST": last, "LONG": long, "BLOCK": _BLOCK, "num_warps": 4}
    if indices.dtype == torch.uint8:
        if any(i % o for i, o in zip(size, outputs)):
            raise RuntimeError(
                "lfp_kernels::max_pool_redistribute: windows of these indices tile the input"
            )
        launch(give_tiles_kernel, programs, out, reward, indices, out, *shared, **meta)
        return out
    reach = torch.full((6,), -(2**31 - 1), dtype=torch.int32, device=out.device)
    count = indices.numel()
    launch(
        reach_kernel, blocks(count, _BLOCK), out, indices, reach, count, out.shape[1], *size,
        *outputs, *strides(indices), LONG=long, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    launch(give_flat_kernel, programs, out, reward, indices, reach, out, *shared, **meta)
    return out
