"""The Triton kernels of the linear layer. Shapes: x [N, I], weight [O, I], z and reward [N, O].

  z        = x W^T + b
  r_in     = input_epilogue(s W, x)         s = prologue(r, z), made by the loader, never stored
  feedback = weight_epilogue(s^T x, W)      bias: weight_epilogue(sum_n s, b), the same pass
The update form applies feedback to W in the epilogue of its tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton import (
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
def forward_kernel(
    x_ptr, w_ptr, bias_ptr, z_ptr, rows, inputs, outputs, part, x_row, x_column, w_row, w_column,
    BIAS: tl.constexpr, RELU: tl.constexpr, SPLIT: tl.constexpr, MODE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """z[rows, outputs] = x w^T + bias; with SPLIT x w^T over ``part`` of the inputs"""
    acc: tl.constexpr = accumulate_type(x_ptr.dtype.element_ty)
    split, m, n = tile_of(tl.program_id(0), tl.cdiv(rows, M), tl.cdiv(outputs, N), GROUP)
    row = m * M + tl.arange(0, M)[:, None]
    output = n * N + tl.arange(0, N)[:, None]
    k = tl.arange(0, K)[None, :]
    start, end = split * part, tl.minimum((split + 1) * part, inputs)
    x_at = x_ptr + row * x_row + (start + k) * x_column
    w_at = w_ptr + output * w_row + (start + k) * w_column
    x_step, w_step = K * tl.cast(x_column, tl.int64), K * tl.cast(w_column, tl.int64)
    total = tl.zeros([M, N], acc)
    for first in range(start, end, K):
        inside = k < end - first
        x = tl.load(x_at, mask=(row < rows) & inside, other=0.0)
        w = tl.load(w_at, mask=(output < outputs) & inside, other=0.0)
        total = product(x, tl.trans(w), total, MODE)
        x_at += x_step
        w_at += w_step
    output = n * N + tl.arange(0, N)[None, :]
    if BIAS:
        total += load(bias_ptr + output, output < outputs)
    if RELU:
        total = tl.where(total < 0, 0.0, total)  # NaN passes
    offset = row * outputs + output
    if SPLIT:
        offset += split * rows * outputs
    store(z_ptr + offset, total, (row < rows) & (output < outputs))


@triton.jit(do_not_specialize=["seed"])
def input_kernel(
    x_ptr, w_ptr, given_ptr, r_ptr, z_ptr, out_ptr, rows, inputs, outputs, part, seed, x_row,
    x_column, w_row, w_column, r_row, r_column, z_row, z_column, eps: tl.float64,
    below: tl.float64, a: tl.float64, PROLOGUE: tl.constexpr, RULE: tl.constexpr,
    SIGNAL_OUT: tl.constexpr, SPLIT: tl.constexpr, MODE: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """out[rows, inputs] = input_epilogue(s w, x); with SPLIT s w over ``part`` of the outputs"""
    acc: tl.constexpr = accumulate_type(x_ptr.dtype.element_ty)
    split, m, n = tile_of(tl.program_id(0), tl.cdiv(rows, M), tl.cdiv(inputs, N), GROUP)
    row = m * M + tl.arange(0, M)[:, None]
    column = n * N + tl.arange(0, N)[None, :]
    k = tl.arange(0, K)
    start, end = split * part, tl.minimum((split + 1) * part, outputs)
    r_at = r_ptr + row * r_row + (start + k)[None, :] * r_column
    z_at = z_ptr + row * z_row + (start + k)[None, :] * z_column
    w_at = w_ptr + (start + k)[:, None] * w_row + column * w_column
    r_step, z_step = K * tl.cast(r_column, tl.int64), K * tl.cast(z_column, tl.int64)
    w_step = K * tl.cast(w_row, tl.int64)
    total = tl.zeros([M, N], acc)
    for first in range(start, end, K):
        s = load_signal(r_at, z_at, (row < rows) & (k[None, :] < end - first), eps, PROLOGUE)
        w_mask = (k[:, None] < end - first) & (column < inputs)
        w = tl.load(w_at, mask=w_mask, other=0.0)
        if ((RULE >> 4) & 15) != WEIGHT:  # B lies like W, both contiguous
            index = tl.cast(first + k, tl.int64)[:, None] * inputs + column
            w = made_matrix(w, given_ptr + index, w_mask, index, a, seed, RULE)
        total = product(s, w, total, MODE)
        r_at += r_step
        z_at += z_step
        w_at += w_step
    inside = (row < rows) & (column < inputs)
    offset = row * inputs + column
    if SPLIT:
        store(out_ptr + split * rows * inputs + offset, total, inside)
        return
    x = load(x_ptr + row * x_row + column * x_column, inside)
    result = input_epilogue(total, x, below.to(acc), RULE, SIGNAL_OUT)
    store(out_ptr + offset, result, inside)


@triton.jit
def weight_kernel(
    x_ptr, w_ptr, r_ptr, z_ptr, out_ptr, a_ptr, b_ptr, bias_sums_ptr, rows, inputs, outputs, part,
    x_row, x_column, r_row, r_column, z_row, z_column, eps: tl.float64,
    lr: tl.float64, decay: tl.float64, scale: tl.float64, momentum: tl.float64,
    nesterov: tl.float64, beta1: tl.float64, beta2: tl.float64, adam_eps: tl.float64,
    correction1: tl.float64, correction2: tl.float64, rest1: tl.float64, rest2: tl.float64,
    PROLOGUE: tl.constexpr, RULE: tl.constexpr, OPTIMIZER: tl.constexpr, BIAS: tl.constexpr,
    MODE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """s^T x [outputs, inputs] over ``part`` of the rows, and what OPTIMIZER makes of it.

    The programs of the first columns add up s for the bias.
    """
    acc: tl.constexpr = accumulate_type(x_ptr.dtype.element_ty)
    tiles_m, tiles_n = tl.cdiv(outputs, M), tl.maximum(tl.cdiv(inputs, N), 1)
    split, m, n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP)
    output = m * M + tl.arange(0, M)
    column = n * N + tl.arange(0, N)[None, :]
    row = split * part + tl.arange(0, K)[:, None]
    r_at = r_ptr + row * r_row + output[None, :] * r_column
    z_at = z_ptr + row * z_row + output[None, :] * z_column
    x_at = x_ptr + row * x_row + column * x_column
    r_step, z_step = K * tl.cast(r_row, tl.int64), K * tl.cast(z_row, tl.int64)
    x_step = K * tl.cast(x_row, tl.int64)
    total = tl.zeros([M, N], acc)
    sums = tl.zeros([K, M], acc)
    end = tl.minimum((split + 1) * part, rows)
    for first in range(split * part, end, K):
        inside = tl.arange(0, K)[:, None] < end - first
        s = load_signal(r_at, z_at, inside & (output[None, :] < outputs), eps, PROLOGUE)
        x = tl.load(x_at, mask=inside & (column < inputs), other=0.0)
        total = product(tl.trans(s), x, total, MODE)
        if BIAS:
            sums += s
        r_at += r_step
        z_at += z_step
        x_at += x_step
    if BIAS and n == 0:
        at = bias_sums_ptr + split * outputs + output
        store(at, tl.sum(sums, 0), output < outputs)
    inside = (output[:, None] < outputs) & (column < inputs)
    offset = output[:, None] * inputs + column
    if OPTIMIZER == PARTIAL:
        store(out_ptr + split * outputs * inputs + offset, total, inside)
    else:
        hyper = (
            lr, decay, scale, momentum, nesterov, beta1, beta2, adam_eps, correction1, correction2,
            rest1, rest2,
        )  # fmt: skip
        w = load(w_ptr + offset, inside)
        finish_weight(
            total, w, w_ptr, out_ptr, a_ptr, b_ptr, offset, inside, hyper, RULE, OPTIMIZER
        )  # fmt: skip


@triton.jit
def one_pass_kernel(
    x_ptr, w_ptr, r_ptr, z_ptr, a_ptr, b_ptr, partial_ptr, bias_sums_ptr, rows, inputs, outputs,
    part, x_row, x_column, r_row, r_column, z_row, z_column, eps: tl.float64,
    lr: tl.float64, decay: tl.float64, scale: tl.float64, momentum: tl.float64,
    nesterov: tl.float64, beta1: tl.float64, beta2: tl.float64, adam_eps: tl.float64,
    correction1: tl.float64, correction2: tl.float64, rest1: tl.float64, rest2: tl.float64,
    PROLOGUE: tl.constexpr, RULE: tl.constexpr, OPTIMIZER: tl.constexpr, BIAS: tl.constexpr,
    MODE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The update of a small batch, all of whose rows fit into one tile: W is read and written once.

    A program owns N inputs and ``part`` of the outputs, K at a time. It leaves its part of s w in
    partial[parts, rows, inputs].
    """
    acc: tl.constexpr = accumulate_type(x_ptr.dtype.element_ty)
    strips = tl.cdiv(inputs, N)
    split = (tl.program_id(0) // strips).to(tl.int64)
    column = (tl.program_id(0) % strips).to(tl.int64) * N + tl.arange(0, N)[None, :]
    row = tl.arange(0, M).to(tl.int64)[:, None]
    hyper = (
        lr, decay, scale, momentum, nesterov, beta1, beta2, adam_eps, correction1, correction2,
        rest1, rest2,
    )  # fmt: skip
    x_mask = (row < rows) & (column < inputs)
    x = tl.load(x_ptr + row * x_row + column * x_column, mask=x_mask, other=0.0)
    total = tl.zeros([M, N], acc)
    for first in range(split * part, tl.minimum((split + 1) * part, outputs), K):
        output = first + tl.arange(0, K)
        o = output[None, :]
        s = load_signal(
            r_ptr + row * r_row + o * r_column, z_ptr + row * z_row + o * z_column,
            (row < rows) & (o < outputs), eps, PROLOGUE,
        )  # fmt: skip
        offset = output[:, None] * inputs + column
        inside = (output[:, None] < outputs) & (column < inputs)
        w = load(w_ptr + offset, inside)
        total = product(s, w, total, MODE)
        raw = product(tl.trans(s), x, tl.zeros([K, N], acc), MODE)
        tl.debug_barrier()  # every thread has read the tile of W
        finish_weight(raw, w, w_ptr, w_ptr, a_ptr, b_ptr, offset, inside, hyper, RULE, OPTIMIZER)
        if BIAS and tl.program_id(0) % strips == 0:
            store(bias_sums_ptr + output, tl.sum(s, 0), output < outputs)
    store(partial_ptr + (split * rows + row) * inputs + column, total, x_mask)
