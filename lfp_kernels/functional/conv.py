"""Convolution, 1 to 3 dimensions, transposed or not, in the three forms of the linear layer."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _validate as check
from .. import ops
from .._no_grad import no_grad
from ..backends import select
from ..ops.conv.geometry import ConvGeometry, out_channels, output_shape
from ..ops.conv.layout import channels_last
from ..optim import Update
from ..rules import Derivative, Epsilon, Matrix, Rule, RuleCall
from .composed import Redistributed, apply_composed, is_composed, redistribute_composed

__all__ = [
    "ConvGeometry",
    "channels_last",
    "conv",
    "conv_redistribute",
    "conv_redistribute_update",
    "conv_weight",
]

_ = ops  # registers the schemas
_EPSILON = Epsilon()


@no_grad
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    *,
    relu: bool = False,
) -> Tensor:
    """Convolution of x, with ``relu`` the positive part of it.

    Args:
        x: [N, C, *spatial] or [C, *spatial], 1 to 3 spatial dimensions.
        weight: [O, C/groups, *kernel], transposed [C, O/groups, *kernel]. bias: [O] or None.
            All of one dtype and device.
        geometry: stride, padding, dilation, transposed, output padding, groups.

    Returns:
        [N, O, *spatial] or [O, *spatial], in channels-last layout when x or weight has it.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    batched, _ = _check_layer("conv", x, weight, bias, geometry)
    z = select("conv", x).forward(batched, weight, bias, geometry, relu)
    return z if batched is x else z.squeeze(0)


