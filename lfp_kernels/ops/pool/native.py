"""Pools in compiled code (csrc/cpu/pool.cpp). Max pooling in 3-d is ATen's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...rules import SIGNAL_IN, SIGNAL_OUT, Rule, run_params

_ops = torch.ops.lfp_kernels


def max_pool(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    if x.dim() == 5:
        z, winner = F.max_pool3d(
            x, kernel, stride, padding, dilation, ceil_mode, return_indices=True
        )
        return z, winner.int()
    out = [
        _pooled(size, *window, ceil_mode)
        for size, *window in zip(x.shape[2:], kernel, stride, padding, dilation)
    ]
    return _ops.max_pool_forward.default(x, kernel, stride, padding, dilation, out)


def _pooled(
    size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool
) -> int:
    """Windows along one axis; with ceil_mode the last may hang over but must start inside."""
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (span + (stride - 1 if ceil_mode else 0)) // stride + 1
    return count - 1 if ceil_mode and (count - 1) * stride >= size + padding else count


def max_pool_redistribute(reward: Tensor, winner: Tensor, shape: tuple[int, ...]) -> Tensor:
    if winner.dtype != torch.int32:
        winner = winner.int()
    return _ops.max_pool_redistribute.default(reward, winner, shape)


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
    return _ops.avg_pool_redistribute.default(
        x, z, reward, kernel, stride, padding, ceil_mode, count_include_pad, divisor,
        rule.code, run_params(rule, below), _chain(below, signal_in),
    )  # fmt: skip


def adaptive_avg_pool_redistribute(
    x: Tensor, z: Tensor, reward: Tensor, rule: Rule, below: Rule | None, signal_in: bool
) -> Tensor:
    return _ops.adaptive_avg_pool_redistribute.default(
        x, z, reward, rule.code, run_params(rule, below), _chain(below, signal_in)
    )


def _chain(below: Rule | None, signal_in: bool) -> int:
    return (SIGNAL_IN if signal_in else 0) | (0 if below is None else SIGNAL_OUT)
