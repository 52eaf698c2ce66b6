"""The masks of torch's attention modules, as scaled_dot_product_attention takes them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def module_mask(
    op: str, attn_mask: Any, key_padding_mask: Any, q: Tensor, k: Tensor, *, batched: bool = True
) -> Tensor | None:
    """One mask of both, True where a key takes part, or added; None of none.

    Args:
        attn_mask: [L, S] or [N * heads, L, S]. key_padding_mask: [N, S], or [S] where the module's
            input has no batch (not ``batched``). bool, True where a key is hidden, or added.
        q: [N, heads, L, E]. k: [N, heads, S, E].

    Raises:
        TypeError, ValueError: a mask does not fit; the message names it.
    """
    n, heads, length, keys = *q.shape[:3], k.shape[2]
    mask = padding = None
    if attn_mask is not None:
        _check(op, "attn_mask", attn_mask, (length, keys), (n * heads, length, keys))
        mask = _takes_part(attn_mask)
        mask = mask if mask.dim() == 2 else mask.view(n, heads, length, keys)
    if key_padding_mask is not None:
        _check(op, "key_padding_mask", key_padding_mask, (n, keys) if batched else (keys,))
        padding = _takes_part(key_padding_mask).view(n, 1, 1, keys)
    if mask is None or padding is None:
        return padding if mask is None else mask
    if mask.dtype == padding.dtype == torch.bool:
        return mask & padding
    return _added(mask, q.dtype) + _added(padding, q.dtype)


def _check(op: str, name: str, mask: Any, *shapes: tuple[int, ...]) -> None:
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"{op}: {name}: expected a bool tensor (True hides) or a floating one that is added, "
            f"got {got}; of one that is 0 where padded take mask == 0"
        )
    if tuple(mask.shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"{op}: {name}: expected shape {expected}, got {tuple(mask.shape)}")


def _takes_part(mask: Tensor) -> Tensor:
    return ~mask if mask.dtype == torch.bool else mask


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -math.inf)
