"""Optimizer updates in plain PyTorch: the oracle. Feedback points uphill."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._no_grad import no_grad
from ...optim import ADAMW, SGD_MOMENTUM, SGD_PLAIN, Update
from ...rules import accumulate_dtype


@no_grad
def apply_update(
    param: Tensor, feedback: Tensor, update: Update, factor: Tensor | None = None
) -> None:
    """One in-place optimizer step of ``param`` [any shape] along ``feedback`` [same shape], times
    ``factor`` (0-dim) where there is one."""
    hyper: list[Any] = [*update.hyper]
    acc = accumulate_dtype(param.dtype)
    if update.live is not None:
        lr, step = update.live
        if lr is not None:
            hyper[0] = lr.to(acc)
        if step is not None:
            hyper[8:10] = (1 - (1 - rest) ** (step.double() + 1) for rest in hyper[10:12])
    lr, decay, scale, momentum, nesterov, _, beta2, eps, c1, c2, rest1, rest2 = hyper
    w = param.to(acc)
    ascent = feedback.to(acc) * scale
    if factor is not None:
        ascent = ascent * factor.to(acc)
    if update.code == SGD_PLAIN:
        w = w - lr * (decay * w - ascent)
    elif update.code == SGD_MOMENTUM:
        d = decay * w - ascent
        m = momentum * update.states[0].to(acc) + d
        update.states[0].copy_(m)
        w = w - lr * (d + momentum * m if nesterov else m)
    elif update.code == ADAMW:
        a, b = (state.to(acc) for state in update.states)
        a = a + rest1 * (-ascent - a)
        b = beta2 * b + rest2 * ascent * ascent
        update.states[0].copy_(a)
        update.states[1].copy_(b)
        w = w - lr * (decay * w + a / c1 / ((b / c2).sqrt() + eps))
    else:
        raise ValueError(f"optimizer_update: unknown optimizer code {update.code}")
    param.copy_(w)


def global_norm(tensors: list[Tensor]) -> Tensor:
    """L2 norm over all elements, accumulated in float64; float64 if any tensor is, else float32."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    squares = [torch.linalg.vector_norm(t, dtype=torch.float64).square() for t in tensors]
    return torch.stack(squares).sum().sqrt().to(torch.float64 if wide else torch.float32)


def update(
    params: list[Tensor], feedback: list[Tensor], updates: list[Update], scale: Tensor | None
) -> None:
    for param, fb, step in zip(params, feedback, updates):
        apply_update(param, fb, step, scale)
