"""Rules that are made of other rules' calls: separate rules for input and weight, and Oja's."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..optim import Update
from ..rules import Hebbian, Oja, Rule, Separate
from .update import optimizer_update

Need = tuple[bool, bool, bool]


class Redistributed(NamedTuple):
    """What a layer makes of the reward at its output; None where it was not asked for."""

    input: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


# run(rule, need, reward, z): one call of the layer's redistribution
Run = Callable[[Rule, Need, Tensor, Tensor], Redistributed]


def is_composed(rule: Rule) -> bool:
    return isinstance(rule, (Separate, Oja))


def input_rule(rule: Rule) -> Rule:
    """What an operator without weights makes of a rule."""
    return rule.input if isinstance(rule, Separate) else rule


def redistribute_composed(
    rule: Rule,
    need: Need,
    weight: Tensor | None,
    bias: Tensor | None,
    reward: Tensor,
    z: Tensor,
    run: Run,
) -> Redistributed:
    found = Redistributed(None, None, None)
    if isinstance(rule, Separate):
        if need[0]:
            found = run(rule.input, (True, False, False), reward, z)
        rule, need = rule.weight, (False, need[1], need[2])
    if not (need[1] or need[2]):
        return found
    if isinstance(rule, Oja):
        part = _oja(need, weight, bias, reward, z, run)
    else:
        part = run(rule, need, reward, z)
    return Redistributed(found.input, part.weight, part.bias)


def _oja(
    need: Need, weight: Tensor | None, bias: Tensor | None, reward: Tensor, z: Tensor, run: Run
) -> Redistributed:
    # Hebbian gives |W| * ((r z)^T x): with r = z^2 that is |W| N, with r = 1 it is |W| D.
    hebbian = run(Hebbian(), need, reward, z)
    cubic = run(Hebbian(), need, z * z, z)
    linear = run(Hebbian(), need, z.new_ones(()).expand_as(z), z)

    def decayed(feedback: Tensor, n: Tensor, d: Tensor, parameter: Tensor) -> Tensor:
        size = parameter.abs()
        # N / D, the factor |W| cancelled; N itself where D = 0.
        safe = d.where(d != 0, d.new_ones(()))
        quotient = (n / safe).where(d != 0, n / size.where(size != 0, size.new_ones(())))
        return feedback - size * parameter * quotient

    weight_feedback = bias_feedback = None
    if hebbian.weight is not None and cubic.weight is not None and linear.weight is not None:
        assert weight is not None
        weight_feedback = decayed(hebbian.weight, cubic.weight, linear.weight, weight)
    if hebbian.bias is not None and cubic.bias is not None and linear.bias is not None:
        assert bias is not None
        bias_feedback = decayed(hebbian.bias, cubic.bias, linear.bias, bias)
    return Redistributed(None, weight_feedback, bias_feedback)


def apply_composed(
    found: Redistributed,
    weight: Tensor,
    bias: Tensor | None,
    weight_update: Update,
    bias_update: Update | None,
) -> Tensor | None:
    """Update weight and bias by finished feedback; the input reward."""
    assert found.weight is not None
    parameters, feedback, updates = [weight], [found.weight], [weight_update]
    if bias is not None and bias_update is not None and found.bias is not None:
        parameters.append(bias)
        feedback.append(found.bias)
        updates.append(bias_update)
    optimizer_update(parameters, feedback, updates)
    return found.input
