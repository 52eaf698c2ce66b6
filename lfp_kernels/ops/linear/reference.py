"""The linear layer in plain PyTorch: the oracle. Shapes: x [N, I], weight [O, I], z [N, O]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...optim import Update
from ...rules import RuleCall, accumulate_dtype, finish_below, finish_input
from .._split import redistribute_split
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
    call: RuleCall,
    need: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    rule, dtype, acc = call.rule, x.dtype, accumulate_dtype(x.dtype)
    x, w, z, reward = x.to(acc), weight.to(acc), z.to(acc), reward.to(acc)
    b = None if bias is None else bias.to(acc)
    narrow = call.product_dtype

    def product(a: Tensor, b: Tensor) -> Tensor:
        if narrow.itemsize < acc.itemsize and narrow != torch.float16:
            return (a.to(narrow) @ b.to(narrow)).to(acc)
        return a @ b

    input_reward = weight_feedback = bias_feedback = None
    if rule.split:
        input_reward, weight_feedback, bias_feedback = redistribute_split(
            x, w, b, z, reward, rule, need,
            lambda v, m: v @ m.t(), lambda s, m: s @ m, lambda s, v: s.t() @ v, lambda v: v,
        )  # fmt: skip
        if input_reward is not None:
            input_reward = finish_below(input_reward, call.below, input_reward, x)
    else:
        s = reward if call.signal_in else rule.prologue(reward, z)
        if need[0]:
            given = None if call.matrix is None else call.matrix.to(acc)
            g = product(s, rule.matrix(w, given))
            input_reward = finish_input(rule, call.below, g, x)
        if need[1]:
            weight_feedback = rule.weight_epilogue(product(s.t(), x), w)
        if need[2] and b is not None:
            bias_feedback = rule.weight_epilogue(s.sum(0), b)
    found = (input_reward, weight_feedback, bias_feedback)
    first, second, third = (None if t is None else t.to(dtype) for t in found)
    return first, second, third


def redistribute_update(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    reward: Tensor,
    weight_update: Update,
    bias_update: Update | None,
    call: RuleCall,
    need_input: bool,
) -> Tensor | None:
    need = (need_input, True, bias_update is not None)
    input_reward, weight_feedback, bias_feedback = redistribute(
        x, weight, bias, z, reward, call, need
    )
    assert weight_feedback is not None
    apply_update(weight, weight_feedback, weight_update)
    if bias is not None and bias_feedback is not None and bias_update is not None:
        apply_update(bias, bias_feedback, bias_update)
    return input_reward
