"""Optimizer updates and the global norm in compiled code (csrc/cpu/update.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...optim import Update
from .. import _cuda
from . import reference

_ops = torch.ops.lfp_kernels


def global_norm(tensors: list[Tensor]) -> Tensor:
    return _ops.global_norm.default(tensors)


def update(
    params: list[Tensor], feedback: list[Tensor], updates: list[Update], scale: Tensor | None
) -> None:
    lr = [step.live.lr for step in updates if step.live is not None and step.live.lr is not None]
    steps = [
        step.live.step for step in updates if step.live is not None and step.live.step is not None
    ]
    live = bool(lr or steps)
    whole = all(len(values) in (0, len(updates)) for values in (lr, steps))
    if live and not (whole and _cuda.is_gpu(params[0])):
        return reference.update(params, feedback, updates, scale)
    states: list[Tensor] = []
    codes: list[int] = []
    hyper: list[float] = []
    for step in updates:
        states += step.states
        codes.append(step.code)
        hyper += step.hyper
    if not live:
        return _ops.optimizer_update.default(params, feedback, states, codes, hyper, scale)
    _ops.optimizer_update_live.default(params, feedback, states, codes, hyper, scale, lr, steps)
