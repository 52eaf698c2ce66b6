"""Inner products and squared norms of two tensors, in one pass over both."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _validate as check
from .. import ops
from .._no_grad import no_grad
from ..backends import select

_ = ops  # registers the schemas
_CHUNK = 4096  # elements of a row when a whole tensor is summed


@no_grad
def alignment_sums(a: Tensor, b: Tensor, *, rows: bool = False) -> Tensor:
    """``(a . b, |a|^2, |b|^2)``: [3] of the whole tensors, or [N, 3] of their first dimension.

    Args:
        a, b: of one shape, dtype and device. rows: one result per entry of the first dimension.

    Returns:
        float64 for float64 tensors and for whole tensors, else float32.
    """
    op = "alignment_sums"
    check.floating(op, "a", a)
    check.like(op, "b", b, a, "a")
    check.shape(op, "b", b, a.shape)
    if rows:
        if a.dim() == 0:
            raise ValueError(f"{op}: a: expected at least one dimension with rows=True, got none")
        n = a.shape[0]
        if a.numel() == 0:
            return a.new_zeros((n, 3), dtype=torch.float32 if a.dtype != torch.float64 else None)
        return select("alignment", a).sums(a.reshape(n, -1), b.reshape(n, -1))
    total = torch.zeros(3, dtype=torch.float64, device=a.device)
    x, y = a.reshape(-1), b.reshape(-1)
    whole = x.numel() - x.numel() % _CHUNK
    for begin, end, width in ((0, whole, _CHUNK), (whole, x.numel(), x.numel() - whole)):
        if end > begin:
            part = select("alignment", a).sums(
                x[begin:end].view(-1, width), y[begin:end].view(-1, width)
            )
            total += part.sum(0, dtype=torch.float64)
    return total
