"""Stages of transformers: embedding, normalisation, attention, and tensors taken apart."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor, nn

from .. import functional as F
from ..composites import Transformer
from ..rules import stabilize
from .stages import Run, Stage


class Embedding(Stage):
    """Rows of a table; nothing flows on to the tokens."""

    def __init__(self, module: nn.Embedding, composite: Transformer) -> None:
        super().__init__()
        self.module: Any = module
        self.eps = composite.eps

    @property
    def parameters(self) -> list[Tensor]:
        return [self.module.weight]

    def forward(self, run: Run) -> Tensor:
        tokens = run.values[self.reads[0]]
        run.aside[self.index] = tokens
        return TF.embedding(tokens, self.module.weight)

    def redistribute(self, run: Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        weight, tokens = self.module.weight, run.aside[self.index]
        if weight.requires_grad:
            rows = weight[tokens]
            feedback = rows.abs() * (reward / stabilize(rows, self.eps))
            if self.module.padding_idx is not None:
                hidden = tokens == self.module.padding_idx
                feedback = feedback.masked_fill(hidden[..., None], 0.0)
            total = torch.zeros_like(weight)
            total.index_add_(0, tokens.reshape(-1), feedback.reshape(-1, weight.shape[1]))
            run.updates.add(weight, total)
        return ()


class Norm(Stage):
    """Layer norm or RMS norm over the last dimensions."""

    def __init__(self, module: nn.Module, composite: Transformer) -> None:
        super().__init__()
        self.module: Any = module
        self.centred = isinstance(module, nn.LayerNorm)
        self.composite = composite

    @property
    def parameters(self) -> list[Tensor]:
        return [p for p in (self.module.weight, self._bias) if p is not None]

    @property
    def _bias(self) -> Any:
        return getattr(self.module, "bias", None)

    def keeps(self) -> set[int]:
        return {*self.inputs}

    def forward(self, run: Run) -> Tensor:
        return self.module(run.values[self.inputs[0]])

    def redistribute(self, run: Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        m, x = self.module, run.values[self.inputs[0]]
        eps = m.eps if m.eps is not None else torch.finfo(x.dtype).eps
        found = F.norm_redistribute(
            x, m.weight, self._bias, reward, centred=self.centred, eps=eps,
            stabilizer=self.composite.eps, identity=self.composite.norms == "attnlrp",
        )  # fmt: skip
        for parameter, feedback in ((m.weight, found.weight), (self._bias, found.bias)):
            if parameter is not None and parameter.requires_grad:
                run.updates.add(parameter, feedback)
        return (found.input,)

    def describe(self) -> str:
        return f"{type(self.module).__name__}, {self.composite.norms}"


class Attention(Stage):
    """scaled_dot_product_attention, causal or not, without a mask."""

    def __init__(self, causal: bool, scale: float | None, composite: Transformer) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"is_causal": causal, "scale": scale}
        self.composite = composite

    def keeps(self) -> set[int]:
        return {*self.inputs, self.output} if self.composite.mode == "attnlrp" else set()

    def forward(self, run: Run) -> Tensor:
        q, k, v = (run.values[slot] for slot in self.inputs)
        if self.composite.mode == "attnlrp":
            return TF.scaled_dot_product_attention(q, k, v, **self.options)
        with torch.enable_grad():  # of this one function: its own derivative acts on the reward
            inputs = [t.detach().requires_grad_() for t in (q, k, v)]
            out = TF.scaled_dot_product_attention(*inputs, **self.options)
        run.aside[self.index] = (out, inputs)
        return out.detach()

    def redistribute(self, run: Run, reward: Tensor) -> tuple[Tensor | None, ...]:
        if self.composite.mode == "attnlrp":
            q, k, v = (run.values[slot] for slot in self.inputs)
            return F.attention_redistribute(
                q, k, v, run.values[self.output], reward, causal=self.options["is_causal"],
                scale=self.options["scale"], eps=self.composite.eps,
            )  # fmt: skip
        out, inputs = run.aside[self.index]
        run.aside[self.index] = None
        with torch.enable_grad():
            return torch.autograd.grad(out, inputs, reward)

    def describe(self) -> str:
        return f"Attention, {self.composite.mode}"


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

    def __init__(self, name: str, arguments: tuple[Any, ...]) -> None:
        super().__init__()
        self.name, self.arguments = name, arguments
        default = 0
        place = 0 if name == "unbind" else 1
        self.dim = arguments[place] if len(arguments) > place else default

    def forward(self, run: Run) -> Any:
        x = run.values[self.inputs[0]]
        parts = getattr(x, self.name)(*self.arguments)
        run.aside[self.index] = [p.shape for p in parts]
        return parts

    def redistribute(self, run: Run, reward: Any) -> tuple[Tensor | None, ...]:
        shapes = run.aside[self.index]
        like = next(iter(reward.parts.values()))
        parts = [reward.parts.get(i, None) for i in range(len(shapes))]
        full = [like.new_zeros(s) if p is None else p for p, s in zip(parts, shapes)]
        if self.name == "unbind":
            return (torch.stack(full, self.dim),)
        return (torch.cat(full, self.dim),)


class Item(Stage):
    """One part of a tensor that was taken apart."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.item = index

    def forward(self, run: Run) -> Tensor:
        return run.values[self.inputs[0]][self.item]

    def redistribute(self, run: Run, reward: Tensor) -> Any:
        return (Part({self.item: reward}),)
