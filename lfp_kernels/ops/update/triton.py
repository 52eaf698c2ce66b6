"""Optimizer updates and the global norm in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...optim import Update
from ...rules import Gradient
from .._triton import blocks, finish, launch, load

_CHUNK = 8192  # fixed, so that the norm does not depend on the device
_TILE = 2048  # elements in flight per program


def update(
    params: list[Tensor], feedback: list[Tensor], updates: list[Update], scale: Tensor | None
) -> None:
    if scale is not None:  # one more pass, without asking the device for the value
        feedback = [fb * scale.to(fb.dtype) for fb in feedback]
    for param, fb, step in zip(params, feedback, updates):
        # The gradient rule's weight epilogue is the identity: the feedback comes finished.
        finish(fb.contiguous(), param, Gradient.code, step, None)


@triton.jit
def _squares(x_ptr, offset, mask):
    x = load(x_ptr + offset, mask).to(tl.float64)
    return x * x


@triton.jit
def squares_kernel(x_ptr, sums_ptr, count, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """sums[program] = sum of squares of one chunk of x, in float64."""
    program = tl.program_id(0)
    start = program.to(tl.int64) * CHUNK
    total = tl.zeros([TILE], tl.float64)
    if start + CHUNK <= count:
        for at in tl.static_range(0, CHUNK, TILE):
            total += _squares(x_ptr, start + at + tl.arange(0, TILE), None)
    else:
        for at in range(0, CHUNK, TILE):
            offset = start + at + tl.arange(0, TILE)
            total += _squares(x_ptr, offset, offset < count)
    tl.store(sums_ptr + program, tl.sum(total))


@triton.jit
def norm_kernel(sums_ptr, out_ptr, count, TILE: tl.constexpr):
    """out = sqrt(sum of sums[count])."""
    total = tl.zeros([TILE], tl.float64)
    for at in range(0, count, TILE):
        offset = at + tl.arange(0, TILE)
        total += tl.load(sums_ptr + offset, mask=offset < count, other=0.0)
    tl.store(out_ptr, tl.sqrt(tl.sum(total)).to(out_ptr.dtype.element_ty))


def global_norm(tensors: list[Tensor]) -> Tensor:
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    out = tensors[0].new_empty((), dtype=torch.float64 if wide else torch.float32)
    chunks = [blocks(tensor.numel(), _CHUNK) for tensor in tensors]
    sums = out.new_empty(sum(chunks), dtype=torch.float64)
    at = 0
    for tensor, count in zip(tensors, chunks):
        launch(
            squares_kernel, count, out, tensor.contiguous(), sums[at:], tensor.numel(),
            CHUNK=_CHUNK, TILE=_TILE, num_warps=4,
        )  # fmt: skip
        at += count
    launch(norm_kernel, 1, out, sums, out, at, TILE=1024, num_warps=4)
    return out
