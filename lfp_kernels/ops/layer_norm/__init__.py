"""Layer and RMS norm by the epsilon rule, or handing the reward on: rows over their last dimension.

Group norm has rows with weights of their own; it runs on the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._library import define
from ...backends import FLOATS, Implementation, register
from . import native, reference


def _redistribute(x: Tensor, weight, bias, reward, centred, eps, stabilizer, identity):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    sums = [x.new_empty((x.shape[1],), dtype=dtype) for _ in range(2)]
    return x.new_empty(x.shape), *sums


define(
    "norm_redistribute(Tensor x, Tensor? weight, Tensor? bias, Tensor reward, bool centred, "
    "float eps, float stabilizer, bool identity) -> (Tensor, Tensor, Tensor)",
    _redistribute,
)
register(
    "layer_norm",
    native=Implementation(native, frozenset({"cpu"}), FLOATS, needs="native"),
    reference=reference,
)
register("group_norm", reference=reference)
