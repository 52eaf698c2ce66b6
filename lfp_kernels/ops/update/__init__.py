"""Optimizer updates of many tensors, and their global norm: schemas and fakes."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..._library import define
from ...backends import register
from . import native, reference


def _optimizer_update(params, feedback, states, codes, hyper, scale) -> None:
    return None


def _global_norm(tensors: list[Tensor]) -> Tensor:
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return tensors[0].new_empty((), dtype=torch.float64 if wide else torch.float32)


def _triton() -> ModuleType:
    from . import triton

    return triton


define(
    "optimizer_update(Tensor(a!)[] params, Tensor[] feedback, Tensor(b!)[] states, int[] codes, "
    "float[] hyper, Tensor? scale) -> ()",
    _optimizer_update,
)
define("global_norm(Tensor[] tensors) -> Tensor", _global_norm)
register("update", native=native, triton=_triton, reference=reference)
