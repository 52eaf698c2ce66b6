"""Initial rewards: schemas and fakes of the two operators."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from ..._library import define
from ...backends import register
from . import native, reference


def _reward(out: Tensor, target: Tensor | None, kind: int, params: list[float]) -> Tensor:
    return out.new_empty(out.shape)


def _reward_spike_rate(spikes: Tensor, labels: Tensor) -> Tensor:
    return spikes.new_empty(spikes.shape)


def _triton() -> ModuleType:
    from . import triton

    return triton


define("reward(Tensor out, Tensor? target, int kind, float[] params) -> Tensor", _reward)
define("reward_spike_rate(Tensor spikes, Tensor labels) -> Tensor", _reward_spike_rate)
register("reward", native=native, triton=_triton, reference=reference)
