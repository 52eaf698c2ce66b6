"""Attention and relevance through it in plain PyTorch: the oracle (AttnLRP, arXiv 2402.05602;
docs/math.md, section 7). A block of queries at a time, so nothing of the size [queries, keys] is
kept."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...rules import accumulate_dtype, philox, stabilize

_BLOCK = 1 << 18  # probabilities of a block of queries: they stay in a core's cache
_DEVICE_BLOCK = 1 << 22  # beside the CPU, where every block is a round of launches


def _rows(q: Tensor, k: Tensor) -> int:
    """Queries of a block."""
    block = _BLOCK if q.device.type == "cpu" else _DEVICE_BLOCK
    return max(16, block // max(1, q.shape[0] * q.shape[1] * k.shape[2]))


def _head_of_queries(t: Tensor, q: Tensor) -> Tensor:
    """Keys or values [B, K, S, E] as every query head reads them, [B, H, S, E]."""
    shared = q.shape[1] // max(1, t.shape[1])
    return t.to(accumulate_dtype(t.dtype)).repeat_interleave(shared, 1)


def _keys_seen(q: Tensor, k: Tensor, causal: bool, last: int) -> int:
    """Keys that the queries before ``last`` may see."""
    return min(k.shape[2], last) if causal else k.shape[2]


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
        part = mask[..., row : row + q.shape[-2], : k.shape[-2]]
        shown = part.dtype == torch.bool
        masked = masked.masked_fill(~part, -math.inf) if shown else masked + part
    return z, masked


def _probabilities(masked: Tensor) -> Tensor:
    """Softmax whose rows without a key are 0."""
    return masked.softmax(-1).masked_fill((masked == -math.inf).all(-1, keepdim=True), 0.0)


def _kept(like: Tensor, rate: float, seed: int, row: int, shape: torch.Size) -> Tensor:
    """``mask / (1 - rate)`` of the probabilities ``like``, the query rows from ``row`` on.

    Element [b, h, i, j] of ``shape`` [B, H, L, S] takes word ``index % 4`` of Philox block
    ``index / 4``, index = ((b * H + h) * L + i) * S + j; it is kept where the upper 24 bits, as a
    number in [0, 1), reach the rate."""
    heads, rows, seen, keys = shape[0] * shape[1], like.shape[2], like.shape[3], shape[3]
    begin = (torch.arange(heads) * shape[2] + row) * keys
    count = rows * keys
    blocks = begin[:, None] // 4 + torch.arange(count // 4 + 2)
    words = philox(blocks.flatten(), seed).view(heads, -1)
    drawn = words.gather(1, begin[:, None] % 4 + torch.arange(count))
    uniform = (drawn >> 8).to(torch.float32) * 2.0**-24
    keep = (uniform.view(*shape[:2], rows, keys)[..., :seen] >= rate).to(like.device)
    return keep.to(like.dtype) / (1 - rate)


def _shape(q: Tensor, k: Tensor) -> torch.Size:
    return torch.Size((*q.shape[:3], k.shape[2]))


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float,
    dropout: float, seed: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse)."""
    from . import empty_heads  # the package imports this module

    acc, shape = accumulate_dtype(q.dtype), _shape(q, k)
    out = empty_heads(q, (*q.shape[:3], v.shape[3]))
    lse = q.new_empty(q.shape[:3], dtype=acc)
    k, v = _head_of_queries(k, q), _head_of_queries(v, q)
    rows = _rows(q, k)
    for row in range(0, q.shape[2], rows):
        at = slice(row, row + rows)
        seen = _keys_seen(q, k, causal, min(row + rows, q.shape[2]))
        _, masked = _logits(q[:, :, at].to(acc), k[:, :, :seen], mask, causal, scale, row)
        p = _probabilities(masked)
        of_row = masked.logsumexp(-1)
        lse[:, :, at] = torch.where(of_row == -math.inf, math.inf, of_row)
        if dropout:
            p = p * _kept(p, dropout, seed, row, shape)
        out[:, :, at] = p @ v[:, :, :seen]
    return out, lse


def redistribute(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, reward: Tensor, mask: Tensor | None,
    causal: bool, scale: float, dropout: float, seed: int, attnlrp: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Rewards of q, k, v: AttnLRP's, or the gradient's. ``lse`` is not read: the oracle computes
    the softmax itself. What the softmax takes off every logit, the sum of p r_p over the keys, is
    that of s out over the output's width: one number per query, known before any key is read."""
    from . import empty_heads

    acc, shape, kv = accumulate_dtype(q.dtype), _shape(q, k), k.shape[1]
    found = [empty_heads(t, tuple(t.shape)) for t in (q, k, v)]
    keys, values = _head_of_queries(k, q), _head_of_queries(v, q)
    of_k, of_v = torch.zeros_like(keys), torch.zeros_like(values)
    rows = _rows(q, k)
    for row in range(0, q.shape[2], rows):
        at = slice(row, row + rows)
        seen = _keys_seen(q, k, causal, min(row + rows, q.shape[2]))
        some, part = slice(0, seen), q[:, :, at].to(acc)
        z, masked = _logits(part, keys[:, :, some], mask, causal, scale, row)
        p = _probabilities(masked)
        kept = _kept(p, dropout, seed, row, shape) if dropout else 1.0
        s, o = reward[:, :, at].to(acc), out[:, :, at].to(acc)
        if attnlrp:  # the product with the values gives them half
            s = s / (2 * stabilize(o, eps))
        of_v[:, :, some] += (p * kept).transpose(-1, -2) @ s
        to_p = kept * (s @ values[:, :, some].transpose(-1, -2))
        to_z = p * (to_p - (s * o).sum(-1, keepdim=True))
        if attnlrp:  # z takes z * to_z, and its product gives half to each factor
            to_z = to_z * z / (2 * stabilize(z, eps))
        to_z = scale * torch.where(masked.isinf(), 0.0, to_z)
        to_q = to_z @ keys[:, :, some]
        found[0][:, :, at] = part * to_q if attnlrp else to_q
        of_k[:, :, some] += to_z.transpose(-1, -2) @ part
    for result, total, t in zip(found[1:], (of_k, of_v), (k, v)):
        total = total.unflatten(1, (kv, -1)).sum(2)
        result.copy_(t.to(acc) * total if attnlrp else total)
    return found[0], found[1], found[2]
