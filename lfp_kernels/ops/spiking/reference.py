"""Spiking neurons in plain PyTorch, step by step: the oracle.

Every operation rounds once, in the order written, and the membrane is rounded to its storage type
after each step. The compiled kernels do the same (no fused multiply-add), so from the same currents
every backend makes the same spikes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...rules import accumulate_dtype, philox
from .codes import PLANE, Reset, planes

AT_ONCE = Reset.SUBTRACT_AT_ONCE


def _entering(before: Tensor, threshold: Tensor, reset: int) -> Tensor:
    """What is left of the membrane when a step begins."""
    return torch.where(before > threshold, 0.0, before) if reset == Reset.ZERO else before


def _resets(entering: Tensor, threshold: Tensor, reset: int) -> Tensor:
    """Where the reset takes the threshold off the charged membrane before the neuron may fire."""
    if reset in (Reset.SUBTRACT, AT_ONCE):
        return entering > threshold
    return torch.zeros_like(entering, dtype=torch.bool)


def _per_neuron(value: Tensor, neurons: int, inner: int, dtype: torch.dtype) -> Tensor:
    value = value.to(dtype).reshape(-1).repeat_interleave(inner)
    return value.repeat(neurons // value.numel()) if neurons else value[:0]


def forward(
    current: Tensor, state: Tensor | None, beta: Tensor, threshold: Tensor, inner: int,
    steps: int, reset: int, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype, acc = current.dtype, accumulate_dtype(current.dtype)
    neurons = current.shape[1]
    beta = _per_neuron(beta, neurons, inner, acc)
    threshold = _per_neuron(threshold, neurons, inner, acc)
    u = current.new_zeros(neurons, dtype=acc) if state is None else state.to(acc)
    bits = current.new_zeros((planes(steps), neurons), dtype=torch.uint8)
    membrane = current.new_empty((steps, neurons) if keep else (0,))
    for t in range(steps):
        p = _entering(u, threshold, reset)
        v = beta * p + current[t if current.shape[0] == steps else 0].to(acc)
        w = torch.where(_resets(p, threshold, reset), v - threshold, v)
        spike = w > threshold
        u = torch.where(spike, v - threshold, v) if reset == AT_ONCE else w
        u = u.to(dtype).to(acc)
        if reset != AT_ONCE:  # whoever reads the stored membrane sees the same
            spike = u > threshold
        bits[t // PLANE] |= spike.to(torch.uint8) << (t % PLANE)
        if keep:
            membrane[t] = u
    return bits, membrane, u.to(dtype)


def feedback(
    reward: Tensor, membrane: Tensor, bits: Tensor, state: Tensor | None, carry: Tensor | None,
    beta: Tensor, threshold: Tensor, inner: int, eps: float, reset: int, static: bool,
    as_reward: bool, need_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype, acc = reward.dtype, accumulate_dtype(reward.dtype)
    steps, neurons = reward.shape
    beta = _per_neuron(beta, neurons, inner, acc)
    threshold = _per_neuron(threshold, neurons, inner, acc)
    zero = reward.new_zeros(neurons, dtype=acc)
    first = zero if state is None else state.to(acc)
    m = zero if carry is None else carry.to(acc)
    total, beta_sum, threshold_sum = zero, zero, zero
    signal = reward.new_empty((1 if static else steps, neurons))
    for t in reversed(range(steps)):
        u = membrane[t].to(acc)
        p = _entering(first if t == 0 else membrane[t - 1].to(acc), threshold, reset)
        resets = _resets(p, threshold, reset)
        off = ((bits[t // PLANE] >> (t % PLANE)) & 1) > 0 if reset == AT_ONCE else resets
        v = torch.where(off, u + threshold, u)
        n = (reward[t].to(acc) + m) / (p.abs() + (v - p).abs() + eps)
        m = beta * p * n
        beta_sum = beta_sum + p * n
        threshold_sum = threshold_sum - n * (1 + resets.to(acc))
        out = (v - beta * p) * n if as_reward else n
        if static:
            total = total + out
        else:
            signal[t] = out
    if static:
        signal[0] = total
    if not need_parameters:
        beta_sum = threshold_sum = zero[:0]
    return signal, m.to(dtype), beta_sum.to(dtype), threshold_sum.to(dtype)


def _normal(steps: int, neurons: int, seed: int, first: int, device: torch.device) -> Tensor:
    """N(0, 1) [steps, neurons] in float64: Box-Muller on Philox words, by the element's index
    ``(first + t) * neurons + m`` alone: words 0, 1 of block index / 4 for indices 0, 1 modulo 4
    (cosine, sine), words 2, 3 for the others."""
    begin = first * neurons
    count = steps * neurons
    index = torch.arange(begin, begin + count, dtype=torch.int64)
    low = begin // 4
    words = philox(torch.arange(low, (begin + count + 3) // 4 + 1), seed)
    row, pair = index // 4 - low, (index % 4) // 2 * 2
    # The first word in (0, 1], so that its logarithm is finite.
    u1 = ((words[row, pair] >> 8).to(torch.float64) + 1) * 2.0**-24
    u2 = (words[row, pair + 1] >> 8).to(torch.float64) * 2.0**-24
    angle = 2 * math.pi * u2
    draws = (-2 * u1.log()).sqrt() * torch.where(index % 2 == 0, angle.cos(), angle.sin())
    return draws.to(device).view(steps, neurons)


def unpack(
    bits: Tensor, steps: int, dtype: torch.dtype, noise: float, seed: int, first: int
) -> Tensor:
    shift = torch.arange(PLANE, dtype=torch.uint8, device=bits.device)[:, None]
    spikes = (bits[:, None] >> shift) & 1  # [P, 8, M]
    spikes = spikes.flatten(0, 1)[:steps]
    return add_noise(spikes.to(dtype), steps, noise, seed, first)


def add_noise(x: Tensor, steps: int, noise: float, seed: int, first: int) -> Tensor:
    x = x.expand(steps, x.shape[1])
    if noise == 0:
        return x.clone(memory_format=torch.contiguous_format)
    acc = accumulate_dtype(x.dtype)
    draws = _normal(steps, x.shape[1], seed, first, x.device).to(acc)
    return (x.to(acc) + noise * draws).to(x.dtype)
