"""Layer, RMS and group norm in Triton: x [N, C, M], C in groups; a layer norm has one and M = 1.

Statistics of the rows (a row is a group of a sample), then r_x and partial sums for weight and bias
column by column: rows of any length, every operand read from memory once per pass.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...rules import accumulate_dtype
from .._triton import (
    BLOCK,
    accumulate_type,
    blocks,
    divide,
    launch,
    load,
    power_of_2,
    registers,
    square_root,
    stabilize,
    store,
)

_WIDE = 1024  # elements of a row at a time
_COLUMNS = 128  # of a tile of the second pass
_SAMPLES = 8  # of it at least
_PARTS = 256  # partial sums for weight and bias at most
# A sum over threads of products that are not rounded on their own has other bits in each of them.
_ROUNDED: dict[str, Any] = {"enable_fp_fusion": False, "num_warps": 4}


@triton.jit
def _parameters(weight_ptr, bias_ptr, channel, mask, like):
    """(w, b) of the channels, 1 and 0 where there is none."""
    w = tl.full(like.shape, 1.0, like.dtype)
    b = tl.zeros_like(like)
    if weight_ptr is not None:
        w = load(weight_ptr + channel, mask)
    if bias_ptr is not None:
        b = load(bias_ptr + channel, mask)
    return w, b


@triton.jit
def statistics_kernel(
    x_ptr, weight_ptr, bias_ptr, r_ptr, values_ptr, rows, length, channels, inner, groups,
    eps: tl.float64, stabilizer: tl.float64, CENTRED: tl.constexpr, IDENTITY: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """values[4, rows] = mean, 1 / deviation, mean(g * xhat) / deviation, mean(g)."""
    acc: tl.constexpr = accumulate_type(x_ptr.dtype.element_ty)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None]
    start = (row * length)[:, None]
    first_channel = (row % groups * (channels // groups))[:, None]
    k = tl.arange(0, WIDTH)[None, :]
    count = tl.cast(length, acc)
    mean = tl.zeros([ROWS], acc)
    if CENTRED:
        for at in range(0, length, WIDTH):
            mean += tl.sum(load(x_ptr + start + at + k, inside & (at + k < length)), 1)
        mean = divide(mean, tl.zeros_like(mean) + count)
    square = tl.zeros([ROWS], acc)
    for at in range(0, length, WIDTH):
        mask = inside & (at + k < length)
        d = tl.where(mask, load(x_ptr + start + at + k, mask) - mean[:, None], 0.0)
        square += tl.sum(d * d, 1)
    variance = divide(square, tl.zeros_like(square) + count) + eps.to(acc)
    invstd = divide(tl.full([ROWS], 1.0, acc), square_root(variance))
    along = tl.zeros([ROWS], acc)
    shift = tl.zeros([ROWS], acc)
    for at in range(0, length, WIDTH):
        mask = inside & (at + k < length)
        h = (load(x_ptr + start + at + k, mask) - mean[:, None]) * invstd[:, None]
        w, b = _parameters(weight_ptr, bias_ptr, first_channel + (at + k) // inner, mask, h)
        g = w * divide(load(r_ptr + start + at + k, mask), stabilize(h * w + b, stabilizer.to(acc)))
        along += tl.sum(g * h, 1)
        shift += tl.sum(g, 1)
    tl.store(values_ptr + row, mean, mask=row < rows)
    tl.store(values_ptr + rows + row, invstd, mask=row < rows)
    if IDENTITY:  # the deviation is held constant: nothing flows along xhat
        along = tl.zeros_like(along)
    if not CENTRED:
        shift = tl.zeros_like(shift)
    slope = divide(along, tl.zeros_like(along) + count) * invstd
    tl.store(values_ptr + 2 * tl.cast(rows, tl.int64) + row, slope, mask=row < rows)
    shift = divide(shift, tl.zeros_like(shift) + count)
    tl.store(values_ptr + 3 * tl.cast(rows, tl.int64) + row, shift, mask=row < rows)


@triton.jit(do_not_specialize=["parts", "step"])
def apply_kernel(
    x_ptr, weight_ptr, bias_ptr, r_ptr, values_ptr, out_ptr, sums_ptr, batch, rows, width, length,
    inner, groups, parts, step, stabilizer: tl.float64, HANDS_ON: tl.constexpr,
    SAMPLES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """r_x, and sums[2, parts, width] of s * xhat and of s over the samples of each part."""
    acc: tl.constexpr = accumulate_type(x_ptr.dtype.element_ty)
    part = (tl.program_id(0) % parts).to(tl.int64)
    column = tl.program_id(0) // parts * WIDTH + tl.arange(0, WIDTH)
    c = column[None, :]
    like = tl.zeros([1, WIDTH], acc)
    w, b = _parameters(weight_ptr, bias_ptr, c // inner, c < width, like)
    of_weight = tl.zeros([WIDTH], acc)
    of_bias = tl.zeros([WIDTH], acc)
    for first in range(0, step, SAMPLES):
        n = part * step + first + tl.arange(0, SAMPLES)[:, None]
        mask = (n < batch) & (first + tl.arange(0, SAMPLES)[:, None] < step) & (c < width)
        row = n * groups + c // length
        mean, invstd = load(values_ptr + row, mask), load(values_ptr + rows + row, mask)
        x, r = load(x_ptr + n * width + c, mask), load(r_ptr + n * width + c, mask)
        d = x - mean
        h = d * invstd
        s = divide(r, stabilize(h * w + b, stabilizer.to(acc)))
        of_weight += tl.sum(s * h, 0)
        of_bias += tl.sum(s, 0)
        if not HANDS_ON:
            slope = load(values_ptr + 2 * tl.cast(rows, tl.int64) + row, mask)
            shift = load(values_ptr + 3 * tl.cast(rows, tl.int64) + row, mask)
            r = x * (s * w - d * slope - shift) * invstd
        store(out_ptr + n * width + c, r, mask)
    at = sums_ptr + part * width + column
    tl.store(at, of_weight, mask=column < width)
    tl.store(at + tl.cast(parts, tl.int64) * width, of_bias, mask=column < width)


def _run(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, reward: Tensor, groups: int,
    centred: bool, eps: float, stabilizer: float, identity: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, channels, inner = x.shape
    acc = accumulate_dtype(x.dtype)
    if x.numel() == 0:
        sums = x.new_zeros((2, channels), dtype=acc)
        return torch.empty_like(x), sums[0].clone(), sums[1].clone()
    x, reward = x.contiguous(), reward.contiguous()
    weight, bias = (None if p is None else p.contiguous() for p in (weight, bias))
    out = torch.empty_like(x)
    width, rows = channels * inner, batch * groups
    length = width // groups
    values = x.new_empty((4, rows), dtype=acc)
    block = power_of_2(length, most=_WIDE)
    tile = max(1, BLOCK // block)
    launch(
        statistics_kernel, blocks(rows, tile), x, x, weight, bias, reward, values, rows, length,
        channels, inner, groups, eps, stabilizer, CENTRED=centred, IDENTITY=identity, ROWS=tile,
        WIDTH=block, **_ROUNDED,
    )  # fmt: skip
    columns = power_of_2(width, most=_COLUMNS)
    samples = max(_SAMPLES, BLOCK // columns)
    wanted = min(max(batch // samples, 1), _PARTS)
    step = blocks(batch, wanted)
    parts = blocks(batch, step)
    sums = x.new_empty((2, parts, channels, inner), dtype=acc)
    launch(
        apply_kernel, parts * blocks(width, columns), x, x, weight, bias, reward, values, out, sums,
        batch, rows, width, length, inner, groups, parts, step, stabilizer,
        HANDS_ON=identity and not centred and bias is None, SAMPLES=samples, WIDTH=columns,
        **_ROUNDED, **registers(255),
    )  # fmt: skip
    of_weight, of_bias = sums.sum((1, 3)).unbind()
    return out, of_weight.clone(), of_bias.clone()


def redistribute(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, reward: Tensor, centred: bool,
    eps: float, stabilizer: float, identity: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out, *sums = _run(
        x[:, :, None], weight, bias, reward[:, :, None], 1, centred, eps, stabilizer, identity
    )
    return out.view(x.shape), sums[0], sums[1]


def group_redistribute(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, reward: Tensor, groups: int,
    eps: float, stabilizer: float, identity: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _run(x, weight, bias, reward, groups, True, eps, stabilizer, identity)
