"""Pools in plain PyTorch: the oracle. x is [N, C, H, W] or [N, C, D, H, W]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...rules import Rule, accumulate_dtype, finish_input

_aten = torch.ops.aten


def max_pool(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    pool = F.max_pool2d if x.dim() == 4 else F.max_pool3d
    return pool(x, kernel, stride, padding, dilation, ceil_mode, return_indices=True)


def max_pool_redistribute(reward: Tensor, winner: Tensor, shape: tuple[int, ...]) -> Tensor:
    out = reward.new_zeros(shape, dtype=accumulate_dtype(reward.dtype)).flatten(2)
    out.scatter_add_(2, winner.flatten(2).long(), reward.flatten(2).to(out.dtype))
    return out.view(shape).to(reward.dtype)


def avg_pool_redistribute(
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
    transpose = _aten.avg_pool2d_backward if x.dim() == 4 else _aten.avg_pool3d_backward
    acc = accumulate_dtype(x.dtype)
    xa = x.to(acc)
    s = reward.to(acc) if signal_in else rule.prologue(reward.to(acc), z.to(acc))
    g = transpose(s, xa, kernel, stride, padding, ceil_mode, count_include_pad, divisor)
    return finish_input(rule, below, g, xa).to(x.dtype)


def adaptive_avg_pool_redistribute(
    x: Tensor, z: Tensor, reward: Tensor, rule: Rule, below: Rule | None, signal_in: bool
) -> Tensor:
    two = x.dim() == 4
    transpose = _aten._adaptive_avg_pool2d_backward if two else _aten._adaptive_avg_pool3d_backward
    acc = accumulate_dtype(x.dtype)
    xa = x.to(acc)
    s = reward.to(acc) if signal_in else rule.prologue(reward.to(acc), z.to(acc))
    return finish_input(rule, below, transpose(s, xa), xa).to(x.dtype)
