"""Relevance through attention and normalisation (arXiv 2402.05602; docs/math.md, section 7).

Reference implementations only; attention is computed block by block of queries, so nothing of the
size [queries, keys] is ever kept.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _validate as check
from .. import ops
from ..backends import select
from ..rules import accumulate_dtype

_ = ops  # registers the schemas
_BLOCK = 1 << 18  # probabilities of a block of queries: they stay in a core's cache
_DEVICE_BLOCK = 1 << 22  # beside the CPU, where every block is a round of launches


class NormFeedback(NamedTuple):
    """Input reward, shaped like x, and feedback of weight and bias (None where there is none)."""

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None


@torch.no_grad()
def softmax_redistribute(x: Tensor, p: Tensor, reward: Tensor, dim: int = -1) -> Tensor:
    """``x * (r - p * sum r)`` of ``p = softmax(x, dim)``; 0 where x is -inf (masked out).

    Args:
        x, p, reward: of one shape, floating point.
    """
    op = "softmax_redistribute"
    check.floating(op, "x", x)
    check.like(op, "reward", reward, x, "x")
    check.shape(op, "reward", reward, x.shape)
    acc = accumulate_dtype(x.dtype)
    backend = select("attention", x)
    return backend.softmax_redistribute(x.to(acc), p.to(acc), reward.to(acc), dim).to(x.dtype)


@torch.no_grad()
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """``softmax(scale * q k^T + mask) v`` [..., L, E'] as torch's scaled_dot_product_attention.

    Args:
        q: [..., L, E]. k: [..., S, E]. v: [..., S, E']. mask: bool (True takes part) or added,
            broadcast to [..., L, S]. causal: query i sees keys 0 .. i.
        scale: None is 1 / sqrt(E). dropout: of the probabilities; ``seed`` decides it.
    """
    scale = _check("attention", q, k, v, mask, scale, dropout)
    return select("attention", q).forward(q, k, v, mask, causal, scale, dropout, seed, _rows(q, k))


@torch.no_grad()
def attention_redistribute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    reward: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards of q, k and v from the ``reward`` at ``out`` of :func:`attention`.

    Half goes to v, a quarter each to q and k: every product halves, and the softmax passes on what
    its logits ``x`` explain, ``x * (r - p * sum r)``.

    Args: as :func:`attention`. eps: stabilizer of both products.
    """
    op = "attention_redistribute"
    scale = _check(op, q, k, v, mask, scale, dropout)
    check.like(op, "reward", reward, q, "q")
    check.shape(op, "reward", reward, out.shape)
    return select("attention", q).redistribute(
        q, k, v, out, reward, mask, causal, scale, dropout, seed, _rows(q, k), eps
    )


@torch.no_grad()
def norm_redistribute(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    reward: Tensor,
    *,
    groups: int | None = None,
    centred: bool = True,
    eps: float = 1e-5,
    stabilizer: float = 1e-6,
    identity: bool = False,
) -> NormFeedback:
    """Relevance through a layer norm, an RMS norm (``centred=False``) or a group norm (``groups``).

    Args:
        x, reward: [..., *weight.shape], or [N, C, ...] of a group norm. weight, bias: or None.
        identity: the division by the deviation hands the reward on, and the rest (mean, weight,
            bias) follows the epsilon rule (AttnLRP): the reward itself, where there is no mean and
            no bias. Else the epsilon rule with the whole derivative, statistics included (the
            official package).
    """
    op = "norm_redistribute"
    check.floating(op, "x", x)
    check.like(op, "reward", reward, x, "x")
    check.shape(op, "reward", reward, x.shape)
    if groups is None:
        width = weight.numel() if weight is not None else x.shape[-1]
        flat = [None if p is None else p.reshape(-1) for p in (weight, bias)]
        found, *sums = select("layer_norm", x).redistribute(
            x.reshape(-1, width), *flat, reward.reshape(-1, width), centred, eps, stabilizer,
            identity,
        )  # fmt: skip
    else:
        rows = x.reshape(x.shape[0] * groups, -1)
        each = rows.shape[1] * groups // x.shape[1]
        of = [
            None
            if p is None
            else p.view(groups, -1, 1).expand(-1, -1, each).reshape(groups, -1).repeat(len(x), 1)
            for p in (weight, bias)
        ]
        found, *to = select("group_norm", x).rows_redistribute(
            rows, *of, reward.reshape(rows.shape), centred, eps, stabilizer, identity
        )
        sums = [t.view(len(x), x.shape[1], -1).sum((0, 2)) for t in to]
    of_weight, of_bias = (
        None if p is None else (p.abs() * total.view(p.shape)).to(p.dtype)
        for p, total in zip((weight, bias), sums)
    )
    return NormFeedback(found.view(x.shape), of_weight, of_bias)


def _rows(q: Tensor, k: Tensor) -> int:
    """Queries of a block."""
    heads = max(1, math.prod(q.shape[:-2]))
    block = _BLOCK if q.device.type == "cpu" else _DEVICE_BLOCK
    return max(16, block // (heads * max(1, k.shape[-2])))


def _check(
    op: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, drop: float
) -> float:
    check.floating(op, "q", q)
    for name, value in (("k", k), ("v", v)):
        check.like(op, name, value, q, "q")
    if q.dim() < 2 or k.shape != (*q.shape[:-2], k.shape[-2], q.shape[-1]):
        raise ValueError(
            f"{op}: k: expected shape (*{tuple(q.shape[:-2])}, S, {q.shape[-1]}) like q, got "
            f"{tuple(k.shape)}"
        )
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"{op}: v: expected {tuple(k.shape[:-1])} in front, got {tuple(v.shape)}")
    if mask is not None:
        full = (*q.shape[:-1], k.shape[-2])
        try:
            fits = torch.broadcast_shapes(mask.shape, full) == full
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"{op}: mask: expected a shape that broadcasts to {full}, got {tuple(mask.shape)}"
            )
    if not 0 <= drop < 1:
        raise ValueError(f"{op}: dropout: expected a rate in [0, 1), got {drop}")
    return 1 / math.sqrt(q.shape[-1]) if scale is None else scale
