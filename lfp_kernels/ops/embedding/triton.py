"""Embeddings in Triton: the uses sorted by row, summed in windows (csrc/cuda/embedding.cu)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...optim import Update
from ...rules import Gradient, accumulate_dtype
from .._triton import (
    FEEDBACK,
    NO_HYPER,
    accumulate_type,
    blocks,
    divide,
    finish_weight,
    launch,
    load,
    power_of_2,
    stabilize,
    states_of,
)

_WINDOW = 64  # uses
_RULE = Gradient.code  # the weight epilogue is the identity: the feedback comes finished


@triton.jit
def _run_length(tokens_ptr, token, first, end, stride, WINDOW: tl.constexpr):
    """How many of the sorted tokens first, first + stride, ... before ``end`` are ``token``."""
    found = tl.cast(0, tl.int64)
    more = True
    while more:
        at = first + (found + tl.arange(0, WINDOW)) * stride
        same = tl.load(tokens_ptr + at, mask=at < end, other=-1) == token
        count = tl.sum((same & (at < end)).to(tl.int64))
        found += count
        more = count == WINDOW
    return found


@triton.jit
def _sum_uses(places_ptr, r_ptr, first, count, column, width, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], accumulate_type(r_ptr.dtype.element_ty))
    for i in range(count):
        place = tl.load(places_ptr + first + i)
        total += load(r_ptr + place * width + column, column < width)
    return total


@triton.jit(do_not_specialize=["count", "padding"])
def carry_kernel(
    tokens_ptr, places_ptr, r_ptr, carried_ptr, count, width, padding, WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """carried[window] = sum of its first uses, where their row began before the window."""
    window = tl.program_id(0).to(tl.int64) + 1
    first = window * WINDOW
    token = tl.load(tokens_ptr + first)
    before = tl.load(tokens_ptr + first - 1)
    if (token != padding) & (token == before):
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        end = tl.minimum(first + WINDOW, count)
        uses = _run_length(tokens_ptr, token, first, end, 1, WINDOW)
        total = _sum_uses(places_ptr, r_ptr, first, uses, column, width, BLOCK)
        tl.store(carried_ptr + window * width + column, total, mask=column < width)


@triton.jit(do_not_specialize=["count", "padding"])
def rows_kernel(
    tokens_ptr, places_ptr, r_ptr, carried_ptr, w_ptr, out_ptr, a_ptr, b_ptr, count, rows, width,
    padding, stabilizer: tl.float64,
    lr: tl.float64, decay: tl.float64, scale: tl.float64, momentum: tl.float64,
    nesterov: tl.float64, beta1: tl.float64, beta2: tl.float64, eps: tl.float64,
    correction1: tl.float64, correction2: tl.float64, rest1: tl.float64, rest2: tl.float64,
    RULE: tl.constexpr, OPTIMIZER: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Feedback or step of a row, at the first of its uses."""
    hyper = (
        lr, decay, scale, momentum, nesterov, beta1, beta2, eps, correction1, correction2, rest1,
        rest2,
    )  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens_ptr + at)
    before = tl.load(tokens_ptr + at - 1, mask=at > 0, other=-1)
    if (token != padding) & (token != before) & (token >= 0) & (token < rows):
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = column < width
        following = (at // WINDOW + 1) * WINDOW
        uses = _run_length(tokens_ptr, token, at, tl.minimum(following, count), 1, WINDOW)
        total = _sum_uses(places_ptr, r_ptr, at, uses, column, width, BLOCK)
        windows = _run_length(tokens_ptr, token, following, count, WINDOW, WINDOW)
        for k in range(windows):
            total += load(carried_ptr + (following // WINDOW + k) * width + column, mask)
        offset = token * width + column
        w = load(w_ptr + offset, mask)
        feedback = divide(tl.abs(w), stabilize(w, stabilizer.to(w.dtype))) * total
        finish_weight(
            feedback, w, w_ptr, out_ptr, a_ptr, b_ptr, offset, mask, hyper, RULE, OPTIMIZER
        )


def _run(
    weight: Tensor, tokens: Tensor, reward: Tensor, padding: int, eps: float, out: Tensor,
    update: Update | None,
) -> None:  # fmt: skip
    count, (rows, width) = tokens.numel(), weight.shape
    if count == 0 or width == 0:
        return
    if tokens.is_cuda:  # checked on the device, as torch's own kernels do
        torch._assert_async(((tokens >= 0) & (tokens < rows)).all())
    ascending, places = tokens.sort(stable=True)
    reward = reward.contiguous()
    block = power_of_2(width, most=512)
    columns, windows = blocks(width, block), blocks(count, _WINDOW)
    acc = accumulate_dtype(weight.dtype)
    carried = reward.new_empty((windows if windows > 1 else 1, width), dtype=acc)
    sizes = {"WINDOW": _WINDOW, "BLOCK": block, "num_warps": 4}
    uses = (ascending, places, reward, carried)
    launch(carry_kernel, windows - 1, weight, *uses, count, width, padding, groups=columns, **sizes)
    launch(
        rows_kernel, count, weight, *uses, weight, out, *states_of(update, weight), count, rows,
        width, padding, eps, *(NO_HYPER if update is None else update.hyper), groups=columns,
        RULE=_RULE, OPTIMIZER=FEEDBACK.value if update is None else update.code, **sizes,
    )  # fmt: skip


def redistribute(
    weight: Tensor, tokens: Tensor, reward: Tensor, padding: int, eps: float
) -> Tensor:
    weight = weight.contiguous()
    out = torch.zeros_like(weight)
    _run(weight, tokens, reward, padding, eps, out, None)
    return out


def redistribute_update(
    weight: Tensor, tokens: Tensor, reward: Tensor, padding: int, eps: float, update: Update
) -> None:
    _run(weight, tokens, reward, padding, eps, weight, update)
