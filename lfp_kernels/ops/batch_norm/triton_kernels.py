"""The Triton kernels of batch normalization.

  xhat = (x - mean) * invstd,  out = gamma * xhat + beta
  s    = prologue(r, z)
  dx   = gamma * invstd * (s - mean(s) - xhat * mean(s * xhat))    batch statistics
  dx   = gamma * invstd * s                                        running statistics
  r_in = input_epilogue(dx, x);  feedback: weight_epilogue(sum s * xhat, gamma),
                                           weight_epilogue(sum s, beta)
Three kernels each way: sums of parts, per-channel coefficients from them in float64, one pass that
writes. Neither s nor xhat is stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton import (
    accumulate_type,
    input_epilogue,
    load,
    load_signal,
    store,
    weight_epilogue,
)


@triton.jit
def _tile(group, line, channels, inner, lines, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """(offsets in x, mask) of a tile: lines [height, 1] of a group."""
    w = tl.arange(0, WIDTH)[None, :]
    if ROWS:
        column = group * WIDTH + w
        columns = channels * inner
        return line * columns + column, (line < lines) & (column < columns)
    else:
        pieces = tl.cdiv(inner, WIDTH)
        at = line % pieces * WIDTH + w
        return (line // pieces * channels + group) * inner + at, (line < lines) & (at < inner)


@triton.jit
def _total(value, ROWS: tl.constexpr):
    """Sum of a tile [height, width]: per column, or over the whole plane."""
    return tl.sum(value, 0) if ROWS else tl.sum(value)


@triton.jit
def _store_part(at, value, group, columns, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """A part's value per column (rows) or of its channel (planes)."""
    if ROWS:
        column = group * WIDTH + tl.arange(0, WIDTH)
        tl.store(at + column, value, mask=column < columns)
    else:
        tl.store(at + group, value)


@triton.jit
def _channel_values(pointer, group, channels, inner, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Per-channel coefficients where a tile [height, width] needs them."""
    if ROWS:
        column = group * WIDTH + tl.arange(0, WIDTH)[None, :]
        return tl.load(pointer + column // inner, mask=column < channels * inner, other=0.0)
    else:
        return tl.load(pointer + group)


@triton.jit(do_not_specialize=["parts", "step"])
def moments_kernel(
    x_ptr, parts_ptr, columns, channels, inner, lines, parts, step, ROWS: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """parts[3, parts, columns] = mean, sum of squared deviations from it, count; in float64.

    Each tile is centred on its own mean before it is squared, so that nothing cancels.
    """
    group, part = tl.program_id(0).to(tl.int64) // parts, tl.program_id(0) % parts
    mean = tl.zeros([WIDTH], tl.float64) if ROWS else tl.cast(0.0, tl.float64)
    m2 = mean
    count = mean
    for first in range(0, step, HEIGHT):
        line = part.to(tl.int64) * step + first + tl.arange(0, HEIGHT)[:, None]
        offset, mask = _tile(group, line, channels, inner, lines, ROWS, WIDTH)
        x = load(x_ptr + offset, mask)
        more = _total(mask.to(x.dtype), ROWS)
        some = tl.maximum(more, 1.0)
        center = _total(x, ROWS) / some
        d = tl.where(mask, x - center, 0.0)
        shift, square = _total(d, ROWS).to(tl.float64), _total(d * d, ROWS).to(tl.float64)
        more, some = more.to(tl.float64), some.to(tl.float64)
        # Chan's update
        both = tl.maximum(count + more, 1.0)
        delta = center.to(tl.float64) + shift / some - mean
        mean += delta * (more / both)
        m2 += square - shift * shift / some + delta * delta * (count * more / both)
        count += more
    at = parts_ptr + part.to(tl.int64) * columns
    size = tl.cast(parts, tl.int64) * columns
    _store_part(at, mean, group, columns, ROWS, WIDTH)
    _store_part(at + size, m2, group, columns, ROWS, WIDTH)
    _store_part(at + 2 * size, count, group, columns, ROWS, WIDTH)


@triton.jit
def _parts_of(channel, at, columns, parts, repeat):
    """(offsets, mask) of entries ``at`` of the ``parts * repeat`` values of a channel."""
    return at // repeat * columns + channel * repeat + at % repeat, at < parts * repeat


@triton.jit(do_not_specialize=["parts", "repeat"])
def statistics_kernel(
    parts_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, mean_ptr, invstd_ptr,
    coefficients_ptr, columns, channels, parts, repeat, mean_stride, var_stride, unbias: tl.float64,
    momentum: tl.float64, eps: tl.float64, TRAINING: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Statistics of one channel, the move of the running ones, and the coefficients [3, C] of
    out = (x - mean) * scale + offset: what rounding takes from the mean goes into the offset.
    """
    c = tl.program_id(0).to(tl.int64)
    old_mean = tl.cast(0.0, tl.float64)
    old_var = tl.cast(1.0, tl.float64)
    if running_mean_ptr is not None:
        old_mean = tl.load(running_mean_ptr + c * mean_stride).to(tl.float64)
    if running_var_ptr is not None:
        old_var = tl.load(running_var_ptr + c * var_stride).to(tl.float64)
    if TRAINING:
        size = tl.cast(parts, tl.int64) * columns
        count = tl.zeros([PARTS], tl.float64)
        total = tl.zeros([PARTS], tl.float64)
        for first in range(0, parts * repeat, PARTS):
            offset, mask = _parts_of(c, first + tl.arange(0, PARTS), columns, parts, repeat)
            more = load(parts_ptr + 2 * size + offset, mask)
            count += more
            total += more * load(parts_ptr + offset, mask)
        n = tl.sum(count)
        mean = tl.sum(total) / n
        m2 = tl.zeros([PARTS], tl.float64)
        for first in range(0, parts * repeat, PARTS):
            offset, mask = _parts_of(c, first + tl.arange(0, PARTS), columns, parts, repeat)
            delta = load(parts_ptr + offset, mask) - mean
            weight = load(parts_ptr + 2 * size + offset, mask)
            m2 += load(parts_ptr + size + offset, mask) + weight * delta * delta
        var = tl.sum(m2) / n
        tl.debug_barrier()  # every thread has read what one of them writes
        if running_mean_ptr is not None:
            moved = momentum * mean + (1 - momentum) * old_mean
            store(running_mean_ptr + c * mean_stride, moved, None)
        if running_var_ptr is not None:
            moved = momentum * (var * unbias) + (1 - momentum) * old_var
            store(running_var_ptr + c * var_stride, moved, None)
    else:
        mean = old_mean
        var = old_var
    invstd = 1.0 / tl.sqrt(var + eps)
    store(mean_ptr + c, mean, None)
    store(invstd_ptr + c, invstd, None)
    scale = invstd
    offset = tl.cast(0.0, tl.float64)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + c).to(tl.float64)
    if bias_ptr is not None:
        offset = tl.load(bias_ptr + c).to(tl.float64)
    rounded = mean.to(coefficients_ptr.dtype.element_ty)
    tl.store(coefficients_ptr + c, rounded)
    store(coefficients_ptr + channels + c, scale, None)
    offset -= (mean - rounded.to(tl.float64)) * scale
    store(coefficients_ptr + 2 * channels + c, offset, None)


