"""Residual sum and dropout in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...rules import Rule
from .._triton import (
    BLOCK,
    arranged_like,
    blocks,
    input_epilogue,
    launch,
    load,
    prologue,
    prologue_code,
    store,
)


@triton.jit
def _sum_block(
    a_ptr, b_ptr, r_ptr, first_ptr, second_ptr, offset, mask, eps, PROLOGUE: tl.constexpr,
    RULE: tl.constexpr,
):  # fmt: skip
    a = load(a_ptr + offset, mask)
    b = load(b_ptr + offset, mask)
    s = prologue(load(r_ptr + offset, mask), a + b, eps.to(a.dtype), PROLOGUE)
    store(first_ptr + offset, input_epilogue(s, a, eps, RULE, False), mask)
    store(second_ptr + offset, input_epilogue(s, b, eps, RULE, False), mask)


@triton.jit
def sum_kernel(
    a_ptr, b_ptr, r_ptr, first_ptr, second_ptr, count, eps: tl.float64, PROLOGUE: tl.constexpr,
    RULE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """s = prologue(r, a + b);  r_a = input_epilogue(s, a), r_b = input_epilogue(s, b)."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offset = start + tl.arange(0, BLOCK)
    if start + BLOCK <= count:  # whole blocks need no mask, so their accesses are vectors
        _sum_block(a_ptr, b_ptr, r_ptr, first_ptr, second_ptr, offset, None, eps, PROLOGUE, RULE)
    else:
        mask = offset < count
        _sum_block(a_ptr, b_ptr, r_ptr, first_ptr, second_ptr, offset, mask, eps, PROLOGUE, RULE)


def sum_redistribute(
    a: Tensor, b: Tensor, reward: Tensor, rule: Rule, signal_in: bool
) -> tuple[Tensor, Tensor]:
    first, second = torch.empty_like(reward), torch.empty_like(reward)
    a, b, reward = (arranged_like(first, t) for t in (a, b, reward))
    count = first.numel()
    launch(
        sum_kernel, blocks(count), first, a, b, reward, first, second, count, rule.stabilizer,
        PROLOGUE=prologue_code(rule, signal_in), RULE=rule.code, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return first, second


@triton.jit
def _dropout_block(r_ptr, mask_ptr, out_ptr, offset, mask, scale):
    r = load(r_ptr + offset, mask)
    kept = tl.load(mask_ptr + offset, mask=mask) != 0
    # A select, not a product: what the mask drops is 0 whatever stood there.
    store(out_ptr + offset, tl.where(kept, r * scale.to(r.dtype), 0.0), mask)


@triton.jit
def dropout_kernel(r_ptr, mask_ptr, out_ptr, count, scale: tl.float64, BLOCK: tl.constexpr):
    """The reward times scale where the mask holds, else 0."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offset = start + tl.arange(0, BLOCK)
    if start + BLOCK <= count:
        _dropout_block(r_ptr, mask_ptr, out_ptr, offset, None, scale)
    else:
        _dropout_block(r_ptr, mask_ptr, out_ptr, offset, offset < count, scale)


def dropout_redistribute(reward: Tensor, mask: Tensor, scale: float) -> Tensor:
    out = torch.empty_like(reward)
    reward, mask = arranged_like(out, reward), arranged_like(out, mask)
    launch(
        dropout_kernel, blocks(out.numel()), out, reward, mask.view(torch.uint8), out, out.numel(),
        scale, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return out
