"""Where feedback goes: straight into the parameter, or set aside until the walk is over."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .. import functional as F
from ..optim import BoundOptimizer, Update, clip_factor
from .reduce import Buckets


class Updates:
    """One step's updates.

    A parameter is updated inside the pass that makes its feedback when one stage alone uses it and
    no global norm has to be known first. Everything else is set aside and updated by one
    multi-tensor call at the end: shared parameters (their feedback is summed), small vectors,
    those whose update reads the device (``capturable``, a tensor for ``lr``), and all parameters
    under ``clip_norm`` (phase one: feedback, phase two: norm and update) or with a process group
    (``buckets``: feedback travels to the other processes while the walk goes on).
    """

    def __init__(
        self, optimizer: BoundOptimizer, shared: Iterable[int], buckets: Buckets | None = None
    ) -> None:
        self.optimizer = optimizer
        self.groups = {id(p): g for g in optimizer.param_groups for p in g["params"]}
        self.clip: float | None = optimizer.param_groups[0]["clip_norm"]
        self.shared = frozenset(shared)
        self.buckets = buckets
        self.aside: dict[int, tuple[Tensor, Tensor]] = {}
        self.done: list[Tensor] = []

    def in_place(self, parameter: Tensor) -> bool:
        return (
            self.clip is None
            and self.buckets is None
            and id(parameter) in self.groups
            and not self.optimizer.is_live(self.groups[id(parameter)])
            and parameter.requires_grad
            and id(parameter) not in self.shared
        )

    def take(self, parameter: Tensor) -> Update:
        """The update of a parameter that the caller applies in place."""
        self.done.append(parameter)
        return self.optimizer.update_of(parameter, self.groups[id(parameter)])

    def add(self, parameter: Any, feedback: Tensor | None) -> None:
        if parameter is None or feedback is None or id(parameter) not in self.groups:
            return
        before = self.aside.get(id(parameter))
        total = feedback if before is None else before[1] + feedback
        self.aside[id(parameter)] = (parameter, total)
        if self.buckets is not None and not self._comes_again(parameter):
            self.buckets.add(total)

    def _comes_again(self, parameter: Tensor) -> bool:
        """Whether another use of the parameter may add to its feedback."""
        return id(parameter) in self.shared

    def finish(self) -> None:
        if self.buckets is not None:
            for parameter, total in self.aside.values():
                if self._comes_again(parameter):
                    self.buckets.add(total)
            self.buckets.finish()
        pairs = list(self.aside.values())
        if pairs:
            parameters = [p for p, _ in pairs]
            feedback = [f for _, f in pairs]
            scale = None if self.clip is None else clip_factor(F.global_norm(feedback), self.clip)
            take = self.optimizer.update_of
            updates = [take(p, self.groups[id(p)]) for p in parameters]
            F.optimizer_update([p.data for p in parameters], feedback, updates, scale=scale)
            self.done += parameters
        self.aside = {}
        self.optimizer.count_step(self.done)
