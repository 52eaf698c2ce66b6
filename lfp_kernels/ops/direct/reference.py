"""Direct feedback alignment in plain PyTorch: the oracle.

Shapes: x [N, I], weight [O, I], error [N, C], matrix [C, O], activation [N, O].
"""

from __future__ import annotations

from torch import Tensor

from ...optim import Update
from ...rules import Derivative, accumulate_dtype
from ..update.reference import apply_update


def direct_update(
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
    acc = accumulate_dtype(x.dtype)
    delta = error.to(acc) @ matrix.to(acc)
    if derivative is not None:
        delta = derivative(delta, activation.to(acc))
    apply_update(weight, delta.t() @ x.to(acc), weight_update)
    if bias is not None and bias_update is not None:
        apply_update(bias, delta.sum(0), bias_update)
