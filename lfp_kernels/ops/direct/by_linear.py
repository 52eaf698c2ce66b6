"""Direct feedback alignment on a GPU: delta by a library product, then the linear layer's update.

A tile of delta costs C multiply-adds per element. A CPU thread forms it once per tile of outputs;
the blocks of a GPU would form it again for every tile of inputs, so there delta [N, O] is stored.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...optim import Update
from ...rules import Derivative, Gradient, RuleCall


def direct_update(
    linear: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    error: Tensor,
    matrix: Tensor,
    activation: Tensor,
    weight_update: Update,
    bias_update: Update | None,
    derivative: Derivative | None,
) -> None:
    """``linear``: the backend's module of the linear layer."""
    delta = error @ matrix
    if derivative is not None:
        delta = derivative(delta, activation)
    call = RuleCall(Gradient(), signal_in=True, product_dtype=x.dtype)
    linear.redistribute_update(
        x, weight, bias, delta, delta, weight_update, bias_update, call, False
    )
