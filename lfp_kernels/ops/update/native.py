"""Optimizer updates and the global norm in compiled code (csrc/cpu/update.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...optim import Update
from .. import _cuda

_ops = torch.ops.lfp_kernels


def global_norm(tensors: list[Tensor]) -> Tensor:
    return _ops.global_norm.default(tensors)


def takes_live(params: list[Tensor], updates: list[Update]) -> bool:
    """Whether updates that read the device run here: on a GPU, where all read the same values."""
    columns = zip(*(step.live or (None, None) for step in updates))
    alike = all(len({value is None for value in column}) == 1 for column in columns)
    return alike and _cuda.is_gpu(params[0])


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
    live = [step.live for step in updates if step.live is not None]
    if not live:
        return _ops.optimizer_update.default(params, feedback, states, codes, hyper, scale)
    lr = [now.lr for now in live if now.lr is not None]
    steps = [now.step for now in live if now.step is not None]
    _ops.optimizer_update_live.default(params, feedback, states, codes, hyper, scale, lr, steps)
