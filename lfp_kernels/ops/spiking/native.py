"""Spiking neurons in compiled code (csrc/cpu/lif*.cpp, csrc/cuda/lif.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.lfp_kernels


def forward(
    current: Tensor, state: Tensor | None, beta: Tensor, threshold: Tensor, inner: int,
    steps: int, reset: int, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _ops.lif_forward.default(current, state, beta, threshold, inner, steps, int(reset), keep)


def feedback(
    reward: Tensor, membrane: Tensor, bits: Tensor, state: Tensor | None, carry: Tensor | None,
    beta: Tensor, threshold: Tensor, inner: int, eps: float, reset: int, static: bool,
    as_reward: bool, need_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _ops.lif_feedback.default(
        reward, membrane, bits, state, carry, beta, threshold, inner, eps, int(reset), static,
        as_reward, need_parameters,
    )  # fmt: skip


def unpack(
    bits: Tensor, steps: int, dtype: torch.dtype, noise: float, seed: int, first: int
) -> Tensor:
    return _ops.spikes_unpack.default(bits, steps, dtype, noise, seed, first)


def add_noise(x: Tensor, steps: int, noise: float, seed: int, first: int) -> Tensor:
    return _ops.add_noise.default(x, steps, noise, seed, first)
