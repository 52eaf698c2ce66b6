"""The linear layer in compiled code (csrc/cpu/linear.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...optim import FROZEN, Update
from ...rules import RuleCall
from .. import _cuda

_ops = torch.ops.lfp_kernels


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    if _cuda.linear_in_tf32(x):
        return _ops.linear_forward_tf32.default(x, weight, bias, relu)
    return _ops.linear_forward.default(x, weight, bias, relu)


def redistribute(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    reward: Tensor,
    call: RuleCall,
    need: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    results = _ops.linear_redistribute.default(
        x, weight, bias, z, reward, call.matrix, call.rule.code, call.params, *need,
        call.chain, _cuda.product_dtype(call.product_dtype, _cuda.linear_in_tf32(x)),
    )  # fmt: skip
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
    call: RuleCall,
    need_input: bool,
) -> Tensor | None:
    other = weight_update if bias_update is None else bias_update
    if not call.rule.split and bias_update is None:  # nobody reads it
        bias = None
    input_reward = _ops.linear_redistribute_update.default(
        x,
        weight,
        bias,
        z,
        reward,
        call.matrix,
        weight_update.states,
        bias_update.states if bias_update is not None else [],
        call.rule.code,
        call.params,
        weight_update.code,
        weight_update.hyper,
        FROZEN if bias_update is None else other.code,
        other.hyper,
        need_input,
        call.chain,
        _cuda.product_dtype(call.product_dtype, _cuda.linear_in_tf32(x)),
    )
    return input_reward if need_input else None
