"""Residual sum and dropout in compiled code (csrc/cpu/sum.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...rules import SIGNAL_IN, Rule, run_params

_ops = torch.ops.lfp_kernels


def sum_redistribute(
    a: Tensor, b: Tensor, reward: Tensor, rule: Rule, signal_in: bool
) -> tuple[Tensor, Tensor]:
    return _ops.sum_redistribute.default(
        a, b, reward, rule.code, run_params(rule), SIGNAL_IN if signal_in else 0
    )


def dropout_redistribute(reward: Tensor, mask: Tensor, scale: float) -> Tensor:
    return _ops.dropout_redistribute.default(reward, mask, scale)
