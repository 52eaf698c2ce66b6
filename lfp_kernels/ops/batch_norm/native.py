"""Batch normalization in compiled code (csrc/cpu/batch_norm.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...rules import SIGNAL_IN, SIGNAL_OUT, Rule, run_params

_ops = torch.ops.lfp_kernels


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
    return _ops.batch_norm_forward.default(
        x, weight, bias, running_mean, running_var, training, momentum, eps, relu
    )


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
    chain = (SIGNAL_IN if signal_in else 0) | (0 if below is None else SIGNAL_OUT)
    results = _ops.batch_norm_redistribute.default(
        x, weight, bias, z, reward, mean, invstd, training,
        rule.code, run_params(rule, below), *need, chain,
    )  # fmt: skip
    wanted = (need[0], need[1] and weight is not None, need[2] and bias is not None)
    input_reward, weight_feedback, bias_feedback = (
        tensor if want else None for tensor, want in zip(results, wanted)
    )
    return input_reward, weight_feedback, bias_feedback
