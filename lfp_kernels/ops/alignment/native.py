"""Alignment sums in compiled code (csrc/cpu/alignment.cpp, csrc/cuda/alignment.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.lfp_kernels


def sums(a: Tensor, b: Tensor) -> Tensor:
    return _ops.alignment_sums.default(a, b)
