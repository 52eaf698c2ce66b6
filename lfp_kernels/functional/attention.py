"""Attention, and relevance through it (arXiv 2402.05602; docs/math.md, section 7).

Block by block with the softmax computed again: nothing of the size [queries, keys] is ever kept.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _validate as check
from .. import ops
from .._no_grad import no_grad
from ..backends import select

_ = ops  # registers the schemas
_DEEPEST = -1e4  # finite entries of an added mask: hidden as well, and lse keeps three decimals


class Attended(NamedTuple):
    """Output [..., H, L, F] and each query's log of the sum of exponentials [..., H, L], float32
    (float64 of float64); +inf where a query sees no key."""

    out: Tensor
    lse: Tensor


@no_grad
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
) -> Attended:
    """``softmax(scale * q k^T + mask) v`` as torch's scaled_dot_product_attention.

    Args:
        q: [..., H, L, E]. k: [..., K, S, E]. v: [..., K, S, F]. H is a multiple of K: query head h
            reads key head h // (H / K). Without heads: [L, E], [S, E], [S, F].
        mask: bool (True takes part) or added, broadcast to [..., H, L, S]. causal: query i sees
            keys 0 .. i; both hide where both are given.
        scale: None is 1 / sqrt(E). dropout: of the probabilities; ``seed`` decides it, on every
            backend alike.

    Raises:
        TypeError, ValueError: a shape or dtype that does not fit; the message names it.
    """
    four, mask, scale, shape = _prepare("attention", q, k, v, mask, scale, dropout)
    out, lse = select("attention", q).forward(*four, mask, causal, scale, dropout, seed)
    return Attended(out.reshape(*shape, v.shape[-1]), lse.reshape(shape))


@no_grad
def attention_redistribute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    reward: Tensor,
    mask: Tensor | None = None,
    *,
    lse: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    mode: str = "attnlrp",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards of q, k and v from the ``reward`` at ``out`` of :func:`attention`.

    Mode "attnlrp": half goes to v, a quarter each to q and k: every product halves, and the softmax
    passes on what its logits ``x`` explain, ``x * (r - p * sum r)``. Mode "plain": the gradient
    acts on the reward.

    Args: as :func:`attention`. lse: as it returned; None computes it again. eps: stabilizer of both
        products.
    """
    op = "attention_redistribute"
    four, full, number, shape = _prepare(op, q, k, v, mask, scale, dropout)
    for name, value in (("out", out), ("reward", reward)):
        check.like(op, name, value, q, "q")
        check.shape(op, name, value, (*shape, v.shape[-1]))
    if mode not in ("attnlrp", "plain"):
        raise ValueError(f"{op}: mode: expected 'attnlrp' or 'plain', got {mode!r}")
    if lse is None:
        options: dict[str, Any] = {"scale": scale, "dropout": dropout, "seed": seed}
        lse = attention(q, k, v, mask, causal=causal, **options).lse
    rows, width = four[0].shape[:3], v.shape[-1]
    found = select("attention", q).redistribute(
        *four, out.reshape(*rows, width), lse.reshape(rows), reward.reshape(*rows, width), full,
        causal, number, dropout, seed, mode == "attnlrp", eps,
    )  # fmt: skip
    of_q, of_k, of_v = (f.reshape(t.shape) for f, t in zip(found, (q, k, v)))
    return of_q, of_k, of_v


def _prepare(
    op: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, drop: float
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None, float, torch.Size]:
    """(q, k, v as [B, H, L, E]; the mask expanded to [B, H, L, S]; the scale; [..., H, L])."""
    check.floating(op, "q", q)
    for name, value in (("k", k), ("v", v)):
        check.like(op, name, value, q, "q")
    heads = lambda t: t.shape[-3] if t.dim() > 2 else 1  # noqa: E731
    front = q.shape[:-3]
    if q.dim() < 2 or k.dim() != q.dim() or k.shape[:-3] != front or k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"{op}: k: expected shape (*{tuple(front)}, K, S, {q.shape[-1]}) like q, got "
            f"{tuple(k.shape)}"
        )
    if heads(k) != heads(q) and (heads(k) == 0 or heads(q) % heads(k)):
        raise ValueError(
            f"{op}: k: expected a number of heads that divides the {heads(q)} of q, got {heads(k)}"
        )
    if v.dim() != k.dim() or v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"{op}: v: expected {tuple(k.shape[:-1])} in front, got {tuple(v.shape)}")
    if not 0 <= drop < 1:
        raise ValueError(f"{op}: dropout: expected a rate in [0, 1), got {drop}")
    full = (*q.shape[:-1], k.shape[-2])
    if mask is not None:
        try:
            fits = torch.broadcast_shapes(mask.shape, full) == full
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"{op}: mask: expected a shape that broadcasts to {full}, got {tuple(mask.shape)}"
            )
        if mask.dtype != torch.bool:
            check.floating(op, "mask", mask)
            # lse of a query that sees nothing but finfo.min could not tell that from one key.
            deep = (mask < _DEEPEST) & (mask > -math.inf)
            mask = mask.masked_fill(deep, _DEEPEST).to(q.dtype)
        while mask.dim() < 4:
            mask = mask.unsqueeze(0)
        leading = torch.Size(full[:-3]).numel()
        if mask.dim() > 4:
            mask = mask.expand(full).reshape(leading, *full[-3:])
        mask = mask.expand(leading, heads(q), *full[-2:])
    batch = torch.Size(front).numel()
    four = tuple(t.reshape(batch, heads(t), *t.shape[-2:]) for t in (q, k, v))
    number = 1 / math.sqrt(max(1, q.shape[-1])) if scale is None else scale
    return four, mask, number, q.shape[:-1]  # type: ignore[return-value]
