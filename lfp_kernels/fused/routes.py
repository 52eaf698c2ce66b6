"""Stages that move values without arithmetic, and parameters that stand where activations may."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .stages import Run, Stage

Resolve = Callable[[Any], tuple[list[Any], dict[str, Any]]]


class Parameter(Stage):
    """A parameter that forward reads as a value: what arrives is its feedback."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    @property
    def parameters(self) -> list[Tensor]:
        return [self.weight]

    def forward(self, run: Run) -> Tensor:
        return self.weight

    def redistribute(self, run: Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        run.updates.add(self.weight, reward.contiguous())
        return ()


class Signed(Stage):
    """A parameter, or a part of one, where an activation may stand: feedback is ``sign(w)`` times
    the relevance that arrives. The builder puts it before every stage that is no view."""

    def keeps(self) -> set[int]:
        return {*self.inputs}

    def forward(self, run: Run) -> Tensor:
        return run.values[self.inputs[0]]

    def redistribute(self, run: Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        return (reward * run.values[self.inputs[0]].sign(),)


class Index(Stage):
    """``x[...]`` by numbers and slices: the reward goes back into zeros."""

    passes_zero = True
    routes = True
    views = True

    def __init__(self, resolve: Resolve) -> None:
        super().__init__()
        self.resolve = resolve

    def forward(self, run: Run) -> Tensor:
        (x, index), _ = self.resolve(run.values)
        run.aside[self.index] = (x.shape, index)
        return x[index]

    def redistribute(self, run: Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        shape, index = run.aside[self.index]
        found = reward.new_zeros(shape)
        found[index] = reward
        return (found,)


class Expand(Stage):
    """Copies along dimensions of size 1: the rewards of copies add up."""

    def __init__(self, call: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, run: Run) -> Tensor:
        run.aside[self.index] = run.values[self.inputs[0]].shape
        return self.call(run.values)

    def redistribute(self, run: Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        return (reward.sum_to_size(run.aside[self.index]),)


class Uncast(Stage):
    """``to`` and its like on a part of a parameter that has that type already: itself. A copy would
    be no part of it, and how its feedback is signed depends on that."""

    views = True

    def __init__(self, call: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, run: Run) -> Tensor:
        x = run.values[self.inputs[0]]
        y = self.call(run.values)
        if (y.dtype, y.device) != (x.dtype, x.device):
            raise ValueError(
                f"fuse: {self.label}: a parameter was converted from {x.dtype} on {x.device} to "
                f"{y.dtype} on {y.device}, and has no stage there; keep all in one type"
            )
        return x

    def redistribute(self, run: Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        return (reward,)


class Fill(Stage):
    """``masked_fill`` by a constant: what was filled passes nothing."""

    def __init__(self, call: Callable[[Any], Tensor], resolve: Resolve) -> None:
        super().__init__()
        self.call, self.resolve = call, resolve

    def forward(self, run: Run) -> Tensor:
        args, kwargs = self.resolve(run.values)
        mask = args[1] if len(args) > 1 else kwargs["mask"]
        run.aside[self.index] = (mask, run.values[self.inputs[0]].shape)
        return self.call(run.values)

    def redistribute(self, run: Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        mask, shape = run.aside[self.index]
        run.aside[self.index] = None
        return (reward.masked_fill(mask, 0.0).sum_to_size(shape),)


class Moved(Stage):
    """Any other call that only moves and copies values (``repeat``, ``stack``, ``where``):
    linear in its inputs, or affine, so the transpose that torch derives moves the reward."""

    def __init__(self, call: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, run: Run) -> Tensor:
        values = {slot: run.values[slot] for slot in self.reads}
        run.aside[self.index] = {
            slot: (value.shape, value.dtype, value.device) if slot in self.inputs else value
            for slot, value in values.items()
        }
        return self.call(values)

    def redistribute(self, run: Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        values = run.aside[self.index]
        run.aside[self.index] = None
        with torch.enable_grad():
            for slot in self.inputs:
                shape, dtype, device = values[slot]
                values[slot] = torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)
            inputs = [values[slot] for slot in self.inputs]
            return torch.autograd.grad(self.call(values), inputs, reward, allow_unused=True)
