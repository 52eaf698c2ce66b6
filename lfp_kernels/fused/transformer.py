"""Stages of transformers: embedding, normalisation, attention, and tensors taken apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor

from .. import functional as F
from ..composites import Transformer
from .stages import Run, Stage


class Embedding(Stage):
    """Rows of a table; nothing flows on to the tokens."""

    def __init__(
        self, tokens: Callable[[Any], Tensor], weight: Tensor, padding: int | None, sparse: bool,
        composite: Transformer,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tokens = tokens
        self.weight, self.padding, self.sparse = weight, padding, sparse
        self.eps = composite.eps

    @property
    def parameters(self) -> list[Tensor]:
        return [self.weight]

    def forward(self, run: Run) -> Tensor:
        tokens = self.tokens(run.values)
        run.aside[self.index] = tokens
        return TF.embedding(tokens, self.weight)

    def redistribute(self, run: Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        tokens, updates = run.aside[self.index], run.updates
        options: dict[str, Any] = {"padding": self.padding, "eps": self.eps}
        if self.sparse and updates.in_place(self.weight):  # rows in use alone are touched
            update = updates.take(self.weight)
            F.embedding_redistribute_update(self.weight.data, tokens, reward, update, **options)
        elif self.weight.requires_grad:
            found = F.embedding_redistribute(self.weight, tokens, reward, **options)
            updates.add(self.weight, found)
        return ()


class Norm(Stage):
    """Layer norm, RMS norm (not ``centred``) or group norm. ``call``: values -> the norm's output.

    ``axes``: how many dimensions a layer or RMS norm covers.
    """

    def __init__(
        self, kind: str, call: Callable[[Any], Tensor], weight: Any, bias: Any,
        composite: Transformer, *, eps: float | None, axes: int = 1, groups: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.kind, self.call, self.weight, self.bias = kind, call, weight, bias
        self.composite, self.eps, self.axes, self.groups = composite, eps, axes, groups

    @property
    def parameters(self) -> list[Tensor]:
        return [p for p in (self.weight, self.bias) if p is not None]

    def keeps(self) -> set[int]:
        return {*self.inputs}

    def forward(self, run: Run) -> Tensor:
        return self.call(run.values)

    def redistribute(self, run: Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        x = run.values[self.inputs[0]]
        shape = x.shape
        if not self.parameters and self.axes > 1:  # no weight says what the norm covers
            x, reward = x.flatten(-self.axes), reward.flatten(-self.axes)
        found = F.norm_redistribute(
            x, self.weight, self.bias, reward, groups=self.groups, centred=self.kind != "rms_norm",
            eps=torch.finfo(x.dtype).eps if self.eps is None else self.eps,
            stabilizer=self.composite.eps, identity=self.composite.norms == "attnlrp",
        )  # fmt: skip
        for parameter, feedback in ((self.weight, found.weight), (self.bias, found.bias)):
            if parameter is not None and parameter.requires_grad:
                run.updates.add(parameter, feedback)
        return (found.input.view(shape),)

    def describe(self) -> str:
        return f"{self.kind}, {self.composite.norms}"


class Attention(Stage):
    """scaled_dot_product_attention; its probabilities are made again on the way back.

    ``mask``: values -> the mask or None.
    """

    def __init__(
        self, composite: Transformer, mask: Callable[[Any], Any], options: dict[str, Any]
    ) -> None:
        super().__init__()
        self.composite, self.mask, self.options = composite, mask, options

    def keeps(self) -> set[int]:
        return {*self.inputs, self.output}

    def heads(self, x: Tensor) -> Tensor:
        """A value as [..., heads, length, width]."""
        return x

    def merged(self, x: Tensor, like: Tensor) -> Tensor:
        """What ``heads`` made, in the shape that ``like``, its argument, has."""
        return x

    def mask_of(self, values: Any, q: Tensor, k: Tensor) -> Any:
        return self.mask(values)

    def forward(self, run: Run) -> Tensor:
        values, options = [run.values[slot] for slot in self.inputs], dict(self.options)
        seed = int(torch.randint(2**31, ())) if options["dropout"] else 0
        q, k, v = map(self.heads, values)
        mask = self.mask_of(run.values, q, k)
        out, lse = F.attention(q, k, v, mask, seed=seed, **options)
        run.aside[self.index] = (lse, mask, {"seed": seed, **options})
        return self.merged(out, values[0])

    def redistribute(self, run: Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        lse, mask, options = run.aside[self.index]
        run.aside[self.index] = None
        values = [run.values[slot] for slot in self.inputs]
        q, k, v, out, reward = map(self.heads, (*values, run.values[self.output], reward))
        found = F.attention_redistribute(
            q, k, v, out, reward, mask, lse=lse,
            mode=self.composite.mode, eps=self.composite.eps, **options,
        )  # fmt: skip
        return tuple(self.merged(r, x) for r, x in zip(found, values))

    def describe(self) -> str:
        return f"{type(self).__name__}, {self.composite.mode}"


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether every element of the memory spanned belongs to one element of the tensor."""
    expected = 1
    for step, size in sorted((step, size) for step, size in zip(stride, shape) if size != 1):
        if step != expected:
            return False
        expected *= size
    return True


class Part:
    """The reward of one part of a tensor that was taken apart; adding collects."""

    def __init__(self, parts: dict[int, Tensor]) -> None:
        self.parts = parts

    def __add__(self, other: Part) -> Part:
        both = dict(self.parts)
        for index, reward in other.parts.items():
            both[index] = both[index] + reward if index in both else reward
        return Part(both)


class TakeApart(Stage):
    """``unbind``, ``chunk`` or ``split``: a tuple of views."""

    views = True

    def __init__(self, name: str, arguments: tuple[Any, ...]) -> None:
        super().__init__()
        self.name, self.arguments = name, arguments

    def forward(self, run: Run) -> Any:
        x = run.values[self.inputs[0]]
        run.aside[self.index] = (x.shape, x.stride())
        return getattr(x, self.name)(*self.arguments)

    def redistribute(self, run: Run, reward: Any) -> tuple[Tensor | None, ...]:
        like = next(iter(reward.parts.values()))
        # laid out as the value was, so that what made it views (heads of a projection) undoes them
        shape, stride = run.aside[self.index]
        dense = is_dense(shape, stride)
        whole = like.new_empty_strided(shape, stride) if dense else like.new_empty(shape)
        for i, part in enumerate(getattr(whole, self.name)(*self.arguments)):
            part.copy_(reward.parts[i]) if i in reward.parts else part.zero_()
        return (whole,)


class Item(Stage):
    """One part of a tensor that was taken apart."""

    views = True

    def __init__(self, index: int) -> None:
        super().__init__()
        self.item = index

    def forward(self, run: Run) -> Tensor:
        parts = run.values[self.inputs[0]]
        run.aside[self.index] = self.item % len(parts)
        return parts[self.item]

    def redistribute(self, run: Run, reward: Tensor) -> Any:
        return (Part({run.aside[self.index]: reward}),)
