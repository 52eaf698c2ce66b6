"""Linear layers whose weight is a view of a parameter: rows of a packed one, or one that the model
keeps as [I, O]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from ..composites import Composite, LayerRule
from ..rules import Epsilon, Rule
from . import stages as S

View = Callable[[Tensor], Tensor]


class LinearOfViews(S.Linear):
    """``seen``: weight -> [O, I] and bias -> [O], as the layer reads them; None is the whole.

    The feedback takes the parameter's own layout, so it is made as a whole, and applied at once.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, seen: tuple[View | None, View | None],
        layer: LayerRule, composite: Composite,
    ) -> None:  # fmt: skip
        super().__init__(weight, bias, layer, composite)
        self.seen = seen

    def _parts(self) -> list[Any]:
        both = zip((self.weight, self.bias), self.seen)
        return [t if t is None or view is None else view(t) for t, view in both]

    def forward(self, run: S.Run) -> Tensor:
        return F.linear(run.values[self.inputs[0]], *self._parts(), relu=self.relu)

    def redistribute(self, run: S.Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        x = run.values[self.inputs[0]]
        z = run.values[self.output] if self.reads_output else reward
        wants_bias = self.bias is not None and self.bias.requires_grad
        need = (self.wants_input, self.weight.requires_grad, wants_bias)
        rule: Rule = self.composite.rule_now(self.rule)
        weight, bias = self._parts()
        found = F.linear_redistribute(x, weight, bias, z, reward, rule, need=need, **self.options())
        self._learn(run, self.weight, found.weight, self.seen[0])
        self._learn(run, self.bias, found.bias, self.seen[1])
        return (found.input,)

    def _learn(self, run: S.Run, parameter: Any, feedback: Any, view: View | None) -> None:
        if parameter is None or feedback is None:
            return
        if view is not None:
            whole = feedback.new_zeros(parameter.shape)
            view(whole).copy_(feedback)
            feedback = whole
        if parameter.dim() > 1 and run.updates.in_place(parameter):  # frees the feedback
            update = run.updates.take(parameter)
            return F.optimizer_update([parameter.data], [feedback], [update])
        run.updates.add(parameter, feedback)


class TransposedLinear(LinearOfViews):
    """A layer that keeps its weight as [I, O]. Its weight product is the one of the layer that the
    weight belongs to the other way round, with x and the signal in each other's place: nothing is
    transposed, and the update is part of the pass, as in every linear layer."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, layer: LayerRule, composite: Composite
    ) -> None:
        super().__init__(weight, bias, (Tensor.t, None), layer, composite)

    def redistribute(self, run: S.Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, updates = run.values[self.inputs[0]], self.weight, self.bias, run.updates
        rule: Rule = self.composite.rule_now(self.rule)
        one_signal = type(rule) is Epsilon and self.below is None and self.product is None
        if not one_signal or x.dtype not in (torch.float32, torch.float64):
            return super().redistribute(run, reward)
        s = reward if self.signal_in else rule.prologue(reward, run.values[self.output])
        found = F.linear(s, weight).mul_(x) if self.wants_input else None
        if updates.in_place(weight):
            F.linear_redistribute_update(
                s, weight, None, x, x, updates.take(weight), None, rule,
                need_input=False, signal_in=True,
            )  # fmt: skip
        elif weight.requires_grad:
            need = (False, True, False)
            swapped = F.linear_redistribute(s, weight, None, x, x, rule, need=need, signal_in=True)
            updates.add(weight, swapped.weight)
        if bias is not None and bias.requires_grad:
            updates.add(bias, rule.weight_epilogue(s.sum(0), bias))
        return (found,)


def rows(part: slice | None) -> View | None:
    return None if part is None else lambda t: t[part]