@no_grad
def conv_weight(x: Tensor, weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """``weight`` in the order in which the kernels read it beside x: itself, or a copy of it.

    On a GPU a convolution in channels last reads its weight with the taps before the channels, and
    makes such a copy in every call. Who calls it forward and back makes the copy once: it is the
    ``weight`` of :func:`conv` and the ``arranged`` of the other two.
    """
    backend = select("conv", x)
    arranges = getattr(backend, "arranges", None)
    if arranges is None or not arranges(x):
        return weight
    _check_layer("conv_weight", x, weight, None, geometry)
    return backend.arranged(weight, geometry)


@no_grad
def conv_redistribute(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    reward: Tensor,
    geometry: ConvGeometry,
    rule: Rule = _EPSILON,
    *,
    need: tuple[bool, bool, bool] = (True, True, True),
    matrix: Tensor | None = None,
    arranged: Tensor | None = None,
    below: Rule | Derivative | None = None,
    signal_in: bool = False,
    nonnegative: bool = False,
    product_dtype: torch.dtype | None = None,
) -> Redistributed:
    """Redistribute the reward at ``z = conv(x, W) + b`` (arXiv 2308.12053; docs/math.md).

    Args:
        x, weight, bias, geometry: as in :func:`conv`.
        z: layer output [N, O, *spatial], bias included. reward: reward at z, of the same shape.
        rule: the four functions around the two products.
        need: which of (input reward, weight feedback, bias feedback) to compute.
        matrix: feedback matrix B, shaped like weight, of rules that take one.
        arranged: what :func:`conv_weight` made of this weight. It must hold the same values: the
            input reward may be formed with it in place of the weight.
        below: with the rule of the layer that made x, the input reward comes out as that layer's
            signal (``signal_in=True`` there): two elementwise passes become one. With a
            ``rules.Derivative`` of the activation that made x, it is multiplied by it.
        signal_in: ``reward`` is already this layer's signal; z is not read.
        nonnegative: promise that x is nowhere negative (behind a ReLU): rules that part x by sign
            then run half of their products.
        product_dtype: torch.bfloat16 runs the two products of float32 tensors in bfloat16 with
            float32 accumulation.

    Returns:
        Redistributed(input, weight, bias), shaped like x, weight and bias; feedback points uphill
        and is summed over batch and space. The input reward is in channels-last layout when x or
        reward is, the weight feedback contiguous.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    op = "conv_redistribute"
    flat = _check_redistribute(op, x, weight, bias, z, reward, geometry, rule, signal_in)
    if is_composed(rule):
        return redistribute_composed(
            rule, need, weight, bias, reward, z,
            lambda part, wanted, r, out: conv_redistribute(
                x, weight, bias, out, r, geometry, part, need=wanted, matrix=matrix,
                arranged=arranged, below=below, nonnegative=nonnegative,
                product_dtype=product_dtype,
            ),
        )  # fmt: skip
    call = check.rule_call(
        op, x, weight, rule, need[0], matrix, below, signal_in, nonnegative, product_dtype
    )
    call = _with_arranged(op, call, weight, arranged)
    input_reward, weight_feedback, bias_feedback = select("conv", x, rule).redistribute(
        flat[0], weight, bias, flat[1], flat[2], geometry, call, need
    )
    if input_reward is not None and flat[0] is not x:
        input_reward = input_reward.squeeze(0)
    return Redistributed(input_reward, weight_feedback, bias_feedback)


@no_grad
def conv_redistribute_update(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    reward: Tensor,
    geometry: ConvGeometry,
    weight_update: Update,
    bias_update: Update | None = None,
    rule: Rule = _EPSILON,
    *,
    need_input: bool = True,
    matrix: Tensor | None = None,
    arranged: Tensor | None = None,
    below: Rule | Derivative | None = None,
    signal_in: bool = False,
    nonnegative: bool = False,
    product_dtype: torch.dtype | None = None,
) -> Tensor | None:
    """Redistribute and update ``weight``, ``bias`` and the optimizer states in place.

    The weight feedback takes its epilogue and the optimizer's step in one pass.
    ``bias_update=None`` leaves the bias alone. Arguments as in :func:`conv_redistribute`; the input
    reward is that of the old weight. Nothing is updated when an argument is refused.

    Returns:
        Input reward shaped like x, or None with ``need_input=False``.
    """
    op = "conv_redistribute_update"
    flat = _check_redistribute(op, x, weight, bias, z, reward, geometry, rule, signal_in)
    check.update(op, "weight_update", weight_update, weight)
    if bias_update is not None:
        if bias is None:
            raise ValueError(
                f"{op}: bias_update: expected None for a layer without bias, got an Update"
            )
        check.update(op, "bias_update", bias_update, bias)
    if is_composed(rule):
        found = conv_redistribute(
            x, weight, bias, z, reward, geometry, rule,
            need=(need_input, True, bias_update is not None),
            matrix=matrix, arranged=arranged, below=below, nonnegative=nonnegative,
            product_dtype=product_dtype,
        )  # fmt: skip
        return apply_composed(found, weight, bias, weight_update, bias_update)
    call = check.rule_call(
        op, x, weight, rule, need_input, matrix, below, signal_in, nonnegative, product_dtype
    )
    call = _with_arranged(op, call, weight, arranged)
    dense = weight.contiguous()
    dense_bias = None if bias is None else bias.contiguous()
    input_reward = select("conv", x, rule).redistribute_update(
        flat[0], dense, dense_bias, flat[1], flat[2], geometry, weight_update, bias_update, call,
        need_input,
    )  # fmt: skip
    if dense is not weight:
        weight.copy_(dense)
    if bias is not None and dense_bias is not bias and bias_update is not None:
        bias.copy_(dense_bias)  # type: ignore[arg-type]
    if input_reward is None or flat[0] is x:
        return input_reward
    return input_reward.squeeze(0)


def _with_arranged(op: str, call: RuleCall, weight: Tensor, arranged: Tensor | None) -> RuleCall:
    """Rules that read the weight itself may read it from the copy: it takes the matrix's place."""
    if arranged is None:
        return call
    check.like(op, "arranged", arranged, weight, "weight")
    check.shape(op, "arranged", arranged, weight.shape)
    plain = not call.rule.split and call.rule.matrix_code == Matrix.WEIGHT
    return call._replace(matrix=arranged) if plain else call


def _check_geometry(op: str, geometry: ConvGeometry, spatial: int) -> None:
    if not isinstance(geometry, ConvGeometry):
        raise TypeError(
            f"{op}: geometry: expected a ConvGeometry, got {type(geometry).__name__}; "
            "make one with ConvGeometry.make(kernel_size, stride, ...)"
        )
    lists = (
        ("stride", geometry.stride, 1),
        ("padding", geometry.padding, 0),
        ("dilation", geometry.dilation, 1),
        ("output_padding", geometry.output_padding, 0),
    )
    for name, values, least in lists:
        if len(values) != spatial or any(v < least for v in values):
            raise ValueError(
                f"{op}: geometry.{name}: expected {spatial} ints >= {least} for a kernel of "
                f"{spatial} spatial dimensions, got {tuple(values)}"
            )
    for k, extra in enumerate(geometry.output_padding):
        limit = max(geometry.stride[k], geometry.dilation[k]) if geometry.transposed else 1
        if extra >= limit:
            raise ValueError(
                f"{op}: geometry.output_padding: expected values < max(stride, dilation) of a "
                f"transposed convolution, else 0, got {tuple(geometry.output_padding)}"
            )


def _check_layer(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry
) -> tuple[Tensor, tuple[int, ...]]:
    """x with a batch dimension, and the shape of z with it."""
    check.floating(op, "x", x)
    check.like(op, "weight", weight, x, "x")
    spatial = weight.dim() - 2
    if not 1 <= spatial <= 3 or 0 in weight.shape:
        raise ValueError(
            f"{op}: weight: expected shape [O, C/groups, *kernel] with 1 to 3 kernel dimensions, "
            f"got {tuple(weight.shape)}"
        )
    _check_geometry(op, geometry, spatial)
    groups, first = geometry.groups, weight.shape[0]
    if groups < 1 or first % groups:
        raise ValueError(
            f"{op}: geometry.groups: expected a divisor of weight.shape[0] = {first}, got {groups}"
        )
    batched = x.unsqueeze(0) if x.dim() == spatial + 1 else x
    channels = first if geometry.transposed else weight.shape[1] * groups
    if batched.dim() != spatial + 2 or batched.shape[1] != channels:
        names = ", ".join("DHW"[3 - spatial :])
        raise ValueError(
            f"{op}: x: expected shape [N, {channels}, {names}] or [{channels}, {names}] for a "
            f"weight of shape {tuple(weight.shape)} and groups={groups}, got {tuple(x.shape)}"
        )
    shape = output_shape(batched.shape, weight.shape, geometry)
    if min(batched.shape[2:]) < 1 or min(shape[2:]) < 1:
        raise ValueError(
            f"{op}: x: expected a spatial size that gives an output of at least 1, got "
            f"{tuple(x.shape)} for kernel {tuple(weight.shape[2:])}, which gives {shape[2:]}; "
            "enlarge the input or the padding"
        )
    if bias is not None:
        check.like(op, "bias", bias, x, "x")
        check.shape(op, "bias", bias, (out_channels(weight.shape, geometry),))
    return batched, shape


def _check_redistribute(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    reward: Tensor,
    geometry: ConvGeometry,
    rule: Rule,
    signal_in: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Checked x, z, reward with a batch dimension."""
    batched, shape = _check_layer(op, x, weight, bias, geometry)
    check.rule(op, rule)
    expected = shape if batched is x else shape[1:]
    check.like(op, "reward", reward, x, "x")
    check.shape(op, "reward", reward, expected)
    if signal_in:
        z = reward
    else:
        check.like(op, "z", z, x, "x")
        check.shape(op, "z", z, expected)
    if batched is x:
        return x, z, reward
    return batched, z.unsqueeze(0), reward.unsqueeze(0)
