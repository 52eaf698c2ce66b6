"""Alignment sums in Triton: a program per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import BLOCK, accumulate_type, launch, load


@triton.jit
def alignment_kernel(a_ptr, b_ptr, sums_ptr, count, BLOCK: tl.constexpr):
    """sums[row] = (a . b, |a|^2, |b|^2) of row ``program``"""
    row = tl.program_id(0).to(tl.int64)
    acc: tl.constexpr = accumulate_type(a_ptr.dtype.element_ty)
    ab = tl.zeros([BLOCK], acc)
    aa = tl.zeros([BLOCK], acc)
    bb = tl.zeros([BLOCK], acc)
    for start in range(0, count, BLOCK):
        column = start + tl.arange(0, BLOCK)
        a = load(a_ptr + row * count + column, column < count)
        b = load(b_ptr + row * count + column, column < count)
        ab += a * b
        aa += a * a
        bb += b * b
    tl.store(sums_ptr + row * 3, tl.sum(ab, 0))
    tl.store(sums_ptr + row * 3 + 1, tl.sum(aa, 0))
    tl.store(sums_ptr + row * 3 + 2, tl.sum(bb, 0))


def sums(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.contiguous(), b.contiguous()
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    out = a.new_empty((a.shape[0], 3), dtype=dtype)
    launch(alignment_kernel, a.shape[0], a, a, b, out, a.shape[1], BLOCK=BLOCK, num_warps=4)
    return out
