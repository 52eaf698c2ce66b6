"""Linear layer: forward, redistribute, redistribute-and-update."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _validate as check
from .. import ops
from .._no_grad import no_grad
from ..backends import select
from ..optim import Update
from ..rules import Derivative, Epsilon, Rule
from .composed import Redistributed, apply_composed, is_composed, redistribute_composed

_ = ops  # registers the schemas
_EPSILON = Epsilon()


@no_grad
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """``x W^T + b`` [..., O], with ``relu`` the positive part of it, in one product.

    Args:
        x: [..., I]. weight: [O, I]. bias: [O] or None. All of one dtype and device.
    """
    _check_layer("linear", x, weight, bias)
    return select("linear", x).forward(x, weight, bias, relu)


@no_grad
def linear_redistribute(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    reward: Tensor,
    rule: Rule = _EPSILON,
    *,
    need: tuple[bool, bool, bool] = (True, True, True),
    matrix: Tensor | None = None,
    below: Rule | Derivative | None = None,
    signal_in: bool = False,
    nonnegative: bool = False,
    product_dtype: torch.dtype | None = None,
) -> Redistributed:
    """Redistribute the reward at ``z = x W^T + b`` (arXiv 2308.12053; docs/math.md, section 1).

    Args:
        x: layer input [..., I]. weight: [O, I]. bias: [O] or None.
        z: layer output [..., O], bias included. reward: reward at z [..., O].
        rule: the four functions around the two products.
        need: which of (input reward, weight feedback, bias feedback) to compute.
        matrix: feedback matrix B, shaped like weight, of rules that take one.
        below: with the rule of the layer that made x, the input reward comes out as that layer's
            signal (``signal_in=True`` there): two elementwise passes become one. With a
            ``rules.Derivative`` of the activation that made x, it is multiplied by it.
        signal_in: ``reward`` is already this layer's signal; z is not read.
        nonnegative: promise that x is nowhere negative (behind a ReLU): rules that part x by sign
            then run half of their products.
        product_dtype: torch.bfloat16 runs the two products of float32 tensors in bfloat16 with
            float32 accumulation.

    Returns:
        Redistributed(input [..., I], weight [O, I], bias [O]); feedback points uphill and is
        summed over all batch dimensions.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    op = "linear_redistribute"
    flat = _check_redistribute(op, x, weight, bias, z, reward, rule, signal_in)
    if is_composed(rule):
        return redistribute_composed(
            rule, need, weight, bias, reward, z,
            lambda part, wanted, r, out: linear_redistribute(
                x, weight, bias, out, r, part, need=wanted, matrix=matrix, below=below,
                nonnegative=nonnegative, product_dtype=product_dtype,
            ),
        )  # fmt: skip
    call = check.rule_call(
        op, x, weight, rule, need[0], matrix, below, signal_in, nonnegative, product_dtype
    )
    input_reward, weight_feedback, bias_feedback = select("linear", x, rule).redistribute(
        flat[0], weight, bias, flat[1], flat[2], call, need
    )
    if input_reward is not None:
        input_reward = input_reward.view(x.shape)
    return Redistributed(input_reward, weight_feedback, bias_feedback)


@no_grad
def linear_redistribute_update(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    reward: Tensor,
    weight_update: Update,
    bias_update: Update | None = None,
    rule: Rule = _EPSILON,
    *,
    need_input: bool = True,
    matrix: Tensor | None = None,
    below: Rule | Derivative | None = None,
    signal_in: bool = False,
    nonnegative: bool = False,
    product_dtype: torch.dtype | None = None,
) -> Tensor | None:
    """Redistribute and update ``weight``, ``bias`` and the optimizer states in place, in one pass.

    The weight feedback exists only tile by tile. ``bias_update=None`` leaves the bias alone.
    Arguments as in :func:`linear_redistribute`; the input reward is that of the old weight.

    Returns:
        Input reward [..., I], or None with ``need_input=False``.
    """
    op = "linear_redistribute_update"
    flat = _check_redistribute(op, x, weight, bias, z, reward, rule, signal_in)
    check.update(op, "weight_update", weight_update, weight)
    if bias_update is not None:
        if bias is None:
            raise ValueError(
                f"{op}: bias_update: expected None for a layer without bias, got an Update"
            )
        check.update(op, "bias_update", bias_update, bias)
    if is_composed(rule):
        found = linear_redistribute(
            x, weight, bias, z, reward, rule, need=(need_input, True, bias_update is not None),
            matrix=matrix, below=below, nonnegative=nonnegative, product_dtype=product_dtype,
        )  # fmt: skip
        return apply_composed(found, weight, bias, weight_update, bias_update)
    call = check.rule_call(
        op, x, weight, rule, need_input, matrix, below, signal_in, nonnegative, product_dtype
    )
    dense = weight.contiguous()
    dense_bias = None if bias is None else bias.contiguous()
    input_reward = select("linear", x, rule).redistribute_update(
        flat[0], dense, dense_bias, flat[1], flat[2], weight_update, bias_update, call, need_input
    )  # fmt: skip
    if dense is not weight:
        weight.copy_(dense)
    if bias_update is not None and bias is not None and dense_bias is not bias:
        bias.copy_(dense_bias)  # type: ignore[arg-type]
    return None if input_reward is None else input_reward.view(x.shape)


def _check_layer(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check.floating(op, "x", x)
    check.like(op, "weight", weight, x, "x")
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight: expected shape [O, I], got {tuple(weight.shape)}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: x: expected shape [..., {weight.shape[1]}] for a weight of shape "
            f"{tuple(weight.shape)}, got {tuple(x.shape)}"
        )
    if bias is not None:
        check.like(op, "bias", bias, x, "x")
        check.shape(op, "bias", bias, weight.shape[:1])


def _check_redistribute(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    reward: Tensor,
    rule: Rule,
    signal_in: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Checked x, z, reward as matrices."""
    _check_layer(op, x, weight, bias)
    check.rule(op, rule)
    expected = (*x.shape[:-1], weight.shape[0])
    check.like(op, "reward", reward, x, "x")
    check.shape(op, "reward", reward, expected)
    if signal_in:
        z = reward
    else:
        check.like(op, "z", z, x, "x")
        check.shape(op, "z", z, expected)
    if x.dim() == 2:
        return x, z, reward
    return (
        x.reshape(-1, weight.shape[1]),
        z.reshape(-1, weight.shape[0]),
        reward.reshape(-1, weight.shape[0]),
    )
