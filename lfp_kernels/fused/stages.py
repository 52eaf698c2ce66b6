"""Stages of a fused step: one forward and one redistribution each, over numbered value slots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import calls
from .. import functional as F
from ..composites import Composite, LayerRule
from ..rules import Derivative, Rule
from .updates import Updates


class Run:
    """What one step holds: values by slot, what stages put aside, and the parameters' updates."""

    __slots__ = ("aside", "given", "kernels", "statistics", "updates", "values")

    def __init__(self, slots: int, stages: int, updates: Updates, given: Any = None) -> None:
        self.given: dict[str, Tensor] = given or {}  # arguments of forward besides the first
        self.values: list[Any] = [None] * slots
        self.aside: list[Any] = [None] * stages
        self.kernels: dict[int, Tensor] = {}  # of convolutions, in the order their kernels read
        self.statistics: dict[Any, tuple[Tensor, Tensor]] = {}  # of batch norms, as they will be
        self.updates = updates

    def copy_statistics(self, modules: list[Any]) -> None:
        """Running statistics move in copies until the whole step is known to be good."""
        if modules:
            old = [t for m in modules for t in (m.running_mean, m.running_var)]
            new = torch._foreach_add(old, 0.0)  # one launch for all copies
            self.statistics = dict(zip(modules, zip(new[::2], new[1::2])))

    def commit_statistics(self) -> None:
        modules = list(self.statistics)
        if modules:
            old = [t for m in modules for t in (m.running_mean, m.running_var)]
            torch._foreach_copy_(old, [t for pair in self.statistics.values() for t in pair])
            torch._foreach_add_([m.num_batches_tracked for m in modules], 1)


