"""Spiking neurons: the two scans over time, packed spikes, and noise.

Neurons are a flat axis of M = batch x features in memory order; ``inner`` neurons in a row share
one entry of the per-channel ``beta`` and ``threshold``: channel = (m // inner) % channels.

Packed spikes ``bits[P, M]``, P = ceil(steps / 8): bit ``t % 8`` of byte ``[t // 8, m]`` is that
of neuron m at step t; the bits after the last step are 0.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..._library import define
from ...backends import register
from . import native, reference
from .codes import planes


def _forward(current, state, beta, threshold, inner, steps, reset, keep):
    neurons = current.shape[1]
    return (
        current.new_empty((planes(steps), neurons), dtype=torch.uint8),
        current.new_empty((steps, neurons) if keep else (0,)),
        current.new_empty((neurons,)),
    )


def _feedback(
    reward, membrane, bits, state, carry, beta, threshold, inner, eps, reset, static, as_reward,
    need_parameters,
):  # fmt: skip
    steps, neurons = reward.shape
    sums = (neurons,) if need_parameters else (0,)
    return (
        reward.new_empty((1 if static else steps, neurons)),
        reward.new_empty((neurons,)),
        reward.new_empty(sums),
        reward.new_empty(sums),
    )


def _unpack(bits: Tensor, steps: int, dtype: torch.dtype, noise: float, seed: int, first: int):
    return bits.new_empty((steps, bits.shape[1]), dtype=dtype)


def _add_noise(x: Tensor, steps: int, noise: float, seed: int, first: int) -> Tensor:
    return x.new_empty((steps, x.shape[1]))


def _triton() -> ModuleType:
    from . import triton

    return triton


define(
    "lif_forward(Tensor current, Tensor? state, Tensor beta, Tensor threshold, int inner, "
    "int steps, int reset, bool keep) -> (Tensor, Tensor, Tensor)",
    _forward,
)
define(
    "lif_feedback(Tensor reward, Tensor membrane, Tensor bits, Tensor? state, Tensor? carry, "
    "Tensor beta, Tensor threshold, int inner, float eps, int reset, bool static, bool as_reward, "
    "bool need_parameters) -> (Tensor, Tensor, Tensor, Tensor)",
    _feedback,
)
define(
    "spikes_unpack(Tensor bits, int steps, ScalarType dtype, float noise, int seed, int first) "
    "-> Tensor",
    _unpack,
)
define("add_noise(Tensor x, int steps, float noise, int seed, int first) -> Tensor", _add_noise)
register("spiking", native=native, triton=_triton, reference=reference)
