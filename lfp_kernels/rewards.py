"""Initial rewards: what the output of a network is told, as a tensor of its shape and dtype.

Notation: ``o`` logits, ``p = softmax(o)``, ``y`` one-hot label, ``sigma`` the sigmoid. Rewards
carry no factor 1/N, and feedback sums over the batch: a learning rate that suits a mean loss must
be divided by the batch size, or the feedback clipped. ``out`` may have any batch dimensions:
[..., C] with labels [...]. Definitions: arXiv 2308.12053 and docs/math.md, section 5.

A label outside [0, C) raises ValueError on the CPU; on a GPU, where looking would stall the device,
it makes its row NaN. A NaN logit gives a NaN reward.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .functional.reward import loss_reward as _loss_reward
from .functional.reward import reward as _reward
from .functional.reward import spike_rate_reward as _spike_rate
from .ops.reward.codes import Kind

__all__ = [
    "REGISTRY", "binary_sigmoid", "bounded_softmax", "correct_classification", "cross_entropy",
    "get", "maximize", "minimize", "misclassification", "mse", "regression", "sigmoid", "snn_rate",
    "softmax",
]  # fmt: skip


def softmax(out: Tensor, y: Tensor) -> Tensor:
    """``o * (y - p)``: minus output times the gradient of the summed cross-entropy.

    Args:
        out: logits [N, C]. y: integer class labels [N].
    """
    return _reward("rewards.softmax", Kind.SOFTMAX, out, y)


def sigmoid(out: Tensor, y: Tensor) -> Tensor:
    """``o * (y - sigma(o))``: every class on its own.

    Args:
        out: logits [N, C]. y: integer class labels [N].
    """
    return _reward("rewards.sigmoid", Kind.SIGMOID, out, y)


def binary_sigmoid(out: Tensor, y: Tensor) -> Tensor:
    """``o * (y - sigma(o))`` with targets instead of labels.

    Args:
        out: logits [N, 1] (or [N, C] for independent outputs).
        y: targets of the same shape, or [N] for [N, 1]; any dtype, 0 or 1.
    """
    return _reward("rewards.binary_sigmoid", Kind.BINARY_SIGMOID, out, y)


def maximize(out: Tensor, y: Tensor | None = None, *, neuron: int | None = None) -> Tensor:
    """``sign(o) * (1 - sigma(o))`` at ``neuron`` and 0 elsewhere; at every output without it.

    Args:
        out: logits [N, C]. y: not read; there so that every reward is called alike.
    """
    return _reward("rewards.maximize", Kind.MAXIMIZE, out, None, neuron=neuron)


def minimize(out: Tensor, y: Tensor | None = None, *, neuron: int | None = None) -> Tensor:
    """``-sign(o) * (1 - sigma(o))`` at ``neuron`` and 0 elsewhere; at every output without it.

    Args:
        out: logits [N, C]. y: not read; there so that every reward is called alike.
    """
    return _reward("rewards.minimize", Kind.MINIMIZE, out, None, neuron=neuron)


def bounded_softmax(
    out: Tensor, y: Tensor, low: float = 0.0, high: float = 1.0, sign: bool = False
) -> Tensor:
    """``o * (y - p')`` where p' is p, but 1 above ``high`` and 0 below ``low``.

    What is already sure enough is left alone. ``sign=True`` puts sign(o) in the place of o.

    Args:
        out: logits [N, C]. y: integer class labels [N]. low, high: 0 <= low <= high <= 1.
    """
    return _reward(
        "rewards.bounded_softmax", Kind.BOUNDED_SOFTMAX, out, y, low=low, high=high, sign=sign
    )


def correct_classification(out: Tensor, y: Tensor) -> Tensor:
    """``sign(o_y)`` at the label where it is the arg-max (the first on ties), else 0.

    Args:
        out: logits [N, C]. y: integer class labels [N].
    """
    return _reward("rewards.correct_classification", Kind.CORRECT_CLASSIFICATION, out, y)


def misclassification(out: Tensor, y: Tensor) -> Tensor:
    """``-sign(o_k)`` at every k with ``o_k > o_y``, else 0.

    Args:
        out: logits [N, C]. y: integer class labels [N].
    """
    return _reward("rewards.misclassification", Kind.MISCLASSIFICATION, out, y)


def regression(out: Tensor, y: Tensor) -> Tensor:
    """Cubic: ``(t - o)^3 * sign(o)``.

    Args:
        out: predictions [N, C]. y: target values t of the same shape ([N] for [N, 1]).
    """
    return _reward("rewards.regression", Kind.REGRESSION, out, y)


def cross_entropy(out: Tensor, y: Tensor) -> Tensor:
    """``(y - p) / N``: minus the gradient of the mean cross-entropy, for the feedback-alignment
    family, whose signal is an error and not a relevance.

    Args:
        out: logits [N, C]. y: integer class labels [N].
    """
    return _loss_reward("rewards.cross_entropy", out, y, values=False)


def mse(out: Tensor, y: Tensor) -> Tensor:
    """``2 (t - o) / numel``: minus the gradient of the mean squared error (feedback alignment).

    Args:
        out: predictions [N, C]. y: target values t of the same shape ([N] for [N, 1]).
    """
    return _loss_reward("rewards.mse", out, y, values=True)


def snn_rate(spikes: Tensor, y: Tensor) -> Tensor:
    """Rate coding over T steps. True class, at every step: ``1 - sigma(sum_t s - T // 2)``; others:
    ``-s * (1 - sigma(sum_t (1 - s) - T // 2))``. No factor 1/T.

    Args:
        spikes: 0 or 1, [T, N, C]. y: integer class labels [N].
    """
    return _spike_rate("rewards.snn_rate", spikes, y)


REGISTRY: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        softmax, sigmoid, binary_sigmoid, maximize, minimize, bounded_softmax,
        correct_classification, misclassification, regression, cross_entropy, mse, snn_rate,
    )
}  # fmt: skip


def get(reward: str | Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The reward function of that name; a callable ``f(out, y)`` is returned as it is.

    Raises:
        ValueError: no such name; the message lists the names.
        TypeError: neither a name nor a callable.
    """
    if callable(reward):
        return reward
    if not isinstance(reward, str):
        raise TypeError(
            f"reward: expected a name or a function (out, y) -> reward, got {type(reward).__name__}"
        )
    if reward not in REGISTRY:
        raise ValueError(
            f"reward: expected one of {', '.join(REGISTRY)}, or a function (out, y) -> reward, "
            f"got {reward!r}"
        )
    return REGISTRY[reward]
