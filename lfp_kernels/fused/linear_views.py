"""Linear layers whose weight is a view of a parameter: rows of a packed one, or one that the model
keeps as [I, O]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import functional as F
from ..composites import Composite, LayerRule
from ..rules import Rule
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


def rows(part: slice | None) -> View | None:
    return None if part is None else lambda t: t[part]
