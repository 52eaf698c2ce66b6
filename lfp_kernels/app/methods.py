"""Ways to train a model for one batch: LFP and the feedback-alignment family, fused or drop-in;
gradient descent; LFP nested."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import lfp_kernels
from lfp_kernels import composites
from lfp_kernels.nested import NestedReference
from lfp_kernels.nn import Spiking

from . import AppError

ALIGNMENT: dict[str, Callable[[], composites.Composite]] = {
    "fa": composites.FeedbackAlignment,
    "usf": composites.UniformSignSymmetry,
    "brsf": composites.BatchSignSymmetry,
    "frsf": composites.FixedSignSymmetry,
    "kp": composites.KolenPollack,
    "dfa": composites.DirectFeedbackAlignment,
    "drtp": lambda: composites.DirectFeedbackAlignment("drtp"),
    "linbp": composites.LinBP,
}
METHODS = ("lfp", "sgd", *ALIGNMENT)
WAYS = ("fused", "drop-in")
# Of the whole model, or of the feedback products of a float32 model.
PRECISIONS = ("float32", "bfloat16", "bfloat16-feedback")
NOT_SPIKING = (
    "expected lfp or sgd for a spiking model (the feedback-alignment family needs the derivatives "
    "that a spike does not have)"
)

Reward = Callable[[Tensor, Tensor], Tensor]


class Learner(NamedTuple):
    """``step(x, y)`` updates the model once and returns its output from before the update: logits
    [N, C] or spikes [T, N, C]; ``optimizer`` is what schedulers drive."""

    step: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer


def scores(out: Tensor) -> Tensor:
    """What classes are told by [N, C]: logits, or how often each output neuron fired."""
    return out if out.dim() == 2 else out.sum(0)


def spike_rate(spikes: Tensor, y: Tensor) -> Tensor:
    """The rate-coded reward of spikes [T, N, C], over T: whatever T, the same norm limit fits."""
    return lfp_kernels.rewards.snn_rate(spikes, y) / len(spikes)


def reward(out: Tensor, y: Tensor) -> Tensor:
    """The reward that LFP hands out at the output."""
    return lfp_kernels.rewards.softmax(out, y) if out.dim() == 2 else spike_rate(out, y)


def learner(
    model: nn.Module,
    method: str = "lfp",
    way: str = "fused",
    *,
    lr: float = 0.1,
    momentum: float = 0.9,
    clip: float | None = 3.0,
    eps: float = 1e-6,
    example: Tensor | None = None,
    feedback_dtype: torch.dtype | None = None,
) -> Learner:
    """SGD with momentum and a global norm limit; only where its direction comes from differs.

    Args:
        method: one of METHODS. way: one of WAYS, for all but sgd.
        example: an input [N, ...], for direct feedback alignment of convolutions.
        feedback_dtype: of the feedback products, for all but sgd (torch.bfloat16, or None).

    A spiking network learns by lfp, or by sgd through the surrogate derivatives of its neurons.
    """
    if method == "sgd":
        return _gradient(model, lr, momentum, clip)
    if method != "lfp" and isinstance(model, Spiking):
        raise AppError(f"--method: {NOT_SPIKING}, got {method!r}")
    composite = composites.Epsilon(eps=eps) if method == "lfp" else ALIGNMENT[method]()
    if feedback_dtype is not None:
        composite = composite.with_feedback_dtype(feedback_dtype)
    composite.prepare(model, example)
    make = _fused if way == "fused" else _drop_in
    loss: Reward = reward if method == "lfp" else lfp_kernels.rewards.cross_entropy
    return make(model, composite, loss, lr, momentum, clip)


def _fused(
    model: nn.Module,
    composite: composites.Composite,
    reward_of: Reward,
    lr: float,
    momentum: float,
    clip: float | None,
) -> Learner:
    optimizer = lfp_kernels.optim.SGD(lr=lr, momentum=momentum, clip_norm=clip)
    fused = lfp_kernels.fuse(model, composite, reward=reward_of, optimizer=optimizer)

    def step(x: Tensor, y: Tensor) -> Tensor:
        return fused(x, y).out

    return Learner(step, fused.optimizer)


def _drop_in(
    model: nn.Module,
    composite: composites.Composite,
    reward_of: Reward,
    lr: float,
    momentum: float,
    clip: float | None,
) -> Learner:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        with composite.context(model):
            out = model(x)
            if isinstance(composite, composites.DirectFeedbackAlignment):
                composite.target(y)
            lfp_kernels.backward(out, reward_of(out, y))
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
        nn.functional.cross_entropy(scores(out), y).backward()
        _clip_and_step(model, optimizer, clip)
        return out.detach()

    return Learner(step, optimizer)


def _clip_and_step(model: nn.Module, optimizer: torch.optim.Optimizer, clip: float | None) -> None:
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
