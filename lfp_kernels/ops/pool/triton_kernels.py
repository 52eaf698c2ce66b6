"""The Triton kernels of the pools over x [N, C, D, H, W] (1-d and 2-d: leading axes of size 1).

Every pass gathers: a position adds up its windows in the order of the outputs. The forms of the max
pool's indices are those of csrc/cpu/max_pool.h.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton import accumulate_type, divide, input_epilogue, load, load_signal, store
from .._triton_volume import offset_of, place_of


@triton.jit
def _index(BLOCK: tl.constexpr, LONG: tl.constexpr):
    """Elements of this program; 64-bit divisions are slow, so only where they are needed."""
    if LONG:
        return tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    else:
        return tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)


# ---- average pools:  dx = sum over the windows that cover a position of s / divisor


@triton.jit
def _windows(i, size, outputs, kernel, stride, padding, ADAPTIVE: tl.constexpr):
    """[first, last) outputs whose windows cover position i of an axis."""
    if ADAPTIVE:
        return i * outputs // size, ((i + 1) * outputs + size - 1) // size
    else:
        first = tl.maximum(i + padding - kernel + stride, 0) // stride
        return first, tl.minimum((i + padding) // stride + 1, outputs)


@triton.jit
def _extent(
    o, size, outputs, kernel, stride, padding, ADAPTIVE: tl.constexpr, INCLUDE: tl.constexpr
):  # fmt: skip
    """An axis's share of the divisor of window o."""
    if ADAPTIVE:
        return ((o + 1) * size + outputs - 1) // outputs - o * size // outputs
    else:
        start = o * stride - padding
        stop = tl.minimum(start + kernel, size + padding)
        if not INCLUDE:
            start = tl.maximum(start, 0)
            stop = tl.minimum(stop, size)
        return stop - start


_AVERAGE_GEOMETRY = [
    "depth", "height", "width", "out_d", "out_h", "out_w", "k_d", "k_h", "k_w", "step_d", "step_h",
    "step_w", "pad_d", "pad_h", "pad_w", "covers_d", "covers_h", "covers_w", "divisor", "r_n",
    "r_d", "r_h", "z_n", "z_d", "z_h",
]  # fmt: skip


