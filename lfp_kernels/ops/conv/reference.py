"""Convolution in plain PyTorch: the oracle. Shapes: x [N, C, *spatial], z [N, O, *spatial]."""

from __future__ import annotations

import torch
from torch import Tensor

from ...optim import Update
from ...rules import Rule, accumulate_dtype, finish_input
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
    rule: Rule,
    need: tuple[bool, bool, bool],
    below: Rule | None,
    signal_in: bool,
    product_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dtype, acc = x.dtype, accumulate_dtype(x.dtype)
    x, w, z, reward = x.to(acc), weight.to(acc), z.to(acc), reward.to(acc)
    s = reward if signal_in else rule.prologue(reward, z)
    # fp16 products run in float32: s may leave fp16's range.
    narrow = acc if product_dtype == torch.float16 else product_dtype

    def product(wanted: str, matrix: Tensor) -> Tensor:
        """J_x^T s or J_W^T s."""
        if s.numel() == 0 or x.numel() == 0:
            return torch.zeros_like(x if wanted == "x" else w)
        mask = [wanted == "x", wanted == "weight", False]
        g_x, g_w, _ = torch.ops.aten.convolution_backward(
            s.to(narrow), x.to(narrow), matrix.to(narrow), None, *geometry, mask
        )
        return (g_x if wanted == "x" else g_w).to(acc)

    input_reward = weight_feedback = bias_feedback = None
    if need[0]:
        input_reward = finish_input(rule, below, product("x", rule.matrix(w)), x).to(dtype)
    if need[1]:
        weight_feedback = rule.weight_epilogue(product("weight", w), w).to(dtype)
    if need[2] and bias is not None:
        space = [d for d in range(s.dim()) if d != 1]
        bias_feedback = rule.weight_epilogue(s.sum(space), bias.to(acc)).to(dtype)
    return input_reward, weight_feedback, bias_feedback


def redistribute_update(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    reward: Tensor,
    geometry: ConvGeometry,
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
        x, weight, bias, z, reward, geometry, rule, need, below, signal_in, product_dtype
    )
    assert weight_feedback is not None
    apply_update(weight, weight_feedback, weight_update)
    if bias is not None and bias_feedback is not None and bias_update is not None:
        apply_update(bias, bias_feedback, bias_update)
    return input_reward
