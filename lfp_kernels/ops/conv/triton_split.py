"""Rules with two signals on convolutions in Triton; the equations are those of _triton_split.py,
the products those of triton_kernels.py. u and v [N, O, ...] are all that is stored in between.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...optim import Update
from ...rules import RuleCall, Signals, accumulate_dtype
from .._triton import (
    FEEDBACK,
    NO_HYPER,
    accumulate_type,
    arranged_like,
    below_code,
    launch,
    load,
    states_of,
)
from .._triton_product import GROUP, Tiles, tile_of, tiles
from .._triton_split import (
    PLUS,
    VALUE,
    add_compensated,
    add_product,
    finish_reward,
    finish_signals,
    finish_split_weight,
    has_second_part,
    input_parts,
    split_bias,
    split_mode,
    split_options,
    weight_parts,
)
from .._triton_volume import axes, strides
from .geometry import ConvGeometry
from .layout import empty, strided_channels_last
from .triton_kernels import GEOMETRY, along, positions_of, taps_of
from .triton_launch import is_long, window, with_warps


@triton.jit
def load_pair(
    first_ptr, second_ptr, offset, inside, a, b, SIDES: tl.constexpr, RULE: tl.constexpr
):  # fmt: skip
    """u, v (SIDES), the second one where the rule has it, or x_a, x_b"""
    first = load(first_ptr + offset, inside)
    if SIDES:
        if ((RULE >> 16) & 15) == PLUS:
            return first, first
        else:
            return first, load(second_ptr + offset, inside)
    else:
        return input_parts(first, inside, a, b, RULE)


@triton.jit
def _add(
    source, w, total, rest, TO_INPUT: tl.constexpr, LAST: tl.constexpr, MODE: tl.constexpr
):  # fmt: skip
    """(sum, rest) with a product [positions, outputs] for LAST, else its transpose"""
    first = source if LAST else w
    second = w if LAST else source
    if TO_INPUT:
        return add_product(first, second, total, MODE), rest
    else:
        return add_compensated(first, second, total, rest, MODE)


@triton.jit(do_not_specialize=[
    *GEOMETRY, "rows", "src_n", "src_d", "src_h", "out_n", "o_d", "o_h",
])  # fmt: skip
def split_product_kernel(
    first_ptr, second_ptr, w_ptr, bias_ptr, r_ptr, z_ptr, x_ptr, out_ptr, v_ptr, rows, inputs,
    outputs, w_in, w_out, w_group, out_d, out_h, out_w, in_d, in_h, in_w, k_d, k_h, k_w, step_d,
    step_h, step_w, pad_d, pad_h, pad_w, far_d, far_h, far_w, src_n, src_c, src_d, src_h, src_w,
    out_n, out_c, o_d, o_h, o_w, eps: tl.float64, a: tl.float64, b: tl.float64,
    SCATTER: tl.constexpr, TO_INPUT: tl.constexpr, BELOW: tl.constexpr, BIAS: tl.constexpr,
    RULE: tl.constexpr, SECOND: tl.constexpr, LAST: tl.constexpr, FLAT: tl.constexpr,
    LONG: tl.constexpr, MODE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """gather or scatter of the pair at ``first`` and ``second`` to out[positions, outputs]: from x
    to u, v or, TO_INPUT, from u, v to the input reward.

    SECOND: whether x_b is anything but 0. Everything of the target lies as ``out`` does; for the
    rest see product_kernel.
    """
    acc: tl.constexpr = accumulate_type(w_ptr.dtype.element_ty)
    TWO: tl.constexpr = ((RULE >> 16) & 15) != PLUS  # v is anything but 0
    LEFT: tl.constexpr = TWO if TO_INPUT else SECOND  # as is the second factor of the source
    RIGHT: tl.constexpr = ((RULE >> 24) & 15) == VALUE  # as is Wn
    CROSSED: tl.constexpr = SECOND if TO_INPUT else TWO  # the second sum is wanted
    P: tl.constexpr = 0 if LAST else 1  # axis of the positions in the tile
    O: tl.constexpr = 1 - P
    a, b = a.to(acc), b.to(acc)
    _, m, n = tile_of(tl.program_id(0), tl.cdiv(rows, M), tl.cdiv(outputs, N), GROUP)
    group = tl.program_id(1).to(tl.int64)
    row = m * M + tl.arange(0, M)
    batch, p_d, p_h, p_w = positions_of(row, out_d, out_h, out_w, LONG)
    row, batch = along(row, P), along(batch, P)
    p_d, p_h, p_w = along(p_d, P), along(p_h, P), along(p_w, P)
    output = along(n * N + tl.arange(0, N), O)
    w_at = w_ptr + group * w_group + output * w_out
    taps = k_d * k_h * k_w
    chunks = tl.cdiv(inputs, K)
    steps = tl.cdiv(inputs * taps, K) if FLAT else chunks * taps
    straight = tl.zeros([M, N] if LAST else [N, M], acc)
    crossed = tl.zeros([M, N] if LAST else [N, M], acc)
    s_rest, c_rest = tl.zeros_like(straight), tl.zeros_like(crossed)
    for step in range(0, steps):
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
        at = batch * src_n + offset + (group * inputs + along(channel, O)) * src_c
        one, two = load_pair(first_ptr, second_ptr, at, mask, a, b, TO_INPUT, RULE)
        w_mask = along(k_inside, P) & (output < outputs)
        w = load(w_at + along(channel, P) * w_in + w_tap, w_mask)
        w_p, w_n = weight_parts(w, w_mask, RULE)
        straight, s_rest = _add(one, w_p, straight, s_rest, TO_INPUT, LAST, MODE)
        if LEFT and RIGHT:
            straight, s_rest = _add(two, w_n, straight, s_rest, TO_INPUT, LAST, MODE)
        if CROSSED and RIGHT:
            crossed, c_rest = _add(one, w_n, crossed, c_rest, TO_INPUT, LAST, MODE)
        if CROSSED and LEFT:
            crossed, c_rest = _add(two, w_p, crossed, c_rest, TO_INPUT, LAST, MODE)
    inside = (row < rows) & (output < outputs)
    offset = batch * out_n + p_d.to(tl.int64) * o_d + p_h.to(tl.int64) * o_h
    offset += p_w.to(tl.int64) * o_w + (group * outputs + output) * out_c
    if TO_INPUT:
        finish_reward(straight, crossed, x_ptr, out_ptr, offset, inside, a, b, RULE, BELOW, SECOND)
    else:
        finish_signals(
            straight, crossed, bias_ptr + group * outputs + output, output < outputs, r_ptr, z_ptr,
            out_ptr, v_ptr, offset, inside, a, b, eps.to(acc), RULE, BIAS,
        )  # fmt: skip


@triton.jit(do_not_specialize=[
    *GEOMETRY, "positions", "small_n", "small_d", "small_h", "large_n", "large_d", "large_h",
])  # fmt: skip
def split_weight_kernel(
    small_ptr, small2_ptr, large_ptr, large2_ptr, w_ptr, out_ptr, a_ptr, b_ptr, positions, outputs,
    inputs, out_d, out_h, out_w, in_d, in_h, in_w, k_d, k_h, k_w, step_d, step_h, step_w, pad_d,
    pad_h, pad_w, far_d, far_h, far_w, small_n, small_c, small_d, small_h, small_w, large_n,
    large_c, large_d, large_h, large_w, a: tl.float64, b: tl.float64, lr: tl.float64,
    decay: tl.float64, scale: tl.float64, momentum: tl.float64, nesterov: tl.float64,
    beta1: tl.float64, beta2: tl.float64, adam_eps: tl.float64, correction1: tl.float64,
    correction2: tl.float64, rest1: tl.float64, rest2: tl.float64, SIGNAL: tl.constexpr,
    RULE: tl.constexpr, OPTIMIZER: tl.constexpr, SECOND: tl.constexpr, LAST: tl.constexpr,
    LONG: tl.constexpr, MODE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """f1, f2 [outputs, (inputs, taps)] of each group over all positions of the batch, their
    feedback, and what OPTIMIZER makes of it. SIGNAL: which side u, v are. See weight_kernel."""
    acc: tl.constexpr = accumulate_type(w_ptr.dtype.element_ty)
    TWO: tl.constexpr = ((RULE >> 16) & 15) != PLUS
    SMALL: tl.constexpr = TWO if SIGNAL == "small" else SECOND  # the second factors are not 0
    LARGE: tl.constexpr = SECOND if SIGNAL == "small" else TWO
    SIGNED: tl.constexpr = ((RULE >> 24) & 15) == VALUE  # as is Wn
    a, b = a.to(acc), b.to(acc)
    taps = k_d * k_h * k_w
    columns = inputs * taps
    group = tl.program_id(1).to(tl.int64)
    _, m, n = tile_of(tl.program_id(0), tl.cdiv(outputs, M), tl.cdiv(columns, N), GROUP)
    output = m * M + tl.arange(0, M)
    column = n * N + tl.arange(0, N)
    channel = column % inputs if LAST else column // taps
    tap = column // inputs if LAST else column % taps
    Q: tl.constexpr = 0 if LAST else 1  # axis of the positions
    C: tl.constexpr = 1 - Q
    small_channel = along(group * outputs + output, C) * small_c
    large_channel = along(group * inputs + channel, C) * large_c
    tap_along = along(tap.to(tl.int32), C)
    f1, f2 = tl.zeros([M, N], acc), tl.zeros([M, N], acc)
    for first in range(0, positions, K):
        q = tl.cast(first, tl.int64) + tl.arange(0, K)
        batch, p_d, p_h, p_w = positions_of(q, out_d, out_h, out_w, LONG)
        q, batch = along(q, Q), along(batch, Q)
        p_d, p_h, p_w = along(p_d, Q), along(p_h, Q), along(p_w, Q)
        at = batch * small_n + p_d.to(tl.int64) * small_d + p_h.to(tl.int64) * small_h
        at += p_w.to(tl.int64) * small_w + small_channel
        small, small2 = load_pair(
            small_ptr, small2_ptr, at, (q < positions) & (along(output, C) < outputs), a, b,
            SIGNAL == "small", RULE,
        )  # fmt: skip
        at, inside = taps_of(
            tap_along, p_d, p_h, p_w, in_d, in_h, in_w, k_h, k_w, step_d, step_h, step_w, pad_d,
            pad_h, pad_w, far_d, far_h, far_w, large_d, large_h, large_w, False, LONG,
        )  # fmt: skip
        large, large2 = load_pair(
            large_ptr, large2_ptr, at + batch * large_n + large_channel,
            inside & (q < positions) & (along(column, C) < columns), a, b, SIGNAL != "small", RULE,
        )  # fmt: skip
        if LAST:
            small, small2 = tl.trans(small), tl.trans(small2)
        else:
            large, large2 = tl.trans(large), tl.trans(large2)
        f1 = add_product(small, large, f1, MODE)
        if SMALL and LARGE:
            f1 = add_product(small2, large2, f1, MODE)
        if SIGNED and LARGE:
            f2 = add_product(small, large2, f2, MODE)
        if SIGNED and SMALL:
            f2 = add_product(small2, large, f2, MODE)
    inside = (output[:, None] < outputs) & (column[None, :] < columns)
    place = channel * taps + tap if LAST else column
    offset = (group * outputs + output)[:, None] * columns + place[None, :]
    hyper = (
        lr, decay, scale, momentum, nesterov, beta1, beta2, adam_eps, correction1, correction2,
        rest1, rest2,
    )  # fmt: skip
    finish_split_weight(
        f1, f2, w_ptr, out_ptr, a_ptr, b_ptr, offset, inside, hyper, RULE, OPTIMIZER
    )


def _tiles(m: int, n: int, k: int, mode: str, groups: int, thin: bool = False) -> Tiles:
    """Two sums a tile, so no more than half of what a plain product has; k is in one part."""
    tile = tiles(m, n, k, mode, groups, thin, heavy=True)
    tile = tile._replace(m=min(tile.m, 128 if thin else 32), n=min(tile.n, 32), splits=1)
    # Sums that divide the reward keep what was rounded away, too: four warps would spill some.
    return tile._replace(warps=8) if tile.m * tile.n >= 32 * 32 else tile


def _product(
    pair: tuple[Tensor, Tensor], weight: Tensor, out: Tensor, geometry: ConvGeometry,
    scatter: bool, call: RuleCall, last: bool, meta: dict[str, Any], *,
    bias: Tensor | None = None, reward: Tensor | None = None, z: Tensor | None = None,
    x: Tensor | None = None, v: Tensor | None = None,
) -> None:  # fmt: skip
    """``out`` = a gather or scatter of ``pair``; the rest lies like ``out``, None: is not read."""
    rule, groups, taps = call.rule, geometry.groups, weight.shape[2:].numel()
    first, second = weight.shape[0] // groups, weight.shape[1]
    inputs, outputs = (first, second) if scatter else (second, first)
    w_strides = (second * taps, taps) if scatter else (taps, second * taps)
    rows = out.shape[0] * out.shape[2:].numel()
    thin = inputs <= 4 and outputs <= 4  # depthwise: a tensor core would multiply zeros
    flat = inputs < 16 or thin or meta["MODE"] == "fp64"
    tile = _tiles(rows, outputs, inputs, meta["MODE"], groups, thin)
    tile = with_warps(tile, 2 * tile.m * tile.k)
    src = pair[0]
    given = (weight if bias is None else bias, reward, z, x, out, v)
    launch(
        split_product_kernel, tile.programs(rows, outputs), out, *pair, weight,
        *(out if t is None else t for t in given), rows, inputs, outputs, *w_strides,
        weight.numel() // groups, *axes(out.shape[2:]), *axes(src.shape[2:]),
        *window(weight, geometry), *strides(src), *strides(out), rule.stabilizer, rule.first,
        rule.second, SCATTER=scatter, TO_INPUT=x is not None, BELOW=below_code(call.below),
        BIAS=bias is not None, LAST=last, FLAT=flat, LONG=is_long(out, src), groups=groups,
        **meta, **split_options(tile),
    )  # fmt: skip


def redistribute_split(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    reward: Tensor,
    geometry: ConvGeometry,
    call: RuleCall,
    need: tuple[bool, bool, bool],
    weight_update: Update | None = None,
    bias_update: Update | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Input reward and feedback; with updates, weight and bias move in place instead.

    Args:
        need: as in the functional form. weight: contiguous where it is updated, as is bias.
    """
    rule, acc = call.rule, accumulate_dtype(x.dtype)
    last = strided_channels_last(x) or strided_channels_last(reward)
    weight = weight.contiguous()
    u = empty(x.new_empty(0, dtype=acc), reward.shape, last)
    v = u if rule.signals_code == Signals.PLUS else torch.empty_like(u)
    reward = arranged_like(u, reward)
    z = arranged_like(u, z) if rule.signals_code == Signals.GAMMA else reward
    meta: dict[str, Any] = {
        "RULE": rule.code, "SECOND": has_second_part(call), "MODE": split_mode(x)
    }  # fmt: skip
    if u.numel():
        added = None if bias is None else bias.contiguous()
        _product(
            (x, x), weight, u, geometry, geometry.transposed, call, last, meta, bias=added,
            reward=reward, z=z, v=v,
        )  # fmt: skip
    input_reward = weight_feedback = bias_feedback = None
    if need[0]:
        input_reward = empty(x, x.shape, last)
        if x.numel():
            like = arranged_like(input_reward, x)
            scatter = not geometry.transposed
            _product((u, v), weight, input_reward, geometry, scatter, call, last, meta, x=like)
    if need[1]:
        if weight_update is None:
            weight_feedback = weight.new_empty(weight.shape)
        if weight.numel():
            _weight(x, weight, u, v, geometry, call, last, weight_update, weight_feedback, meta)
    if need[2] and bias is not None:
        bias_feedback = split_bias(u, None if v is u else v, bias, rule, bias_update)
    return input_reward, weight_feedback, bias_feedback


