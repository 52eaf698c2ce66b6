"""Layer, RMS and group norm in compiled code (csrc/cpu/layer_norm.cpp, csrc/cuda/*_norm.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.lfp_kernels


def redistribute(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, reward: Tensor, centred: bool,
    eps: float, stabilizer: float, identity: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _ops.norm_redistribute.default(
        x, weight, bias, reward, centred, eps, stabilizer, identity
    )


def group_redistribute(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, reward: Tensor, groups: int,
    eps: float, stabilizer: float, identity: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _ops.group_norm_redistribute.default(
        x, weight, bias, reward, groups, eps, stabilizer, identity
    )
