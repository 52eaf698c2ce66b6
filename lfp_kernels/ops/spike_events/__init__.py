"""Products of packed spikes with weights that touch only the weights of neurons that fired.

Packed spikes ``bits`` (ops/spiking): uint8 [P, N, I] or [P, N, C, H, W] of any strides, time in the
bits. x: the spikes they unpack to, 0 or 1. Results with channels lie channels last in memory, which
the operators return as they are ([T, N, H, W, C]) and the functions of the backends in the logical
order [T, N, C, H, W]. Stride 1, dilation 1, one group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._library import define
from ...backends import FLOATS, Implementation, register
from . import native, reference


def _linear(bits: Tensor, steps: int, weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight.new_empty((steps, bits.shape[1], weight.shape[0]))


def _linear_redistribute(
    bits, steps, weight, bias, signal, magnitude, need_input, need_weight, need_bias
):
    return (
        weight.new_empty((steps, *bits.shape[1:]) if need_input else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty((weight.shape[0],) if need_bias else (0,)),
    )


def _conv(bits: Tensor, steps: int, weight: Tensor, bias: Tensor | None, padding) -> Tensor:
    height, width = (
        n + 2 * p - k + 1 for n, p, k in zip(bits.shape[3:], padding, weight.shape[2:])
    )
    return weight.new_empty((steps, bits.shape[1], height, width, weight.shape[0]))


def _conv_redistribute(
    bits, steps, weight, bias, signal, padding, magnitude, need_input, need_weight, need_bias
):
    samples, channels, height, width = bits.shape[1:]
    return (
        weight.new_empty((steps, samples, height, width, channels) if need_input else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty((weight.shape[0],) if need_bias else (0,)),
    )


def _pooled(n, kernel: int, stride: int, padding: int, ceil_mode: bool):
    out = (n + 2 * padding - kernel + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (out - 1) * stride >= n + padding:  # it would start behind the input
        out -= 1
    return out


def _max_pool(bits: Tensor, kernel, stride, padding, ceil_mode: bool) -> Tensor:
    planes, samples, channels = bits.shape[:3]
    height, width = (
        _pooled(bits.shape[3 + d], kernel[d], stride[d], padding[d], ceil_mode) for d in (0, 1)
    )
    return bits.new_empty((planes, samples, height, width, channels))


def _max_pool_redistribute(bits, reward, kernel, stride, padding, ceil_mode) -> Tensor:
    samples, channels, height, width = bits.shape[1:]
    return reward.new_empty((reward.shape[0], samples, height, width, channels))


def _count(bits: Tensor) -> Tensor:
    return bits.new_empty((), dtype=torch.int64)


_NEED = "bool magnitude, bool need_input, bool need_weight, bool need_bias"
_WINDOW = "int[2] kernel, int[2] stride, int[2] padding, bool ceil_mode"

define(
    "spike_linear_forward(Tensor bits, int steps, Tensor weight, Tensor? bias) -> Tensor", _linear
)
define(
    "spike_linear_redistribute(Tensor bits, int steps, Tensor weight, Tensor? bias, "
    f"Tensor signal, {_NEED}) -> (Tensor, Tensor, Tensor)",
    _linear_redistribute,
)
define(
    "spike_conv2d_forward(Tensor bits, int steps, Tensor weight, Tensor? bias, int[2] padding) "
    "-> Tensor",
    _conv,
)
define(
    "spike_conv2d_redistribute(Tensor bits, int steps, Tensor weight, Tensor? bias, "
    f"Tensor signal, int[2] padding, {_NEED}) -> (Tensor, Tensor, Tensor)",
    _conv_redistribute,
)
define(f"spike_max_pool2d(Tensor bits, {_WINDOW}) -> Tensor", _max_pool)
define(
    f"spike_max_pool2d_redistribute(Tensor bits, Tensor reward, {_WINDOW}) -> Tensor",
    _max_pool_redistribute,
)
define("spike_count(Tensor bits) -> Tensor", _count)

# Chosen by the weight or the reward, and by the bits where there is neither.
_BITS = frozenset({torch.uint8})
register(
    "spike_events",
    native=Implementation(
        native, frozenset({"cpu"}), _BITS | {torch.float32, torch.float64}, needs="native"
    ),
    reference=Implementation(reference, dtypes=FLOATS | _BITS),
)
