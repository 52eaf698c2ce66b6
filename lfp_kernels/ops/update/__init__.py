"""Optimizer updates of many tensors, and their global norm: schemas and fakes."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..._library import define
from ...backends import register
from . import native, reference


def _optimizer_update(params, feedback, states, codes, hyper, scale, lr=(), steps=()) -> None:
    return None


def _global_norm(tensors: list[Tensor]) -> Tensor:
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return tensors[0].new_empty((), dtype=torch.float64 if wide else torch.float32)


def _triton() -> ModuleType:
    from . import triton

    return triton


_ARGUMENTS = (
    "Tensor(a!)[] params, Tensor[] feedback, Tensor(b!)[] states, int[] codes, float[] hyper, "
    "Tensor? scale"
)
define(f"optimizer_update({_ARGUMENTS}) -> ()", _optimizer_update)
# On a GPU alone: learning rates and counts of steps that the kernel reads; a list may be empty.
define(f"optimizer_update_live({_ARGUMENTS}, Tensor[] lr, Tensor[] steps) -> ()", _optimizer_update)
define("global_norm(Tensor[] tensors) -> Tensor", _global_norm)
register("update", native=native, triton=_triton, reference=reference)
