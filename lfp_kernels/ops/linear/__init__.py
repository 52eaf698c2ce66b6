"""Linear layer ``z = x W^T + b``: schemas and fakes of its three operators."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from ..._library import define
from ...backends import register
from . import native, reference


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _redistribute(
    x,
    weight,
    bias,
    z,
    reward,
    matrix,
    rule,
    params,
    need_input,
    need_weight,
    need_bias,
    chain,
    product,
):
    return (
        x.new_empty(x.shape if need_input else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty(weight.shape[:1] if need_bias and bias is not None else (0,)),
    )


def _redistribute_update(
    x, weight, bias, z, reward, matrix, weight_state, bias_state, rule, params, optimizer, hyper,
    bias_optimizer, bias_hyper, need_input, chain, product,
):  # fmt: skip
    return x.new_empty(x.shape if need_input else (0,))


def _triton() -> ModuleType:
    from . import triton

    return triton


define("linear_forward(Tensor x, Tensor weight, Tensor? bias, bool relu) -> Tensor", _forward)
# On a GPU alone: float32 tensors whose product rounds to TF32.
define("linear_forward_tf32(Tensor x, Tensor weight, Tensor? bias, bool relu) -> Tensor", _forward)
define(
    "linear_redistribute(Tensor x, Tensor weight, Tensor? bias, Tensor z, Tensor reward, "
    "Tensor? matrix, int rule, float[] params, bool need_input, bool need_weight, bool need_bias, "
    "int chain, ScalarType product) -> (Tensor, Tensor, Tensor)",
    _redistribute,
)
define(
    "linear_redistribute_update(Tensor x, Tensor(a!) weight, Tensor(b!)? bias, Tensor z, "
    "Tensor reward, Tensor? matrix, Tensor(c!)[] weight_state, Tensor(d!)[] bias_state, int rule, "
    "float[] params, int optimizer, float[] hyper, int bias_optimizer, float[] bias_hyper, "
    "bool need_input, int chain, ScalarType product) -> Tensor",
    _redistribute_update,
)
register("linear", native=native, triton=_triton, reference=reference)
