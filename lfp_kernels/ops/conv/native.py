"""Convolution in compiled code (csrc/cpu/conv.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...optim import FROZEN, Update
from ...rules import RuleCall
from .. import _cuda
from .geometry import ConvGeometry
from .layout import strided_channels_last

_ops = torch.ops.lfp_kernels
_DIRECT_PAIRS = 16  # kDirectPairs of csrc/cuda/conv_direct.cuh: such layers read W as it lies


def arranges(x: Tensor) -> bool:
    """Whether the kernels read W in an order of their own beside such an x."""
    return _cuda.is_gpu(x) and strided_channels_last(x)


def arranged(weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """That order, taps before channels: a copy of W, or W itself where it makes no difference."""
    pairs = weight.shape[0] // geometry.groups * weight.shape[1]
    if pairs <= _DIRECT_PAIRS:
        return weight
    layout = torch.channels_last if weight.dim() == 4 else torch.channels_last_3d
    return weight.contiguous(memory_format=layout)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry, relu: bool
) -> Tensor:
    if _cuda.conv_in_tf32(x):
        return _ops.conv_forward_tf32.default(x, weight, bias, *geometry, relu)
    return _ops.conv_forward.default(x, weight, bias, *geometry, relu)


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
    results = _ops.conv_redistribute.default(
        x, weight, bias, z, reward, call.matrix, *geometry, call.rule.code, call.params, *need,
        call.chain, _cuda.product_dtype(call.product_dtype, _cuda.conv_in_tf32(x)),
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
    geometry: ConvGeometry,
    weight_update: Update,
    bias_update: Update | None,
    call: RuleCall,
    need_input: bool,
) -> Tensor | None:
    other = weight_update if bias_update is None else bias_update
    if not call.rule.split and bias_update is None:  # nobody reads it
        bias = None
    input_reward = _ops.conv_redistribute_update.default(
        x,
        weight,
        bias,
        z,
        reward,
        call.matrix,
        weight_update.states,
        bias_update.states if bias_update is not None else [],
        *geometry,
        call.rule.code,
        call.params,
        weight_update.code,
        weight_update.hyper,
        FROZEN if bias_update is None else other.code,
        other.hyper,
        need_input,
        call.chain,
        _cuda.product_dtype(call.product_dtype, _cuda.conv_in_tf32(x)),
    )
    return input_reward if need_input else None
