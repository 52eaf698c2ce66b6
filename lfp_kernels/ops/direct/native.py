"""Direct feedback alignment in compiled code: csrc/cpu/direct.cpp; on CUDA the linear layer's."""

from __future__ import annotations

import torch
from torch import Tensor

from ...optim import Update
from ...rules import DERIVATIVE_BITS, Derivative
from .. import _cuda
from ..linear import native as linear
from . import by_linear

_ops = torch.ops.lfp_kernels


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
    if _cuda.is_gpu(x):
        return by_linear.direct_update(
            linear, x, weight, bias, error, matrix, activation, weight_update, bias_update,
            derivative,
        )  # fmt: skip
    other = weight_update if bias_update is None else bias_update
    _ops.direct_update.default(
        x,
        weight,
        bias if bias_update is not None else None,
        error,
        matrix,
        activation,
        weight_update.states,
        bias_update.states if bias_update is not None else [],
        0 if derivative is None else DERIVATIVE_BITS[derivative.function],
        weight_update.code,
        weight_update.hyper,
        other.code,
        other.hyper,
    )
