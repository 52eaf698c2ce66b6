"""Initial rewards as callables ``(logits, labels) -> reward`` in the logits' shape and dtype.

Notation: o logits [N, C], p their softmax, y the one-hot label (docs/math.md, section 4). The
constructor's ``device`` is kept for its name's sake: a reward lives where the logits are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .... import rewards


class _Reward:
    def __init__(self, device: Any, **kwargs: Any) -> None:
        self.device = device
        self.saved_rewards: list[Tensor] = []

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.reward(logits.detach(), labels.to(logits.device))

    def reward(self, logits: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError


class MaximizeSingleNeuron(_Reward):
    """``sign(o) * (1 - sigma(o))`` at every output; the labels are not read."""

    def __call__(self, logits: Tensor, labels: Tensor | None = None) -> Tensor:
        return rewards.maximize(logits.detach())


class MinimizeSingleNeuron(_Reward):
    """``-sign(o) * (1 - sigma(o))`` at every output; the labels are not read."""

    def __call__(self, logits: Tensor, labels: Tensor | None = None) -> Tensor:
        return rewards.minimize(logits.detach())


class BinarySigmoidLossReward(_Reward):
    """``o * (y - sigma(o))`` with targets of as many elements as there are logits."""

    def reward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return rewards.binary_sigmoid(logits, labels.reshape(logits.shape))


class SigmoidLossReward(_Reward):
    """``o * (y - sigma(o))``, labels [N]."""

    def reward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return rewards.sigmoid(logits, labels)


class SoftmaxLossReward(_Reward):
    """``o * (y - p)``, labels [N]."""

    def reward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return rewards.softmax(logits, labels)


class BoundedSoftmaxReward(_Reward):
    """``o * (y - p')``: p' is p, but 1 above ``higher_bound`` and 0 below ``lower_bound``;
    ``logit_sign_only`` puts sign(o) in the place of o."""

    def __init__(
        self,
        device: Any,
        lower_bound: float = 0.0,
        higher_bound: float = 1.0,
        logit_sign_only: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(device)
        self.lower_bound = lower_bound
        self.higher_bound = higher_bound
        self.logit_sign_only = logit_sign_only

    def reward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return rewards.bounded_softmax(
            logits, labels, self.lower_bound, self.higher_bound, self.logit_sign_only
        )


class CorrectclassificationReward(_Reward):
    """``sign(o_y)`` at the label where no logit is larger, ties included; else 0."""

    def reward(self, logits: Tensor, labels: Tensor) -> Tensor:
        index = labels.long().unsqueeze(1)
        own = logits.gather(1, index)
        right = torch.where(own == logits.amax(1, keepdim=True), own.sign(), torch.zeros_like(own))
        return torch.zeros_like(logits).scatter(1, index, right)


class MisclassificationReward(_Reward):
    """``-sign(o_k)`` at every k with ``o_k > o_y``, else 0."""

    def reward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return rewards.misclassification(logits, labels)


class SnnCorrectClassRewardSpikesRateCoded(_Reward):
    """Rate coding of spikes [T, N, C]; see :func:`lfp_kernels.rewards.snn_rate`."""

    def reward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return rewards.snn_rate(logits, labels)

    def get_predictions(self, spikes: Tensor) -> Tensor:
        """The class that spiked most often [N]."""
        return spikes.sum(0).argmax(-1)