def _weight(
    x: Tensor, weight: Tensor, u: Tensor, v: Tensor, geometry: ConvGeometry, call: RuleCall,
    last: bool, update: Update | None, out: Tensor | None, meta: dict[str, Any],
) -> None:  # fmt: skip
    groups, taps = geometry.groups, weight.shape[2:].numel()
    small, large = (x, u) if geometry.transposed else (u, x)
    second_small, second_large = (x, v) if geometry.transposed else (v, x)
    outputs, inputs = weight.shape[0] // groups, weight.shape[1]
    positions = small.shape[0] * small.shape[2:].numel()
    tile = _tiles(outputs, inputs * taps, positions, meta["MODE"], groups)
    tile = with_warps(tile, 2 * (tile.m + tile.n) * tile.k)
    launch(
        split_weight_kernel, tile.programs(outputs, inputs * taps), x, small, second_small, large,
        second_large, weight, weight if out is None else out, *states_of(update, weight), positions,
        outputs, inputs, *axes(small.shape[2:]), *axes(large.shape[2:]), *window(weight, geometry),
        *strides(small), *strides(large), call.rule.first, call.rule.second,
        *(NO_HYPER if update is None else update.hyper),
        SIGNAL="large" if geometry.transposed else "small",
        OPTIMIZER=FEEDBACK.value if update is None else update.code, LAST=last,
        LONG=is_long(small, large), groups=groups, **meta, **split_options(tile),
    )  # fmt: skip
