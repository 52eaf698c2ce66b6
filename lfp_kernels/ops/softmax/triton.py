"""Softmax by the rule of AttnLRP in Triton, one or more rows per program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import BLOCK, accumulate_type, blocks, launch, load, power_of_2, store

_WHOLE = 4096  # elements up to which a row stays in registers


@triton.jit
def rows_kernel(
    x_ptr, p_ptr, r_ptr, out_ptr, rows, count, WHOLE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out = x * (r - p * sum r) of rows [rows, count]; 0 where x is infinite (masked out)."""
    acc: tl.constexpr = accumulate_type(x_ptr.dtype.element_ty)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None]
    start = (row * count)[:, None]
    k = tl.arange(0, BLOCK)[None, :]
    r = load(r_ptr + start + k, inside & (k < count))
    total = tl.sum(r, 1)
    if not WHOLE:
        for at in range(BLOCK, count, BLOCK):
            total += tl.sum(load(r_ptr + start + at + k, inside & (at + k < count)), 1)
    for at in range(0, 1 if WHOLE else count, BLOCK):
        mask = inside & (at + k < count)
        if not WHOLE:
            r = load(r_ptr + start + at + k, mask)
        x, p = load(x_ptr + start + at + k, mask), load(p_ptr + start + at + k, mask)
        found = x * (r - p * total[:, None])
        found = tl.where(tl.abs(x) == float("inf"), tl.zeros_like(found), found).to(acc)
        store(out_ptr + start + at + k, found, mask)


def redistribute(x: Tensor, p: Tensor, reward: Tensor) -> Tensor:
    x, p, reward = x.contiguous(), p.contiguous(), reward.contiguous()
    out = torch.empty_like(x)
    rows, count = x.shape
    if x.numel() == 0:
        return out
    block = power_of_2(count, most=_WHOLE)
    tile = max(1, BLOCK // block)
    launch(
        rows_kernel, blocks(rows, tile), x, x, p, reward, out, rows, count, WHOLE=count <= block,
        ROWS=tile, BLOCK=block, num_warps=4 if block <= 1024 else 8,
    )  # fmt: skip
    return out
