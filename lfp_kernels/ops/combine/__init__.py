"""Residual sum and dropout: schemas and fakes of their redistributions."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..._library import define
from ...backends import register
from . import native, reference


def _sum(a: Tensor, b: Tensor, reward: Tensor, rule: int, params: list[float], chain: int):
    return torch.empty_like(reward), torch.empty_like(reward)


def _dropout(reward: Tensor, mask: Tensor, scale: float) -> Tensor:
    return torch.empty_like(reward)


def _triton() -> ModuleType:
    from . import triton

    return triton


define(
    "sum_redistribute(Tensor a, Tensor b, Tensor reward, int rule, float[] params, int chain) "
    "-> (Tensor, Tensor)",
    _sum,
)
define("dropout_redistribute(Tensor reward, Tensor mask, float scale) -> Tensor", _dropout)
register("combine", native=native, triton=_triton, reference=reference)
