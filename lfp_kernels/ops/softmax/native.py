"""Softmax in compiled code (csrc/cpu/softmax.cpp, csrc/cuda/softmax.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.lfp_kernels


def redistribute(x: Tensor, p: Tensor, reward: Tensor) -> Tensor:
    return _ops.softmax_redistribute.default(x, p, reward)
