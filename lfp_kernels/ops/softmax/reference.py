"""Softmax by the rule of AttnLRP, in plain PyTorch (docs/math.md, section 7)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...rules import accumulate_dtype


def redistribute(x: Tensor, p: Tensor, reward: Tensor) -> Tensor:
    """``x * (r - p * sum r)`` of rows [M, N]; 0 where x is masked out (infinite)."""
    acc = accumulate_dtype(x.dtype)
    dtype, (x, p, reward) = x.dtype, (t.to(acc) for t in (x, p, reward))
    found = x * (reward - p * reward.sum(1, keepdim=True))
    return torch.where(x.isinf(), 0.0, found).to(dtype)
