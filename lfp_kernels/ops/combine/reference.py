"""Residual sum and dropout in plain PyTorch: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from ...rules import Rule, accumulate_dtype


def sum_redistribute(
    a: Tensor, b: Tensor, reward: Tensor, rule: Rule, signal_in: bool
) -> tuple[Tensor, Tensor]:
    dtype, acc = reward.dtype, accumulate_dtype(reward.dtype)
    a, b, r = a.to(acc), b.to(acc), reward.to(acc)
    s = r if signal_in else rule.prologue(r, a + b)
    return rule.input_epilogue(s, a).to(dtype), rule.input_epilogue(s, b).to(dtype)


def dropout_redistribute(reward: Tensor, mask: Tensor, scale: float) -> Tensor:
    acc = accumulate_dtype(reward.dtype)
    given = (reward.to(acc) * scale).masked_fill(~mask, 0)
    return torch.empty_like(reward).copy_(given)
