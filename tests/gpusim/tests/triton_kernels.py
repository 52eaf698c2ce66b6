"""Ordinary Triton kernels and wrappers: nothing here knows about the executor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.autotune(
    [
        triton.Config({"BB": 32, "BK": 32}, num_warps=4, num_stages=2),
        triton.Config({"BB": 64, "BK": 32}, num_warps=4, num_stages=3),
    ],
    key=["b", "n", "k"],
)
@triton.jit
def weighted_product_kernel(
    s, a, w, out, b, n, k, PRECISION: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """out[n, k] = |w[n, k]| * sum_b s[b, n] a[b, k]."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    columns = tl.program_id(1) * BK + tl.arange(0, BK)
    total = tl.zeros((BN, BK), tl.float32)
    for start in range(0, b, BB):
        batch = start + tl.arange(0, BB)
        mask_s = (rows[:, None] < n) & (batch[None, :] < b)
        mask_a = (batch[:, None] < b) & (columns[None, :] < k)
        tile_s = tl.load(s + batch[None, :] * n + rows[:, None], mask=mask_s, other=0.0)
        tile_a = tl.load(a + batch[:, None] * k + columns[None, :], mask=mask_a, other=0.0)
        total = tl.dot(tile_s, tile_a, total, input_precision=PRECISION)
    mask = (rows[:, None] < n) & (columns[None, :] < k)
    at = rows[:, None] * k + columns[None, :]
    weight = tl.load(w + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, total * tl.abs(weight), mask=mask)


def weighted_product(s, a, w, precision="tf32"):
    (b, n), k = s.shape, a.shape[1]
    out = torch.empty(n, k)
    grid = lambda meta: (triton.cdiv(n, 32), triton.cdiv(k, meta["BK"]))  # noqa: E731
    weighted_product_kernel[grid](s, a, w, out, b, n, k, PRECISION=precision, BN=32)
    return out


@triton.jit
def softmax_kernel(x, y, n, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    value = tl.load(x + row * n + columns, mask=columns < n, other=-float("inf"))
    value = tl.exp(value - tl.max(value, 0))
    tl.store(y + row * n + columns, value / tl.sum(value, 0), mask=columns < n)


def softmax(x):
    y = torch.empty_like(x)
    softmax_kernel[(x.shape[0],)](x, y, x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]))
    return y


@triton.jit
def column_sum_kernel(x, y, m, n, ATOMIC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (rows[:, None] < m) & (columns[None, :] < n)
    value = tl.sum(tl.load(x + rows[:, None] * n + columns[None, :], mask=mask, other=0.0), 0)
    if ATOMIC:
        tl.atomic_add(y + columns, value, mask=columns < n)
    else:  # a race between the blocks of one column
        tl.store(y + columns, tl.load(y + columns, mask=columns < n) + value, mask=columns < n)


def column_sum(x, atomic=True, zeroed=True):
    m, n = x.shape
    y = torch.zeros(n) if zeroed else torch.empty(n)
    grid = (triton.cdiv(m, 32), triton.cdiv(n, 64))
    column_sum_kernel[grid](x, y, m, n, ATOMIC=atomic, BM=32, BN=64)
    return y


@triton.jit
def elementwise_kernel(x, y, n, offset, OP: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK) + offset
    mask = at < n + offset if MASK else None
    value = tl.load(x + at, mask=mask).to(tl.float32)
    if OP == "erf":
        value = libdevice.erf(value)
    elif OP == "tanh":
        value = libdevice.tanh(value)
    elif OP == "log1p":
        value = libdevice.log1p(tl.abs(value))
    elif OP == "sin":
        value = tl.sin(value * 100)
    elif OP == "cumsum":
        value = tl.cumsum(value, 0)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


def elementwise(x, op, mask=True):
    y = torch.empty_like(x)
    grid = (triton.cdiv(x.numel(), 256),)
    elementwise_kernel[grid](x, y, x.numel(), 0, OP=op, MASK=mask, BLOCK=256)
    return y


@triton.jit
def tile_product_kernel(a, b, c, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """A product of tensor descriptors: TMA where the target has it."""
    row, column = tl.program_id(0) * BM, tl.program_id(1) * BN
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, k, BK):
        total = tl.dot(a.load([row, start]), b.load([start, column]), total)
    c.store([row, column], total)


def tile_product(a, b):
    from triton.tools.tensor_descriptor import TensorDescriptor

    (m, k), n = a.shape, b.shape[1]
    c = torch.empty(m, n)
    tiles = ((a, [64, 32]), (b, [32, 64]), (c, [64, 64]))
    descriptors = [TensorDescriptor.from_tensor(t, box) for t, box in tiles]
    grid = (triton.cdiv(m, 64), triton.cdiv(n, 64))
    tile_product_kernel[grid](*descriptors, k, 64, 64, 32, num_warps=4)
    return c
