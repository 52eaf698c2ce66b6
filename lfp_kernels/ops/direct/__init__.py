"""Direct feedback alignment of a linear layer: schema and fake of its update."""

from __future__ import annotations

from types import ModuleType

from ..._library import define
from ...backends import register
from . import native, reference


def _direct_update(
    x, weight, bias, error, matrix, activation, weight_state, bias_state, derivative, optimizer,
    hyper, bias_optimizer, bias_hyper,
) -> None:  # fmt: skip
    return None


def _triton() -> ModuleType:
    from . import triton

    return triton


define(
    "direct_update(Tensor x, Tensor(a!) weight, Tensor(b!)? bias, Tensor error, Tensor matrix, "
    "Tensor activation, Tensor(c!)[] weight_state, Tensor(d!)[] bias_state, int derivative, "
    "int optimizer, float[] hyper, int bias_optimizer, float[] bias_hyper) -> ()",
    _direct_update,
)
register("direct", native=native, triton=_triton, reference=reference)
