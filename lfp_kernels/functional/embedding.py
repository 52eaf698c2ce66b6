"""Rows of a table (embeddings): redistribute, redistribute-and-update."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _validate as check
from .. import ops
from .._no_grad import no_grad
from ..backends import select
from ..optim import Update

_ = ops  # registers the schemas


@no_grad
def embedding_redistribute(
    weight: Tensor, tokens: Tensor, reward: Tensor, *, padding: int | None = None, eps: float = 1e-6
) -> Tensor:
    """Feedback of a table whose rows ``weight[tokens]`` got the reward (docs/math.md, section 7).

    ``|w| / stab(w)`` times the sum of the rewards of a row's uses; 0 for a row that nothing used.

    Args:
        weight: [V, E]. tokens: integers [...]. reward: [..., E], at ``weight[tokens]``.
        padding: a row that takes no feedback; negative: counted from the end.

    Returns:
        [V, E]; feedback points uphill.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
        IndexError: a token is no row of the table (CPU; on CUDA the kernel stops, as torch's does).
    """
    op = "embedding_redistribute"
    tokens, reward, row = _check(op, weight, tokens, reward, padding)
    return select("embedding", weight).redistribute(weight, tokens, reward, row, eps)


@no_grad
def embedding_redistribute_update(
    weight: Tensor,
    tokens: Tensor,
    reward: Tensor,
    update: Update,
    *,
    padding: int | None = None,
    eps: float = 1e-6,
) -> None:
    """Move the rows in use and their optimizer states one step along their feedback, in place.

    Each row moves once, however often it was used. Rows that were not used, their states and their
    weight decay stand still, as those of sparse gradients do.

    Args:
        update: what :meth:`lfp_kernels.optim.BoundOptimizer.update_of` gives for ``weight``.
        The others as in :func:`embedding_redistribute`.

    Raises:
        As :func:`embedding_redistribute`; nothing has been changed then.
    """
    op = "embedding_redistribute_update"
    tokens, reward, row = _check(op, weight, tokens, reward, padding)
    check.update(op, "update", update, weight)
    dense = weight.contiguous()
    select("embedding", weight).redistribute_update(dense, tokens, reward, row, eps, update)
    if dense is not weight:
        weight.copy_(dense)


def _check(
    op: str, weight: Tensor, tokens: Tensor, reward: Tensor, padding: int | None
) -> tuple[Tensor, Tensor, int]:
    """(tokens [N] in int64, reward [N, E], padding row or -1)"""
    check.floating(op, "weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight: expected shape [V, E], got {tuple(weight.shape)}")
    check.tensor(op, "tokens", tokens)
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"{op}: tokens: expected int64 or int32, got {tokens.dtype}; convert it with .long()"
        )
    if tokens.device != weight.device:
        raise ValueError(
            f"{op}: tokens: expected device {weight.device} like weight, got {tokens.device}"
        )
    check.like(op, "reward", reward, weight, "weight")
    check.shape(op, "reward", reward, (*tokens.shape, weight.shape[1]))
    rows = weight.shape[0]
    if padding is not None and not -rows <= padding < rows:
        raise ValueError(
            f"{op}: padding: expected None or a row of the table, in [{-rows}, {rows}), "
            f"got {padding}"
        )
    tokens = tokens.reshape(-1).long()
    # On a GPU this would wait for it.
    if tokens.device.type == "cpu" and tokens.numel() and not torch.compiler.is_compiling():
        low, high = (int(t) for t in tokens.aminmax())
        if low < 0 or high >= rows:
            raise IndexError(
                f"{op}: tokens: expected rows of the table, in [0, {rows}), got "
                f"{low if low < 0 else high}"
            )
    row = -1 if padding is None else padding % rows
    return tokens, reward.reshape(tokens.numel(), weight.shape[1]), row
