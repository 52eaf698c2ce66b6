"""``get_reward``: reward and loss functions by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import reward_functions

_LOG_OF_ZERO = -99999.99999  # lfprop's stand-in for the logarithm of a probability cut to 0


class CustomCrossEntropyLoss(nn.Module):
    """Cross entropy on softmax outputs cut to 1 above ``higher_bound`` and to 0 below
    ``lower_bound``: where they are cut, the logits get no gradient.

    Args:
        lower_bound, higher_bound: of the softmax.
        logit_sign_only: divide the gradient by ``|logit|``.
    """

    def __init__(
        self, lower_bound: float = 0.0, higher_bound: float = 1.0, logit_sign_only: bool = False
    ) -> None:
        super().__init__()
        self.lower_bound = lower_bound
        self.higher_bound = higher_bound
        self.logit_sign_only = logit_sign_only

    def forward(self, inp: Tensor, target: Tensor) -> Tensor:
        p = inp.detach().softmax(1)
        above, below = p > self.higher_bound, p < self.lower_bound
        if inp.requires_grad:
            size = inp.detach().abs() if self.logit_sign_only else None

            def cut(gradient: Tensor) -> Tensor:
                gradient = gradient if size is None else gradient / size
                return gradient.masked_fill(above | below, 0)

            inp.register_hook(cut)
        log_p = inp.log_softmax(1).masked_fill(above, 0).masked_fill(below, _LOG_OF_ZERO)
        return F.nll_loss(log_p, target)


class SigmoidBCELossWrapper(nn.BCELoss):
    """Binary cross entropy of ``sigmoid(logits)``, labels in any shape of as many elements."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().forward(torch.sigmoid(logits), labels.view_as(logits).to(logits.dtype))


class MaximizeSingleNeuron(nn.Module):
    """``-sigma(o)``"""

    def forward(self, logits: Tensor, labels: Tensor | None = None) -> Tensor:
        return -torch.sigmoid(logits)


class MinimizeSingleNeuron(nn.Module):
    """``sigma(o)``"""

    def forward(self, logits: Tensor, labels: Tensor | None = None) -> Tensor:
        return torch.sigmoid(logits)


class RateCodedCrossEntropyLoss(nn.Module):
    """Mean cross entropy over the time steps of spikes [T, N, C] and labels [N]."""

    def forward(self, spikes: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(spikes.flatten(0, 1), labels.repeat(len(spikes)))


REWARD_MAP: dict[str, Callable[..., Any]] = {
    "correct-class": reward_functions.SigmoidLossReward,
    "binarysigmoidlossreward": reward_functions.BinarySigmoidLossReward,
    "maximizesingleneuronreward": reward_functions.MaximizeSingleNeuron,
    "minimizesingleneuronreward": reward_functions.MinimizeSingleNeuron,
    "sigmoidlossreward": reward_functions.SigmoidLossReward,
    "softmaxlossreward": reward_functions.SoftmaxLossReward,
    "misclassificationreward": reward_functions.MisclassificationReward,
    "correctclassification": reward_functions.CorrectclassificationReward,
    "boundedsoftmaxreward": reward_functions.BoundedSoftmaxReward,
    "snnratecodedreward": reward_functions.SnnCorrectClassRewardSpikesRateCoded,
    "correct-class-spikes-ratecoded": reward_functions.SnnCorrectClassRewardSpikesRateCoded,
}

LOSS_MAP: dict[str, Callable[..., nn.Module]] = {
    "ce-loss": nn.CrossEntropyLoss,
    "custom-ce-loss": CustomCrossEntropyLoss,
    "bce-loss": SigmoidBCELossWrapper,
    "maximizesingleneuronloss": MaximizeSingleNeuron,
    "minimizesingleneuronloss": MinimizeSingleNeuron,
    "snnratecodedloss": RateCodedCrossEntropyLoss,
}


def get_reward(reward_name: str, device: Any, *args: Any, **kwargs: Any) -> Any:
    """The reward ``(logits, labels) -> reward`` or the loss of that name.

    Args:
        reward_name: a key of REWARD_MAP or LOSS_MAP. device: kept by rewards, not used.
        kwargs: settings of the rewards and of "custom-ce-loss".

    Raises:
        ValueError: no such name; the message lists the names.
    """
    if reward_name in REWARD_MAP:
        return REWARD_MAP[reward_name](device=device, **kwargs)
    if reward_name in LOSS_MAP:
        return LOSS_MAP[reward_name](**(kwargs if reward_name == "custom-ce-loss" else {}))
    raise ValueError(
        f"get_reward: expected one of {', '.join((*REWARD_MAP, *LOSS_MAP))}, got {reward_name!r}"
    )
