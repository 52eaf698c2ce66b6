"""Softmax by the rule of AttnLRP, on rows [M, N]."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from ..._library import define
from ...backends import register
from . import native, reference


def _redistribute(x: Tensor, p: Tensor, reward: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _triton() -> ModuleType:
    from . import triton

    return triton


define("softmax_redistribute(Tensor x, Tensor p, Tensor reward) -> Tensor", _redistribute)
register("softmax", native=native, triton=_triton, reference=reference)
