"""Spiking neurons in Triton: the scans over time (csrc/neuron.h again), packed spikes, and noise.

A program takes a block of neurons through all steps with their state in registers; two steps are
read ahead of their use. Rows start at multiples of ``neurons``, so their accesses are vectors where
that is a multiple of 16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton import accumulate_type, divide, load, square_root, store
from .codes import PLANE, Reset

SUBTRACT, AT_ONCE = tl.constexpr(int(Reset.SUBTRACT)), tl.constexpr(int(Reset.SUBTRACT_AT_ONCE))
ZERO = tl.constexpr(int(Reset.ZERO))
STEPS = tl.constexpr(PLANE)  # in a byte of packed spikes
AHEAD = tl.constexpr(2)  # steps that a scan reads ahead; more take too many registers


@triton.jit
def times(a, b, minus_zero):
    """A product that no compiler fuses with the sum around it: what is added to it, -0, is known
    at run time alone."""
    return tl.fma(a, b, tl.zeros_like(a) + minus_zero.to(a.dtype))


@triton.jit
def per_channel(pointer, channels, inner, offset, mask, SHARED: tl.constexpr):
    """A value per neuron from one per channel, or from the one that all of them share."""
    if SHARED:
        value = load(pointer, None)
        return tl.zeros(offset.shape, value.dtype) + value
    else:
        return load(pointer + offset // inner % channels, mask)


@triton.jit
def two_rows(pointer, first, step: tl.constexpr, rows, neurons, offset, mask):
    """Rows first and first + step as they are stored, 0 where there is none."""
    a = first
    b = first + step
    return (
        tl.load(pointer + a * neurons + offset, mask & (a >= 0) & (a < rows), 0.0),
        tl.load(pointer + b * neurons + offset, mask & (b >= 0) & (b < rows), 0.0),
    )


@triton.jit
def entering(before, threshold, RESET: tl.constexpr):
    """What is left of the membrane when a step begins."""
    if RESET == ZERO:
        return tl.where(before > threshold, 0.0, before)
    else:
        return before


@triton.jit
def resets(p, threshold, RESET: tl.constexpr):
    """Where the reset takes the threshold off the charged membrane before the neuron may fire."""
    if (RESET == SUBTRACT) | (RESET == AT_ONCE):
        return p > threshold
    else:
        return tl.zeros_like(p) > 0


@triton.jit
def forward_step(
    u, packed, current, t, shift: tl.constexpr, steps, beta, threshold, minus_zero, membrane_ptr,
    neurons, offset, mask, RESET: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """(membrane, packed spikes) after step t; steps after the last one change neither."""
    stored: tl.constexpr = membrane_ptr.dtype.element_ty
    p = entering(u, threshold, RESET)
    v = times(beta, p, minus_zero) + current.to(u.dtype)
    w = tl.where(resets(p, threshold, RESET), v - threshold, v)
    fires = w > threshold
    if RESET == AT_ONCE:
        w = tl.where(fires, v - threshold, v)
    after = w.to(stored).to(u.dtype)
    if RESET != AT_ONCE:  # whoever reads the stored membrane sees the same
        fires = after > threshold
    live = t < steps
    if KEEP:
        tl.store(membrane_ptr + t * neurons + offset, after.to(stored), mask & live)
    return tl.where(live, after, u), packed | ((fires & live).to(tl.int32) << shift)


@triton.jit(do_not_specialize=["steps", "rows", "channels", "inner"])
def forward_kernel(
    current_ptr, state_ptr, beta_ptr, threshold_ptr, bits_ptr, membrane_ptr, last_ptr, neurons,
    steps, rows, channels, inner, minus_zero: tl.float64, BETA: tl.constexpr,
    THRESHOLD: tl.constexpr, STATE: tl.constexpr, MOVES: tl.constexpr, RESET: tl.constexpr,
    KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < neurons
    beta = per_channel(beta_ptr, channels, inner, offset, mask, BETA)
    threshold = per_channel(threshold_ptr, channels, inner, offset, mask, THRESHOLD)
    u = tl.zeros_like(beta)
    if STATE:
        u = load(state_ptr + offset, mask)
    zero = tl.cast(0, tl.int64)
    a, b = two_rows(current_ptr, zero, 1, rows, neurons, offset, mask)
    if not MOVES:
        b = a
    for first in range(0, steps, STEPS):
        packed = tl.zeros([BLOCK], tl.int32)
        for part in tl.static_range(STEPS // AHEAD):
            t = tl.cast(first, tl.int64) + part * AHEAD
            now = (a, b)
            if MOVES:
                a, b = two_rows(current_ptr, t + AHEAD, 1, rows, neurons, offset, mask)
            for s in tl.static_range(AHEAD):
                u, packed = forward_step(
                    u, packed, now[s], t + s, part * AHEAD + s, steps, beta, threshold, minus_zero,
                    membrane_ptr, neurons, offset, mask, RESET, KEEP,
                )  # fmt: skip
        plane = tl.cast(first // STEPS, tl.int64)
        tl.store(bits_ptr + plane * neurons + offset, packed.to(tl.uint8), mask)
    store(last_ptr + offset, u, mask)


@triton.jit
def backward_step(
    u, carry, total, beta_sum, threshold_sum, reward, before, spike, t, steps, beta, threshold, eps,
    minus_zero, signal_ptr, neurons, offset, mask, RESET: tl.constexpr, STATIC: tl.constexpr,
    AS_REWARD: tl.constexpr, PARAMETERS: tl.constexpr,
):  # fmt: skip
    """The membrane before step t, the carry and the sums after it; see csrc/neuron.h."""
    live = t < steps
    before = before.to(u.dtype)
    p = entering(before, threshold, RESET)
    reset = resets(p, threshold, RESET)
    off = reset
    if RESET == AT_ONCE:
        off = spike
    v = tl.where(off, u + threshold, u)
    n = divide(reward.to(u.dtype) + carry, tl.abs(p) + tl.abs(v - p) + eps)
    decayed = times(beta, p, minus_zero)
    out = n
    if AS_REWARD:
        out = times(v - decayed, n, minus_zero)
    if STATIC:
        total = tl.where(live, total + out, total)
    else:
        store(signal_ptr + t * neurons + offset, out, mask & live)
    if PARAMETERS:
        beta_sum = tl.where(live, beta_sum + times(p, n, minus_zero), beta_sum)
        threshold_sum = tl.where(live, threshold_sum - tl.where(reset, n + n, n), threshold_sum)
    carry = tl.where(live, times(decayed, n, minus_zero), carry)
    return tl.where(live, before, u), carry, total, beta_sum, threshold_sum


@triton.jit(do_not_specialize=["steps", "channels", "inner"])
def backward_kernel(
    reward_ptr, membrane_ptr, bits_ptr, state_ptr, carry_ptr, beta_ptr, threshold_ptr, signal_ptr,
    carried_ptr, beta_sum_ptr, threshold_sum_ptr, neurons, steps, channels, inner, eps: tl.float64,
    minus_zero: tl.float64, BETA: tl.constexpr, THRESHOLD: tl.constexpr, STATE: tl.constexpr,
    CARRY: tl.constexpr, RESET: tl.constexpr, STATIC: tl.constexpr, AS_REWARD: tl.constexpr,
    PARAMETERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < neurons
    beta = per_channel(beta_ptr, channels, inner, offset, mask, BETA)
    threshold = per_channel(threshold_ptr, channels, inner, offset, mask, THRESHOLD)
    eps = eps.to(beta.dtype)
    first = tl.zeros_like(beta)
    if STATE:
        first = load(state_ptr + offset, mask)
    carry = tl.zeros_like(beta)
    if CARRY:
        carry = load(carry_ptr + offset, mask)
    total = tl.zeros_like(beta)
    beta_sum = tl.zeros_like(beta)
    threshold_sum = tl.zeros_like(beta)
    last = tl.cast(steps, tl.int64) - 1
    u = load(membrane_ptr + last * neurons + offset, mask & (last >= 0))
    top = last // STEPS * STEPS + (STEPS - 1)  # last step of the last plane
    # A step reads its reward and the membrane before it; its own is left over from the step after.
    ra, rb = two_rows(reward_ptr, top, -1, steps, neurons, offset, mask)
    ua, ub = two_rows(membrane_ptr, top - 1, -1, last, neurons, offset, mask)
    for back in range(0, steps, STEPS):
        spikes = tl.zeros([BLOCK], tl.int32)
        if RESET == AT_ONCE:
            plane = (top - back) // STEPS
            spikes = tl.load(bits_ptr + plane * neurons + offset, mask, 0).to(tl.int32)
        for part in tl.static_range(STEPS // AHEAD):
            t = top - back - part * AHEAD
            rewards = (ra, rb)
            befores = (ua, ub)
            following = t - AHEAD
            ra, rb = two_rows(reward_ptr, following, -1, steps, neurons, offset, mask)
            ua, ub = two_rows(membrane_ptr, following - 1, -1, last, neurons, offset, mask)
            for s in tl.static_range(AHEAD):
                before = befores[s].to(beta.dtype)
                if part * AHEAD + s == STEPS - 1:
                    before = tl.where(t == s, first, before)  # there is no membrane before step 0
                u, carry, total, beta_sum, threshold_sum = backward_step(
                    u, carry, total, beta_sum, threshold_sum, rewards[s], before,
                    (spikes >> (STEPS - 1 - part * AHEAD - s)) & 1 != 0, t - s, steps, beta,
                    threshold, eps, minus_zero, signal_ptr, neurons, offset, mask, RESET, STATIC,
                    AS_REWARD, PARAMETERS,
                )  # fmt: skip
    store(carried_ptr + offset, carry, mask)
    if STATIC:
        store(signal_ptr + offset, total, mask)
    if PARAMETERS:
        store(beta_sum_ptr + offset, beta_sum, mask)
        store(threshold_sum_ptr + offset, threshold_sum, mask)


# ---- packed spikes and noise


@triton.jit
def on_circle(u):
    """(cos, sin) of u turns, 0 <= u < 1: the quadrant exactly, then Taylor's series within an
    eighth of a turn. The library's functions bring local memory for large arguments."""
    quadrant = (4 * u + 0.5).to(tl.int32)
    x = (4 * u - quadrant.to(u.dtype)) * 1.5707963267948966
    square = x * x
    c = tl.zeros_like(x) + 1
    s = tl.zeros_like(x) + 1
    for k in tl.static_range(8, 0, -1):
        c = 1 - c * square * (1 / ((2 * k - 1) * (2 * k)))
        s = 1 - s * square * (1 / (2 * k * (2 * k + 1)))
    s *= x
    swap = (quadrant & 1) != 0
    cosine, sine = tl.where(swap, s, c), tl.where(swap, c, s)
    cosine = tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine)
    return cosine, tl.where((quadrant & 2) != 0, -sine, sine)


