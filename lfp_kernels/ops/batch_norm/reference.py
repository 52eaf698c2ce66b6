"""Batch normalization in plain PyTorch: the oracle. x, z, reward: [N, C, *]; the rest: [C]."""

from __future__ import annotations

import torch
from torch import Tensor

from ...rules import Rule, accumulate_dtype, finish_input


def _others(x: Tensor) -> list[int]:
    """Every axis but the channels."""
    return [axis for axis in range(x.dim()) if axis != 1]


def _broadcast(per_channel: Tensor, x: Tensor) -> Tensor:
    return per_channel.to(x.dtype).view(1, -1, *[1] * (x.dim() - 2))


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, layout = x.dtype, torch.empty_like(x)
    x = x.to(accumulate_dtype(dtype))
    mean = x.new_zeros(x.shape[1]) if running_mean is None else running_mean.to(x.dtype, copy=True)
    var = x.new_ones(x.shape[1]) if running_var is None else running_var.to(x.dtype, copy=True)
    if training and x.numel():
        n = x.numel() // x.shape[1]
        mean = x.mean(_others(x))
        var = (x - _broadcast(mean, x)).square().mean(_others(x))
        if running_mean is not None:
            running_mean.copy_(momentum * mean + (1 - momentum) * running_mean)
        if running_var is not None:
            unbiased = var * (n / (n - 1))
            running_var.copy_(momentum * unbiased + (1 - momentum) * running_var)
    invstd = (var + eps).rsqrt()
    out = (x - _broadcast(mean, x)) * _broadcast(invstd, x)
    if weight is not None:
        out = out * _broadcast(weight, x)
    if bias is not None:
        out = out + _broadcast(bias, x)
    return layout.copy_(out.relu() if relu else out), mean, invstd


def redistribute(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor,
    reward: Tensor,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    rule: Rule,
    need: tuple[bool, bool, bool],
    below: Rule | None,
    signal_in: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    layout = torch.empty_like(x)
    acc = accumulate_dtype(x.dtype)
    x, z, reward = x.to(acc), z.to(acc), reward.to(acc)
    s = reward if signal_in else rule.prologue(reward, z)
    xhat = (x - _broadcast(mean, x)) * _broadcast(invstd, x)

    input_reward = weight_feedback = bias_feedback = None
    if need[0]:
        dx = s
        if training and x.numel():
            mean_s = s.mean(_others(x), keepdim=True)
            dx = s - mean_s - xhat * (s * xhat).mean(_others(x), keepdim=True)
        dx = dx * _broadcast(invstd, x)
        if weight is not None:
            dx = dx * _broadcast(weight, x)
        input_reward = layout.copy_(finish_input(rule, below, dx, x))
    if need[1] and weight is not None:
        raw = (s * xhat).sum(_others(x))
        weight_feedback = rule.weight_epilogue(raw, weight.to(acc)).to(weight.dtype)
    if need[2] and bias is not None:
        raw = s.sum(_others(x))
        bias_feedback = rule.weight_epilogue(raw, bias.to(acc)).to(bias.dtype)
    return input_reward, weight_feedback, bias_feedback
