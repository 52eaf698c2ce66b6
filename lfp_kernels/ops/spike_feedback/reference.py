"""The neurons' feedback in event-driven networks, in plain PyTorch: the oracle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..spiking import reference as spiking


def feedback(
    reward: Tensor, membrane: Tensor, constant: bool, bits: Tensor, state: Tensor | None,
    carry: Tensor | None, beta: Tensor, threshold: Tensor, inner: int, pool: Sequence[int],
    steps: int, eps: float, reset: int, sums: bool, as_reward: bool, need_parameters: bool,
    overwrite: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if constant:
        current = membrane
        _, membrane, _ = spiking.forward(
            current, state, beta, threshold, inner, steps, reset, keep=True
        )
    if pool:
        reward = _unpooled(reward, bits, pool)
    signal, carried, beta_sum, threshold_sum = spiking.feedback(
        reward, membrane, bits, state, carry, beta, threshold, inner, eps, reset, sums, as_reward,
        need_parameters,
    )  # fmt: skip
    signal = membrane.copy_(signal) if overwrite else signal
    return signal, carried, beta_sum, threshold_sum


def _unpooled(reward: Tensor, bits: Tensor, pool: Sequence[int]) -> Tensor:
    n, h, w, c, kh, kw = pool
    steps = reward.shape[0]
    spikes = spiking.unpack(bits, steps, reward.dtype, 0.0, 0, 0).view(steps, n, h, w, c)
    out = torch.zeros_like(spikes)
    rewards = reward.view(steps, n, h // kh, w // kw, c)
    height, width = h // kh * kh, w // kw * kw
    taken = torch.zeros_like(rewards, dtype=torch.bool)
    for y in range(kh):
        for x in range(kw):
            fires = spikes[:, :, y:height:kh, x:width:kw] > 0
            first = fires & ~taken
            out[:, :, y:height:kh, x:width:kw] = torch.where(first, rewards, 0.0)
            taken = taken | fires
    return out.view(steps, -1)