@triton.jit
def unit_interval(word, dtype: tl.constexpr):
    """The upper 24 bits in [0, 1)."""
    return (word >> 8).to(tl.int32).to(dtype) * 5.9604644775390625e-08


@triton.jit
def normal_pair(first, second, dtype: tl.constexpr):
    """Two draws of N(0, 1) by Box-Muller, the first word in (0, 1] for a finite logarithm."""
    u1 = unit_interval(first, dtype) + 5.9604644775390625e-08
    radius = square_root(-2 * tl.log(u1))
    cosine, sine = on_circle(unit_interval(second, dtype))
    return radius * cosine, radius * sine


@triton.jit
def words_of(block, seed):
    zero = tl.zeros_like(block).to(tl.uint32)
    low, high = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
    return tl.philox(seed, low, high, zero, zero)


@triton.jit
def normal(first, seed, dtype: tl.constexpr, FOURS: tl.constexpr, BLOCK: tl.constexpr):
    """N(0, 1) of the elements first ... first + BLOCK - 1: normal() of csrc/neuron.h. FOURS: first
    is a multiple of 4, so a Philox block serves four elements."""
    if FOURS:
        a, b, c, d = words_of((first >> 2) + tl.arange(0, BLOCK // 4), seed)
        n0, n1 = normal_pair(a, b, dtype)
        n2, n3 = normal_pair(c, d, dtype)
        return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))
    else:
        index = first + tl.arange(0, BLOCK)
        a, b, c, d = words_of(index >> 2, seed)
        upper = (index & 2) != 0
        even, odd = normal_pair(tl.where(upper, c, a), tl.where(upper, d, b), dtype)
        return tl.where((index & 1) == 0, even, odd)


