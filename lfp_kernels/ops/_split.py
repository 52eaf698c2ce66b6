"""The equations of rules with two signals, for any linear layer: shared by the references."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..rules import Rule

Product = Callable[[Tensor, Tensor], Tensor]


def redistribute_split(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    reward: Tensor,
    rule: Rule,
    need: tuple[bool, bool, bool],
    forward: Product,
    to_input: Product,
    to_weight: Product,
    per_output: Callable[[Tensor], Tensor],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(input reward, weight feedback, bias feedback), as in :mod:`lfp_kernels.rules.base`.

    Args:
        forward: (x, W) -> x W^T. to_input: (s, W) -> s W. to_weight: (s, x) -> s^T x.
        per_output: a vector over outputs in the shape that adds to z.
    """
    x_a, x_b = rule.parts(x)
    mapped = rule.mapped(weight)
    w_p, w_n = mapped.clamp(min=0), mapped.clamp(max=0)
    positive = forward(x_a, w_p) + forward(x_b, w_n)
    negative = forward(x_b, w_p) + forward(x_a, w_n)
    if bias is not None:
        above, under = rule.bias_parts(bias)
        positive, negative = positive + per_output(above), negative + per_output(under)
    u, v = rule.signals(reward, z, positive, negative)
    input_reward = weight_feedback = bias_feedback = None
    if need[0]:
        input_reward = x_a * (to_input(u, w_p) + to_input(v, w_n))
        input_reward = input_reward + x_b * (to_input(u, w_n) + to_input(v, w_p))
    if need[1]:
        weight_feedback = w_p * (to_weight(u, x_a) + to_weight(v, x_b))
        weight_feedback = weight_feedback + w_n * (to_weight(u, x_b) + to_weight(v, x_a))
        weight_feedback = weight_feedback * weight.sign()
    if need[2] and bias is not None:
        above, under = rule.bias_parts(bias)
        summed = [s.sum([d for d in range(s.dim()) if d != 1]) for s in (u, v)]
        bias_feedback = (above * summed[0] + under * summed[1]) * bias.sign()
    return input_reward, weight_feedback, bias_feedback
