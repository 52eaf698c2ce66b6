"""Pruning by magnitude or by relevance (arXiv 2308.12053, application; Yeom 2021).

A weight that is zero stays zero under LFP (its feedback is |w| times something), so an LFP-trained
network can go on training after pruning without masks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .attribution import attribute
from .composites import Composite, Epsilon
from .composites.base import WEIGHTED

SCORES = ("magnitude", "relevance")
SCOPES = ("global", "layer")


class Pruned(NamedTuple):
    """What :func:`prune` did.

    Attributes:
        masks: weight name -> 1 where it was kept, 0 where it was set to zero.
        sparsity: weight name -> share of zeros in it, in [0, 1]. total: share over all of them.
    """

    masks: dict[str, Tensor]
    sparsity: dict[str, float]
    total: float


@torch.no_grad()
def prune(
    model: nn.Module,
    amount: float,
    *,
    by: str = "magnitude",
    scope: str = "global",
    data: Iterable[tuple[Tensor, Any]] | None = None,
    composite: Composite | None = None,
) -> Pruned:
    """Set the least important weights of linear and convolutional layers to zero, in place.

    Args:
        model: trained. amount: share of weights to remove, in [0, 1].
        by: "magnitude" removes the smallest ``|w|``; "relevance" those through which the least
            relevance flows, ``|sum over data|`` by :func:`lfp_kernels.attribute`.
        scope: "global" ranks all weights together, "layer" removes the same share of each layer.
        data: batches (x, labels) for "relevance"; labels as ``target`` of ``attribute``.
        composite: rules of the relevance; by default epsilon. (z+ gives negative weights none, so
            they would all go first.)

    Raises:
        ValueError: an argument is out of its range, or data is missing. Nothing is pruned then.
    """
    if isinstance(amount, bool) or not isinstance(amount, (int, float)) or not 0 <= amount <= 1:
        raise ValueError(f"prune: amount: expected a share in [0, 1], got {amount!r}")
    if by not in SCORES:
        raise ValueError(f"prune: by: expected one of {SCORES}, got {by!r}")
    if scope not in SCOPES:
        raise ValueError(f"prune: scope: expected one of {SCOPES}, got {scope!r}")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, WEIGHTED)}
    if not layers:
        raise ValueError("prune: model: expected a linear or convolutional layer, got none")
    scores = _scores(model, layers, by, data, composite)
    masks = _masks(scores, float(amount), scope)
    sparsity, zeros, total = {}, 0, 0
    for name, mask in masks.items():
        # In place: the parameter stays the one that optimizers hold.
        model.get_parameter(name).mul_(mask)
        gone = mask.numel() - int(mask.sum())
        sparsity[name] = gone / max(mask.numel(), 1)
        zeros, total = zeros + gone, total + mask.numel()
    return Pruned(masks, sparsity, zeros / max(total, 1))


def _masks(scores: dict[str, Tensor], amount: float, scope: str) -> dict[str, Tensor]:
    """1 where a weight is kept: the least scores go, the earlier weight first among equals."""
    groups = [list(scores)] if scope == "global" else [[name] for name in scores]
    masks: dict[str, Tensor] = {}
    for names in groups:
        ranked = torch.cat([scores[name].flatten() for name in names])
        keep = torch.ones_like(ranked)
        keep[ranked.argsort(stable=True)[: round(amount * ranked.numel())]] = 0
        parts = keep.split([scores[name].numel() for name in names])
        masks.update((name, part.view_as(scores[name])) for name, part in zip(names, parts))
    return masks


def _scores(
    model: nn.Module,
    layers: dict[str, Any],
    by: str,
    data: Iterable[tuple[Tensor, Any]] | None,
    composite: Composite | None,
) -> dict[str, Tensor]:
    if by == "magnitude":
        return {_key(name): layer.weight.detach().abs() for name, layer in layers.items()}
    if data is None:
        raise ValueError(
            "prune: data: expected batches (x, labels) for by='relevance', got None; a few hundred "
            "samples of the training set do"
        )
    sums = {_key(name): torch.zeros_like(layer.weight) for name, layer in layers.items()}
    rules = Epsilon() if composite is None else composite
    batches = 0
    for x, target in data:
        found = attribute(model, x, target, rules, weights=True).weights
        for name, total in sums.items():
            total += found[name]
        batches += 1
    if not batches:
        raise ValueError("prune: data: expected at least one batch (x, labels), got none")
    return {name: total.abs() for name, total in sums.items()}


def _key(layer: str) -> str:
    return f"{layer}.weight" if layer else "weight"
