"""Relevance through layer, RMS and group norms (docs/math.md, section 7)."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from .. import _validate as check
from .. import ops
from .._no_grad import no_grad
from ..backends import select

_ = ops  # registers the schemas


class NormFeedback(NamedTuple):
    """Input reward, shaped like x, and feedback of weight and bias (None where there is none)."""

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None


@no_grad
def norm_redistribute(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    reward: Tensor,
    *,
    groups: int | None = None,
    centred: bool = True,
    eps: float = 1e-5,
    stabilizer: float = 1e-6,
    identity: bool = False,
) -> NormFeedback:
    """Relevance through a layer norm, an RMS norm (``centred=False``) or a group norm (``groups``).

    Args:
        x, reward: [..., *weight.shape], or [N, C, ...] of a group norm. weight, bias: or None.
        identity: the division by the deviation hands the reward on, and the rest (mean, weight,
            bias) follows the epsilon rule (AttnLRP): the reward itself, where there is no mean and
            no bias. Else the epsilon rule with the whole derivative, statistics included (the
            official package).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    op = "norm_redistribute"
    check.floating(op, "x", x)
    check.like(op, "reward", reward, x, "x")
    check.shape(op, "reward", reward, x.shape)
    parameters = [p for p in (weight, bias) if p is not None]
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None:
            check.like(op, name, p, x, "x")
            check.shape(op, name, p, parameters[0].shape)
    flat = [None if p is None else p.reshape(-1) for p in (weight, bias)]
    if groups is None:
        shape = parameters[0].shape if parameters else x.shape[-1:]
        if tuple(x.shape[x.dim() - len(shape) :]) != tuple(shape):
            raise ValueError(
                f"{op}: x: expected shape [..., {', '.join(map(str, shape))}] for such a weight, "
                f"got {tuple(x.shape)}"
            )
        rows = x.reshape(-1, math.prod(shape)) if x.numel() else x.reshape(0, math.prod(shape))
        found, *sums = select("layer_norm", x).redistribute(
            rows, *flat, reward.reshape(rows.shape), centred, eps, stabilizer, identity
        )
    else:
        _check_groups(op, x, parameters, groups, centred)
        planes = x.reshape(*x.shape[:2], math.prod(x.shape[2:]))
        found, *sums = select("group_norm", x).group_redistribute(
            planes, *flat, reward.reshape(planes.shape), groups, eps, stabilizer, identity
        )
    of_weight, of_bias = (
        None if p is None else (p.abs() * total.view(p.shape)).to(p.dtype)
        for p, total in zip((weight, bias), sums)
    )
    return NormFeedback(found.view(x.shape), of_weight, of_bias)


def _check_groups(op: str, x: Tensor, parameters: list[Tensor], groups: int, centred: bool) -> None:
    if x.dim() < 2:
        raise ValueError(f"{op}: x: expected shape [N, C, ...] with groups, got {tuple(x.shape)}")
    if not isinstance(groups, int) or groups < 1 or x.shape[1] % groups:
        raise ValueError(
            f"{op}: groups: expected a divisor of the {x.shape[1]} channels of x, got {groups!r}"
        )
    if not centred:
        raise ValueError(f"{op}: centred: expected True with groups, got False")
    if parameters:
        check.shape(op, "weight and bias", parameters[0], x.shape[1:2])
