"""Activations: only ``step`` needs an operator; the reward passes every activation unchanged."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..._library import define
from ...backends import register
from . import native, reference


def _step(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _triton() -> ModuleType:
    from . import triton

    return triton


define("step(Tensor x) -> Tensor", _step)
register("activation", native=native, triton=_triton, reference=reference)
