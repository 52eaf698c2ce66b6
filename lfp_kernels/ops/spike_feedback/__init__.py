"""``lif_feedback`` with what stands around it in an event-driven network: no membrane is stored for
a constant current, and rewards are taken from behind the max pool that the spikes went through.

Arguments are those of ``lif_feedback`` (:mod:`lfp_kernels.ops.spiking`), and: with ``constant``,
``membrane`` is the current [1, M]; with ``pool`` = [N, H, W, C, kernel height, kernel width] the
neurons are [N, H, W, C] in memory and the reward [T, N * (H // kh) * (W // kw) * C] is that of
windows that do not overlap. The first spike of a window in row-major order takes its reward.
With ``overwrite`` the signal replaces the membrane, and the first result has no elements.
"""

from __future__ import annotations

import torch

from ..._library import define
from ...backends import Implementation, register
from . import native, reference


def _feedback(
    reward, membrane, constant, bits, state, carry, beta, threshold, inner, pool, steps, eps, reset,
    sums, as_reward, need_parameters, overwrite,
):  # fmt: skip
    neurons = bits.shape[1]
    parameters = (neurons if need_parameters else 0,)
    return (
        reward.new_empty((0,) if overwrite else (1 if sums else steps, neurons)),
        reward.new_empty((neurons,)),
        reward.new_empty(parameters),
        reward.new_empty(parameters),
    )


define(
    "spike_lif_feedback(Tensor reward, Tensor(a!) membrane, bool constant, Tensor bits, "
    "Tensor? state, Tensor? carry, Tensor beta, Tensor threshold, int inner, int[] pool, "
    "int steps, float eps, "
    "int reset, bool sums, bool as_reward, bool need_parameters, bool overwrite) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _feedback,
)
_FLOATS = frozenset({torch.float32, torch.float64})
register(
    "spike_feedback",
    native=Implementation(native, frozenset({"cpu"}), _FLOATS, needs="native"),
    reference=reference,
)
