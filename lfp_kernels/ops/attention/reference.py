"""Relevance through softmax, products of activations and attention, in plain PyTorch (AttnLRP,
arXiv 2402.05602; docs/math.md, section 7)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...rules import accumulate_dtype, stabilize


def softmax_redistribute(x: Tensor, p: Tensor, reward: Tensor, dim: int) -> Tensor:
    """``x * (r - p * sum r)``; 0 where x is masked out (-inf)."""
    found = x * (reward - p * reward.sum(dim, keepdim=True))
    return torch.where(x.isinf(), 0.0, found)


def matmul_redistribute(
    a: Tensor, b: Tensor, z: Tensor, reward: Tensor, eps: float, need: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Half of the reward to each factor of ``z = a b``: ``s = r / (2 stab(z))``."""
    s = reward / (2 * stabilize(z, eps))
    first = a * (s @ b.transpose(-1, -2)) if need[0] else None
    second = b * (a.transpose(-1, -2) @ s) if need[1] else None
    return first, second


def _logits(
    q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float, row: int
) -> tuple[Tensor, Tensor]:
    """(scale * q k^T, the same masked) of the query rows that begin at ``row``."""
    z = scale * (q @ k.transpose(-1, -2))
    masked = z
    if causal:
        query = torch.arange(row, row + q.shape[-2], device=q.device)[:, None]
        hidden = torch.arange(k.shape[-2], device=q.device) > query
        masked = masked.masked_fill(hidden, -math.inf)
    if mask is not None:
        part = mask[..., row : row + q.shape[-2], :] if mask.shape[-2] > 1 else mask
        fill = part if part.dtype != torch.bool else torch.zeros_like(part, dtype=z.dtype)
        masked = masked + fill
        if part.dtype == torch.bool:
            masked = masked.masked_fill(~part, -math.inf)
    return z, masked


def _probabilities(masked: Tensor) -> Tensor:
    """Softmax whose rows without a key are 0."""
    return masked.softmax(-1).nan_to_num(0.0) if masked.numel() else masked


def _dropped(p: Tensor, rate: float, seed: int, row: int) -> Tensor:
    """``mask / (1 - rate)``: the same for the same seed and row."""
    generator = torch.Generator(device=p.device).manual_seed(seed + row)
    keep = torch.rand(p.shape, generator=generator, device=p.device, dtype=torch.float32) >= rate
    return keep.to(p.dtype) / (1 - rate)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float,
    dropout: float, seed: int, rows: int,
) -> Tensor:  # fmt: skip
    acc = accumulate_dtype(q.dtype)
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    k, v = k.to(acc), v.to(acc)
    for row in range(0, q.shape[-2], rows):
        part = q[..., row : row + rows, :].to(acc)
        p = _probabilities(_logits(part, k, mask, causal, scale, row)[1])
        if dropout:
            p = p * _dropped(p, dropout, seed, row)
        out[..., row : row + rows, :] = p @ v
    return out


def redistribute(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, reward: Tensor, mask: Tensor | None, causal: bool,
    scale: float, dropout: float, seed: int, rows: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Rewards of q, k, v. ``rows`` queries at a time: nothing of the size [queries, keys] is kept,
    the probabilities are computed again."""
    dtype, acc = q.dtype, accumulate_dtype(q.dtype)
    k, v = k.to(acc), v.to(acc)
    of_q = torch.empty_like(q)
    of_k, of_v = torch.zeros_like(k), torch.zeros_like(v)
    for row in range(0, q.shape[-2], rows):
        at = slice(row, row + rows)
        part = q[..., at, :].to(acc)
        z, masked = _logits(part, k, mask, causal, scale, row)
        p = _probabilities(masked)
        used = p * _dropped(p, dropout, seed, row) if dropout else p
        s = reward[..., at, :].to(acc) / (2 * stabilize(out[..., at, :].to(acc), eps))
        of_v += used.transpose(-1, -2) @ s
        of_p = used * (s @ v.transpose(-1, -2))
        # the mask is a constant that takes no relevance: what is left is that of z
        of_z = softmax_redistribute(torch.where(masked.isinf(), masked, z), p, of_p, -1)
        s = scale * of_z / (2 * stabilize(z, eps))
        of_q[..., at, :] = part * (s @ k)
        of_k += s.transpose(-1, -2) @ part
    return of_q, (k * of_k).to(dtype), (v * of_v).to(dtype)