@triton.jit(do_not_specialize=["parts", "step"])
def normalize_kernel(
    x_ptr, out_ptr, coefficients_ptr, channels, inner, lines, parts, step, RELU: tl.constexpr,
    ROWS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out = (x - mean) * scale + offset, its positive part with RELU"""
    group, part = tl.program_id(0).to(tl.int64) // parts, tl.program_id(0) % parts
    mean = _channel_values(coefficients_ptr, group, channels, inner, ROWS, WIDTH)
    scale = _channel_values(coefficients_ptr + channels, group, channels, inner, ROWS, WIDTH)
    shift = _channel_values(coefficients_ptr + 2 * channels, group, channels, inner, ROWS, WIDTH)
    for first in range(0, step, HEIGHT):
        line = part.to(tl.int64) * step + first + tl.arange(0, HEIGHT)[:, None]
        offset, mask = _tile(group, line, channels, inner, lines, ROWS, WIDTH)
        y = (load(x_ptr + offset, mask) - mean) * scale + shift
        if RELU:
            y = tl.where(y < 0, 0.0, y)  # NaN passes
        store(out_ptr + offset, y, mask)


@triton.jit(do_not_specialize=["parts", "step"])
def sums_kernel(
    x_ptr, z_ptr, r_ptr, mean_ptr, parts_ptr, columns, channels, inner, lines, parts, step,
    eps: tl.float64, PROLOGUE: tl.constexpr, ROWS: tl.constexpr, HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """parts[2, parts, columns] = sums of s and of s * (x - mean)

    Of float32 tensors in float64: terms of both signs cancel. It is no more than memory allows,
    also where float64 is slow; 16-bit tensors bring twice the elements and ask for less.
    """
    acc: tl.constexpr = accumulate_type(x_ptr.dtype.element_ty)
    wide: tl.constexpr = (
        tl.float32 if x_ptr.dtype.element_ty.primitive_bitwidth == 16 else tl.float64
    )
    group, part = tl.program_id(0).to(tl.int64) // parts, tl.program_id(0) % parts
    mean = _channel_values(mean_ptr, group, channels, inner, ROWS, WIDTH).to(acc)
    sum_s = tl.zeros([WIDTH], tl.float64)
    sum_sd = sum_s
    for first in range(0, step, HEIGHT):
        line = part.to(tl.int64) * step + first + tl.arange(0, HEIGHT)[:, None]
        offset, mask = _tile(group, line, channels, inner, lines, ROWS, WIDTH)
        s = load_signal(r_ptr + offset, z_ptr + offset, mask, eps, PROLOGUE)
        d = tl.where(mask, load(x_ptr + offset, mask) - mean, 0.0)
        sum_s += tl.sum(s.to(wide), 0).to(tl.float64)
        sum_sd += tl.sum(s.to(wide) * d.to(wide), 0).to(tl.float64)
    if not ROWS:
        sum_s, sum_sd = tl.sum(sum_s), tl.sum(sum_sd)
    at = parts_ptr + part.to(tl.int64) * columns
    _store_part(at, sum_s, group, columns, ROWS, WIDTH)
    _store_part(at + tl.cast(parts, tl.int64) * columns, sum_sd, group, columns, ROWS, WIDTH)


@triton.jit(do_not_specialize=["parts", "repeat"])
def feedback_kernel(
    parts_ptr, weight_ptr, bias_ptr, mean_ptr, invstd_ptr, coefficients_ptr, weight_feedback_ptr,
    bias_feedback_ptr, columns, channels, parts, repeat, count: tl.float64, TRAINING: tl.constexpr,
    RULE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Feedback of one channel, and the coefficients [4, C] of
    dx = scale * (s - mean_s - (x - mean) * slope).
    """
    c = tl.program_id(0).to(tl.int64)
    s = tl.zeros([PARTS], tl.float64)
    sd = tl.zeros([PARTS], tl.float64)
    for first in range(0, parts * repeat, PARTS):
        offset, mask = _parts_of(c, first + tl.arange(0, PARTS), columns, parts, repeat)
        s += load(parts_ptr + offset, mask)
        sd += load(parts_ptr + tl.cast(parts, tl.int64) * columns + offset, mask)
    sum_s, sum_sd = tl.sum(s), tl.sum(sd)
    mean, invstd = tl.load(mean_ptr + c), tl.load(invstd_ptr + c).to(tl.float64)
    scale = invstd
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + c).to(tl.float64)
    store(coefficients_ptr + c, mean, None)
    store(coefficients_ptr + channels + c, scale, None)
    if TRAINING:
        store(coefficients_ptr + 2 * channels + c, sum_s / count, None)
        store(coefficients_ptr + 3 * channels + c, sum_sd * invstd * invstd / count, None)
    else:
        store(coefficients_ptr + 2 * channels + c, tl.cast(0.0, tl.float64), None)
        store(coefficients_ptr + 3 * channels + c, tl.cast(0.0, tl.float64), None)
    if weight_feedback_ptr is not None:
        w = load(weight_ptr + c, None)
        store(
            weight_feedback_ptr + c, weight_epilogue((sum_sd * invstd).to(w.dtype), w, RULE), None
        )
    if bias_feedback_ptr is not None:
        b = load(bias_ptr + c, None)
        store(bias_feedback_ptr + c, weight_epilogue(sum_s.to(b.dtype), b, RULE), None)


