"""Attention in compiled code (csrc/cpu/attention.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.lfp_kernels


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float,
    dropout: float, seed: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _ops.attention_forward.default(q, k, v, mask, causal, scale, dropout, seed)


def redistribute(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, reward: Tensor, mask: Tensor | None,
    causal: bool, scale: float, dropout: float, seed: int, attnlrp: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _ops.attention_redistribute.default(
        q, k, v, out, lse, reward, mask, causal, scale, dropout, seed, attnlrp, eps
    )
