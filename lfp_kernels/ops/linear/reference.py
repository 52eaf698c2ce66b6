"""The linear layer in plain PyTorch: the oracle. Shapes: x [N, I], weight [O, I], z [N, O]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...optim import Update
from ...rules import Rule, accumulate_dtype, finish_input
from ..update.reference import apply_update


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    z = F.linear(x, weight, bias)
    return z.relu() if relu else z


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
    dtype, acc = x.dtype, accumulate_dtype(x.dtype)
    x, w, z, reward = x.to(acc), weight.to(acc), z.to(acc), reward.to(acc)
    s = reward if signal_in else rule.prologue(reward, z)

    def product(a: Tensor, b: Tensor) -> Tensor:
        if product_dtype.itemsize < acc.itemsize and product_dtype != torch.float16:
            return (a.to(product_dtype) @ b.to(product_dtype)).to(acc)
        return a @ b

    input_reward = weight_feedback = bias_feedback = None
    if need[0]:
        input_reward = finish_input(rule, below, product(s, rule.matrix(w)), x).to(dtype)
    if need[1]:
        weight_feedback = rule.weight_epilogue(product(s.t(), x), w).to(dtype)
    if need[2] and bias is not None:
        bias_feedback = rule.weight_epilogue(s.sum(0), bias.to(acc)).to(dtype)
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
    need = (need_input, True, bias_update is not None)
    input_reward, weight_feedback, bias_feedback = redistribute(
        x, weight, bias, z, reward, rule, need, below, signal_in, product_dtype
    )
    assert weight_feedback is not None
    apply_update(weight, weight_feedback, weight_update)
    if bias is not None and bias_feedback is not None and bias_update is not None:
        apply_update(bias, bias_feedback, bias_update)
    return input_reward
