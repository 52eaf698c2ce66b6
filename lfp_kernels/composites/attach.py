"""One model under one composite: the wrapped forward, and what each layer's weight goes with."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn
from torch.overrides import resolve_name

from ..capture import RewardMode
from ..rules import Rule

if TYPE_CHECKING:
    from .base import Composite

MARK = "_lfp_attachment"


class LayerRule(NamedTuple):
    """What a weight goes with: its rule, its feedback matrix, and who makes its input reward."""

    rule: Rule
    matrix: Tensor | None = None
    teacher: Callable[[Tensor, Tensor], Tensor] | None = None
    name: str = ""


class Attachment:
    """One model under one composite: weight -> rule, and the wrapped forward."""

    def __init__(self, composite: Composite, model: nn.Module) -> None:
        self.composite = composite
        self.model = model
        self.function_rule = composite.function_rule
        self.product_dtype = composite.product_dtype
        self.names_left_out: set[str] = set()
        self.running = 0  # forward calls that have the rules around them
        self._replaced: list[tuple[nn.Module, Any]] = []
        self._spiking: dict[nn.Module, Any] = {}
        self.linear = False  # LinBP: activations pass rewards unchanged from here on
        # A parameter's rule is that of the layer that owns it.
        self._rules = self._by_weight()

    def _by_weight(self) -> dict[int, LayerRule]:
        return {
            id(parameter): self.composite.layer(name, module)
            for name, module in self.model.named_modules()
            for parameter in module.parameters(recurse=False)
        }

    def spiking_stage(self, spiking: nn.Module) -> Any:
        """What runs a spiking network of this model, made when it is first called."""
        from ..fused.spiking import Spiking, prefix_of  # the stages know composites

        if spiking not in self._spiking:
            prefix = prefix_of(self.model, spiking)
            stage = Spiking(spiking, self.composite, prefix)  # type: ignore[arg-type]
            self._spiking[spiking] = stage
            stage.inputs, stage.output, stage.index = [0], 1, 0
            stage.once = False  # autograd may be told to retain the graph
        return self._spiking[spiking]

    def install(self) -> None:
        self._own_forward = self.model.__dict__.get("forward")
        original = self.model.forward

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            self.linear = self.composite.begins_linear(None)
            with RewardMode(self), self:
                return self.composite.finish(original(*args, **kwargs))

        for module in self.model.modules():
            replacement = self.composite.as_one_call(module)
            if replacement is None and self.composite.reenters and module is not self.model:
                replacement = self._reentered(module)
            if replacement is not None:
                self._replaced.append((module, module.__dict__.get("forward")))
                module.__dict__["forward"] = replacement
        # Straight into __dict__: nothing of the module's registries changes.
        self.model.__dict__["forward"] = forward
        self.model.__dict__[MARK] = self

    def _reentered(self, module: nn.Module) -> Callable[..., Any] | None:
        """A forward that has the rules even where the model's own is not at work around it: a part
        that activation checkpointing runs again during backward."""
        if not any(True for _ in module.children()):
            return None
        original = module.forward

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.running:
                return original(*args, **kwargs)
            with RewardMode(self), self:
                return original(*args, **kwargs)

        return forward

    def __enter__(self) -> None:
        self.running += 1

    def __exit__(self, *error: Any) -> None:
        self.running -= 1

    def remove(self) -> None:
        del self.model.__dict__[MARK]
        for module, before in [(self.model, self._own_forward), *self._replaced]:
            if before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before
        self._replaced.clear()

    def rule_of_weight(self, weight: Tensor) -> LayerRule:
        if id(weight) not in self._rules and isinstance(weight, nn.Parameter):
            self._rules |= self._by_weight()  # sharded models have other tensors during forward
        found = self._rules.get(id(weight)) or LayerRule(self.composite.rule)
        self.linear = self.linear or self.composite.begins_linear(found.name)
        now = self.composite.rule_now(found.rule)
        return found if now is found.rule else found._replace(rule=now)

    def left_out(self, function: Any, args: Any, kwargs: Any) -> None:
        """A differentiable function without a rule took part in forward."""
        name = resolve_name(function) or getattr(function, "__name__", repr(function))
        if self.composite.default == "error":
            shapes = [tuple(a.shape) for a in args if isinstance(a, Tensor)]
            raise ValueError(
                f"composite: function {name} on tensors of shapes {shapes} has no rule; choose "
                "default='gradient' to let the plain gradient act on the reward there"
            )
        if name not in self.names_left_out:
            self.names_left_out.add(name)
            warnings.warn(
                f"lfp_kernels: {name} has no rule; the plain gradient acts on the reward there",
                stacklevel=4,
            )
