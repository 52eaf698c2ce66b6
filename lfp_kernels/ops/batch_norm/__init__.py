"""Batch normalization of x [N, C, *]: schemas and fakes of its two operators."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..._library import define
from ...backends import register
from ...rules import accumulate_dtype
from . import native, reference


def _forward(x: Tensor, weight, bias, running_mean, running_var, training, momentum, eps, relu):
    statistics = x.new_empty(x.shape[1], dtype=accumulate_dtype(x.dtype))
    return torch.empty_like(x), statistics, torch.empty_like(statistics)


def _redistribute(
    x, weight, bias, z, reward, mean, invstd, training, rule, params,
    need_input, need_weight, need_bias, chain,
):  # fmt: skip
    return (
        torch.empty_like(x) if need_input else x.new_empty(0),
        torch.empty_like(weight) if need_weight and weight is not None else x.new_empty(0),
        torch.empty_like(bias) if need_bias and bias is not None else x.new_empty(0),
    )


def _triton() -> ModuleType:
    from . import triton

    return triton


define(
    "batch_norm_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, bool training, float momentum, float eps, bool relu) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
)
define(
    "batch_norm_redistribute(Tensor x, Tensor? weight, Tensor? bias, Tensor z, Tensor reward, "
    "Tensor mean, Tensor invstd, bool training, int rule, float[] params, bool need_input, "
    "bool need_weight, bool need_bias, int chain) -> (Tensor, Tensor, Tensor)",
    _redistribute,
)
register("batch_norm", native=native, triton=_triton, reference=reference)