@triton.jit(do_not_specialize=["parts", "step"])
def input_kernel(
    x_ptr, z_ptr, r_ptr, out_ptr, coefficients_ptr, channels, inner, lines, parts, step,
    eps: tl.float64, below: tl.float64, PROLOGUE: tl.constexpr, RULE: tl.constexpr,
    SIGNAL_OUT: tl.constexpr, ROWS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out = input_epilogue(scale * (s - mean_s - (x - mean) * slope), x)"""
    group, part = tl.program_id(0).to(tl.int64) // parts, tl.program_id(0) % parts
    mean = _channel_values(coefficients_ptr, group, channels, inner, ROWS, WIDTH)
    scale = _channel_values(coefficients_ptr + channels, group, channels, inner, ROWS, WIDTH)
    mean_s = _channel_values(coefficients_ptr + 2 * channels, group, channels, inner, ROWS, WIDTH)
    slope = _channel_values(coefficients_ptr + 3 * channels, group, channels, inner, ROWS, WIDTH)
    for first in range(0, step, HEIGHT):
        line = part.to(tl.int64) * step + first + tl.arange(0, HEIGHT)[:, None]
        offset, mask = _tile(group, line, channels, inner, lines, ROWS, WIDTH)
        s = load_signal(r_ptr + offset, z_ptr + offset, mask, eps, PROLOGUE)
        x = load(x_ptr + offset, mask)
        dx = scale * (s - mean_s - (x - mean) * slope)
        store(out_ptr + offset, input_epilogue(dx, x, below.to(x.dtype), RULE, SIGNAL_OUT), mask)
