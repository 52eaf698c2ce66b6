"""Row-wise ``(a . b, |a|^2, |b|^2)``: what every alignment metric is made of."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..._library import define
from ...backends import register
from . import native, reference


def _alignment_sums(a: Tensor, b: Tensor) -> Tensor:
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    return a.new_empty((a.shape[0], 3), dtype=dtype)


def _triton() -> ModuleType:
    from . import triton

    return triton


define("alignment_sums(Tensor a, Tensor b) -> Tensor", _alignment_sums)
register("alignment", native=native, triton=_triton, reference=reference)
