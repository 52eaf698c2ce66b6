"""Composites of layer-wise relevance propagation, which LFP trains by just as well."""

from __future__ import annotations

from typing import Any

from ..rules import AlphaBeta, Flat, Gamma, Rule, WSquare, ZBox, ZPlus
from ..rules import Epsilon as EpsilonRule
from .base import _CONVS, FIRST, Composite

FIRST_RULES = ("flat", "wsquare")


class Epsilon(Composite):
    """LFP-epsilon for every layer (arXiv 2308.12053), the official package's default.

    Args:
        eps: stabilizer of every denominator, > 0.
        first: rule of the first layer: "flat", "wsquare", a Rule such as ``ZBox(low=-1, high=1)``,
            or None for the same as the others.
        layers, default, dropout, feedback_dtype: see :class:`Composite`.
    """

    def __init__(
        self,
        eps: float = 1e-6,
        *,
        first: str | Rule | None = None,
        layers: Any = (),
        **options: Any,
    ) -> None:
        super().__init__(EpsilonRule(eps), layers=[*layers, *_first(first, eps)], **options)


class EpsilonPlus(Composite):
    """z+ for convolutions, epsilon for linear layers and everything else.

    Args: as for :class:`Epsilon`.
    """

    def __init__(
        self,
        eps: float = 1e-6,
        *,
        first: str | Rule | None = None,
        layers: Any = (),
        **options: Any,
    ) -> None:
        rules = [*layers, *_first(first, eps), (_CONVS, ZPlus(eps))]
        super().__init__(EpsilonRule(eps), layers=rules, **options)


class EpsilonAlpha2Beta1(Composite):
    """alpha-beta with alpha = 2, beta = 1 for convolutions, epsilon for everything else.

    Args: as for :class:`Epsilon`.
    """

    def __init__(
        self,
        eps: float = 1e-6,
        *,
        first: str | Rule | None = None,
        layers: Any = (),
        **options: Any,
    ) -> None:
        rules = [*layers, *_first(first, eps), (_CONVS, AlphaBeta(eps, 2.0, 1.0))]
        super().__init__(EpsilonRule(eps), layers=rules, **options)


class EpsilonGammaBox(Composite):
    """z-box for the first layer, gamma for the other convolutions, epsilon for everything else.

    Args:
        low, high: bounds of the model's input. gamma: of the gamma rule, >= 0.
        eps, layers, default, dropout, feedback_dtype: as for :class:`Epsilon`.
    """

    def __init__(
        self,
        low: float,
        high: float,
        *,
        gamma: float = 0.25,
        eps: float = 1e-6,
        layers: Any = (),
        **options: Any,
    ) -> None:
        rules = [*layers, (FIRST, ZBox(eps, low, high)), (_CONVS, Gamma(eps, gamma))]
        super().__init__(EpsilonRule(eps), layers=rules, **options)


def _first(rule: str | Rule | None, eps: float) -> list[tuple[Any, Rule]]:
    if rule is None:
        return []
    if isinstance(rule, Rule):
        return [(FIRST, rule)]
    if rule not in FIRST_RULES:
        raise ValueError(
            f"composite: first: expected one of {FIRST_RULES}, a Rule or None, got {rule!r}"
        )
    return [(FIRST, Flat(eps) if rule == "flat" else WSquare(eps))]


__all__ = ["Epsilon", "EpsilonAlpha2Beta1", "EpsilonGammaBox", "EpsilonPlus"]
