"""Embeddings in plain PyTorch: the oracle (docs/math.md, section 7)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...optim import Update
from ...rules import accumulate_dtype, stabilize
from ..update.reference import apply_update


def _rows(
    weight: Tensor, tokens: Tensor, reward: Tensor, padding: int, eps: float
) -> tuple[Tensor, Tensor]:
    """(rows in use, each once, ascending; their feedback in the arithmetic type)."""
    acc = accumulate_dtype(weight.dtype)
    used = tokens != padding
    rows, inverse = tokens[used].unique(return_inverse=True)
    sums = torch.zeros(len(rows), weight.shape[1], dtype=acc, device=weight.device)
    sums.index_add_(0, inverse, reward[used].to(acc))
    w = weight[rows].to(acc)
    return rows, w.abs() / stabilize(w, eps) * sums


def redistribute(
    weight: Tensor, tokens: Tensor, reward: Tensor, padding: int, eps: float
) -> Tensor:
    """Feedback [V, E]: ``|w| / stab(w) * sum`` of the rewards of a row's uses; 0 without uses."""
    rows, feedback = _rows(weight, tokens, reward, padding, eps)
    total = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    total[rows] = feedback.to(weight.dtype)
    return total


def redistribute_update(
    weight: Tensor, tokens: Tensor, reward: Tensor, padding: int, eps: float, update: Update
) -> None:
    """One optimizer step of the rows in use; the others and their states stand still."""
    rows, feedback = _rows(weight, tokens, reward, padding, eps)
    param, states = weight[rows], [state[rows] for state in update.states]
    apply_update(param, feedback, update._replace(states=states))
    weight[rows] = param
    for state, moved in zip(update.states, states):
        state[rows] = moved
