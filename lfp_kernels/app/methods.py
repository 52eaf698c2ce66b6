"""Ways to train a model for one batch: LFP fused, LFP drop-in, gradient descent, LFP nested."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import lfp_kernels
from lfp_kernels.nested import NestedReference

METHODS = ("lfp", "sgd")
WAYS = ("fused", "drop-in")


class Learner(NamedTuple):
    """``step(x, y)`` updates the model once and returns the logits [N, C] from before the update;
    ``optimizer`` is what schedulers drive."""

    step: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer


def learner(
    model: nn.Module,
    method: str = "lfp",
    way: str = "fused",
    *,
    lr: float = 0.1,
    momentum: float = 0.9,
    clip: float | None = 3.0,
    eps: float = 1e-6,
) -> Learner:
    """SGD with momentum and a global norm limit; only where its direction comes from differs.

    Args:
        method: one of METHODS. way: one of WAYS, for lfp.
    """
    if method == "sgd":
        return _gradient(model, lr, momentum, clip)
    if way == "fused":
        return _fused(model, lr, momentum, clip, eps)
    return _drop_in(model, lr, momentum, clip, eps)


def _fused(model: nn.Module, lr: float, momentum: float, clip: float | None, eps: float) -> Learner:
    fused = lfp_kernels.fuse(
        model,
        lfp_kernels.composites.Epsilon(eps=eps),
        reward="softmax",
        optimizer=lfp_kernels.optim.SGD(lr=lr, momentum=momentum, clip_norm=clip),
    )

    def step(x: Tensor, y: Tensor) -> Tensor:
        return fused(x, y).out

    return Learner(step, fused.optimizer)


def _drop_in(
    model: nn.Module, lr: float, momentum: float, clip: float | None, eps: float
) -> Learner:
    composite = lfp_kernels.composites.Epsilon(eps=eps)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        with composite.context(model):
            out = model(x)
            lfp_kernels.backward(out, lfp_kernels.rewards.softmax(out, y))
        _clip_and_step(model, optimizer, clip)
        return out.detach()

    return Learner(step, optimizer)


def nested(
    model: nn.Module, *, lr: float, momentum: float, clip: float | None, eps: float
) -> Learner:
    """LFP by nested autograd calls, as the official package runs it: to compare the cost."""
    reference = NestedReference(model, eps=eps)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)

    def step(x: Tensor, y: Tensor) -> Tensor:
        with reference.context():
            out, _ = reference.redistribute(x, y)
        for parameter in model.parameters():
            feedback = parameter.feedback  # type: ignore[attr-defined]
            parameter.grad = None if feedback is None else -feedback
        _clip_and_step(model, optimizer, clip)
        return out

    return Learner(step, optimizer)


def _gradient(model: nn.Module, lr: float, momentum: float, clip: float | None) -> Learner:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        out = model(x)
        nn.functional.cross_entropy(out, y).backward()
        _clip_and_step(model, optimizer, clip)
        return out.detach()

    return Learner(step, optimizer)


def _clip_and_step(model: nn.Module, optimizer: torch.optim.Optimizer, clip: float | None) -> None:
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
