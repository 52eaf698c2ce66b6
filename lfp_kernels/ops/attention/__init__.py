"""Scaled dot-product attention, and relevance through it with the softmax computed again.

q [B, H, L, E], k [B, K, S, E], v [B, K, S, F], H a multiple of K: query head h reads key head
h // (H / K). ``mask`` is bool (True takes part) or of q's dtype (added), a view expanded to
[B, H, L, S]. The forward pass also returns ``lse [B, H, L]``, each query's logarithm of the sum of
exponentials (+inf where it sees no key), from which the probabilities are made again.

Results lie in memory as [B, L, H, E]: what the projections around attention read and write.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..._library import define
from ...backends import register
from . import native, reference


def empty_heads(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[B, H, L, E] whose memory is [B, L, H, E]."""
    b, h, length, width = shape
    return like.new_empty((b, length, h, width)).transpose(1, 2)


def _forward(q: Tensor, k: Tensor, v: Tensor, mask, causal, scale, dropout, seed):
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    return empty_heads(q, (*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=acc)


def _redistribute(
    q: Tensor, k: Tensor, v: Tensor, out, lse, reward, mask, causal, scale, dropout, seed, attnlrp,
    eps,
):  # fmt: skip
    return tuple(empty_heads(t, tuple(t.shape)) for t in (q, k, v))


def _triton() -> ModuleType:
    from . import triton

    return triton


define(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale, "
    "float dropout, int seed) -> (Tensor, Tensor)",
    _forward,
)
define(
    "attention_redistribute(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor reward, "
    "Tensor? mask, bool causal, float scale, float dropout, int seed, bool attnlrp, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    _redistribute,
)
register("attention", native=native, triton=_triton, reference=reference)
