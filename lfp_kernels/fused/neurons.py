"""Stages inside a spiking network: neurons, and layers whose input is packed spikes.

A value is either a tensor, [N, ...] before the first neurons of a static input and [T * N, ...]
behind them, or the :class:`PackedSpikes` of a LIF stage.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from ..composites import Composite
from ..functional import PackedSpikes
from ..nn import LIF
from ..rules import Epsilon, Rule
from . import stages as S
from . import structure as M
from .updates import Updates

# Share of spikes below which touching only the weights of neurons that fired beats a dense product
# (docs/performance.md).
DENSITY = 0.2


class TimeRun(S.Run):
    """One chunk of time steps: ``steps`` of them from ``first`` on, and what neurons carry."""

    __slots__ = (
        "batch",
        "carries",
        "dtype",
        "first",
        "keep",
        "release",
        "seed",
        "states",
        "static",
        "steps",
    )

    def __init__(self, slots: int, stages: int, updates: Any, steps: int, batch: int) -> None:
        super().__init__(slots, stages, updates)
        self.steps, self.batch, self.first = steps, batch, 0
        self.states: dict[int, Tensor] = {}  # membranes after the last step, by stage
        self.carries: dict[int, Tensor] = {}  # rewards that flow on to the steps before
        self.static: frozenset[int] = frozenset()  # slots that hold one value for all steps
        self.seed = 0  # of the noise; 0: none
        self.dtype = torch.float32
        self.keep = True  # what redistribution reads
        self.release = False  # nobody walks back a second time: values may be overwritten

    def over_time(self, x: Tensor) -> Tensor:
        """[T * N, ...] as [T, N, ...]."""
        return x.unflatten(0, (self.steps, self.batch))


class Lif(S.Stage):
    """Neurons; the layer below takes its signal from them.

    Where the processor has event-driven kernels, the membranes of a constant current are computed
    again instead of kept, and a max pool above hands its rewards down as they are.
    """

    pool: tuple[int, int] | None = None  # the windows of that pool

    def __init__(self, module: LIF, composite: Composite) -> None:
        super().__init__()
        self.module: Any = module
        rule = composite.function_rule
        self.rule = rule if isinstance(rule, Epsilon) else Epsilon()

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.module.parameters())

    def forward(self, run: Any) -> PackedSpikes:
        x = run.values[self.inputs[0]]
        static = self.inputs[0] in run.static
        state = run.states.get(self.index)
        again = static and F.has_spike_feedback(x)
        found = self.module.scan(
            x if static else run.over_time(x), steps=run.steps if static else None, state=state,
            keep=run.keep and not again,
        )  # fmt: skip
        run.aside[self.index] = (x if again else None, found.membrane, found.spikes, state)
        run.states[self.index] = found.state
        return found.spikes

    def redistribute(self, run: Any, reward: Tensor) -> tuple[Tensor | None, ...]:
        current, membrane, spikes, state = run.aside[self.index]
        static, m = self.inputs[0] in run.static, self.module
        learned = [p for p in (m.beta, m.threshold) if p.requires_grad]
        options = {
            "eps": self.rule.eps, "reset": m.reset, "reset_delay": m.reset_delay, "state": state,
            "carry": run.carries.get(self.index), "sum_steps": static,
            "as_reward": self.below is None, "need_parameters": bool(learned),
        }  # fmt: skip
        reward = run.over_time(reward)
        overwrite = run.release and not static and F.has_spike_feedback(reward)
        if current is not None or overwrite or reward.shape != spikes.shape:
            found = F.spike_lif_feedback(
                reward, spikes, m.decay, m.threshold, membrane=membrane, current=current,
                pool=None if reward.shape == spikes.shape else self.pool, overwrite=overwrite,
                **options,
            )  # fmt: skip
        else:
            found = F.lif_feedback(reward, membrane, spikes, m.decay, m.threshold, **options)
        run.carries[self.index] = found.carry
        for parameter, feedback in ((m.beta, found.beta), (m.threshold, found.threshold)):
            if parameter.requires_grad:
                run.updates.add(parameter, feedback)
        return (found.signal if static else found.signal.flatten(0, 1),)


class _SpikeLayer(S._Weighted):
    """A layer with a weight matrix whose input may be packed spikes, or be made noisy."""

    takes_spikes = True
    noise = 0.0

    def by_events(self, spikes: PackedSpikes) -> bool:
        """Whether the products touch only the weights of neurons that fired."""
        rule = self.rule
        plain = type(rule) is Epsilon and self.signal_in and self.teacher is None
        return (
            plain and self.product is None and self.has_events(spikes)
            and spikes.density() < DENSITY
        )  # fmt: skip

    def has_events(self, spikes: PackedSpikes) -> bool:
        """Whether there is an event-driven product for this layer's shape."""
        return False

    def noisy(self, run: Any, slot: int) -> bool:
        return run.seed != 0 and self.noise > 0

    def operand(self, run: Any, *, noisy: bool) -> Tensor:
        """The input as a tensor [T * N, ...] (or [N, ...], static and without noise)."""
        value, slot = run.values[self.inputs[0]], self.inputs[0]
        noise = self.noise if noisy else 0.0
        seed = run.seed + 0x9E3779B1 * (self.index + 1)
        if isinstance(value, PackedSpikes):
            dtype = self.weight.dtype
            return value.unpack(dtype, noise=noise, seed=seed, first=run.first).flatten(0, 1)
        if not noisy:
            return value
        moving = value[None] if slot in run.static else run.over_time(value)
        return F.add_noise(moving, noise, seed, steps=run.steps, first=run.first).flatten(0, 1)

    def forward(self, run: Any) -> Tensor:
        value, noisy = run.values[self.inputs[0]], self.noisy(run, self.inputs[0])
        if isinstance(value, PackedSpikes) and not noisy:
            run.aside[self.index] = self.by_events(value)
            if run.aside[self.index]:
                return self.spike_forward(value).flatten(0, 1)
        with _Value(run, self.inputs[0], self.operand(run, noisy=noisy)):
            return super().forward(run)

    def redistribute(self, run: Any, reward: Tensor) -> tuple[Tensor | None, ...]:
        slot = self.inputs[0]
        if self.noisy(run, slot):
            return self._redistribute_noisy(run, reward)
        if isinstance(run.values[slot], PackedSpikes) and run.aside[self.index]:
            return self._redistribute_events(run, reward)
        with _Value(run, slot, self.operand(run, noisy=False)):
            return super().redistribute(run, reward)

    def _redistribute_noisy(self, run: Any, reward: Tensor) -> tuple[Tensor | None, ...]:
        """The weight sees the noise it was fed with, the neurons below do not."""
        slot, wanted, found = self.inputs[0], self.wants_input, None
        if wanted:
            clean = self.operand(run, noisy=False)
            if slot in run.static:
                clean = clean.repeat(run.steps, *[1] * (clean.dim() - 1))
            rule = self.composite.rule_now(self.rule)
            z = run.values[self.output] if self.reads_output else reward
            found = self.feedback(clean, z, reward, (True, False, False), rule).input
            if slot in run.static:
                found = run.over_time(found).sum(0)
        self.wants_input = False
        try:
            with _Value(run, slot, self.operand(run, noisy=True)):
                super().redistribute(run, reward)
        finally:
            self.wants_input = wanted
        return (found,)

    def _redistribute_events(self, run: Any, reward: Tensor) -> tuple[Tensor | None, ...]:
        bias = self.bias
        need = (
            self.wants_input, self.weight.requires_grad, bias is not None and bias.requires_grad
        )  # fmt: skip
        found = self.spike_redistribute(
            run.values[self.inputs[0]], run.over_time(reward), self.rule, need
        )
        run.updates.add(self.weight, found.weight)
        run.updates.add(bias, found.bias)
        return (None if found.input is None else found.input.flatten(0, 1),)

    def spike_forward(self, spikes: PackedSpikes) -> Tensor:
        raise TypeError

    def spike_redistribute(
        self, spikes: PackedSpikes, signal: Tensor, rule: Rule, need: Any
    ) -> F.Redistributed:
        raise TypeError


