"""Initial rewards in plain PyTorch: the oracle. Shapes: out [..., C], labels [...]."""

from __future__ import annotations

import torch
from torch import Tensor

from ...rules import accumulate_dtype
from .codes import NEURON_TARGET, VALUE_TARGET, Kind

_NAN = float("nan")


def _sign(o: Tensor) -> Tensor:
    """0 at both zeros; NaN stays NaN."""
    return torch.where(o.isnan(), o, o.sign())


def _one_hot(labels: Tensor, o: Tensor) -> Tensor:
    """[..., C] with 1 at the label; a row whose label is out of range is NaN."""
    classes = torch.arange(o.shape[-1], device=o.device)
    labels = labels.unsqueeze(-1)
    valid = (labels >= 0) & (labels < o.shape[-1])
    return torch.where(valid, (labels == classes).to(o.dtype), _NAN)


def _first_winner(o: Tensor) -> Tensor:
    """[..., C] with 1 at the first of the largest logits; NaN counts as the largest."""
    top = (o == o.amax(-1, keepdim=True)) | o.isnan()
    return (top & (top.cumsum(-1) == 1)).to(o.dtype)


def reward(out: Tensor, target: Tensor | None, kind: Kind, params: list[float]) -> Tensor:
    if out.numel() == 0:
        return torch.empty(out.shape, dtype=out.dtype, device=out.device)
    low, high, use_sign, neuron = params
    o = out.to(accumulate_dtype(out.dtype))
    if kind in VALUE_TARGET:
        assert target is not None
        y = target.to(o.dtype).reshape(o.shape)
    elif target is not None:
        y = _one_hot(target, o)
    else:
        assert kind in NEURON_TARGET
        aimed = torch.arange(o.shape[-1], device=o.device) == int(neuron)
        y = torch.ones_like(o) if neuron < 0 else aimed.to(o.dtype).expand(o.shape)

    if kind in (Kind.SIGMOID, Kind.BINARY_SIGMOID):
        r = o * (y - o.sigmoid())
    elif kind == Kind.SOFTMAX:
        r = o * (y - o.softmax(-1))
    elif kind == Kind.BOUNDED_SOFTMAX:
        p = o.softmax(-1)
        bounded = torch.where(p > high, 1.0, torch.where(p < low, 0.0, p))
        r = (_sign(o) if use_sign else o) * (y - bounded)
    elif kind == Kind.MAXIMIZE:
        r = y * _sign(o) * (1 - o.sigmoid())
    elif kind == Kind.MINIMIZE:
        r = -y * _sign(o) * (1 - o.sigmoid())
    elif kind == Kind.CORRECT_CLASSIFICATION:
        r = y * _first_winner(o) * _sign(o)
    elif kind == Kind.MISCLASSIFICATION:
        at_label = torch.where(y == 1, o, -torch.inf).amax(-1, keepdim=True)
        r = -(o > at_label).to(o.dtype) * _sign(o) + 0 * y
    elif kind == Kind.REGRESSION:
        r = (y - o) ** 3 * _sign(o)
    else:
        raise ValueError(f"reward: unknown reward code {kind}")
    return r.to(out.dtype).contiguous()


def spike_rate(spikes: Tensor, labels: Tensor) -> Tensor:
    if spikes.numel() == 0:
        return torch.empty(spikes.shape, dtype=spikes.dtype, device=spikes.device)
    s = spikes.to(accumulate_dtype(spikes.dtype))
    half = s.shape[0] // 2
    fired, silent = s.sum(0), (1 - s).sum(0)
    y = _one_hot(labels, fired)
    true_class = (1 - (fired - half).sigmoid()).expand(s.shape)
    others = -s * (1 - (silent - half).sigmoid())
    r = torch.where(y == 1, true_class, others) + 0 * y
    return r.to(spikes.dtype).contiguous()
