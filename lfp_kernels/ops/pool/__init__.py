"""Average and max pools: schemas and fakes. Native tensors are [N, C, H, W] or [N, C, D, H, W]."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._library import define
from ...backends import register
from . import native, reference


def _max_forward(x: Tensor, kernel, stride, padding, dilation, out) -> tuple[Tensor, Tensor]:
    size = (x.shape[0], x.shape[1], *out)
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    return (
        x.new_empty(size).contiguous(memory_format=layout),
        x.new_empty(size, dtype=torch.int32).contiguous(memory_format=layout),
    )


def _max_redistribute(reward: Tensor, winner: Tensor, size: list[int]) -> Tensor:
    last = reward.dim() == 4 and (
        reward.is_contiguous(memory_format=torch.channels_last) and not reward.is_contiguous()
    )
    layout = torch.channels_last if last else torch.contiguous_format
    return reward.new_empty(size).contiguous(memory_format=layout)


def _average(
    x, z, reward, kernel, stride, padding, ceil_mode, count_include_pad, divisor, rule, params, chain
):
    return torch.empty_like(x)


def _adaptive(x, z, reward, rule, params, chain):
    return torch.empty_like(x)


define(
    "max_pool_forward(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, "
    "int[] out) -> (Tensor, Tensor)",
    _max_forward,
)
define("max_pool_redistribute(Tensor reward, Tensor winner, int[] size) -> Tensor", _max_redistribute)
define(
    "avg_pool_redistribute(Tensor x, Tensor z, Tensor reward, int[] kernel, int[] stride, "
    "int[] padding, bool ceil_mode, bool count_include_pad, int? divisor, int rule, "
    "float[] params, int chain) -> Tensor",
    _average,
)
define(
    "adaptive_avg_pool_redistribute(Tensor x, Tensor z, Tensor reward, int rule, float[] params, "
    "int chain) -> Tensor",
    _adaptive,
)
register("pool", native=native, reference=reference)
