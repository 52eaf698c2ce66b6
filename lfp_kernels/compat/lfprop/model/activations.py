"""Step and the negated activations. The composites know Step; the plain gradient acts at others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ....nn import Step

__all__ = ["NegInnerReLU", "NegReLU", "NegStep", "NegTanh", "Step"]


class NegTanh(nn.Module):
    """``-tanh(x)``"""

    def forward(self, inp: Tensor) -> Tensor:
        return -torch.tanh(inp)


class NegReLU(nn.Module):
    """``-max(x, 0)``"""

    def forward(self, inp: Tensor) -> Tensor:
        return -torch.relu(inp)


class NegInnerReLU(nn.Module):
    """``max(-x, 0)``"""

    def forward(self, inp: Tensor) -> Tensor:
        return torch.relu(-inp)


class NegStep(nn.Module):
    """``x > 0 ? -1 : 0``. Its plain gradient is 0: map it to IdentityRule to train through it."""

    def forward(self, inp: Tensor) -> Tensor:
        return torch.where(inp > 0, -torch.ones_like(inp), inp * 0)
