"""Activations. The reward passes every activation unchanged, so none needs a redistribution."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from .. import _validate as check
from .. import ops
from ..backends import select

_ = ops  # registers the schemas


def step(x: Tensor) -> Tensor:
    """``x > 0 ? 1 : 0`` in the shape, dtype and memory format of ``x`` (0 for NaN).

    It has no useful gradient: LFP trains through it because it needs none (arXiv 2308.12053).
    """
    if has_torch_function_unary(x):  # an attached model gives it the identity rule
        return handle_torch_function(step, (x,), x)
    check.floating("step", "x", x)
    with torch.no_grad():
        return select("activation", x).step(x)
