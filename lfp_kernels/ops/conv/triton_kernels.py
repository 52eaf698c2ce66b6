"""The Triton kernels of convolution, as implicit matrix products.

Per group, with taps t of the kernel and positions p:
  gather   out[n, a, p] = sum_b,t src[n, b, p * stride - padding + t * dilation] W[a, b, t]
  scatter  out[n, b, p] = sum_a,t src[n, a, (p + padding - t * dilation) / stride] W[a, b, t]
  weight   dW[a, b, t]  = sum_n,p small[n, a, p] large[n, b, p * stride - padding + t * dilation]
A convolution gathers forward and scatters its signal back; a transposed one the other way round.
The signal s = prologue(r, z) is made by the loaders and never stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton import (
    IDENTITY,
    PARTIAL,
    WEIGHT,
    accumulate_type,
    finish_weight,
    input_epilogue,
    load,
    load_signal,
    made_matrix,
    store,
)
from .._triton_product import GROUP, product, tile_of


@triton.jit
def along(v, axis: tl.constexpr):
    """A vector as a matrix whose other axis is 1."""
    return v[:, None] if axis == 0 else v[None, :]


@triton.jit
def positions_of(q, depth, height, width, LONG: tl.constexpr):
    """(n, d, h, w) of the q-th position of a batch; 64-bit divisions only where they are needed."""
    if not LONG:
        q = q.to(tl.int32)
    w = q % width
    h = q // width % height
    d = q // width // height % depth
    n = q // width // height // depth
    return n.to(tl.int64), d.to(tl.int32), h.to(tl.int32), w.to(tl.int32)


@triton.jit
def _source(p, t, size, stride, padding, dilation, SCATTER: tl.constexpr):
    """(position that tap t of output position p reads along an axis, whether there is one)"""
    if SCATTER:
        far = p + padding - t * dilation
        at = far // stride
        return at, (far >= 0) & (at * stride == far) & (at < size)
    else:
        at = p * stride - padding + t * dilation
        return at, (at >= 0) & (at < size)


@triton.jit
def taps_of(
    tap, p_d, p_h, p_w, in_d, in_h, in_w, k_h, k_w, step_d, step_h, step_w, pad_d, pad_h, pad_w,
    far_d, far_h, far_w, s_d, s_h, s_w, SCATTER: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """(offset within a channel's positions, mask) of what a tap reads for positions p."""
    d, d_inside = _source(p_d, tap // k_w // k_h, in_d, step_d, pad_d, far_d, SCATTER)
    h, h_inside = _source(p_h, tap // k_w % k_h, in_h, step_h, pad_h, far_h, SCATTER)
    w, w_inside = _source(p_w, tap % k_w, in_w, step_w, pad_w, far_w, SCATTER)
    if LONG:
        d = d.to(tl.int64)
        h = h.to(tl.int64)
        w = w.to(tl.int64)
    return d * s_d + h * s_h + w * s_w, d_inside & h_inside & w_inside


# Arguments that no kernel is compiled anew for.
GEOMETRY = [
    "out_d", "out_h", "out_w", "in_d", "in_h", "in_w", "k_d", "k_h", "k_w", "step_d", "step_h",
    "step_w", "pad_d", "pad_h", "pad_w", "far_d", "far_h", "far_w",
]  # fmt: skip


@triton.jit(do_not_specialize=[
    *GEOMETRY, "rows", "part", "seed", "src_n", "src_d", "src_h", "z_n", "z_d", "z_h", "out_n",
    "o_d", "o_h",
])  # fmt: skip
def product_kernel(
    src_ptr, z_ptr, w_ptr, given_ptr, extra_ptr, out_ptr, rows, inputs, outputs, part, seed, w_in,
    w_out, w_group, out_d, out_h, out_w, in_d, in_h, in_w, k_d, k_h, k_w, step_d, step_h, step_w,
    pad_d, pad_h, pad_w, far_d, far_h, far_w, src_n, src_c, src_d, src_h, src_w, z_n, z_c, z_d, z_h,
    z_w, out_n, out_c, o_d, o_h, o_w, out_count, eps: tl.float64, below: tl.float64, a: tl.float64,
    SCATTER: tl.constexpr, PROLOGUE: tl.constexpr, EPILOGUE: tl.constexpr, BIAS: tl.constexpr,
    RELU: tl.constexpr, RULE: tl.constexpr, SIGNAL_OUT: tl.constexpr, LAST: tl.constexpr,
    FLAT: tl.constexpr, LONG: tl.constexpr, MODE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """gather or scatter: out[rows = positions of the batch, outputs] of each group.

    FLAT: the k of the product are (channel, tap) pairs, for few channels; else channels, tap by
    tap. EPILOGUE: "partial", "forward" (extra = bias) or "input" (extra = x, lying like out).
    The tile is [M positions, N outputs] for LAST, channels-last tensors, else transposed.
    """
    acc: tl.constexpr = accumulate_type(src_ptr.dtype.element_ty)
    P: tl.constexpr = 0 if LAST else 1  # axis of the positions in the tile
    O: tl.constexpr = 1 - P
    tiles_m, tiles_n = tl.cdiv(rows, M), tl.cdiv(outputs, N)
    split, m, n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP)
    group = tl.program_id(1).to(tl.int64)
    row = m * M + tl.arange(0, M)
    batch, p_d, p_h, p_w = positions_of(row, out_d, out_h, out_w, LONG)
    row, batch = along(row, P), along(batch, P)
    p_d, p_h, p_w = along(p_d, P), along(p_h, P), along(p_w, P)
    output = along(n * N + tl.arange(0, N), O)
    src_at = src_ptr + batch * src_n + group * inputs * src_c
    z_at = z_ptr + batch * z_n + group * inputs * z_c
    w_at = w_ptr + group * w_group + output * w_out
    taps = k_d * k_h * k_w
    chunks = tl.cdiv(inputs, K)
    steps = tl.cdiv(inputs * taps, K) if FLAT else chunks * taps
    total = tl.zeros([M, N] if LAST else [N, M], acc)
    for step in range(split * part, tl.minimum((split + 1) * part, steps)):
        if FLAT:
            k = step * K + tl.arange(0, K)
            channel = (k // taps).to(tl.int64)
            k_inside = k < inputs * taps
            tap = along((k % taps).to(tl.int32), O)
            w_tap = along(k % taps, P)
        else:
            channel = step % chunks * K + tl.arange(0, K).to(tl.int64)
            k_inside = channel < inputs
            tap = (step // chunks).to(tl.int32)
            w_tap = tap
        offset, inside = taps_of(
            tap, p_d, p_h, p_w, in_d, in_h, in_w, k_h, k_w, step_d, step_h, step_w, pad_d, pad_h,
            pad_w, far_d, far_h, far_w, src_d, src_h, src_w, SCATTER, LONG,
        )  # fmt: skip
        mask = inside & (row < rows) & along(k_inside, O)
        at = src_at + offset + along(channel, O) * src_c
        if (PROLOGUE & 15) == IDENTITY:
            src = tl.load(at, mask=mask, other=0.0)
        else:
            z_offset, _ = taps_of(
                tap, p_d, p_h, p_w, in_d, in_h, in_w, k_h, k_w, step_d, step_h, step_w, pad_d,
                pad_h, pad_w, far_d, far_h, far_w, z_d, z_h, z_w, SCATTER, LONG,
            )  # fmt: skip
            src = load_signal(at, z_at + z_offset + along(channel, O) * z_c, mask, eps, PROLOGUE)
        w_mask = along(k_inside, P) & (output < outputs)
        w = tl.load(w_at + along(channel, P) * w_in + w_tap, mask=w_mask, other=0.0)
        if ((RULE >> 4) & 15) != WEIGHT:  # B lies like W, both contiguous
            index = group * w_group + output * w_out + along(channel, P) * w_in + w_tap
            w = made_matrix(w, given_ptr + index, w_mask, index, a, seed, RULE)
        total = product(src, w, total, MODE) if LAST else product(w, src, total, MODE)
    inside = (row < rows) & (output < outputs)
    offset = batch * out_n + p_d.to(tl.int64) * o_d + p_h.to(tl.int64) * o_h
    offset += p_w.to(tl.int64) * o_w + (group * outputs + output) * out_c
    if EPILOGUE == "partial":
        offset += split * out_count
    elif EPILOGUE == "input":
        x = load(extra_ptr + offset, inside)
        total = input_epilogue(total, x, below.to(acc), RULE, SIGNAL_OUT)
    else:
        if BIAS:
            total += load(extra_ptr + group * outputs + output, output < outputs)
        if RELU:
            total = tl.where(total < 0, 0.0, total)  # NaN passes
    store(out_ptr + offset, total, inside)


@triton.jit(do_not_specialize=[
    *GEOMETRY, "positions", "part", "small_n", "small_d", "small_h", "large_n", "large_d",
    "large_h", "z_n", "z_d", "z_h",
])  # fmt: skip
def weight_kernel(
    small_ptr, large_ptr, z_ptr, w_ptr, out_ptr, a_ptr, b_ptr, bias_sums_ptr, positions, outputs,
    inputs, part, out_d, out_h, out_w, in_d, in_h, in_w, k_d, k_h, k_w, step_d, step_h, step_w,
    pad_d, pad_h, pad_w, far_d, far_h, far_w, small_n, small_c, small_d, small_h, small_w, large_n,
    large_c, large_d, large_h, large_w, z_n, z_c, z_d, z_h, z_w, w_count, eps: tl.float64,
    lr: tl.float64, decay: tl.float64, scale: tl.float64, momentum: tl.float64,
    nesterov: tl.float64, beta1: tl.float64, beta2: tl.float64, adam_eps: tl.float64,
    correction1: tl.float64, correction2: tl.float64, rest1: tl.float64, rest2: tl.float64,
    SIGNAL: tl.constexpr, PROLOGUE: tl.constexpr, RULE: tl.constexpr, OPTIMIZER: tl.constexpr,
    BIAS: tl.constexpr, LAST: tl.constexpr, LONG: tl.constexpr, MODE: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """dW [outputs, (inputs, taps)] of each group over ``part`` of the positions of the batch, and
    what OPTIMIZER makes of it.

    SIGNAL: which of the tensors "small" and "large" is the reward that the prologue applies to.
    BIAS: the programs of the first columns add up the small one per channel.
    """
    acc: tl.constexpr = accumulate_type(small_ptr.dtype.element_ty)
    taps = k_d * k_h * k_w
    columns = inputs * taps
    group = tl.program_id(1).to(tl.int64)
    tiles_m, tiles_n = tl.cdiv(outputs, M), tl.maximum(tl.cdiv(columns, N), 1)
    split, m, n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP)
    output = m * M + tl.arange(0, M)
    column = n * N + tl.arange(0, N)
    if LAST:  # neighbouring columns are neighbouring channels
        channel = column % tl.maximum(inputs, 1)
        tap = column // tl.maximum(inputs, 1)
    else:
        channel = column // taps
        tap = column % taps
    # Tiles are loaded with the axis last that lies together in memory, and turned for the product.
    Q: tl.constexpr = 0 if LAST else 1  # axis of the positions
    C: tl.constexpr = 1 - Q
    small_at = small_ptr + along(group * outputs + output, C) * small_c
    large_at = large_ptr + along(group * inputs + channel, C) * large_c
    if SIGNAL == "small":
        z_at = z_ptr + along(group * outputs + output, C) * z_c
    else:
        z_at = z_ptr + along(group * inputs + channel, C) * z_c
    tap = along(tap.to(tl.int32), C)
    total = tl.zeros([M, N], acc)
    sums = tl.zeros([K, M] if LAST else [M, K], acc)
    end = tl.minimum((split + 1) * part, positions)
    for first in range(split * part, end, K):
        q = first + tl.arange(0, K)
        batch, p_d, p_h, p_w = positions_of(q, out_d, out_h, out_w, LONG)
        q, batch = along(q, Q), along(batch, Q)
        p_d, p_h, p_w = along(p_d, Q), along(p_h, Q), along(p_w, Q)
        small_mask = (q < end) & (along(output, C) < outputs)
        at = batch * small_n + p_d.to(tl.int64) * small_d + p_h.to(tl.int64) * small_h
        at = small_at + at + p_w.to(tl.int64) * small_w
        large, inside = taps_of(
            tap, p_d, p_h, p_w, in_d, in_h, in_w, k_h, k_w, step_d, step_h, step_w, pad_d, pad_h,
            pad_w, far_d, far_h, far_w, large_d, large_h, large_w, False, LONG,
        )  # fmt: skip
        large_mask = inside & (q < end) & (along(column, C) < columns)
        large = large_at + batch * large_n + large
        if SIGNAL == "small":
            z = batch * z_n + p_d.to(tl.int64) * z_d + p_h.to(tl.int64) * z_h
            a = load_signal(at, z_at + z + p_w.to(tl.int64) * z_w, small_mask, eps, PROLOGUE)
            b = tl.load(large, mask=large_mask, other=0.0)
        else:
            z, _ = taps_of(
                tap, p_d, p_h, p_w, in_d, in_h, in_w, k_h, k_w, step_d, step_h, step_w, pad_d,
                pad_h, pad_w, far_d, far_h, far_w, z_d, z_h, z_w, False, LONG,
            )  # fmt: skip
            a = tl.load(at, mask=small_mask, other=0.0)
            b = load_signal(large, z_at + batch * z_n + z, large_mask, eps, PROLOGUE)
        if BIAS:
            sums += a
        if LAST:
            total = product(tl.trans(a), b, total, MODE)
        else:
            total = product(a, tl.trans(b), total, MODE)
    if BIAS and n == 0:
        at = bias_sums_ptr + (split * tl.num_programs(1) + group) * outputs + output
        store(at, tl.sum(sums, Q), output < outputs)
    inside = (output[:, None] < outputs) & (column[None, :] < columns)
    place = channel * taps + column // tl.maximum(inputs, 1) if LAST else column
    offset = (group * outputs + output)[:, None] * columns + place[None, :]
    if OPTIMIZER == PARTIAL:
        store(out_ptr + split * w_count + offset, total, inside)
    else:
        hyper = (
            lr, decay, scale, momentum, nesterov, beta1, beta2, adam_eps, correction1, correction2,
            rest1, rest2,
        )  # fmt: skip
        w = load(w_ptr + offset, inside)
        finish_weight(
            total, w, w_ptr, out_ptr, a_ptr, b_ptr, offset, inside, hyper, RULE, OPTIMIZER
        )  # fmt: skip
