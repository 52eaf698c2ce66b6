"""A spiking network as one stage: its layers' plan, walked over time in chunks.

Both ways to train use it: :func:`lfp_kernels.fuse` as a stage among others, an attached model
through :class:`lfp_kernels.autograd.SpikingReward`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..composites import Composite
from ..functional import PackedSpikes
from ..nn import Spiking as SpikingModule
from ..nn.spiking import draw_seed
from . import neurons as N
from . import stages as S
from . import structure as M
from .plan import Plan


class TimePlan(Plan):
    """The stages of a spiking chain. ``static[noisy]``: slots with one value for all steps."""

    def __init__(self, stages: list[S.Stage], output: int, static: bool, wants_input: bool) -> None:
        super().__init__(stages, 0, output, source_live=wants_input)
        self._hand_pools_down()
        self.static = {noisy: self._static_slots(static, noisy) for noisy in (False, True)}

    def _static_slots(self, source: bool, noisy: bool) -> frozenset[int]:
        slots = {0} if source else set()
        for stage in self.stages:
            moves = isinstance(stage, N.Lif) or (noisy and isinstance(stage, N._SpikeLayer))
            if not moves and all(slot in slots for slot in stage.reads):
                slots.add(stage.output)
        return frozenset(slots)

    def _hand_pools_down(self) -> None:
        """Neurons below a max pool without overlap take its rewards by themselves."""
        for pool in self.stages:
            if not isinstance(pool, N.MaxPool):
                continue
            kernel, stride, padding, dilation, ceil = pool.settings
            simple = len(kernel) == 2 and kernel == stride and not any(padding) and not ceil
            below = next((s for s in self.stages if s.output == pool.inputs[0]), None)
            alone = len(self.consumers(pool.inputs[0])) == 1
            if simple and set(dilation) == {1} and alone and isinstance(below, N.Lif):
                pool.hands_down, below.pool = True, kernel

    def walk(self, run: N.TimeRun, stages: list[S.Stage]) -> None:
        """Forward through ``stages``; frees what neither a later stage nor backward reads."""
        values = run.values
        for stage in stages:
            values[stage.output] = _call(stage, run, stage.reads, lambda s=stage: s.forward(run))
            for slot in self.free_forward[stage.index]:
                if slot not in run.static or stage.output in run.static:
                    values[slot] = None

    def walk_back(
        self, run: N.TimeRun, stages: list[S.Stage], rewards: list[Tensor | None]
    ) -> None:
        """Redistribution through ``stages``, last first."""
        for stage in reversed(stages):
            arrived = rewards[stage.output]
            rewards[stage.output] = None
            if arrived is None or stage.output not in self.live:
                continue
            found = _call(
                stage, run, stage.keeps(), lambda s=stage, r=arrived: s.redistribute(run, r)
            )
            for slot, part in zip(stage.inputs, found):
                if part is not None and slot in self.live:
                    before = rewards[slot]
                    rewards[slot] = part if before is None else before + part
            if run.release:
                run.aside[stage.index] = None
            for slot in self.free_backward[stage.index]:
                if slot not in run.static or stage.output in run.static:
                    run.values[slot] = None


def _call(stage: S.Stage, run: N.TimeRun, slots: Any, call: Any) -> Any:
    """Stages that know tensors only see packed spikes unpacked."""
    packed = [s for s in slots if isinstance(run.values[s], PackedSpikes)]
    if stage.takes_spikes or not packed:
        return call()
    held = {slot: run.values[slot] for slot in packed}
    for slot, spikes in held.items():
        run.values[slot] = spikes.unpack(run.dtype).flatten(0, 1)
    try:
        return call()
    finally:
        for slot, spikes in held.items():
            run.values[slot] = spikes


class Feedback:
    """Updates that are not made: the feedback alone, summed over the uses of a parameter."""

    def __init__(self) -> None:
        self.found: dict[int, Tensor] = {}

    def in_place(self, parameter: Tensor) -> bool:
        return False

    def add(self, parameter: Any, feedback: Tensor | None) -> None:
        if parameter is not None and feedback is not None:
            before = self.found.get(id(parameter))
            self.found[id(parameter)] = feedback if before is None else before + feedback


class _Chunk(NamedTuple):
    first: int
    steps: int
    states: dict[int, Tensor]  # membranes before its first step


class _Pass(NamedTuple):
    """What a forward pass leaves for redistribution."""

    plan: TimePlan
    x: Tensor
    prefix: N.TimeRun  # the static stages' values
    chunks: list[_Chunk]
    last: N.TimeRun  # the last chunk's
    modes: tuple[bool, bool]  # (static input, noise)


class Spiking(S.Stage):
    """``nn.Spiking``. ``reward`` and result are [T, N, C]."""

    def __init__(self, module: SpikingModule, composite: Composite, prefix: str) -> None:
        super().__init__()
        if composite.plain:
            raise ValueError(
                f"{type(composite).__name__}: spiking neurons have no derivative, and no rule of "
                "the feedback-alignment family; expected a composite of relevance rules, e.g. "
                "composites.Epsilon()"
            )
        self.module = module
        self.composite, self.prefix = composite, prefix
        self.once = True  # backward comes once: what it has read may go
        self._plans: dict[Any, TimePlan] = {}
        self._plan(True)

    def _plan(self, static: bool) -> TimePlan:
        from .trace import trace

        trainable = tuple(p.requires_grad for p in self.module.parameters())
        key = (static, self.wants_input, trainable)
        if key not in self._plans:
            path = f"{self.prefix}." if self.prefix else ""
            stages, _, output = trace(self.module.module, self.composite, time=f"{path}module.")
            for stage in stages:
                if isinstance(stage, N._SpikeLayer):
                    stage.noise = self.module.noise
            self._plans[key] = TimePlan(stages, output, static, self.wants_input)
        return self._plans[key]

    @property
    def parameters(self) -> list[Tensor]:
        return [p for s in next(iter(self._plans.values())).stages for p in s.parameters]

    def norms(self) -> list[Any]:
        plan = next(iter(self._plans.values()))
        return [m for stage in plan.stages for m in stage.norms()]

    def describe(self) -> str:
        rows = [f"{s.label} {s.describe()}" for s in next(iter(self._plans.values())).stages]
        return f"Spiking, {self.module.extra_repr()}\n    " + "\n    ".join(rows)

    def forward(self, run: S.Run) -> Tensor:
        x = run.values[self.inputs[0]]
        steps, static = self.module.time(x)
        plan = self._plan(static)
        noisy = self.module.noise > 0 and self.module.training
        length = steps if self.module.chunk is None else min(self.module.chunk, steps)
        if length < steps:
            self._check_chunks(plan)
        seed = draw_seed() + 1 if noisy else 0
        batch = len(x) if static else x.shape[1]

        def new(first: int, count: int) -> N.TimeRun:
            chunk = N.TimeRun(plan.slots, len(plan.stages), run.updates, count, batch)
            chunk.static, chunk.first, chunk.seed = plan.static[noisy], first, seed
            chunk.statistics, chunk.dtype = run.statistics, x.dtype
            return chunk

        prefix = new(0, steps)
        if static:
            prefix.values[0] = _fast_layout(x)
            plan.walk(prefix, [s for s in plan.stages if s.output in prefix.static])
        chunks: list[_Chunk] = []
        out: list[Tensor] = []
        states: dict[int, Tensor] = {}
        for first in range(0, steps, length):
            count = min(length, steps - first)
            chunks.append(_Chunk(first, count, dict(states)))
            last = self._enter(new(first, count), prefix, x, static, states)
            last.keep = first + count == steps
            plan.walk(last, [s for s in plan.stages if s.output not in last.static])
            states = last.states
            spikes = last.values[plan.output]
            out.append(spikes.unpack(x.dtype))
        last.states = {}  # nobody goes on from the end
        run.aside[self.index] = _Pass(plan, x, prefix, chunks, last, (static, noisy))
        return out[0] if len(out) == 1 else torch.cat(out)

    @staticmethod
    def _enter(
        chunk: N.TimeRun, prefix: N.TimeRun, x: Tensor, static: bool, states: dict[int, Tensor]
    ) -> N.TimeRun:
        chunk.values, chunk.aside = list(prefix.values), list(prefix.aside)
        chunk.states = dict(states)
        if not static:
            part = x[chunk.first : chunk.first + chunk.steps]
            chunk.values[0] = _fast_layout(part.flatten(0, 1))
        return chunk

    def redistribute(self, run: S.Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        plan, x, prefix, chunks, last, (static, _) = run.aside[self.index]
        if self.once:
            run.aside[self.index] = None
        moving = [s for s in plan.stages if s.output not in prefix.static]
        still = [s for s in plan.stages if s.output in prefix.static]
        rewards: list[Tensor | None] = [None] * plan.slots
        carries: dict[int, Tensor] = {}
        of_input: list[Tensor | None] = []
        for number, chunk in reversed(list(enumerate(chunks))):
            here, last = last, None
            if number < len(chunks) - 1:  # forward again, from the membranes it began with
                here = N.TimeRun(plan.slots, len(plan.stages), None, chunk.steps, prefix.batch)
                here.static, here.first, here.seed = prefix.static, chunk.first, prefix.seed
                here.statistics, here.dtype = prefix.statistics, x.dtype
                self._enter(here, prefix, x, static, chunk.states)
                plan.walk(here, moving)
                here.states = {}
            here.updates = N.Gathered(run.updates) if len(chunks) > 1 else run.updates
            here.carries, here.release = carries, self.once
            part = reward[chunk.first : chunk.first + chunk.steps]
            rewards[plan.output] = part.flatten(0, 1)
            self._walk_back(plan, here, moving, rewards)
            del here
            if not static:
                of_input.append(rewards[0])
                rewards[0] = None
        if static:
            prefix.updates, prefix.release = run.updates, self.once
            self._walk_back(plan, prefix, still, rewards)
            return (rewards[0],)
        if of_input[0] is None:
            return (None,)
        parts = [p.unflatten(0, (-1, prefix.batch)) for p in reversed(of_input) if p is not None]
        return (parts[0] if len(parts) == 1 else torch.cat(parts),)

    def forward_alone(self, x: Tensor) -> tuple[S.Run, Tensor]:
        """A pass outside a fused step: running statistics move at once."""
        run = S.Run(2, 1, Feedback())  # type: ignore[arg-type]
        run.copy_statistics(list(dict.fromkeys(self.norms())))
        run.values[0] = x
        out = self.forward(run)
        run.commit_statistics()
        return run, out

    def redistribute_alone(
        self, run: S.Run, reward: Tensor
    ) -> tuple[Tensor | None, dict[int, Tensor]]:
        """(input reward, feedback by the id of its parameter)"""
        run.updates = Feedback()  # type: ignore[assignment]
        (first,) = self.redistribute(run, reward)
        return first, run.updates.found  # type: ignore[attr-defined]

    def _walk_back(
        self, plan: TimePlan, run: N.TimeRun, stages: list[S.Stage], rewards: list[Tensor | None]
    ) -> None:
        held = None if self.once else list(run.values)
        plan.walk_back(run, stages, rewards)
        if held is not None:
            run.values = held

    def _check_chunks(self, plan: TimePlan) -> None:
        """What a second forward pass of a chunk would do differently."""
        for stage in plan.stages:
            random = isinstance(stage, M.Dropout) and stage.module.training and stage.module.p > 0
            if random or (isinstance(stage, S.BatchNorm) and stage.module.training):
                raise ValueError(
                    f"Spiking: chunk: layer {stage.label!r} ({type(stage).__name__}) in training "
                    "mode sees all time steps at once; use chunk=None, or put it in eval mode"
                )


def _fast_layout(x: Tensor) -> Tensor:
    """Channels innermost: event-driven products add whole rows of output channels."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def prefix_of(model: nn.Module, module: nn.Module) -> str:
    """The name of ``module`` in ``model``."""
    return next(name for name, m in model.named_modules() if m is module)
