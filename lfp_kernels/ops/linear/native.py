"""The linear layer in compiled code (csrc/cpu/linear.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...optim import Update
from ...rules import SIGNAL_IN, SIGNAL_OUT, Rule, run_params

_ops = torch.ops.lfp_kernels


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    return _ops.linear_forward.default(x, weight, bias, relu)


def redistribute(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    reward: Tensor,
    rule: Rule,
    need: tuple[bool, bool, bool],
    below: Rule | None,
    signal_in: bool,
    product_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    chain = (SIGNAL_IN if signal_in else 0) | (0 if below is None else SIGNAL_OUT)
    results = _ops.linear_redistribute.default(
        x, weight, bias, z, reward, rule.code, run_params(rule, below), *need, chain, product_dtype
    )
    wanted = (need[0], need[1], need[2] and bias is not None)
    input_reward, weight_feedback, bias_feedback = (
        tensor if want else None for tensor, want in zip(results, wanted)
    )
    return input_reward, weight_feedback, bias_feedback


def redistribute_update(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    reward: Tensor,
    weight_update: Update,
    bias_update: Update | None,
    rule: Rule,
    need_input: bool,
    below: Rule | None,
    signal_in: bool,
    product_dtype: torch.dtype,
) -> Tensor | None:
    chain = (SIGNAL_IN if signal_in else 0) | (0 if below is None else SIGNAL_OUT)
    other = weight_update if bias_update is None else bias_update
    input_reward = _ops.linear_redistribute_update.default(
        x,
        weight,
        bias if bias_update is not None else None,
        z,
        reward,
        weight_update.states,
        bias_update.states if bias_update is not None else [],
        rule.code,
        run_params(rule, below),
        weight_update.code,
        weight_update.hyper,
        other.code,
        other.hyper,
        need_input,
        chain,
        product_dtype,
    )
    return input_reward if need_input else None
