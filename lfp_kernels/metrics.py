"""How well random feedback lines up with backpropagation. The measures differ: name which.

``weight_angle``: W against B, one number per layer (BioTorch, Akrout 2019). ``norm_ratio``:
``|B| / |W|``. ``delta_angle``: the signals of two methods at a layer, per sample, averaged
(Meulemans 2020). ``gradient_angle``: the weight updates of two methods, per layer and together.
Angles are in degrees. Every measure is made of three sums found in one pass over both tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .functional import alignment_sums

__all__ = ["angle", "delta_angle", "gradient_angle", "norm_ratio", "weight_angles"]


def _degrees(sums: Tensor) -> Tensor:
    """Angle from (a . b, |a|^2, |b|^2); 90 where one of them is zero."""
    norms = (sums[..., 1] * sums[..., 2]).sqrt()
    cosine = torch.where(norms > 0, sums[..., 0] / norms.clamp_min(1e-300), 0.0)
    return cosine.clamp(-1, 1).arccos().rad2deg()


def angle(a: Tensor, b: Tensor) -> float:
    """Angle in degrees between two tensors of one shape, as vectors.

    Args:
        a, b: e.g. W and its feedback matrix B.
    """
    return float(_degrees(alignment_sums(a, b)))


def norm_ratio(a: Tensor, b: Tensor) -> float:
    """``|b| / |a|``; inf where a is zero.

    Args:
        a, b: of one shape.
    """
    sums = alignment_sums(a, b)
    return float((sums[2] / sums[1]).sqrt())


def delta_angle(a: Tensor, b: Tensor) -> float:
    """Mean over samples of the angle in degrees between the signals ``a[n]`` and ``b[n]``.

    Args:
        a, b: signals at one layer [N, ...], e.g. by feedback alignment and by backpropagation.
    """
    return float(_degrees(alignment_sums(a, b, rows=True).double()).mean())


def gradient_angle(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, float]:
    """Angle in degrees between two sets of weight updates: per name, and "total" over all.

    Args:
        a, b: name -> update; the same names.
    """
    if set(a) != set(b):
        raise ValueError(
            f"gradient_angle: b: expected the names of a, got {sorted(set(a) ^ set(b))} in one only"
        )
    sums = {name: alignment_sums(a[name], b[name]) for name in a}
    found = {name: float(_degrees(value)) for name, value in sums.items()}
    found["total"] = float(_degrees(torch.stack(list(sums.values())).sum(0)))
    return found


def weight_angles(model: nn.Module) -> dict[str, float]:
    """Layer name -> angle in degrees between its weight and its feedback matrix.

    Args:
        model: prepared by a composite whose matrices have the weights' shape.
    """
    found = {}
    for name, module in model.named_modules():
        weight, matrix = (getattr(module, k, None) for k in ("weight", "feedback_weight"))
        if not (isinstance(weight, Tensor) and isinstance(matrix, Tensor)):
            continue
        if weight.shape == matrix.shape:
            found[name] = angle(weight.detach(), matrix.detach())
    return found
