"""Relevance through layer, RMS and group normalisation, in plain PyTorch (docs/math.md, section 7).

Rows are normalised over their last dimension: ``z = xhat * weight + bias``, with
``xhat = (x - mean) * invstd``, where an RMS norm has no mean. weight and bias broadcast to rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...rules import accumulate_dtype, stabilize


def normalise(x: Tensor, centred: bool, eps: float) -> tuple[Tensor, Tensor]:
    """(xhat, invstd) of rows x [R, D]."""
    x = x.to(accumulate_dtype(x.dtype))
    shifted = x - x.mean(1, keepdim=True) if centred else x
    invstd = (shifted.square().mean(1, keepdim=True) + eps).rsqrt()
    return shifted * invstd, invstd


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, centred: bool, eps: float
) -> Tensor:
    z, _ = normalise(x, centred, eps)
    z = z if weight is None else z * weight
    z = z if bias is None else z + bias
    return z.to(x.dtype)


def rows_redistribute(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, reward: Tensor, centred: bool,
    eps: float, stabilizer: float, identity: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(input reward [R, D], and rows [R, D] whose sums are the feedback of weight and bias without
    the parameter's magnitude). weight and bias broadcast to rows."""
    acc = accumulate_dtype(x.dtype)
    xhat, invstd = normalise(x, centred, eps)
    w = torch.ones_like(xhat) if weight is None else weight.to(acc).expand_as(xhat)
    b = torch.zeros_like(xhat) if bias is None else bias.to(acc).expand_as(xhat)
    s = reward.to(acc) / stabilize(xhat * w + b, stabilizer)
    if identity and not centred and bias is None:
        found = reward.to(acc)  # every term of the output is its own input's
    else:
        g = s * w
        along = 0.0 if identity else xhat * (g * xhat).mean(1, keepdim=True)
        shift = g.mean(1, keepdim=True) if centred else 0.0
        found = x.to(acc) * (g - along - shift) * invstd
    return found.to(x.dtype), s * xhat, s


def redistribute(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, reward: Tensor, centred: bool,
    eps: float, stabilizer: float, identity: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(input reward [R, D], sums [D] for weight and bias)."""
    found, to_weight, to_bias = rows_redistribute(
        x, weight, bias, reward, centred, eps, stabilizer, identity
    )
    return found, to_weight.sum(0), to_bias.sum(0)


def group_redistribute(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, reward: Tensor, groups: int,
    eps: float, stabilizer: float, identity: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(input reward [N, C, M], sums [C] for weight and bias) of x [N, C, M], C in ``groups``."""
    batch, channels, inner = x.shape
    if x.numel() == 0:
        sums = x.new_zeros(channels, dtype=accumulate_dtype(x.dtype))
        return torch.empty_like(x), sums, sums.clone()
    rows = x.reshape(batch * groups, -1)
    each = [  # of every element of a row
        None if p is None else p.repeat_interleave(inner).view(groups, -1).repeat(batch, 1)
        for p in (weight, bias)
    ]
    found, *to = rows_redistribute(
        rows, each[0], each[1], reward.reshape(rows.shape), True, eps, stabilizer, identity
    )
    to_weight, to_bias = (t.view(x.shape).sum((0, 2)) for t in to)
    return found.view(x.shape), to_weight, to_bias
