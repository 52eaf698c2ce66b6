"""Stages without parameters and without arithmetic on the reward beyond a mask or a move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from .. import functional as F
from ..rules import DERIVATIVES
from .stages import Run, Stage


class MaxPool(Stage):
    passes_zero = True
    routes = True

    def __init__(self, settings: tuple) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, run: Run) -> Tensor:
        x = run.values[self.inputs[0]]
        z, indices = F.max_pool(x, *self.settings)
        run.aside[self.index] = (indices, x.shape)
        return z

    def redistribute(self, run: Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        indices, shape = run.aside[self.index]
        run.aside[self.index] = None
        return (F.max_pool_redistribute(reward, indices, shape),)


class Activation(Stage):
    """An elementwise function: the reward passes unchanged, or times the function's derivative."""

    def __init__(
        self, function: Callable[[Tensor], Tensor], name: str, *, derivative: bool = False
    ) -> None:
        super().__init__()
        self.function, self.name = function, name
        self.is_relu = name == "relu"
        self.derivative = derivative  # still to be applied by this stage
        self.passes_zero = self.is_relu
        self.in_place = False  # nobody else reads the input

    def keeps(self) -> set[int]:
        if not self.derivative:
            return set()
        return {self.output} if self.name in DERIVATIVES else {*self.inputs}

    def forward(self, run: Run) -> Tensor:
        x = run.values[self.inputs[0]]
        if self.is_relu:
            return x.relu_() if self.in_place else x.relu()
        return self.function(x)

    def redistribute(self, run: Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        if not self.derivative:
            return (reward,)
        if self.name in DERIVATIVES:
            return (DERIVATIVES[self.name](reward, run.values[self.output]),)
        with torch.enable_grad():  # of this one elementwise function, by its own definition
            x = run.values[self.inputs[0]].detach().requires_grad_()
            return torch.autograd.grad(self.function(x), x, reward)

    def describe(self) -> str:
        return f"Activation, {self.name}" + (", derivative" if self.derivative else "")


class Dropout(Stage):
    passes_zero = True

    def __init__(self, module: Any, conserving: bool) -> None:
        super().__init__()
        self.module = module  # or what else has p and training
        self.conserving = conserving

    def forward(self, run: Run) -> Tensor:
        x = run.values[self.inputs[0]]
        if not self.module.training or self.module.p == 0:
            return x
        y, mask = F.dropout(x, self.module.p)
        run.aside[self.index] = mask
        return y

    def redistribute(self, run: Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        mask = run.aside[self.index]
        if mask is None:
            return (reward,)
        run.aside[self.index] = None
        return (F.dropout_redistribute(reward, mask, self.module.p, conserving=self.conserving),)


class Resolver:
    """Fills values into the arguments of a traced call. ``slots`` of its nodes are those at its
    place in forward: an in-place call further down gives the same nodes other slots."""

    def __init__(self, node: fx.Node, slots: dict[fx.Node, int], constants: dict) -> None:
        self.node = node
        self.slots = {n: slots[n] for n in node.all_input_nodes if n in slots}
        self.constants = {n: constants[n] for n in node.all_input_nodes if n in constants}

    def __call__(self, values: Any) -> tuple[list[Any], dict[str, Any]]:
        def value_of(n: fx.Node) -> Any:
            return values[self.slots[n]] if n in self.slots else self.constants[n]

        args = fx.map_arg(self.node.args, value_of)
        return list(args), dict(fx.map_arg(self.node.kwargs, value_of))


class Reshaper:
    """A traced call with its arguments: sizes may come from other slots."""

    def __init__(self, resolve: Resolver) -> None:
        self.resolve = resolve
        self.target: Any = resolve.node.target
        self.method = resolve.node.op == "call_method"

    def __call__(self, values: Any) -> Any:
        args, kwargs = self.resolve(values)
        if self.method:
            # A view of a channels-last value is a copy; the model wrote it for the plain layout.
            name = "reshape" if self.target == "view" else self.target
            return getattr(args[0], name)(*args[1:], **kwargs)
        return self.target(*args, **kwargs)


class Reshape(Stage):
    passes_zero = True
    routes = True
    views = True

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, run: Run) -> Tensor:
        x = run.values[self.inputs[0]]
        run.aside[self.index] = x.shape
        if isinstance(self.function, Reshaper):
            return self.function(run.values)
        return self.function(x)

    def redistribute(self, run: Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        return (reward.reshape(run.aside[self.index]),)


class Permute(Stage):
    """``permute(order)``, or ``transpose(*swap)`` when no order is given."""

    passes_zero = True
    routes = True
    views = True

    def __init__(self, order: tuple[int, ...], swap: tuple[int, ...]) -> None:
        super().__init__()
        self.order, self.swap = order, swap

    def forward(self, run: Run) -> Tensor:
        x = run.values[self.inputs[0]]
        return x.permute(self.order) if self.order else x.transpose(*self.swap)

    def redistribute(self, run: Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        if not self.order:
            return (reward.transpose(self.swap[0], self.swap[1]),)
        order = [d % len(self.order) for d in self.order]
        return (reward.permute([order.index(d) for d in range(len(order))]),)


class Pad(Stage):
    """Zeros around the last dimensions; ``amounts`` as F.pad takes them."""

    passes_zero = True

    def __init__(self, amounts: tuple[int, ...]) -> None:
        super().__init__()
        self.amounts = amounts

    def forward(self, run: Run) -> Tensor:
        return torch.nn.functional.pad(run.values[self.inputs[0]], self.amounts)

    def redistribute(self, run: Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        return (torch.nn.functional.pad(reward, [-a for a in self.amounts]),)


class Cat(Stage):
    passes_zero = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, run: Run) -> Tensor:
        values = [run.values[i] for i in self.inputs]
        run.aside[self.index] = [v.shape[self.dim] for v in values]
        return torch.cat(values, self.dim)

    def redistribute(self, run: Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(reward.split(run.aside[self.index], self.dim))


class Host(Stage):
    """A size, a mask, or whatever else forward computes that no reward reaches."""

    def __init__(self, compute: Callable[[Any], Any]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, run: Run) -> Any:
        return self.compute(run.values)


class Given(Stage):
    """An argument of the model's forward besides the first."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, run: Run) -> Tensor:
        return run.given[self.name]
