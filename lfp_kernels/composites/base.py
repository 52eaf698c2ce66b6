"""Which layer gets which rule, and how a model is attached to its rules and comes back unchanged.

composite = lfp_kernels.composites.Epsilon(eps=1e-6)
with composite.context(model):
    out = model(x)
    lfp_kernels.backward(out, lfp_kernels.rewards.softmax(out, y))   # .grad = -feedback
optimizer.step()
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, Union

import torch
from torch import Tensor, nn

from .. import rules
from ..rules import Epsilon, Rule, Separate
from .attach import MARK, Attachment, LayerRule

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
# Layers with parameters that have a rule. Other modules of torch.nn with parameters have none; a
# module of the user's own is judged by the functions that its forward calls.
LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *_CONVS, *_BATCH_NORMS)

DEFAULTS = ("error", "gradient")
DROPOUTS = ("scaled", "conserving")
# What a rule is chosen by: layer types, a name or pattern of names ("features.*"), a predicate
# (name, module) -> bool, or FIRST, the first layer with a weight matrix.
Selector = Union[type, tuple[type, ...], str, Callable[[str, nn.Module], bool]]  # noqa: UP007
FIRST = "<first>"
WEIGHTED = (nn.Linear, *_CONVS)


class Composite:
    """Rules for a whole model.

    Args:
        rule: the rule of layers with parameters that ``layers`` does not name; a Rule or a name.
        layers: pairs (selector, rule), the first that matches counts. A selector is a layer type or
            a tuple of them, a module name or pattern ("features.*"), a predicate
            ``(name, module) -> bool``, or ``composites.FIRST``.
        function_rule: the rule of batch norms, sums, average pools and other linear functions
            without a weight matrix; by default ``rule`` where it is one they have, else epsilon.
        default: what happens to a layer or function without a rule: "error" names it and stops;
            "gradient" lets the plain gradient act on the reward and lists it in :meth:`left_out`.
        dropout: "scaled" multiplies the reward by mask / (1 - p), as the official lfprop package
            does; "conserving" by the mask alone.
        feedback_dtype: torch.bfloat16 runs the feedback products of float32 layers in bfloat16
            (accumulated in float32; weights stay float32). None: the layer's own dtype.
    """

    def __init__(
        self,
        rule: Rule | str,
        *,
        layers: Sequence[tuple[Selector, Rule | str]] = (),
        function_rule: Rule | None = None,
        default: str = "error",
        dropout: str = "scaled",
        feedback_dtype: torch.dtype | None = None,
    ) -> None:
        owner = type(self).__name__
        if isinstance(rule, str):
            rule = rules.get(rule)
        if not isinstance(rule, Rule):
            raise TypeError(f"{owner}: rule: expected an lfp_kernels.rules.Rule, got {rule!r}")
        if default not in DEFAULTS:
            raise ValueError(f"{owner}: default: expected one of {DEFAULTS}, got {default!r}")
        if dropout not in DROPOUTS:
            raise ValueError(f"{owner}: dropout: expected one of {DROPOUTS}, got {dropout!r}")
        _check_feedback_dtype(owner, feedback_dtype)
        self.rule = rule
        self.layers = tuple((selector, _check_rule(owner, r)) for selector, r in layers)
        self._function_rule = function_rule or _without_weights(rule)
        self._firsts: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.default = default
        self.dropout = dropout
        self.feedback_dtype = feedback_dtype
        self._attachments: list[Attachment] = []

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rule={self.rule!r}, default={self.default!r})"

    def rule_of(self, name: str, module: nn.Module) -> Rule:
        """The rule of the layer ``module`` called ``name`` in the model."""
        found = next((r for s, r in self.layers if self._selects(s, name, module)), None)
        if isinstance(module, WEIGHTED):
            return self.rule if found is None else found
        return _without_weights(self.function_rule if found is None else found)

    def _selects(self, selector: Selector, name: str, module: nn.Module) -> bool:
        if isinstance(selector, (type, tuple)):
            return isinstance(module, selector)
        if isinstance(selector, str):
            return module in self._firsts if selector == FIRST else fnmatchcase(name, selector)
        return bool(selector(name, module))

    @property
    def function_rule(self) -> Rule:
        """The rule of sums, average pools and other linear functions without parameters."""
        return self._function_rule

    def product_dtype(self, like: Tensor) -> torch.dtype | None:
        return self.feedback_dtype if like.dtype == torch.float32 else None

    def with_feedback_dtype(self, dtype: torch.dtype) -> Composite:
        """The same composite with another dtype for the feedback products."""
        _check_feedback_dtype("fuse", dtype)
        other = copy.copy(self)
        other.feedback_dtype, other._attachments = dtype, []
        other._firsts = weakref.WeakSet()
        return other

    def check(self, model: nn.Module) -> None:
        """Raise ValueError for the first layer with trainable parameters that has no rule."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"composite: model: expected an nn.Module, got {type(model).__name__}")
        self._resolve(model)
        if self.default == "gradient":
            return
        for name, module in model.named_modules():
            if isinstance(module, LAYERS) or not type(module).__module__.startswith("torch.nn"):
                continue
            if self.knows(module):
                continue
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                known = ", ".join(sorted(layer.__name__ for layer in LAYERS))
                raise ValueError(
                    f"composite: layer {name!r} ({type(module).__name__}) has parameters and no "
                    f"rule; expected one of {known}. Freeze it (requires_grad_(False)) or choose "
                    "default='gradient' to let the plain gradient act there"
                )

    def _resolve(self, model: nn.Module) -> None:
        """Look up what selectors refer to in this model."""
        named = {n: m for n, m in model.named_modules() if n}
        weighted = [m for m in model.modules() if isinstance(m, WEIGHTED)]
        self._firsts.update(weighted[:1])
        for selector, _ in self.layers:
            if not isinstance(selector, str) or selector == FIRST:
                continue
            if not any(fnmatchcase(name, selector) for name in named):
                known = ", ".join(n for n, m in named.items() if isinstance(m, LAYERS))
                raise ValueError(
                    f"composite: layers: no module is named {selector!r}; the layers with a rule "
                    f"are: {known or 'none'}"
                )

    # -- what composites of functions beside layers override

    reenters = False  # parts of the model may run again by themselves (activation checkpointing)

    def handlers(self) -> dict[Any, Any]:
        """Rules of torch functions, in front of those that every composite has."""
        return {}

    def knows(self, module: nn.Module) -> bool:
        """Whether a module of torch.nn that is not in ``LAYERS`` has a rule here."""
        return False

    def as_one_call(self, module: nn.Module) -> Callable[..., Any] | None:
        """What to run in place of ``module``'s forward while attached, or None."""
        return None

    def is_activation(self, module: nn.Module) -> bool:
        """Whether a module outside of torch.nn is an activation function, whatever it calls."""
        return False

    # -- what the feedback-alignment family overrides

    plain = False  # everything but the weighted layers' input products is what autograd does

    def prepare(self, model: nn.Module, x: Tensor | None = None) -> None:
        """Give ``model`` what the rules need besides its parameters (feedback matrices)."""

    def matrix_of(self, name: str, module: nn.Module) -> Tensor | None:
        """The feedback matrix of a layer's input product."""
        return None

    def teacher_of(self, name: str, module: nn.Module) -> Any:
        """What makes a layer's input reward instead of an input product: reward -> Tensor."""
        return None

    def layer(self, name: str, module: nn.Module) -> LayerRule:
        """All that goes with the layer ``module`` called ``name``."""
        return LayerRule(
            self.rule_of(name, module),
            self.matrix_of(name, module),
            self.teacher_of(name, module),
            name,
        )

    def begin(self, out: Tensor, labels: Any, reward: Tensor) -> None:
        """A fused step is about to redistribute ``reward`` from ``out``."""

    def begins_linear(self, name: str | None) -> bool:
        """Whether activations pass rewards unchanged once layer ``name`` has run (None: ever)."""
        return not self.plain and name is None

    def finish(self, out: Any) -> Any:
        """What becomes of the output of an attached forward."""
        return out

    def rule_now(self, rule: Rule) -> Rule:
        """The rule with its parameters for the pass that begins (seeds of random matrices)."""
        return rule

    def attach(self, model: nn.Module) -> None:
        """From now on ``model``'s forward builds the graph of rewards; undo with :meth:`detach`.

        Raises:
            ValueError: the model is attached already, or a layer has no rule.
        """
        self.check(model)
        if MARK in model.__dict__:
            raise ValueError(
                "composite: model: is attached already; call detach(model) on the composite that "
                "holds it, or leave its context, first"
            )
        self.prepare(model)
        attachment = Attachment(self, model)
        attachment.install()
        self._attachments.append(attachment)

    def detach(self, model: nn.Module | None = None) -> None:
        """Give ``model`` (or every model of this composite) back exactly as it was."""
        chosen = [a for a in self._attachments if model is None or a.model is model]
        if model is not None and not chosen:
            raise ValueError("composite: model: is not attached to this composite")
        for attachment in chosen:
            attachment.remove()
            self._attachments.remove(attachment)

    @contextlib.contextmanager
    def context(self, model: nn.Module) -> Iterator[nn.Module]:
        """:meth:`attach` inside the block, :meth:`detach` at its end."""
        self.attach(model)
        try:
            yield model
        finally:
            self.detach(model)

    def left_out(self, model: nn.Module | None = None) -> list[str]:
        """Functions without a rule that took part in forward (``default="gradient"``)."""
        return sorted(
            {
                name
                for a in self._attachments
                if model is None or a.model is model
                for name in a.names_left_out
            }
        )


def _check_rule(owner: str, rule: Any) -> Rule:
    if isinstance(rule, str):
        return rules.get(rule)
    if not isinstance(rule, Rule):
        raise TypeError(f"{owner}: layers: expected (selector, Rule) pairs, got {rule!r} as rule")
    return rule


def _without_weights(rule: Rule) -> Rule:
    """The rule of a function without a weight matrix that stands beside layers of ``rule``."""
    if isinstance(rule, Separate):
        return _without_weights(rule.input)
    return rule if rule.has_plain_form else Epsilon()


def _check_feedback_dtype(owner: str, value: torch.dtype | None) -> None:
    if value not in (None, torch.bfloat16):
        raise ValueError(f"{owner}: feedback_dtype: expected torch.bfloat16 or None, got {value}")
