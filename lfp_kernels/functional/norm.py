"""Batch normalization: forward and redistribute."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _validate as check
from .. import ops
from .._no_grad import no_grad
from ..backends import select
from ..rules import Epsilon, Rule
from .composed import Redistributed, is_composed, redistribute_composed

_ = ops  # registers the schemas
_EPSILON = Epsilon()


class Normalized(NamedTuple):
    """Output of a batch normalization and the statistics that made it."""

    out: Tensor
    mean: Tensor
    invstd: Tensor


@no_grad
def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    *,
    relu: bool = False,
) -> Normalized:
    """``(x - mean) * invstd * weight + bias``, with ``relu`` the positive part of it, in one pass.

    With ``training``, or without running statistics, mean and variance are those of the batch and
    the running statistics move in place exactly once, as torch's do:
    ``running = momentum * batch + (1 - momentum) * running``, the variance unbiased.

    Args:
        x: [N, C, *]. weight, bias, running_mean, running_var: [C] or None, of x's dtype or float32.
        momentum: weight of the batch; resolve ``None`` (a cumulative average) before the call.
        eps: added to the variance; >= 0.

    Returns:
        Normalized(out [N, C, *] in x's memory format, mean [C], invstd [C] =
        1 / sqrt(variance + eps)), the statistics in float32 or float64. An empty batch leaves the
        running statistics alone.

    Raises:
        ValueError: one value per channel in training; a wrong shape or device. TypeError: a wrong
        type or dtype.
    """
    op = "batch_norm"
    _check_layer(op, x, weight, bias)
    _check_channel(op, "running_mean", running_mean, x)
    _check_channel(op, "running_var", running_var, x)
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(f"{op}: {missing}: expected a tensor, got None; give both or neither")
    training = bool(training) or running_mean is None
    momentum = _number(op, "momentum", momentum)
    eps = _number(op, "eps", eps)
    if not eps >= 0:
        raise ValueError(f"{op}: eps: expected a number >= 0, got {eps}")
    if training and x.shape[1] and x.numel() == x.shape[1]:
        raise ValueError(
            f"{op}: x: expected more than 1 value per channel in training, got shape "
            f"{tuple(x.shape)}; use a larger batch, or eval mode"
        )
    return Normalized(
        *select(op, x).forward(
            x, weight, bias, running_mean, running_var, training, momentum, eps, relu
        )
    )


@no_grad
def batch_norm_redistribute(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor,
    reward: Tensor,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    rule: Rule = _EPSILON,
    *,
    need: tuple[bool, bool, bool] = (True, True, True),
    below: Rule | None = None,
    signal_in: bool = False,
) -> Redistributed:
    """Redistribute the reward at the output of a batch normalization (docs/math.md, section 3).

    With ``s = prologue(reward, z)`` and ``xhat = (x - mean) * invstd``:
    ``dx = weight * invstd * (s - mean(s) - xhat * mean(s * xhat))`` in training,
    ``dx = weight * invstd * s`` with running statistics; the input reward is ``x * dx``, weight
    feedback ``|weight| * sum(s * xhat)``, bias feedback ``|bias| * sum(s)`` under the epsilon rule.

    Args:
        x: layer input [N, C, *]. weight, bias: [C] or None.
        z: layer output [N, C, *]; behind a ReLU its positive part serves, since the reward is 0
            where that is 0. reward: reward at z.
        mean, invstd: [C], what :func:`batch_norm` returned.
        training: whether they are the statistics of this batch.
        rule, need, below, signal_in: as in ``linear_redistribute``.

    Returns:
        Redistributed(input [N, C, *] in x's memory format, weight [C], bias [C]); feedback points
        uphill and is summed over the batch and the positions.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    op = "batch_norm_redistribute"
    _check_layer(op, x, weight, bias)
    check.rule(op, rule)
    check.like(op, "reward", reward, x, "x")
    check.shape(op, "reward", reward, x.shape)
    if signal_in:
        z = reward
    else:
        check.like(op, "z", z, x, "x")
        check.shape(op, "z", z, x.shape)
    for name, value in (("mean", mean), ("invstd", invstd)):
        _check_channel(op, name, check.tensor(op, name, value), x)
    if is_composed(rule):
        return redistribute_composed(
            rule, need, weight, bias, reward, z,
            lambda part, wanted, r, out: batch_norm_redistribute(
                x, weight, bias, out, r, mean, invstd, training, part, need=wanted, below=below
            ),
        )  # fmt: skip
    if not rule.has_plain_form and rule.is_epsilon_but_for_its_prologue and not signal_in:
        reward = z = rule.prologue(reward, z)
        rule, signal_in = _EPSILON, True
    check.plain_rule(op, rule)
    return Redistributed(
        *select("batch_norm", x).redistribute(
            x, weight, bias, z, reward, mean, invstd, bool(training), rule, need, below, signal_in
        )
    )


def _number(op: str, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError(f"{op}: {name}: expected a finite number, got {value!r}")
    return float(value)


def _check_layer(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    check.floating(op, "x", x)
    if x.dim() < 2:
        raise ValueError(f"{op}: x: expected shape [N, C, *], got {tuple(x.shape)}")
    _check_channel(op, "weight", weight, x)
    _check_channel(op, "bias", bias, x)


def _check_channel(op: str, name: str, value: Tensor | None, x: Tensor) -> None:
    """One value per channel, in x's dtype or, beside 16-bit activations, in float32."""
    if value is None:
        return
    check.tensor(op, name, value)
    if value.dtype != x.dtype and not (x.dtype.itemsize == 2 and value.dtype == torch.float32):
        raise TypeError(
            f"{op}: {name}: expected {x.dtype} like x"
            + (", or torch.float32" if x.dtype.itemsize == 2 else "")
            + f", got {value.dtype}; convert it with .to({x.dtype})"
        )
    if value.device != x.device:
        raise ValueError(
            f"{op}: {name}: expected device {x.device} like x, got {value.device}; "
            f"move it with .to({str(x.device)!r})"
        )
    check.shape(op, name, value, x.shape[1:2])
