"""Where branches meet and where values are dropped: residual sum and dropout."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _validate as check
from .. import ops
from .._no_grad import no_grad
from ..backends import select
from ..rules import Epsilon, Rule, accumulate_dtype

_ = ops  # registers the schemas
_EPSILON = Epsilon()


@no_grad
def sum_redistribute(
    a: Tensor, b: Tensor, reward: Tensor, rule: Rule = _EPSILON, *, signal_in: bool = False
) -> tuple[Tensor, Tensor]:
    """Rewards of ``a`` and ``b`` from the reward at ``a + b``: each takes what it contributed.

    ``s = prologue(r, a + b)``, ``r_a = a * s``, ``r_b = b * s`` in one pass.

    Args:
        a, b: operands; they broadcast to reward's shape, and the reward of a broadcast operand is
            summed back to its own.
        signal_in: ``reward`` is already s.

    Returns:
        The rewards of a and b, each in its operand's shape.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    op = "sum_redistribute"
    check.floating(op, "reward", reward)
    check.plain_rule(op, rule)
    for name, value in (("a", a), ("b", b)):
        check.like(op, name, value, reward, "reward")
    implementation = select("combine", reward)
    if a.shape == b.shape:
        check.shape(op, "reward", reward, a.shape)
        return implementation.sum_redistribute(a, b, reward, rule, signal_in)
    try:
        shape = torch.broadcast_shapes(a.shape, b.shape)
    except RuntimeError:
        raise ValueError(
            f"{op}: b: expected a shape that broadcasts with a's {tuple(a.shape)}, "
            f"got {tuple(b.shape)}"
        ) from None
    check.shape(op, "reward", reward, shape)
    acc = accumulate_dtype(reward.dtype)  # copies are summed before the result is rounded
    rewards = implementation.sum_redistribute(
        a.to(acc).expand(shape), b.to(acc).expand(shape), reward.to(acc), rule, signal_in
    )
    first, second = (r.sum_to_size(t.shape).to(t.dtype) for r, t in zip(rewards, (a, b)))
    return first, second


@no_grad
def dropout(
    x: Tensor, p: float, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """``(x * mask / (1 - p), mask)``; the mask (bool) is what F.dropout draws from the seed."""
    check.floating("dropout", "x", x)
    _check_probability("dropout", p)
    # Drawn in x's dtype, as F.dropout does: the generator's numbers depend on it.
    mask = torch.empty_like(x).bernoulli_(1 - p, generator=generator).bool()
    if p == 1:
        return torch.zeros_like(x), mask
    return select("combine", x).dropout_redistribute(x, mask, 1 / (1 - p)), mask


@no_grad
def dropout_redistribute(
    reward: Tensor, mask: Tensor, p: float, *, conserving: bool = False
) -> Tensor:
    """Input reward of a dropout: ``reward * mask / (1 - p)`` as the official lfprop package has it,
    or ``reward * mask`` with ``conserving``.
    """
    op = "dropout_redistribute"
    check.floating(op, "reward", reward)
    check.tensor(op, "mask", mask)
    check.shape(op, "mask", mask, reward.shape)
    if mask.dtype != torch.bool:
        raise TypeError(f"{op}: mask: expected torch.bool, got {mask.dtype}; pass dropout's mask")
    if mask.device != reward.device:
        raise ValueError(
            f"{op}: mask: expected device {reward.device} like reward, got {mask.device}"
        )
    _check_probability(op, p)
    scale = 1.0 if conserving or p == 1 else 1 / (1 - p)
    return select("combine", reward).dropout_redistribute(reward, mask, scale)


def _check_probability(op: str, p: float) -> None:
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"{op}: p: expected a number in [0, 1], got {p!r}")
    if not 0 <= p <= 1:
        raise ValueError(f"{op}: p: expected a probability in [0, 1], got {p}")