class Stage:
    """Base. A stage reads ``inputs`` and writes ``output``; plan.py sets the flags."""

    rule: Any = None  # a Rule, or None for stages without one
    multiplies_by_input = False  # the reward it hands down is 0 where its input is 0
    passes_zero = False  # hands a 0 of its output's reward down as 0, and 0 in means 0 out
    routes = False  # moves values without changing them: signals pass as rewards do
    views = False  # its output is a part of its input, in the same memory
    takes_spikes = False  # reads packed spikes; others get them unpacked

    def __init__(self) -> None:
        self.inputs: list[int] = []  # slots that take a reward
        self.reads: list[int] = []  # slots whose values forward reads
        self.output = -1
        self.index = -1
        self.label = ""
        self.relu = False  # the ReLU that follows is part of this stage
        self.below: Any = None  # a Rule: hands it its signal; a Derivative: multiplies by it
        self.signal_in = False  # the reward that arrives is this layer's signal
        self.wants_input = True  # somebody below takes a reward
        self.direct: Any = None  # the layer above, when this one hears the output's error itself

    @property
    def parameters(self) -> list[Tensor]:
        return []

    def keeps(self) -> set[int]:
        """Slots whose values redistribution reads."""
        return set()

    def norms(self) -> list[Any]:
        """Modules whose running statistics a step changes."""
        return []

    def forward(self, run: Run) -> Any:
        raise TypeError(f"{type(self).__name__} has no forward")

    def redistribute(self, run: Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        """Rewards of ``inputs``; updates parameters on the way."""
        raise TypeError(f"{type(self).__name__} takes no reward")

    def describe(self) -> str:
        parts = [type(self).__name__ + (" + ReLU" if self.relu else "")]
        if self.rule is not None:
            parts.append(self.rule.name)
        if self.direct is not None:
            parts.append("hears the error itself")
        if self.signal_in:
            parts.append("takes signal")
        if self.below is not None:
            derivative = isinstance(self.below, Derivative)
            parts.append(f"hands {self.below.function}'" if derivative else "hands signal")
        return ", ".join(parts)


class _Weighted(Stage):
    """Linear and convolution: the weight may be updated inside the pass that makes its feedback."""

    multiplies_by_input = True

    def __init__(
        self, weight: Tensor, bias: Tensor | None, layer: LayerRule, composite: Composite
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.rule = weight, bias, layer.rule
        self.matrix, self.teacher = layer.matrix, layer.teacher
        self.composite = composite
        self.product = composite.product_dtype(weight)
        self.nonnegative = False  # the input is nowhere negative

    @property
    def parameters(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def reads_output(self) -> bool:
        return not self.signal_in and self.rule.reads_output

    def keeps(self) -> set[int]:
        kept = {*self.inputs, self.output} if self.reads_output else {*self.inputs}
        if self.direct is not None and self.direct.below is not None:
            kept.update(self.direct.inputs)  # the activation, for its derivative
        return kept

    def options(self) -> dict[str, Any]:
        return {
            "matrix": self.matrix,
            "below": self.below,
            "signal_in": self.signal_in,
            "nonnegative": self.nonnegative,
            "product_dtype": self.product,
        }

    def redistribute(self, run: Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        x = run.values[self.inputs[0]]
        z = run.values[self.output] if self.reads_output else reward
        rule = self.composite.rule_now(self.rule)
        need_input, taught = self.wants_input, None
        if self.teacher is not None and need_input:
            need_input, taught = False, self.teacher(reward, x)
            if isinstance(self.below, Derivative):
                taught = self.below(taught, x)
        if self.direct is not None:
            delta = self._delta(run, reward)
            if delta is None:
                return (taught,)
            z = reward = delta
        updates, weight, bias, matrix = run.updates, self.weight, self.bias, self.matrix
        learns = matrix is not None and matrix.requires_grad
        if updates.in_place(weight) and not learns:
            bias_update = None
            if bias is not None and updates.in_place(bias):
                bias_update = updates.take(bias)
            if bias is None or bias_update is not None or not bias.requires_grad:
                took = updates.take(weight)
                found = self.update(x, z, reward, took, bias_update, rule, need_input)
                return (taught if taught is not None else found,)
        need = (need_input, weight.requires_grad, bias is not None and bias.requires_grad)
        found = self.feedback(x, z, reward, need, rule)
        updates.add(weight, found.weight)
        if bias is not None:
            updates.add(bias, found.bias)
        if learns:  # a learned feedback matrix takes the weight's own step (Kolen-Pollack)
            updates.add(matrix, found.weight)
        return (taught if taught is not None else found.input,)

    def _delta(self, run: Run, reward: Tensor) -> Tensor | None:
        """This layer's own signal from the output's, or None once it has made its step of it."""
        upper, updates = self.direct, run.updates
        error, matrix = upper.teacher.taught(reward), upper.teacher.matrix
        activation = None if upper.below is None else run.values[upper.inputs[0]]
        bias = self.bias if self.bias is not None and self.bias.requires_grad else None
        if updates.in_place(self.weight) and (bias is None or updates.in_place(bias)):
            F.direct_update(
                run.values[self.inputs[0]], self.weight, self.bias, error, matrix, activation,
                updates.take(self.weight), None if bias is None else updates.take(bias),
                derivative=upper.below,
            )  # fmt: skip
            return None
        delta = error @ matrix
        return delta if upper.below is None else upper.below(delta, activation)

    def update(
        self, x: Tensor, z: Tensor, reward: Tensor, weight: Any, bias: Any, rule: Rule, need: bool
    ) -> Any:
        raise TypeError

    def feedback(
        self, x: Tensor, z: Tensor, reward: Tensor, need: Any, rule: Rule
    ) -> F.Redistributed:
        raise TypeError


class Linear(_Weighted):
    def forward(self, run: Run) -> Tensor:
        return F.linear(run.values[self.inputs[0]], self.weight, self.bias, relu=self.relu)

    def update(
        self, x: Tensor, z: Tensor, reward: Tensor, weight: Any, bias: Any, rule: Rule, need: bool
    ) -> Any:
        return F.linear_redistribute_update(
            x, self.weight, self.bias, z, reward, weight, bias, rule, need_input=need,
            **self.options(),
        )  # fmt: skip

    def feedback(
        self, x: Tensor, z: Tensor, reward: Tensor, need: Any, rule: Rule
    ) -> F.Redistributed:
        return F.linear_redistribute(
            x, self.weight, self.bias, z, reward, rule, need=need, **self.options()
        )


class Conv(_Weighted):
    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        geometry: F.ConvGeometry,
        layer: LayerRule,
        composite: Composite,
    ) -> None:
        super().__init__(weight, bias, layer, composite)
        self.geometry = geometry
        self.arranged: Tensor | None = None  # W as the kernels read it, during redistribution
        self.channels = weight.shape[0 if geometry.transposed else 1]

    def forward(self, run: Run) -> Tensor:
        x = run.values[self.inputs[0]]
        kernel = F.conv_weight(x, self.weight, self.geometry)
        if kernel is not self.weight and self.wants_input and not self.rule.split:
            run.kernels[self.index] = kernel  # one copy of W serves both directions
        return F.conv(x, kernel, self.bias, self.geometry, relu=self.relu)

    def redistribute(self, run: Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        self.arranged = run.kernels.pop(self.index, None)
        try:
            return super().redistribute(run, reward)
        finally:
            self.arranged = None

    def options(self) -> dict[str, Any]:
        return {**super().options(), "arranged": self.arranged}

    def update(
        self, x: Tensor, z: Tensor, reward: Tensor, weight: Any, bias: Any, rule: Rule, need: bool
    ) -> Any:
        return F.conv_redistribute_update(
            x, self.weight, self.bias, z, reward, self.geometry, weight, bias, rule,
            need_input=need, **self.options(),
        )  # fmt: skip

    def feedback(
        self, x: Tensor, z: Tensor, reward: Tensor, need: Any, rule: Rule
    ) -> F.Redistributed:
        return F.conv_redistribute(
            x, self.weight, self.bias, z, reward, self.geometry, rule, need=need, **self.options()
        )


class BatchNorm(Stage):
    multiplies_by_input = True

    def __init__(self, module: nn.Module, rule: Rule) -> None:
        super().__init__()
        self.module: Any = module
        self.rule = rule

    @property
    def parameters(self) -> list[Tensor]:
        return [p for p in (self.module.weight, self.module.bias) if p is not None]

    def keeps(self) -> set[int]:
        return {*self.inputs} if self.signal_in else {*self.inputs, self.output}

    def norms(self) -> list[Any]:
        moves = self.module.training and self.module.running_mean is not None
        return [self.module] if moves else []

    def forward(self, run: Run) -> Tensor:
        m = self.module
        training = m.training or m.running_mean is None
        mean, var, momentum = m.running_mean, m.running_var, m.momentum
        if training and mean is not None:
            mean, var = run.statistics[m]
            if momentum is None:
                momentum = 1.0 / (int(m.num_batches_tracked) + 1)
        z, *statistics = F.batch_norm(
            run.values[self.inputs[0]], m.weight, m.bias, mean, var, training,
            0.0 if momentum is None else momentum, m.eps, relu=self.relu,
        )  # fmt: skip
        run.aside[self.index] = (*statistics, training)
        return z

    def redistribute(self, run: Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        m = self.module
        mean, invstd, training = run.aside[self.index]
        x = run.values[self.inputs[0]]
        z = reward if self.signal_in else run.values[self.output]
        need = (
            self.wants_input,
            m.weight is not None and m.weight.requires_grad,
            m.bias is not None and m.bias.requires_grad,
        )
        found = F.batch_norm_redistribute(
            x, m.weight, m.bias, z, reward, mean, invstd, training, self.rule,
            need=need, below=self.below, signal_in=self.signal_in,
        )  # fmt: skip
        run.updates.add(m.weight, found.weight)
        run.updates.add(m.bias, found.bias)
        return (found.input,)


class AvgPool(Stage):
    multiplies_by_input = True

    def __init__(self, settings: calls.PoolSettings, rule: Rule) -> None:
        super().__init__()
        self.settings, self.rule = settings, rule

    def keeps(self) -> set[int]:
        return {*self.inputs} if self.signal_in else {*self.inputs, self.output}

    def forward(self, run: Run) -> Tensor:
        return F.avg_pool(run.values[self.inputs[0]], *self.settings)

    def redistribute(self, run: Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        x = run.values[self.inputs[0]]
        z = reward if self.signal_in else run.values[self.output]
        return (
            F.avg_pool_redistribute(
                x, z, reward, *self.settings,
                rule=self.rule, below=self.below, signal_in=self.signal_in,
            ),
        )  # fmt: skip


class AdaptiveAvgPool(Stage):
    multiplies_by_input = True

    def __init__(self, pool: Callable[..., Tensor], size: Any, rule: Rule) -> None:
        super().__init__()
        self.pool, self.size, self.rule = pool, size, rule

    def keeps(self) -> set[int]:
        return {*self.inputs} if self.signal_in else {*self.inputs, self.output}

    def forward(self, run: Run) -> Tensor:
        return self.pool(run.values[self.inputs[0]], self.size)

    def redistribute(self, run: Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        x = run.values[self.inputs[0]]
        z = reward if self.signal_in else run.values[self.output]
        return (
            F.adaptive_avg_pool_redistribute(
                x, z, reward, self.rule, below=self.below, signal_in=self.signal_in
            ),
        )


class Sum(Stage):
    multiplies_by_input = True

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule

    def keeps(self) -> set[int]:
        return {*self.inputs}

    def forward(self, run: Run) -> Tensor:
        a, b = self.inputs
        return run.values[a] + run.values[b]

    def redistribute(self, run: Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        a, b = self.inputs
        return F.sum_redistribute(run.values[a], run.values[b], reward, self.rule)
