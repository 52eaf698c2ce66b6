"""Layer, RMS and group norm by the epsilon rule, or handing the reward of the division on."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from ..._library import define
from ...backends import register
from ...rules import accumulate_dtype
from . import native, reference


def _redistribute(x: Tensor, weight, bias, reward, centred, eps, stabilizer, identity):
    sums = [x.new_empty((x.shape[1],), dtype=accumulate_dtype(x.dtype)) for _ in range(2)]
    return x.new_empty(x.shape), *sums


def _group(x: Tensor, weight, bias, reward, groups, eps, stabilizer, identity):
    return _redistribute(x, weight, bias, reward, True, eps, stabilizer, identity)


def _triton() -> ModuleType:
    from . import triton

    return triton


define(
    "norm_redistribute(Tensor x, Tensor? weight, Tensor? bias, Tensor reward, bool centred, "
    "float eps, float stabilizer, bool identity) -> (Tensor, Tensor, Tensor)",
    _redistribute,
)
define(
    "group_norm_redistribute(Tensor x, Tensor? weight, Tensor? bias, Tensor reward, int groups, "
    "float eps, float stabilizer, bool identity) -> (Tensor, Tensor, Tensor)",
    _group,
)
register("layer_norm", native=native, triton=_triton, reference=reference)
register("group_norm", native=native, triton=_triton, reference=reference)
