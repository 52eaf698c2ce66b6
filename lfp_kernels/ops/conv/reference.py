"""Convolution in plain PyTorch: the oracle. Shapes: x [N, C, *spatial], z [N, O, *spatial]."""

from __future__ import annotations

import torch
from torch import Tensor

from ...optim import Update
from ...rules import RuleCall, accumulate_dtype, finish_below, finish_input
from .._split import redistribute_split
from ..update.reference import apply_update
from .geometry import ConvGeometry


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry, relu: bool
) -> Tensor:
    dtype = x.dtype
    if dtype == torch.float16:
        x, weight, bias = x.float(), weight.float(), None if bias is None else bias.float()
    z = torch.convolution(x, weight, bias, *geometry)
    return (z.relu() if relu else z).to(dtype)


def redistribute(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    reward: Tensor,
    geometry: ConvGeometry,
    call: RuleCall,
    need: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    rule, dtype, acc = call.rule, x.dtype, accumulate_dtype(x.dtype)
    x, w, z, reward = x.to(acc), weight.to(acc), z.to(acc), reward.to(acc)
    b = None if bias is None else bias.to(acc)
    # fp16 products run in float32: s may leave fp16's range.
    narrow = acc if call.product_dtype == torch.float16 else call.product_dtype

    def product(s: Tensor, x: Tensor, matrix: Tensor, wanted: str) -> Tensor:
        """J_x^T s or J_W^T s."""
        if s.numel() == 0 or x.numel() == 0:
            return torch.zeros_like(x if wanted == "x" else w)
        mask = [wanted == "x", wanted == "weight", False]
        g_x, g_w, _ = torch.ops.aten.convolution_backward(
            s.to(narrow), x.to(narrow), matrix.to(narrow), None, *geometry, mask
        )
        return (g_x if wanted == "x" else g_w).to(acc)

    input_reward = weight_feedback = bias_feedback = None
    if rule.split:
        narrow = acc
        space = (1, -1) + (1,) * (x.dim() - 2)
        input_reward, weight_feedback, bias_feedback = redistribute_split(
            x, w, b, z, reward, rule, need,
            lambda v, m: torch.convolution(v, m, None, *geometry) if v.numel() else z,
            lambda s, m: product(s, x, m, "x"),
            lambda s, v: product(s, v, w, "weight"),
            lambda v: v.reshape(space),
        )  # fmt: skip
        if input_reward is not None:
            input_reward = finish_below(input_reward, call.below, input_reward, x)
    else:
        s = reward if call.signal_in else rule.prologue(reward, z)
        if need[0]:
            given = None if call.matrix is None else call.matrix.to(acc)
            g = product(s, x, rule.matrix(w, given), "x")
            input_reward = finish_input(rule, call.below, g, x)
        if need[1]:
            weight_feedback = rule.weight_epilogue(product(s, x, w, "weight"), w)
        if need[2] and b is not None:
            bias_feedback = rule.weight_epilogue(s.sum([d for d in range(s.dim()) if d != 1]), b)
    found = (input_reward, weight_feedback, bias_feedback)
    first, second, third = (None if t is None else t.to(dtype) for t in found)
    return first, second, third


def redistribute_update(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    reward: Tensor,
    geometry: ConvGeometry,
    weight_update: Update,
    bias_update: Update | None,
    call: RuleCall,
    need_input: bool,
) -> Tensor | None:
    need = (need_input, True, bias_update is not None)
    input_reward, weight_feedback, bias_feedback = redistribute(
        x, weight, bias, z, reward, geometry, call, need
    )
    assert weight_feedback is not None
    apply_update(weight, weight_feedback, weight_update)
    if bias is not None and bias_feedback is not None and bias_update is not None:
        apply_update(bias, bias_feedback, bias_update)
    return input_reward
