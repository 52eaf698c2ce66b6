"""The sum of a residual block as a module; build the block from it where lfprop's did.

lfprop's ResNets themselves are torchvision's, which this package does not need: take them from
torchvision with :mod:`lfp_kernels.composites`, which give ``+`` and ``+=`` the same rule.
"""

from __future__ import annotations

from ....nn import Sum

__all__ = ["Sum"]
