"""Step activation and residual sum."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional


class Step(nn.Module):
    """``x > 0 ? 1 : 0``. No gradient flows through it; the reward passes it unchanged."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.step(x)


class Sum(nn.Module):
    """``a + b`` of a residual block, as a module. The reward is shared in proportion to a and b."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b
