"""Rows of a table: the feedback of all, or one optimizer step of those in use."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..._library import define
from ...backends import register
from . import native, reference


def _redistribute(weight: Tensor, tokens, reward, padding, eps) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _update(weight, tokens, reward, states, padding, eps, optimizer, hyper) -> None:
    return None


def _triton() -> ModuleType:
    from . import triton

    return triton


define(
    "embedding_redistribute(Tensor weight, Tensor tokens, Tensor reward, int padding, float eps) "
    "-> Tensor",
    _redistribute,
)
define(
    "embedding_redistribute_update(Tensor(a!) weight, Tensor tokens, Tensor reward, "
    "Tensor(b!)[] states, int padding, float eps, int optimizer, float[] hyper) -> ()",
    _update,
)
register("embedding", native=native, triton=_triton, reference=reference)
