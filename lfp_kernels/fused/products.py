"""Stages of products, sums, softmax and means of activations (docs/math.md, section 7)."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from ..composites import Transformer
from ..rules import Rule, stabilize
from .stages import Run, Stage

Shares = tuple[float, float]


class Product(Stage):
    """``a * b`` of activations: ``shares`` of the reward by the epsilon rule, which is
    ``z r / stab(z)`` for both, so that the product alone is kept; or the gradient."""

    def __init__(self, composite: Transformer, shares: Shares) -> None:
        super().__init__()
        self.composite, self.shares = composite, shares

    @property
    def _plain(self) -> bool:
        return self.composite.mode == "plain"

    def keeps(self) -> set[int]:
        return {*self.inputs} if self._plain else {self.output}

    def forward(self, run: Run) -> Tensor:
        a, b = (run.values[slot] for slot in self.inputs)
        run.aside[self.index] = (a.shape, b.shape)
        return a * b

    def redistribute(self, run: Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        if self._plain:
            a, b = (run.values[slot] for slot in self.inputs)
            found = [reward * b, reward * a]
        else:
            z = run.values[self.output]
            passed = z * (reward / stabilize(z, self.composite.eps))
            found = [passed * share if share else None for share in self.shares]
        shapes = run.aside[self.index]
        return tuple(None if r is None else r.sum_to_size(s) for r, s in zip(found, shapes))

    def describe(self) -> str:
        how = "gradient" if self._plain else f"shares {self.shares[0]:g} and {self.shares[1]:g}"
        return f"Product, {how}"


class Power(Stage):
    """A power by a positive number: a product with itself, which passes all of the reward; or the
    gradient."""

    def __init__(self, composite: Transformer, exponent: float) -> None:
        super().__init__()
        self.plain, self.exponent = composite.mode == "plain", exponent

    def keeps(self) -> set[int]:
        return {*self.inputs} if self.plain else set()

    def forward(self, run: Run) -> Tensor:
        return run.values[self.inputs[0]] ** self.exponent

    def redistribute(self, run: Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        if not self.plain:
            return (reward,)
        x = run.values[self.inputs[0]]
        return (reward * self.exponent * x ** (self.exponent - 1),)

    def describe(self) -> str:
        return f"Power, {self.exponent:g}, " + ("gradient" if self.plain else "reward unchanged")


class MatrixProduct(Stage):
    """``a @ b``: ``share`` of the reward to each by the epsilon rule, or the gradient."""

    def __init__(self, composite: Transformer, share: float, live: tuple[bool, bool]) -> None:
        super().__init__()
        self.composite, self.share, self.live = composite, share, live

    @property
    def _plain(self) -> bool:
        return self.composite.mode == "plain"

    def keeps(self) -> set[int]:
        if not self._plain:
            return {*self.inputs, self.output}
        return {slot for slot, other in zip(self.inputs, reversed(self.live)) if other}

    def forward(self, run: Run) -> Tensor:
        a, b = (run.values[slot] for slot in self.inputs)
        run.aside[self.index] = (a.shape, b.shape)
        return self.product(a, b)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    def transposed(self, s: Tensor, a: Any, b: Any, shapes: Any) -> list[Tensor | None]:
        """``s`` through the product, to a and to b. Vectors are matrices of one row, or column."""
        if len(shapes[1]) == 1:
            s, b = s.unsqueeze(-1), b if b is None else b.unsqueeze(-1)
        if len(shapes[0]) == 1:
            s, a = s.unsqueeze(-2), a if a is None else a.unsqueeze(-2)
        return [
            _reduced(s @ b.mT, shapes[0]) if self.live[0] else None,
            _reduced(a.mT @ s, shapes[1]) if self.live[1] else None,
        ]

    def redistribute(self, run: Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        a, b = (run.values[slot] for slot in self.inputs)
        s = reward
        if not self._plain:
            s = self.share * reward / stabilize(run.values[self.output], self.composite.eps)
        found = self.transposed(s, a, b, run.aside[self.index])
        if self._plain:
            return tuple(found)
        return tuple(None if f is None else f * x for f, x in zip(found, (a, b)))

    def describe(self) -> str:
        how = "gradient" if self._plain else f"share {self.share:g} to each"
        return f"{type(self).__name__}, {how}"


def _reduced(x: Tensor, shape: torch.Size) -> Tensor:
    """``x`` summed over what was broadcast, and a vector again where it was one."""
    if len(shape) == 1:
        x = x.reshape(-1, *x.shape[-2:]).sum(0)
        return x.reshape(shape)
    return x.sum_to_size(shape)


class Contraction(MatrixProduct):
    """``torch.einsum`` of two operands; torch derives its transposes."""

    def __init__(self, equation: str, *rest: Any) -> None:
        super().__init__(*rest)
        self.equation = equation

    def keeps(self) -> set[int]:
        return {*self.inputs} if self._plain else {*self.inputs, self.output}

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum(self.equation, a, b)

    def transposed(self, s: Tensor, a: Any, b: Any, shapes: Any) -> list[Tensor | None]:
        with torch.enable_grad():
            probes = [t.detach().requires_grad_(on) for t, on in zip((a, b), self.live)]
            wanted = [probe for probe, on in zip(probes, self.live) if on]
            found = iter(torch.autograd.grad(self.product(*probes), wanted, s))
        return [next(found) if on else None for on in self.live]


class Scaled(Stage):
    """A product with a number or a constant, a division by one, negation: the reward passes
    unchanged; in mode plain the gradient acts on it."""

    def __init__(self, name: str, composite: Transformer, other: Callable[[Any], Any]) -> None:
        super().__init__()
        self.name, self.other = name, other
        self.plain = composite.mode == "plain"

    def forward(self, run: Run) -> Tensor:
        x, other = run.values[self.inputs[0]], self.other(run.values)
        run.aside[self.index] = (x.shape, other if self.plain else None)
        return _SCALE[self.name](x, other)

    def redistribute(self, run: Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        shape, other = run.aside[self.index]
        run.aside[self.index] = None
        if self.plain:  # linear, elementwise: the gradient is what forward does, to the reward
            reward = _SCALE[self.name](reward, other)
        return (reward.sum_to_size(shape),)

    def describe(self) -> str:
        return f"Scaled, {self.name}, " + ("gradient" if self.plain else "reward unchanged")


_SCALE: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "mul": operator.mul, "div": operator.truediv, "neg": lambda x, _: -x,
}  # fmt: skip


class CopiedSum(Stage):
    """``a + b`` with residual="gradient": each operand gets the whole reward."""

    def __init__(self, other: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        self.other = other  # a constant beside the one input

    def forward(self, run: Run) -> Tensor:
        values = [run.values[slot] for slot in self.inputs]
        run.aside[self.index] = [v.shape for v in values]
        return values[0] + (values[1] if self.other is None else self.other(run.values))

    def redistribute(self, run: Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(reward.sum_to_size(shape) for shape in run.aside[self.index])


class SumWithConstant(Stage):
    """``x + c``: the constant takes its share, as a parameter in its place would."""

    def __init__(self, rule: Rule, other: Callable[[Any], Any]) -> None:
        super().__init__()
        self.rule, self.other = rule, other

    def keeps(self) -> set[int]:
        return {*self.inputs}

    def forward(self, run: Run) -> Tensor:
        x = run.values[self.inputs[0]]
        other = torch.as_tensor(self.other(run.values), dtype=x.dtype, device=x.device)
        run.aside[self.index] = other
        return x + other

    def redistribute(self, run: Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        x, other = run.values[self.inputs[0]], run.aside[self.index]
        run.aside[self.index] = None
        return (F.sum_redistribute(x, other, reward, self.rule)[0],)


class Softmax(Stage):
    """What the logits explain (AttnLRP), or the gradient, which needs the probabilities alone."""

    def __init__(self, composite: Transformer, dim: int, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.plain, self.dim, self.dtype = composite.mode == "plain", dim, dtype

    def keeps(self) -> set[int]:
        return {self.output} if self.plain else {*self.inputs, self.output}

    def forward(self, run: Run) -> Tensor:
        x = run.values[self.inputs[0]]
        run.aside[self.index] = x.dtype
        return x.softmax(self.dim, dtype=self.dtype)

    def redistribute(self, run: Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        p = run.values[self.output]
        if self.plain:
            found = p * (reward - (p * reward).sum(self.dim, keepdim=True))
        else:
            x = run.values[self.inputs[0]]
            found = F.softmax_redistribute(x.to(p.dtype), p, reward, self.dim)
        return (found.to(run.aside[self.index]),)

    def describe(self) -> str:
        return "Softmax, " + ("gradient" if self.plain else "attnlrp")


class Reduction(Stage):
    """``mean`` or ``sum`` over dimensions: each value takes the share it contributed."""

    multiplies_by_input = True

    def __init__(self, rule: Rule, name: str, dims: Any, keepdim: bool) -> None:
        super().__init__()
        self.rule, self.name, self.keepdim = rule, name, keepdim
        self.dims = (dims,) if isinstance(dims, int) else dims or None

    def keeps(self) -> set[int]:
        return {*self.inputs, self.output}

    def forward(self, run: Run) -> Tensor:
        x = run.values[self.inputs[0]]
        return getattr(x, self.name)(self._all(x), keepdim=self.keepdim)

    def _all(self, x: Tensor) -> tuple[int, ...]:
        dims = range(x.dim()) if self.dims is None else self.dims
        return tuple(sorted(d % x.dim() for d in dims))

    def redistribute(self, run: Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        x, z = run.values[self.inputs[0]], run.values[self.output]
        s = self.rule.prologue(reward, z)
        count = 1
        for dim in self._all(x):
            count *= x.shape[dim]
            s = s if self.keepdim else s.unsqueeze(dim)
        if self.name == "mean":
            s = s / count
        return (self.rule.input_epilogue(s.expand(x.shape), x),)
