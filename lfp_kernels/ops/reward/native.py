"""Initial rewards in compiled code (csrc/cpu/reward.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from .codes import Kind

_ops = torch.ops.lfp_kernels


def reward(out: Tensor, target: Tensor | None, kind: Kind, params: list[float]) -> Tensor:
    return _ops.reward.default(out, target, int(kind), params)


def spike_rate(spikes: Tensor, labels: Tensor) -> Tensor:
    return _ops.reward_spike_rate.default(spikes, labels)
