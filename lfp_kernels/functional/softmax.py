"""Relevance through softmax (arXiv 2402.05602; docs/math.md, section 7)."""

from __future__ import annotations

from torch import Tensor

from .. import _validate as check
from .. import ops
from .._no_grad import no_grad
from ..backends import select

_ = ops  # registers the schemas


@no_grad
def softmax_redistribute(x: Tensor, p: Tensor, reward: Tensor, dim: int = -1) -> Tensor:
    """``x * (r - p * sum r)`` of ``p = softmax(x, dim)``; 0 where x is -inf (masked out).

    Args:
        x, p, reward: of one shape, floating dtype and device.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    op = "softmax_redistribute"
    check.floating(op, "x", x)
    for name, other in (("p", p), ("reward", reward)):
        check.like(op, name, other, x, "x")
        check.shape(op, name, other, x.shape)
    axes = max(x.dim(), 1)
    if not -axes <= dim < axes:
        raise ValueError(f"{op}: dim: expected one of {axes} dimensions, got {dim}")
    last = [t.movedim(dim, -1) if t.dim() else t.view(1) for t in (x, p, reward)]
    rows = [t.reshape(t.numel() // max(t.shape[-1], 1), t.shape[-1]) for t in last]
    found = select("softmax", x).redistribute(*rows).view(last[0].shape)
    return found.movedim(-1, dim) if x.dim() else found.view(())
