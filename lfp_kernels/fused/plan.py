"""What can be decided once per model: fused ReLUs, chained layers, and when values are freed."""

from __future__ import annotations

from collections import Counter

from torch import Tensor

from ..rules import DERIVATIVES
from . import neurons as N
from . import stages as S
from . import structure as M

_FUSES_RELU = (S.Linear, S.Conv, S.BatchNorm)
_TAKES_SIGNAL = (S.Linear, S.Conv, S.BatchNorm, S.AvgPool, S.AdaptiveAvgPool)
_HANDS_SIGNAL = (*_TAKES_SIGNAL, N.Lif)
_WIDE = 32  # input channels from which channels last pays
_NONNEGATIVE = ("relu", "relu6", "sigmoid", "softplus", "step", "hardsigmoid")


class Plan:
    """Stages in order, with their flags set, and the slots that each step of the walk frees."""

    def __init__(
        self, stages: list[S.Stage], source: int, output: int, *, source_live: bool = False
    ) -> None:
        self.stages = stages
        self.source = source
        self.output = output
        self.source_live = source_live  # somebody wants the reward of the input
        self._fuse_relus()
        self._hand_derivatives()
        self._chain()
        for index, stage in enumerate(self.stages):
            stage.index = index
        self._mark_live()
        self._hear_directly()
        self._mark_nonnegative()
        self.slots = 1 + max([source, *(s.output for s in self.stages)])
        self.free_forward = self._free_after_forward()
        self._relu_in_place()
        self.free_backward = self._free_after_backward()
        self.channels_last = self._prefers_channels_last()
        uses = Counter(id(p) for s in self.stages for p in s.parameters)
        self.shared = [key for key, count in uses.items() if count > 1]

    def consumers(self, slot: int) -> list[S.Stage]:
        return [s for s in self.stages if slot in s.reads]

    def _prefers_channels_last(self) -> bool:
        """Channels last is the faster layout of 2-d convolutions, except of input products with a
        few channels (docs/performance.md)."""
        convs = [s for s in self.stages if isinstance(s, S.Conv) and s.weight.dim() == 4]
        wide = all(s.channels >= _WIDE for s in convs if s.wants_input)
        return bool(convs) and wide

    def _fuse_relus(self) -> None:
        """A ReLU behind a layer becomes part of it; the layer's z is then the activation.

        Right where the reward of a zero activation is zero: below layers that multiply by their
        input. Keeping the activation alone is then exact (docs/math.md, section 2).
        """
        for producer in list(self.stages):
            if not isinstance(producer, _FUSES_RELU) or producer.output == self.output:
                continue
            if producer.rule is None or not producer.rule.relu_output_is_enough:
                continue
            readers = self.consumers(producer.output)
            if len(readers) != 1 or not isinstance(readers[0], M.Activation):
                continue
            relu = readers[0]
            if relu.is_relu and not relu.derivative and self._zero_safe(relu.output):
                producer.relu = True
                producer.output = relu.output
                self.stages.remove(relu)

    def _zero_safe(self, slot: int) -> bool:
        """Every reward that reaches ``slot`` is zero where its value is zero."""
        if slot == self.output:
            return False
        for stage in self.consumers(slot):
            if isinstance(stage, M.Host):
                continue
            rule = stage.rule
            if stage.multiplies_by_input and rule is not None and rule.multiplies_by_input:
                continue
            if not (stage.passes_zero and self._zero_safe(stage.output)):
                return False
        return True

    def _reader(self, slot: int) -> S.Stage | None:
        """The one stage that makes something of ``slot``, past stages that move values only."""
        while slot != self.output:
            readers = [s for s in self.consumers(slot) if not isinstance(s, M.Host)]
            if len(readers) != 1:
                return None
            if not readers[0].routes:
                return readers[0]
            slot = readers[0].output
        return None

    def _hand_derivatives(self) -> None:
        """Activations with a derivative (the feedback-alignment family): the layer above multiplies
        by it in its epilogue, from the activation that it reads anyway. A ReLU then needs no
        memory of its own."""
        for stage in list(self.stages):
            if not isinstance(stage, M.Activation) or not stage.derivative:
                continue
            reader = self._reader(stage.output)
            if stage.name not in DERIVATIVES or not isinstance(reader, (S.Linear, S.Conv)):
                continue
            reader.below = DERIVATIVES[stage.name]
            stage.derivative = False
            slot = stage.inputs[0]
            producer = next((s for s in self.stages if s.output == slot), None)
            if stage.is_relu and isinstance(producer, _FUSES_RELU) and slot != self.output:
                rule = producer.rule
                if len(self.consumers(slot)) == 1 and rule is not None and not rule.reads_output:
                    producer.relu = True
                    producer.output = stage.output
                    self.stages.remove(stage)

    def _chain(self) -> None:
        """A layer whose output feeds exactly one layer, with nothing between that changes values,
        takes its signal from that layer: x / stab(x) in one factor instead of two passes."""
        for producer in self.stages:
            if not isinstance(producer, _TAKES_SIGNAL):
                continue
            if producer.rule is None or not producer.rule.chains:
                continue
            reader = self._reader(producer.output)
            if isinstance(reader, _HANDS_SIGNAL) and reader.rule and reader.rule.chains:
                reader.below = producer.rule
                producer.signal_in = True

    def _mark_live(self) -> None:
        """Rewards are wanted where a trainable parameter lies below."""
        live: set[int] = {self.source} if self.source_live else set()
        for stage in self.stages:
            stage.wants_input = any(slot in live for slot in stage.inputs)
            if stage.wants_input or any(p.requires_grad for p in stage.parameters):
                live.add(stage.output)
        self.live = live

    def _hear_directly(self) -> None:
        """A linear layer below one that is taught by the output's error (DFA) makes its delta from
        that error itself, a tile at a time: nothing is handed down, and delta is not stored."""
        made = {stage.output: stage for stage in self.stages}
        for reader in self.stages:
            if not isinstance(reader, S.Linear) or not reader.wants_input:
                continue
            if getattr(reader.teacher, "taught", None) is None:
                continue
            slot = reader.inputs[0]
            below = made.get(slot)
            alone = len(self.consumers(slot)) == 1 and slot != self.output
            if isinstance(below, M.Activation) and not below.derivative:
                alone = alone and len(self.consumers(below.inputs[0])) == 1
                below = made.get(below.inputs[0])
            if not (alone and isinstance(below, S.Linear)):
                continue
            if below.teacher is not None or not below.wants_input:  # has no input product to run
                below.direct, reader.wants_input = reader, False

    def _mark_nonnegative(self) -> None:
        """Layers whose input is nowhere negative: rules that part it by sign do half the work."""
        slots: set[int] = set()
        for stage in self.stages:
            if isinstance(stage, S._Weighted):
                stage.nonnegative = stage.inputs[0] in slots
            passes = stage.routes or isinstance(stage, (S.AvgPool, S.AdaptiveAvgPool, M.Dropout))
            kept = passes and stage.inputs[0] in slots
            positive = isinstance(stage, N.Lif) or (
                isinstance(stage, M.Activation) and stage.name in _NONNEGATIVE
            )
            if stage.relu or positive or kept:
                slots.add(stage.output)

    def _kept(self) -> set[int]:
        return {slot for s in self.stages if s.output in self.live for slot in s.keeps()}

    def _free_after_forward(self) -> list[list[int]]:
        """Per stage: the slots that nothing reads after its forward, redistribution included."""
        kept = self._kept() | {self.output, self.source}
        last = {slot: s.index for s in self.stages for slot in s.reads}
        free: list[list[int]] = [[] for _ in self.stages]
        for slot, index in last.items():
            if slot not in kept:
                free[index].append(slot)
        return free

    def _relu_in_place(self) -> None:
        """A ReLU of its own may overwrite a value that nothing else reads (a view of it may be
        kept), unless that is a view."""
        made = {s.output: s for s in self.stages}
        for stage in self.stages:
            if isinstance(stage, M.Activation) and stage.is_relu:
                slot = stage.inputs[0]
                producer = made.get(slot)
                freed = slot in self.free_forward[stage.index] and len(self.consumers(slot)) == 1
                stage.in_place = freed and isinstance(
                    producer, (S.Linear, S.Conv, S.BatchNorm, S.Sum)
                )

    def _free_after_backward(self) -> list[list[int]]:
        """Per stage: the slots that no stage before it in forward order reads backwards."""
        first: dict[int, int] = {}
        for stage in self.stages:
            for slot in (*stage.keeps(), *stage.inputs):
                first.setdefault(slot, stage.index)
        free: list[list[int]] = [[] for _ in self.stages]
        for slot, index in first.items():
            free[index].append(slot)
        return free

    def forward(self, run: S.Run, x: Tensor) -> Tensor:
        norms = dict.fromkeys(m for stage in self.stages for m in stage.norms())
        run.copy_statistics(list(norms))
        values = run.values
        values[self.source] = x
        for stage, free in zip(self.stages, self.free_forward):
            values[stage.output] = stage.forward(run)
            for slot in free:
                values[slot] = None
        return values[self.output]

    def redistribute(self, run: S.Run, reward: Tensor) -> None:
        rewards: list[Tensor | None] = [None] * self.slots
        rewards[self.output] = reward
        for stage in reversed(self.stages):
            arrived = rewards[stage.output]
            rewards[stage.output] = None
            if stage.direct is not None:
                arrived = reward
            if arrived is not None and stage.output in self.live:
                for slot, part in zip(stage.inputs, stage.redistribute(run, arrived)):
                    if part is None or slot not in self.live:
                        continue
                    before = rewards[slot]
                    rewards[slot] = part if before is None else before + part
            for slot in self.free_backward[stage.index]:
                run.values[slot] = None
