"""Embeddings in compiled code (csrc/cpu/embedding.cpp, csrc/cuda/embedding.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...optim import Update

_ops = torch.ops.lfp_kernels


def redistribute(
    weight: Tensor, tokens: Tensor, reward: Tensor, padding: int, eps: float
) -> Tensor:
    return _ops.embedding_redistribute.default(weight, tokens, reward, padding, eps)


def redistribute_update(
    weight: Tensor, tokens: Tensor, reward: Tensor, padding: int, eps: float, update: Update
) -> None:
    _ops.embedding_redistribute_update.default(
        weight, tokens, reward, update.states, padding, eps, update.code, update.hyper
    )
