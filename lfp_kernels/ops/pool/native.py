"""Pools in compiled code (csrc/cpu/pool.cpp, csrc/cpu/max_pool.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...rules import SIGNAL_IN, SIGNAL_OUT, Rule, run_params

_ops = torch.ops.lfp_kernels


def _chain(below: Rule | None, signal_in: bool) -> int:
    return (SIGNAL_IN if signal_in else 0) | (0 if below is None else SIGNAL_OUT)


def avg_forward(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Tensor:
    """ATen's own kernels."""
    if x.dim() == 3:  # F.avg_pool1d takes no divisor
        kernel, stride, padding = (1, *kernel), (1, *stride), (0, *padding)
        out = F.avg_pool2d(
            x.unsqueeze(2), kernel, stride, padding, ceil_mode, count_include_pad, divisor
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
    return _ops.avg_pool_redistribute.default(
        x, z, reward, kernel, stride, padding, count_include_pad, divisor,
        rule.code, run_params(rule, below), _chain(below, signal_in),
    )  # fmt: skip


def adaptive_avg_redistribute(
    x: Tensor, z: Tensor, reward: Tensor, rule: Rule, below: Rule | None, signal_in: bool
) -> Tensor:
    return _ops.adaptive_avg_pool_redistribute.default(
        x, z, reward, rule.code, run_params(rule, below), _chain(below, signal_in)
    )


def max_forward(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    return _ops.max_pool_forward.default(x, kernel, stride, padding, dilation, ceil_mode)


def max_redistribute(reward: Tensor, indices: Tensor, input_shape: Sequence[int]) -> Tensor:
    return _ops.max_pool_redistribute.default(reward, indices, input_shape)
