"""Convolution ``z = conv(x, W) + b``: schemas and fakes of its three operators."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from ..._library import define
from ...backends import register
from . import native, reference
from .geometry import ConvGeometry, output_shape
from .layout import empty, strided_channels_last

_GEOMETRY = (
    "int[] stride, int[] padding, int[] dilation, bool transposed, int[] output_padding, int groups"
)


def _forward(
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups, relu
) -> Tensor:
    geometry = ConvGeometry(stride, padding, dilation, transposed, output_padding, groups)
    channels_last = strided_channels_last(x) or strided_channels_last(weight)
    return empty(x, output_shape(x.shape, weight.shape, geometry), channels_last)


def _input_reward(x: Tensor, reward: Tensor, need: bool) -> Tensor:
    if not need:
        return x.new_empty(0)
    return empty(x, x.shape, strided_channels_last(x) or strided_channels_last(reward))


def _redistribute(
    x, weight, bias, z, reward, matrix, stride, padding, dilation, transposed, output_padding,
    groups, rule, params, need_input, need_weight, need_bias, chain, product,
):  # fmt: skip
    return (
        _input_reward(x, reward, need_input),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty(bias.shape if need_bias and bias is not None else (0,)),
    )


def _redistribute_update(
    x, weight, bias, z, reward, matrix, weight_state, bias_state, stride, padding, dilation,
    transposed, output_padding, groups, rule, params, optimizer, hyper, bias_optimizer, bias_hyper,
    need_input, chain, product,
):  # fmt: skip
    return _input_reward(x, reward, need_input)


def _triton() -> ModuleType:
    from . import triton

    return triton


# _tf32: on a GPU alone, float32 tensors whose product rounds to TF32.
for _name in ("conv_forward", "conv_forward_tf32"):
    define(
        f"{_name}(Tensor x, Tensor weight, Tensor? bias, {_GEOMETRY}, bool relu) -> Tensor",
        _forward,
    )
define(
    "conv_redistribute(Tensor x, Tensor weight, Tensor? bias, Tensor z, Tensor reward, "
    f"Tensor? matrix, {_GEOMETRY}, int rule, float[] params, bool need_input, bool need_weight, "
    "bool need_bias, int chain, ScalarType product) -> (Tensor, Tensor, Tensor)",
    _redistribute,
)
define(
    "conv_redistribute_update(Tensor x, Tensor(a!) weight, Tensor(b!)? bias, Tensor z, "
    "Tensor reward, Tensor? matrix, Tensor(c!)[] weight_state, Tensor(d!)[] bias_state, "
    f"{_GEOMETRY}, int rule, float[] params, int optimizer, float[] hyper, int bias_optimizer, "
    "float[] bias_hyper, bool need_input, int chain, ScalarType product) -> Tensor",
    _redistribute_update,
)
register("conv", native=native, triton=_triton, reference=reference)