@triton.jit(do_not_specialize=_AVERAGE_GEOMETRY)
def average_kernel(
    x_ptr, z_ptr, r_ptr, out_ptr, count, channels, depth, height, width, out_d, out_h, out_w, k_d,
    k_h, k_w, step_d, step_h, step_w, pad_d, pad_h, pad_w, covers_d, covers_h, covers_w, divisor,
    r_n, r_c, r_d, r_h, r_w, z_n, z_c, z_d, z_h, z_w, eps: tl.float64, below: tl.float64,
    ADAPTIVE: tl.constexpr, INCLUDE: tl.constexpr, PROLOGUE: tl.constexpr, RULE: tl.constexpr,
    SIGNAL_OUT: tl.constexpr, LAST: tl.constexpr, LONG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[count] = input_epilogue(dx, x), in the order of the dense x.

    At most covers_d * covers_h * covers_w windows cover a position; divisor 0: their own sizes.
    """
    acc: tl.constexpr = accumulate_type(x_ptr.dtype.element_ty)
    i = _index(BLOCK, LONG)
    inside = i < count
    n, c, d, h, w = place_of(i, channels, depth, height, width, LAST)
    first_d, last_d = _windows(d, depth, out_d, k_d, step_d, pad_d, ADAPTIVE)
    first_h, last_h = _windows(h, height, out_h, k_h, step_h, pad_h, ADAPTIVE)
    first_w, last_w = _windows(w, width, out_w, k_w, step_w, pad_w, ADAPTIVE)
    dx = tl.zeros([BLOCK], acc)
    for j_d in range(covers_d):
        o_d = first_d + j_d
        extent_d = _extent(o_d, depth, out_d, k_d, step_d, pad_d, ADAPTIVE, INCLUDE)
        for j_h in range(covers_h):
            o_h = first_h + j_h
            extent_h = _extent(o_h, height, out_h, k_h, step_h, pad_h, ADAPTIVE, INCLUDE)
            for j_w in range(covers_w):
                o_w = first_w + j_w
                extent_w = _extent(o_w, width, out_w, k_w, step_w, pad_w, ADAPTIVE, INCLUDE)
                mask = inside & (o_d < last_d) & (o_h < last_h) & (o_w < last_w)
                r_at = r_ptr + offset_of(n, c, o_d, o_h, o_w, r_n, r_c, r_d, r_h, r_w)
                z_at = z_ptr + offset_of(n, c, o_d, o_h, o_w, z_n, z_c, z_d, z_h, z_w)
                s = load_signal(r_at, z_at, mask, eps, PROLOGUE)
                places = tl.where(divisor != 0, divisor, extent_d * extent_h * extent_w)
                dx += tl.where(mask, divide(s, places.to(acc)), 0.0)
    x = load(x_ptr + i, inside)
    store(out_ptr + i, input_epilogue(dx, x, below.to(acc), RULE, SIGNAL_OUT), inside)


# ---- max pools


_MAX_GEOMETRY = [
    "depth", "height", "width", "out_d", "out_h", "out_w", "k_d", "k_h", "k_w", "step_d", "step_h",
    "step_w", "pad_d", "pad_h", "pad_w", "spread_d", "spread_h", "spread_w", "x_n", "x_d", "x_h",
]  # fmt: skip


@triton.jit(do_not_specialize=_MAX_GEOMETRY)
def max_kernel(
    x_ptr, out_ptr, index_ptr, count, channels, depth, height, width, out_d, out_h, out_w, k_d,
    k_h, k_w, step_d, step_h, step_w, pad_d, pad_h, pad_w, spread_d, spread_h, spread_w, x_n, x_c,
    x_d, x_h, x_w, TILES: tl.constexpr, LAST: tl.constexpr, LONG: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[count] and who won: the first largest value of a window, or its last NaN."""
    acc: tl.constexpr = accumulate_type(x_ptr.dtype.element_ty)
    i = _index(BLOCK, LONG)
    inside = i < count
    n, c, o_d, o_h, o_w = place_of(i, channels, out_d, out_h, out_w, LAST)
    best = tl.full([BLOCK], float("-inf"), acc)
    winner = tl.full([BLOCK], -1, tl.int64 if index_ptr.dtype.element_ty == tl.int64 else tl.int32)
    for j_d in range(k_d):
        d = o_d * step_d - pad_d + j_d * spread_d
        for j_h in range(k_h):
            h = o_h * step_h - pad_h + j_h * spread_h
            for j_w in range(k_w):
                w = o_w * step_w - pad_w + j_w * spread_w
                mask = inside & (d >= 0) & (d < depth) & (h >= 0) & (h < height)
                mask = mask & (w >= 0) & (w < width)
                v = load(x_ptr + offset_of(n, c, d, h, w, x_n, x_c, x_d, x_h, x_w), mask)
                take = mask & ((v > best) | (v != v) | (winner < 0))
                best = tl.where(take, v, best)
                if TILES:
                    label = (j_d * k_h + j_h) * k_w + j_w
                else:
                    label = ((d * height + h) * width + w).to(winner.dtype)
                winner = tl.where(take, label, winner)
    store(out_ptr + i, best, inside)
    store(index_ptr + i, winner, inside)


_GIVE_GEOMETRY = [
    "depth", "height", "width", "out_d", "out_h", "out_w", "r_n", "r_d", "r_h", "i_n", "i_d", "i_h",
]  # fmt: skip


@triton.jit(do_not_specialize=_GIVE_GEOMETRY)
def give_tiles_kernel(
    r_ptr, index_ptr, out_ptr, count, channels, depth, height, width, out_d, out_h, out_w, r_n, r_c,
    r_d, r_h, r_w, i_n, i_c, i_d, i_h, i_w, LAST: tl.constexpr, LONG: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[count]: the reward of the window that a position belongs to where it won, else 0."""
    i = _index(BLOCK, LONG)
    inside = i < count
    n, c, d, h, w = place_of(i, channels, depth, height, width, LAST)
    k_d, k_h, k_w = depth // out_d, height // out_h, width // out_w
    place = (d % k_d * k_h + h % k_h) * k_w + w % k_w
    d, h, w = d // k_d, h // k_h, w // k_w
    winner = tl.load(index_ptr + offset_of(n, c, d, h, w, i_n, i_c, i_d, i_h, i_w), mask=inside)
    wins = inside & (winner.to(tl.int32) == place)
    store(
        out_ptr + i, load(r_ptr + offset_of(n, c, d, h, w, r_n, r_c, r_d, r_h, r_w), wins), inside
    )


# Windows that overlap: the indices say who won, not which windows there are. The winner of output
# o of an axis lies near base(o) = o * size // outputs; how far from it at most, the first kernel
# finds out, and so the second one knows which outputs may name a position.


@triton.jit
def _base(o, size, outputs):
    return o * size // outputs


@triton.jit(do_not_specialize=[n for n in _GIVE_GEOMETRY if not n.startswith("r_")])
def reach_kernel(
    index_ptr, reach_ptr, count, channels, depth, height, width, out_d, out_h, out_w, i_n, i_c, i_d,
    i_h, i_w, LONG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """reach[2, 3] = the largest of base - winner and of winner - base along each axis."""
    i = _index(BLOCK, LONG)
    n, c, d, h, w = place_of(i, channels, out_d, out_h, out_w, False)
    at = offset_of(n, c, d, h, w, i_n, i_c, i_d, i_h, i_w)
    winner = tl.load(index_ptr + at, mask=i < count, other=-1).to(i.dtype)
    # an index outside the input gives its reward to nobody
    valid = (i < count) & (winner >= 0) & (winner < tl.cast(depth, i.dtype) * height * width)
    none = -(2**31 - 1)
    for axis in tl.static_range(3):
        if axis == 0:
            far = winner // width // height - _base(d, depth, out_d)
        elif axis == 1:
            far = winner // width % height - _base(h, height, out_h)
        else:
            far = winner % width - _base(w, width, out_w)
        # atomics on integers: the same result in any order
        tl.atomic_max(reach_ptr + axis, tl.max(tl.where(valid, -far, none)).to(tl.int32))
        tl.atomic_max(reach_ptr + 3 + axis, tl.max(tl.where(valid, far, none)).to(tl.int32))


@triton.jit
def _candidates(p, reach_ptr, axis: tl.constexpr, size, outputs):
    """[first, last) outputs of an axis that may name position p, and the most of any position."""
    down = tl.maximum(tl.load(reach_ptr + axis), -size).to(p.dtype)
    up = tl.maximum(tl.load(reach_ptr + 3 + axis), -size).to(p.dtype)
    first = (tl.maximum(p - up, 0) * outputs + size - 1) // size
    last = (tl.maximum(p + down + 1, 0) * outputs + size - 1) // size
    most = tl.minimum(tl.maximum(up + down + 1, 0) * outputs // size + 1, outputs)
    return first, tl.minimum(last, outputs), most


@triton.jit(do_not_specialize=_GIVE_GEOMETRY)
def give_flat_kernel(
    r_ptr, index_ptr, reach_ptr, out_ptr, count, channels, depth, height, width, out_d, out_h,
    out_w, r_n, r_c, r_d, r_h, r_w, i_n, i_c, i_d, i_h, i_w, LAST: tl.constexpr,
    LONG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[count]: the sum of the rewards whose index names a position."""
    acc: tl.constexpr = accumulate_type(r_ptr.dtype.element_ty)
    i = _index(BLOCK, LONG)
    inside = i < count
    n, c, d, h, w = place_of(i, channels, depth, height, width, LAST)
    place = (d * height + h) * width + w
    first_d, last_d, most_d = _candidates(d, reach_ptr, 0, depth, out_d)
    first_h, last_h, most_h = _candidates(h, reach_ptr, 1, height, out_h)
    first_w, last_w, most_w = _candidates(w, reach_ptr, 2, width, out_w)
    total = tl.zeros([BLOCK], acc)
    for j_d in range(most_d):
        o_d = first_d + j_d
        for j_h in range(most_h):
            o_h = first_h + j_h
            for j_w in range(most_w):
                o_w = first_w + j_w
                mask = inside & (o_d < last_d) & (o_h < last_h) & (o_w < last_w)
                at = index_ptr + offset_of(n, c, o_d, o_h, o_w, i_n, i_c, i_d, i_h, i_w)
                wins = mask & (tl.load(at, mask=mask, other=-1).to(i.dtype) == place)
                r_at = r_ptr + offset_of(n, c, o_d, o_h, o_w, r_n, r_c, r_d, r_h, r_w)
                total += load(r_at, wins)
    store(out_ptr + i, total, inside)
