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
import functools
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import resolve_name

from .capture import RewardMode
from .rules import Epsilon as EpsilonRule
from .rules import Rule

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
# Layers with parameters that have a rule. Other modules of torch.nn with parameters have none; a
# module of the user's own is judged by the functions that its forward calls.
LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *_CONVS, *_BATCH_NORMS)

DEFAULTS = ("error", "gradient")
DROPOUTS = ("scaled", "conserving")
_MARK = "_lfp_attachment"


class Composite:
    """Rules for a whole model.

    Args:
        rule: the rule of layers with parameters and of sums and average pools.
        default: what happens to a layer or function without a rule: "error" names it and stops;
            "gradient" lets the plain gradient act on the reward and lists it in :meth:`left_out`.
        dropout: "scaled" multiplies the reward by mask / (1 - p), as the official lfprop package
            does; "conserving" by the mask alone.
        feedback_dtype: torch.bfloat16 runs the feedback products of float32 layers in bfloat16
            (accumulated in float32; weights stay float32). None: the layer's own dtype.
    """

    def __init__(
        self,
        rule: Rule,
        *,
        default: str = "error",
        dropout: str = "scaled",
        feedback_dtype: torch.dtype | None = None,
    ) -> None:
        owner = type(self).__name__
        if not isinstance(rule, Rule):
            raise TypeError(f"{owner}: rule: expected an lfp_kernels.rules.Rule, got {rule!r}")
        if default not in DEFAULTS:
            raise ValueError(f"{owner}: default: expected one of {DEFAULTS}, got {default!r}")
        if dropout not in DROPOUTS:
            raise ValueError(f"{owner}: dropout: expected one of {DROPOUTS}, got {dropout!r}")
        _check_feedback_dtype(owner, feedback_dtype)
        self.rule = rule
        self.default = default
        self.dropout = dropout
        self.feedback_dtype = feedback_dtype
        self._attachments: list[Attachment] = []

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rule={self.rule!r}, default={self.default!r})"

    def rule_of(self, name: str, module: nn.Module) -> Rule:
        """The rule of the layer ``module`` called ``name`` in the model."""
        return self.rule

    @property
    def function_rule(self) -> Rule:
        """The rule of sums, average pools and other linear functions without parameters."""
        return self.rule

    def product_dtype(self, like: Tensor) -> torch.dtype | None:
        return self.feedback_dtype if like.dtype == torch.float32 else None

    def with_feedback_dtype(self, dtype: torch.dtype) -> Composite:
        """The same composite with another dtype for the feedback products."""
        _check_feedback_dtype("fuse", dtype)
        other = copy.copy(self)
        other.feedback_dtype, other._attachments = dtype, []
        return other

    def check(self, model: nn.Module) -> None:
        """Raise ValueError for the first layer with trainable parameters that has no rule."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"composite: model: expected an nn.Module, got {type(model).__name__}")
        if self.default == "gradient":
            return
        for name, module in model.named_modules():
            if isinstance(module, LAYERS) or not type(module).__module__.startswith("torch.nn"):
                continue
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                known = ", ".join(sorted(layer.__name__ for layer in LAYERS))
                raise ValueError(
                    f"composite: layer {name!r} ({type(module).__name__}) has parameters and no "
                    f"rule; expected one of {known}. Freeze it (requires_grad_(False)) or choose "
                    "default='gradient' to let the plain gradient act there"
                )

    def attach(self, model: nn.Module) -> None:
        """From now on ``model``'s forward builds the graph of rewards; undo with :meth:`detach`.

        Raises:
            ValueError: the model is attached already, or a layer has no rule.
        """
        self.check(model)
        if _MARK in model.__dict__:
            raise ValueError(
                "composite: model: is attached already; call detach(model) on the composite that "
                "holds it, or leave its context, first"
            )
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


def _check_feedback_dtype(owner: str, value: torch.dtype | None) -> None:
    if value not in (None, torch.bfloat16):
        raise ValueError(f"{owner}: feedback_dtype: expected torch.bfloat16 or None, got {value}")


class Epsilon(Composite):
    """LFP-epsilon for every layer (arXiv 2308.12053), the official package's default.

    Args:
        eps: stabilizer of every denominator, > 0.
        default, dropout, feedback_dtype: see :class:`Composite`.
    """

    def __init__(self, eps: float = 1e-6, **options: Any) -> None:
        super().__init__(EpsilonRule(eps), **options)


class Attachment:
    """One model under one composite: weight -> rule, and the wrapped forward."""

    def __init__(self, composite: Composite, model: nn.Module) -> None:
        self.composite = composite
        self.model = model
        self.function_rule = composite.function_rule
        self.product_dtype = composite.product_dtype
        self.names_left_out: set[str] = set()
        # A parameter's rule is that of the layer that owns it.
        self._rules = {
            id(parameter): composite.rule_of(name, module)
            for name, module in model.named_modules()
            for parameter in module.parameters(recurse=False)
        }

    def install(self) -> None:
        self._own_forward = self.model.__dict__.get("forward")
        original = self.model.forward

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            with RewardMode(self):
                return original(*args, **kwargs)

        # Straight into __dict__: nothing of the module's registries changes.
        self.model.__dict__["forward"] = forward
        self.model.__dict__[_MARK] = self

    def remove(self) -> None:
        del self.model.__dict__[_MARK]
        if self._own_forward is None:
            del self.model.__dict__["forward"]
        else:
            self.model.__dict__["forward"] = self._own_forward

    def rule_of_weight(self, weight: Tensor) -> Rule:
        return self._rules.get(id(weight), self.composite.rule)

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


def backward(out: Tensor, reward: Tensor) -> None:
    """Redistribute ``reward`` from ``out`` back through the attached model that made it.

    Adds ``-feedback`` to the ``.grad`` of every trainable parameter (so that optimizers, which
    descend, reinforce what was rewarded), and ``-input_reward`` to the ``.grad`` of inputs that
    require grad. Feedback is summed over the batch, and linear in the reward.

    Args:
        out: output of a forward run inside ``composite.context(model)``.
        reward: same shape, dtype and device as ``out``; finite.

    Raises:
        TypeError, ValueError: wrong type, shape, dtype, device, a NaN or infinite reward, or an
            ``out`` that no attached model produced. No ``.grad`` has changed then.
    """
    for name, value in (("out", out), ("reward", reward)):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"backward: {name}: expected a torch.Tensor, got {type(value).__name__}"
            )
    if reward.shape != out.shape:
        raise ValueError(
            f"backward: reward: expected shape {tuple(out.shape)} like out, "
            f"got {tuple(reward.shape)}"
        )
    if reward.dtype != out.dtype or reward.device != out.device:
        raise ValueError(
            f"backward: reward: expected {out.dtype} on {out.device} like out, "
            f"got {reward.dtype} on {reward.device}"
        )
    check_finite("backward", reward)
    if not _made_by_rules(out):
        raise ValueError(
            "backward: out: expected the output of a model that ran inside "
            "composite.context(model), got a tensor that no rule takes part in"
        )
    torch.autograd.backward(out, -reward.detach())


def check_finite(op: str, reward: Tensor) -> None:
    """NaN and inf would reach every weight. Not checked on CUDA, where looking costs a sync."""
    if reward.device.type != "cpu" or math.isfinite(reward.sum()):  # NaN and inf survive a sum
        return
    if not bool(torch.isfinite(reward).all()):
        bad = (~torch.isfinite(reward)).nonzero()[0].tolist()
        raise ValueError(
            f"{op}: reward: expected finite values, got {reward[tuple(bad)].item()} at index "
            f"{tuple(bad)}; lower the learning rate or check the model's output"
        )


def _made_by_rules(out: Tensor) -> bool:
    """True when a function of :mod:`lfp_kernels.autograd` is in the graph behind ``out``."""
    seen: set[Any] = set()
    stack = [out.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if "RewardBackward" in type(node).__name__:
            return True
        seen.add(node)
        stack.extend(parent for parent, _ in node.next_functions)
    return False
