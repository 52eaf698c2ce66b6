"""Spike events in compiled code (csrc/cpu/spike_*.cpp). CPU only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ops = torch.ops.lfp_kernels


def _channels_second(x: Tensor) -> Tensor:
    return x.permute(0, 1, 4, 2, 3)


def spike_linear_forward(bits: Tensor, steps: int, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _ops.spike_linear_forward.default(bits, steps, weight, bias)


def spike_linear_redistribute(
    bits: Tensor, steps: int, weight: Tensor, bias: Tensor | None, signal: Tensor,
    magnitude: bool, need_input: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _ops.spike_linear_redistribute.default(
        bits, steps, weight, bias, signal, magnitude, need_input, need_weight, need_bias
    )


def spike_conv2d_forward(
    bits: Tensor, steps: int, weight: Tensor, bias: Tensor | None, padding: Sequence[int]
) -> Tensor:
    return _channels_second(_ops.spike_conv2d_forward.default(bits, steps, weight, bias, padding))


def spike_conv2d_redistribute(
    bits: Tensor, steps: int, weight: Tensor, bias: Tensor | None, signal: Tensor,
    padding: Sequence[int], magnitude: bool, need_input: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    reward, *feedback = _ops.spike_conv2d_redistribute.default(
        bits, steps, weight, bias, signal, padding, magnitude, need_input, need_weight, need_bias
    )
    return (_channels_second(reward) if need_input else reward), *feedback


def spike_max_pool2d(
    bits: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    ceil_mode: bool,
) -> Tensor:  # fmt: skip
    return _channels_second(_ops.spike_max_pool2d.default(bits, kernel, stride, padding, ceil_mode))


def spike_max_pool2d_redistribute(
    bits: Tensor, reward: Tensor, kernel: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], ceil_mode: bool,
) -> Tensor:  # fmt: skip
    return _channels_second(
        _ops.spike_max_pool2d_redistribute.default(bits, reward, kernel, stride, padding, ceil_mode)
    )


def spike_count(bits: Tensor) -> Tensor:
    return _ops.spike_count.default(bits)
