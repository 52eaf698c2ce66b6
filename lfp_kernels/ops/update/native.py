"""Optimizer updates and the global norm in compiled code (csrc/cpu/update.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...optim import Update

_ops = torch.ops.lfp_kernels


def global_norm(tensors: list[Tensor]) -> Tensor:
    return _ops.global_norm.default(tensors)


def update(
    params: list[Tensor], feedback: list[Tensor], updates: list[Update], scale: Tensor | None
) -> None:
    states: list[Tensor] = []
    codes: list[int] = []
    hyper: list[float] = []
    for step in updates:
        states += step.states
        codes.append(step.code)
        hyper += step.hyper
    _ops.optimizer_update.default(params, feedback, states, codes, hyper, scale)
