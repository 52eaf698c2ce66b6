"""Alignment sums in plain PyTorch: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from ...rules import accumulate_dtype


def sums(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.to(accumulate_dtype(a.dtype)), b.to(accumulate_dtype(b.dtype))
    return torch.stack([(a * b).sum(1), (a * a).sum(1), (b * b).sum(1)], 1)