@triton.jit(do_not_specialize=["steps", "planes", "blocks", "first", "seed"])
def over_steps_kernel(
    from_ptr, y_ptr, neurons, steps, planes, blocks, noise: tl.float64, first, seed,
    SPIKES: tl.constexpr, NOISY: tl.constexpr, FOURS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y[t, m] = spike (SPIKES) or x[m], plus noise, for ``planes`` planes of steps; a row of
    programs has ``blocks`` of them. ``first``: index of the first element of y."""
    acc: tl.constexpr = accumulate_type(y_ptr.dtype.element_ty)
    program = tl.program_id(0)
    start = (program % blocks).to(tl.int64) * BLOCK
    offset = start + tl.arange(0, BLOCK)
    mask = offset < neurons
    begin = (program // blocks).to(tl.int64) * planes
    if not SPIKES:
        values = load(from_ptr + offset, mask)
    for plane in range(begin, min(begin + planes, (steps + STEPS - 1) // STEPS)):
        if SPIKES:
            word = tl.load(from_ptr + plane * neurons + offset, mask, 0).to(tl.int32)
        for s in range(STEPS):
            t = plane * STEPS + s
            if SPIKES:
                values = ((word >> s) & 1).to(acc)
            out = values
            if NOISY:
                draws = normal(first + t * neurons + start, seed, acc, FOURS, BLOCK)
                out = values + noise.to(acc) * draws
            store(y_ptr + t * neurons + offset, out, mask & (t < steps))


@triton.jit(do_not_specialize=["first", "seed"])
def copy_kernel(
    x_ptr, y_ptr, count, noise: tl.float64, first, seed, NOISY: tl.constexpr, FOURS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """y = x plus noise, all steps in one row."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offset = start + tl.arange(0, BLOCK)
    mask = offset < count
    value = load(x_ptr + offset, mask)
    if NOISY:
        value += noise.to(value.dtype) * normal(first + start, seed, value.dtype, FOURS, BLOCK)
    store(y_ptr + offset, value, mask)