class Linear(_SpikeLayer, S.Linear):
    def has_events(self, spikes: PackedSpikes) -> bool:
        return F.has_spike_linear(spikes, self.weight)

    def spike_forward(self, spikes: PackedSpikes) -> Tensor:
        return F.spike_linear(spikes, self.weight, self.bias)

    def spike_redistribute(
        self, spikes: PackedSpikes, signal: Tensor, rule: Rule, need: Any
    ) -> F.Redistributed:
        return F.spike_linear_redistribute(spikes, self.weight, self.bias, signal, need=need)


class Conv(_SpikeLayer, S.Conv):
    def has_events(self, spikes: PackedSpikes) -> bool:
        return F.has_spike_conv(spikes, self.weight, self.geometry)

    def spike_forward(self, spikes: PackedSpikes) -> Tensor:
        return F.spike_conv(spikes, self.weight, self.bias, self.geometry)

    def spike_redistribute(
        self, spikes: PackedSpikes, signal: Tensor, rule: Rule, need: Any
    ) -> F.Redistributed:
        return F.spike_conv_redistribute(
            spikes, self.weight, self.bias, signal, self.geometry, need=need
        )


class MaxPool(M.MaxPool):
    """Of spikes: a window fires when any neuron in it does, and the first one takes the reward."""

    takes_spikes = True
    hands_down = False  # the neurons below route the reward themselves

    def forward(self, run: Any) -> Any:
        value = run.values[self.inputs[0]]
        if not isinstance(value, PackedSpikes):
            return super().forward(run)
        if F.has_spike_max_pool(value, self.settings):
            run.aside[self.index] = value
            return F.spike_max_pool(value, self.settings)
        with _Value(run, self.inputs[0], value.unpack(run.dtype).flatten(0, 1)):
            return super().forward(run)

    def redistribute(self, run: Any, reward: Tensor) -> tuple[Tensor | None, ...]:
        spikes = run.aside[self.index]
        if not isinstance(spikes, PackedSpikes):
            return super().redistribute(run, reward)
        if self.hands_down and F.has_spike_feedback(reward) and F.spikes_channels_last(spikes):
            return (reward,)
        found = F.spike_max_pool_redistribute(spikes, run.over_time(reward), self.settings)
        return (found.flatten(0, 1),)


class Flatten(M.Reshape):
    """All but the batch as one dimension."""

    takes_spikes = True

    def forward(self, run: Any) -> Any:
        value = run.values[self.inputs[0]]
        if not isinstance(value, PackedSpikes):
            return super().forward(run)
        run.aside[self.index] = torch.Size((-1, *value.shape[2:]))
        return value.flatten()


class _Value:
    """Another value in a slot, for one call."""

    def __init__(self, run: Any, slot: int, value: Any) -> None:
        self.run, self.slot, self.value = run, slot, value

    def __enter__(self) -> None:
        self.held = self.run.values[self.slot]
        self.run.values[self.slot] = self.value

    def __exit__(self, *error: Any) -> None:
        self.run.values[self.slot] = self.held


class Gathered:
    """Updates of several chunks: feedback is summed, and nothing moves before the last one."""

    def __init__(self, updates: Updates) -> None:
        self.updates = updates

    def in_place(self, parameter: Tensor) -> bool:
        return False

    def add(self, parameter: Any, feedback: Tensor | None) -> None:
        self.updates.add(parameter, feedback)
