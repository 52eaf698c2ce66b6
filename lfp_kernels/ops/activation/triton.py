"""Activations in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import BLOCK, arranged_like, blocks, launch, load, store


@triton.jit
def _step_block(x_ptr, y_ptr, offset, mask):
    store(y_ptr + offset, load(x_ptr + offset, mask) > 0, mask)


@triton.jit
def step_kernel(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    """y = 1 where x > 0, else 0."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offset = start + tl.arange(0, BLOCK)
    if start + BLOCK <= count:  # whole blocks need no mask, so their accesses are vectors
        _step_block(x_ptr, y_ptr, offset, None)
    else:
        _step_block(x_ptr, y_ptr, offset, offset < count)


def step(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    x = arranged_like(y, x)
    launch(step_kernel, blocks(y.numel()), y, x, y, y.numel(), BLOCK=BLOCK, num_warps=4)
    return y
