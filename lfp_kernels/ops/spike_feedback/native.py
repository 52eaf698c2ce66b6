"""The neurons' feedback in event-driven networks, compiled (csrc/cpu/lif_feedback.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ops = torch.ops.lfp_kernels


def feedback(
    reward: Tensor, membrane: Tensor, constant: bool, bits: Tensor, state: Tensor | None,
    carry: Tensor | None, beta: Tensor, threshold: Tensor, inner: int, pool: Sequence[int],
    steps: int, eps: float, reset: int, sums: bool, as_reward: bool, need_parameters: bool,
    overwrite: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    signal, *rest = _ops.spike_lif_feedback.default(
        reward, membrane, constant, bits, state, carry, beta, threshold, inner, pool, steps, eps,
        int(reset), sums, as_reward, need_parameters, overwrite,
    )  # fmt: skip
    return (membrane if overwrite else signal), *rest  # type: ignore[return-value]
