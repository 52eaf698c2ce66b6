"""Spike events in plain PyTorch: unpack, then dense products. The oracle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as TF
from torch import Tensor
from torch.nn.grad import conv2d_weight

from ...rules import accumulate_dtype

_STEPS = 8  # in a byte of packed spikes


def _unpack(bits: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Spikes [T, N, ...] as 0 and 1."""
    shift = torch.arange(_STEPS, dtype=torch.uint8, device=bits.device)
    shift = shift.view(1, _STEPS, *[1] * (bits.dim() - 1))
    return ((bits[:, None] >> shift) & 1).flatten(0, 1)[:steps].to(dtype)


def _pack(spikes: Tensor) -> Tensor:
    """Bits [P, N, ...] of bool spikes [8 P, N, ...]."""
    bits = spikes.unflatten(0, (-1, _STEPS)).to(torch.uint8)
    shift = torch.arange(_STEPS, dtype=torch.uint8, device=bits.device)
    return (bits << shift.view(1, _STEPS, *[1] * (bits.dim() - 2))).sum(1, dtype=torch.uint8)


def _last(x: Tensor) -> Tensor:
    """[T, N, C, H, W], channels last in memory."""
    return x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def _feedback(
    weight: Tensor, bias: Tensor | None, dw: Tensor, db: Tensor, magnitude: bool,
    need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if magnitude:
        dw = weight.abs() * dw
        db = db if bias is None else bias.abs() * db
    none = weight.new_empty(0)
    return (
        dw.to(weight.dtype).contiguous() if need_weight else none,
        db.to(weight.dtype) if need_bias else none,
    )


def spike_linear_forward(bits: Tensor, steps: int, weight: Tensor, bias: Tensor | None) -> Tensor:
    acc = accumulate_dtype(weight.dtype)
    x = _unpack(bits, steps, acc)
    return TF.linear(x, weight.to(acc), None if bias is None else bias.to(acc)).to(weight.dtype)


def spike_linear_redistribute(
    bits: Tensor, steps: int, weight: Tensor, bias: Tensor | None, signal: Tensor,
    magnitude: bool, need_input: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    acc = accumulate_dtype(weight.dtype)
    x, s = _unpack(bits, steps, acc), signal.to(acc)
    reward = (x * (s @ weight.to(acc))).to(weight.dtype) if need_input else weight.new_empty(0)
    dw = torch.einsum("tno,tni->oi", s, x)
    return reward, *_feedback(weight, bias, dw, s.sum((0, 1)), magnitude, need_weight, need_bias)


def spike_conv2d_forward(
    bits: Tensor, steps: int, weight: Tensor, bias: Tensor | None, padding: Sequence[int]
) -> Tensor:
    acc = accumulate_dtype(weight.dtype)
    x = _unpack(bits, steps, acc)
    bias = None if bias is None else bias.to(acc)
    z = TF.conv2d(x.flatten(0, 1), weight.to(acc), bias, padding=tuple(padding))
    return _last(z.unflatten(0, x.shape[:2]).to(weight.dtype))


def spike_conv2d_redistribute(
    bits: Tensor, steps: int, weight: Tensor, bias: Tensor | None, signal: Tensor,
    padding: Sequence[int], magnitude: bool, need_input: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    acc = accumulate_dtype(weight.dtype)
    x, s, w = _unpack(bits, steps, acc), signal.to(acc), weight.to(acc)
    flat, padding = s.flatten(0, 1), tuple(padding)
    reward = weight.new_empty(0)
    if need_input:
        dx = TF.conv_transpose2d(flat, w, padding=padding)
        reward = _last((x * dx.unflatten(0, x.shape[:2])).to(weight.dtype))
    dw = torch.zeros_like(w)
    if need_weight and flat.numel():
        dw = conv2d_weight(x.flatten(0, 1), w.shape, flat, padding=padding)
    return reward, *_feedback(
        weight, bias, dw, s.sum((0, 1, 3, 4)), magnitude, need_weight, need_bias
    )


def spike_max_pool2d(
    bits: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    ceil_mode: bool,
) -> Tensor:  # fmt: skip
    """Bits [P, N, C, H', W']: a window fires at a step where one of its neurons does."""
    x = _unpack(bits, _STEPS * bits.shape[0], torch.float32)
    window = tuple(kernel), tuple(stride), tuple(padding)
    z = TF.max_pool2d(x.flatten(0, 1), *window, ceil_mode=ceil_mode)
    return _last(_pack(z.unflatten(0, x.shape[:2]) > 0))


def spike_max_pool2d_redistribute(
    bits: Tensor, reward: Tensor, kernel: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], ceil_mode: bool,
) -> Tensor:  # fmt: skip
    """The reward of a window goes to the first neuron in it that fired, in row-major order: the
    winner of torch's max pool. The reward of a silent window goes to nobody: a layer below, which
    multiplies by its output, would make it zero.
    """
    acc = accumulate_dtype(reward.dtype)
    x = _unpack(bits, reward.shape[0], acc)
    window = tuple(kernel), tuple(stride), tuple(padding)
    z, index = TF.max_pool2d(x.flatten(0, 1), *window, ceil_mode=ceil_mode, return_indices=True)
    r = torch.where(z > 0, reward.to(acc).flatten(0, 1), 0.0)
    out = x.new_zeros(x.shape).flatten(0, 1).flatten(2)
    out.scatter_add_(2, index.flatten(2), r.flatten(2))
    return _last(out.view(x.shape).to(reward.dtype))


def spike_count(bits: Tensor) -> Tensor:
    """Spikes, int64 []."""
    shift = torch.arange(_STEPS, dtype=torch.uint8, device=bits.device)
    return ((bits[..., None] >> shift) & 1).sum(dtype=torch.int64)
