"""Rules with two signals on the linear layer in Triton; the equations are those of
_triton_split.py. Shapes: x [N, I], weight [O, I], u, v [N, O].
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


@triton.jit
def signals_kernel(
    x_ptr, w_ptr, bias_ptr, r_ptr, z_ptr, u_ptr, v_ptr, rows, inputs, outputs, eps: tl.float64,
    a: tl.float64, b: tl.float64, RULE: tl.constexpr, BIAS: tl.constexpr, SECOND: tl.constexpr,
    MODE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """u, v [rows, outputs]; SECOND: whether x_b is anything but 0"""
    acc: tl.constexpr = accumulate_type(x_ptr.dtype.element_ty)
    KIND: tl.constexpr = (RULE >> 16) & 15
    _, m, n = tile_of(tl.program_id(0), tl.cdiv(rows, M), tl.cdiv(outputs, N), GROUP)
    a, b, eps = a.to(acc), b.to(acc), eps.to(acc)
    row, output = m * M + tl.arange(0, M)[:, None], n * N + tl.arange(0, N)[:, None]
    positive, negative = tl.zeros([M, N], acc), tl.zeros([M, N], acc)
    p_rest, n_rest = tl.zeros([M, N], acc), tl.zeros([M, N], acc)
    for first in range(0, inputs, K):
        k = first + tl.arange(0, K)[None, :]
        x_mask, w_mask = (row < rows) & (k < inputs), (output < outputs) & (k < inputs)
        x_a, x_b = input_parts(load(x_ptr + row * inputs + k, x_mask), x_mask, a, b, RULE)
        w_p, w_n = weight_parts(load(w_ptr + output * inputs + k, w_mask), w_mask, RULE)
        positive, p_rest = add_compensated(x_a, tl.trans(w_p), positive, p_rest, MODE)
        if SECOND:
            positive, p_rest = add_compensated(x_b, tl.trans(w_n), positive, p_rest, MODE)
        if KIND != PLUS:
            negative, n_rest = add_compensated(x_a, tl.trans(w_n), negative, n_rest, MODE)
            if SECOND:
                negative, n_rest = add_compensated(x_b, tl.trans(w_p), negative, n_rest, MODE)
    output = n * N + tl.arange(0, N)[None, :]
    inside, offset = (row < rows) & (output < outputs), row * outputs + output
    finish_signals(
        positive, negative, bias_ptr + output, output < outputs, r_ptr, z_ptr, u_ptr, v_ptr, offset,
        inside, a, b, eps, RULE, BIAS,
    )  # fmt: skip


@triton.jit
def split_input_kernel(
    x_ptr, w_ptr, u_ptr, v_ptr, out_ptr, rows, inputs, outputs, a: tl.float64, b: tl.float64,
    RULE: tl.constexpr, BELOW: tl.constexpr, SECOND: tl.constexpr, MODE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """out[rows, inputs] = x_a g1 + x_b g2, times the derivative of the activation below"""
    acc: tl.constexpr = accumulate_type(x_ptr.dtype.element_ty)
    KIND: tl.constexpr = (RULE >> 16) & 15
    _, m, n = tile_of(tl.program_id(0), tl.cdiv(rows, M), tl.cdiv(inputs, N), GROUP)
    row, column = m * M + tl.arange(0, M)[:, None], n * N + tl.arange(0, N)[None, :]
    g1, g2 = tl.zeros([M, N], acc), tl.zeros([M, N], acc)
    for first in range(0, outputs, K):
        k = first + tl.arange(0, K)
        s_at, s_mask = row * outputs + k[None, :], (row < rows) & (k[None, :] < outputs)
        w_at = tl.cast(k[:, None], tl.int64) * inputs + column
        w_mask = (k[:, None] < outputs) & (column < inputs)
        w_p, w_n = weight_parts(load(w_ptr + w_at, w_mask), w_mask, RULE)
        u = load(u_ptr + s_at, s_mask)
        g1 = add_product(u, w_p, g1, MODE)
        if SECOND:
            g2 = add_product(u, w_n, g2, MODE)
        if KIND != PLUS:
            v = load(v_ptr + s_at, s_mask)
            g1 = add_product(v, w_n, g1, MODE)
            if SECOND:
                g2 = add_product(v, w_p, g2, MODE)
    inside, offset = (row < rows) & (column < inputs), row * inputs + column
    finish_reward(g1, g2, x_ptr, out_ptr, offset, inside, a.to(acc), b.to(acc), RULE, BELOW, SECOND)


@triton.jit
def split_weight_kernel(
    x_ptr, w_ptr, u_ptr, v_ptr, out_ptr, a_ptr, b_ptr, rows, inputs, outputs, a: tl.float64,
    b: tl.float64, lr: tl.float64, decay: tl.float64, scale: tl.float64, momentum: tl.float64,
    nesterov: tl.float64, beta1: tl.float64, beta2: tl.float64, adam_eps: tl.float64,
    correction1: tl.float64, correction2: tl.float64, rest1: tl.float64, rest2: tl.float64,
    RULE: tl.constexpr, OPTIMIZER: tl.constexpr, SECOND: tl.constexpr, MODE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """sign(w) (Wp f1 + Wn f2) [outputs, inputs], and what OPTIMIZER makes of it"""
    acc: tl.constexpr = accumulate_type(x_ptr.dtype.element_ty)
    KIND: tl.constexpr = (RULE >> 16) & 15
    SIGNED: tl.constexpr = ((RULE >> 24) & 15) == VALUE  # Wn is anything but 0
    _, m, n = tile_of(tl.program_id(0), tl.cdiv(outputs, M), tl.cdiv(inputs, N), GROUP)
    output, column = m * M + tl.arange(0, M), n * N + tl.arange(0, N)[None, :]
    a, b = a.to(acc), b.to(acc)
    f1, f2 = tl.zeros([M, N], acc), tl.zeros([M, N], acc)
    for first in range(0, rows, K):
        row = tl.cast(first, tl.int64) + tl.arange(0, K)[:, None]
        s_at, s_mask = row * outputs + output[None, :], (row < rows) & (output[None, :] < outputs)
        x_mask = (row < rows) & (column < inputs)
        x_a, x_b = input_parts(load(x_ptr + row * inputs + column, x_mask), x_mask, a, b, RULE)
        u = tl.trans(load(u_ptr + s_at, s_mask))
        f1 = add_product(u, x_a, f1, MODE)
        if SECOND and SIGNED:
            f2 = add_product(u, x_b, f2, MODE)
        if KIND != PLUS:
            v = tl.trans(load(v_ptr + s_at, s_mask))
            if SIGNED:
                f2 = add_product(v, x_a, f2, MODE)
            if SECOND:
                f1 = add_product(v, x_b, f1, MODE)
    inside = (output[:, None] < outputs) & (column < inputs)
    offset = output[:, None] * inputs + column
    hyper = (
        lr, decay, scale, momentum, nesterov, beta1, beta2, adam_eps, correction1, correction2,
        rest1, rest2,
    )  # fmt: skip
    finish_split_weight(
        f1, f2, w_ptr, out_ptr, a_ptr, b_ptr, offset, inside, hyper, RULE, OPTIMIZER
    )


def _tiles(m: int, n: int, k: int, mode: str) -> Tiles:
    """Two sums a tile, so no more than half of what a plain product has; k is in one part."""
    tile = tiles(m, n, k, mode, heavy=True)
    least = min(tile.m, 32)
    warps = 8 if least * tile.n >= 2048 else 4 if least * tile.n > 256 else 1
    return tile._replace(m=least, splits=1, warps=warps)


def redistribute_split(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    reward: Tensor,
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
    (rows, inputs), outputs = x.shape, weight.shape[0]
    x, weight, z, reward = (t.contiguous() for t in (x, weight, z, reward))
    bias = None if bias is None else bias.contiguous()
    meta: dict[str, Any] = {
        "RULE": rule.code, "SECOND": has_second_part(call), "MODE": split_mode(x)
    }  # fmt: skip
    u = x.new_empty((rows, outputs), dtype=acc)
    v = u if rule.signals_code == Signals.PLUS else torch.empty_like(u)
    a, b = rule.first, rule.second
    if u.numel():
        tile = _tiles(rows, outputs, inputs, meta["MODE"])
        if torch.version.hip:  # whose warps have 64 threads, of 512 registers where there are four
            tile = tile._replace(warps=min(tile.warps, 4))
        launch(
            signals_kernel, tile.programs(rows, outputs), x, x, weight, x if bias is None else bias,
            reward, z, u, v, rows, inputs, outputs, rule.stabilizer, a, b, BIAS=bias is not None,
            **meta, **split_options(tile),
        )  # fmt: skip
    input_reward = weight_feedback = bias_feedback = None
    if need[0]:
        input_reward = x.new_empty(x.shape)
        if x.numel():
            tile = _tiles(rows, inputs, outputs, meta["MODE"])
            launch(
                split_input_kernel, tile.programs(rows, inputs), x, x, weight, u, v, input_reward,
                rows, inputs, outputs, a, b, BELOW=below_code(call.below), **meta,
                **split_options(tile),
            )  # fmt: skip
    if need[1]:
        if weight_update is None:
            weight_feedback = weight.new_empty(weight.shape)
        target = weight if weight_feedback is None else weight_feedback
        if weight.numel():
            tile = _tiles(outputs, inputs, rows, meta["MODE"])
            launch(
                split_weight_kernel, tile.programs(outputs, inputs), x, x, weight, u, v, target,
                *states_of(weight_update, weight), rows, inputs, outputs, a, b,
                *(NO_HYPER if weight_update is None else weight_update.hyper),
                OPTIMIZER=FEEDBACK.value if weight_update is None else weight_update.code,
                **meta, **split_options(tile),
            )  # fmt: skip
    if need[2] and bias is not None:
        bias_feedback = split_bias(u, None if v is u else v, bias, rule, bias_update)
    return input_reward, weight_feedback, bias_feedback
