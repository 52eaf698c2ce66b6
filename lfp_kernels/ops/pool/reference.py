"""Pools in plain PyTorch: the oracle. Shapes: x [N, C, *], z and reward [N, C, *outputs]."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...rules import Rule, accumulate_dtype, finish_input


def _redistribute(
    pool: Callable[[Tensor], Tensor],
    x: Tensor,
    z: Tensor,
    reward: Tensor,
    rule: Rule,
    below: Rule | None,
    signal_in: bool,
) -> Tensor:
    """The pool is linear: its transpose is the gradient of <pool(x), s>."""
    layout, acc = torch.empty_like(x), accumulate_dtype(x.dtype)
    x, z, reward = x.to(acc), z.to(acc), reward.to(acc)
    s = reward if signal_in else rule.prologue(reward, z)
    if x.numel() == 0:
        return layout
    (dx,) = torch.func.vjp(pool, x)[1](s)
    return layout.copy_(finish_input(rule, below, dx, x))


def avg_forward(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Tensor:
    if x.dim() == 3:  # F.avg_pool1d takes no divisor
        x2 = x.unsqueeze(2)
        out = F.avg_pool2d(
            x2, (1, *kernel), (1, *stride), (0, *padding), ceil_mode, count_include_pad, divisor
        )
        return out.squeeze(2)
    pool = F.avg_pool2d if x.dim() == 4 else F.avg_pool3d
    return pool(x, kernel, stride, padding, ceil_mode, count_include_pad, divisor)


def avg_redistribute(
    x: Tensor,
    z: Tensor,
    reward: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
    rule: Rule,
    below: Rule | None,
    signal_in: bool,
) -> Tensor:
    def pool(v: Tensor) -> Tensor:
        return avg_forward(v, kernel, stride, padding, ceil_mode, count_include_pad, divisor)

    return _redistribute(pool, x, z, reward, rule, below, signal_in)


def adaptive_avg_redistribute(
    x: Tensor, z: Tensor, reward: Tensor, rule: Rule, below: Rule | None, signal_in: bool
) -> Tensor:
    adaptive: dict[int, Callable[..., Tensor]] = {
        3: F.adaptive_avg_pool1d,
        4: F.adaptive_avg_pool2d,
        5: F.adaptive_avg_pool3d,
    }
    size = tuple(z.shape[2:])
    return _redistribute(lambda v: adaptive[x.dim()](v, size), x, z, reward, rule, below, signal_in)


def max_forward(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    pool = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}[x.dim()]
    return pool(x, kernel, stride, padding, dilation, ceil_mode, return_indices=True)


def _flat_indices(indices: Tensor, input_shape: Sequence[int]) -> Tensor:
    """Winners as places in the input's [*spatial], from any of the forms of csrc/cpu/max_pool.h."""
    if indices.dtype != torch.uint8:
        return indices.long()
    local, flat = indices.long(), torch.zeros_like(indices, dtype=torch.int64)
    strides, kernels = [], []
    for axis in range(2, indices.dim()):
        kernels.append(input_shape[axis] // max(indices.shape[axis], 1))
        strides.append(torch.Size(input_shape[axis + 1 :]).numel())
    for k in reversed(range(len(kernels))):
        start = torch.arange(indices.shape[k + 2], device=indices.device) * kernels[k]
        start = start.view(-1, *[1] * (len(kernels) - 1 - k))
        flat += (start + local % kernels[k]) * strides[k]
        local = local // kernels[k]
    return flat


def max_redistribute(reward: Tensor, indices: Tensor, input_shape: Sequence[int]) -> Tensor:
    n, c = input_shape[:2]
    acc = accumulate_dtype(reward.dtype)
    positions = torch.Size(input_shape[2:]).numel()
    out = torch.zeros(n, c, positions, dtype=acc, device=reward.device)
    flat = _flat_indices(indices, input_shape)
    out.scatter_add_(2, flat.flatten(2), reward.to(acc).flatten(2))
    out = out.to(reward.dtype).view(input_shape)
    if indices.dim() in (4, 5) and not indices.is_contiguous():
        layout = torch.channels_last if indices.dim() == 4 else torch.channels_last_3d
        if indices.is_contiguous(memory_format=layout):
            return out.contiguous(memory_format=layout)
    return out
