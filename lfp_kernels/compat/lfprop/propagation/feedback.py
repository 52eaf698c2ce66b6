"""How feedback reaches ``parameter.feedback`` when autograd is asked for the input reward alone.

``torch.autograd.grad((out,), (x,), ...)`` runs only what lies between out and x, so an edge to a
parameter would never be followed. Every layer's activations and parameters therefore pass through
one node on that way, which keeps the parameters' share:

    x -- Deposit -- x' -- layer by the rule -- z        x <- reward
    W ---/    \\--- W' --/                              W.feedback <- what arrives at W'
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ....capture import TABLE, RewardMode
from ....composites import Composite
from ....rules import Rule


class Deposit(torch.autograd.Function):
    """Aliases of the tensors forward; backward, feedback goes to the parameters among them."""

    @staticmethod
    def forward(ctx: Any, layer: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.uphill = True  # this graph carries the reward itself, not the negative reward
        ctx.layer = layer
        ctx.parameters = [t if isinstance(t, nn.Parameter) else None for t in tensors]
        ctx.seen = []
        return tuple(t.detach() for t in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *arrived: Tensor | None) -> Any:
        for tensor, version in ctx.seen:
            if tensor._version != version:
                raise RuntimeError(
                    f"lfp_kernels: the input or output of {ctx.layer} was overwritten by an "
                    "in-place operation before its feedback was computed; use the out-of-place "
                    "form, or lfp_kernels.composites, which understand += and in-place functions"
                )
        passed: list[Tensor | None] = [None]
        for parameter, value in zip(ctx.parameters, arrived):
            if parameter is None:
                passed.append(value)
                continue
            if value is not None:
                _store(parameter, value)
            passed.append(None)
        return tuple(passed)


def _store(parameter: nn.Parameter, feedback: Tensor) -> None:
    """Set ``parameter.feedback``; a second use of the parameter in one backward pass adds."""
    task = torch._C._current_graph_task_id()
    before = getattr(parameter, "feedback", None)
    if before is not None and getattr(before, "_backward_pass", None) == task:
        feedback = before + feedback
    feedback._backward_pass = task  # type: ignore[attr-defined]
    parameter.feedback = feedback  # type: ignore[attr-defined]


class OneRule(Composite):
    """One rule for whatever a layer calls."""

    def __init__(self, rule: Rule) -> None:
        super().__init__(rule, default="gradient")

    def rule_of(self, name: str, module: nn.Module) -> Rule:
        return self.rule


class LayerMode(RewardMode):
    """Active while one layer runs forward: its calls follow the rule, feedback is deposited."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = {
            id(t): t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad
        }
        if func not in TABLE or not tensors or not torch.is_grad_enabled():
            return super().__torch_function__(func, types, args, kwargs)
        layer = type(self.attachment.model).__name__
        aliases = dict(zip(tensors, Deposit.apply(layer, *tensors.values())))
        args = [aliases.get(id(a), a) for a in args]
        kwargs = {name: aliases.get(id(a), a) for name, a in kwargs.items()}
        out = super().__torch_function__(func, types, args, kwargs)
        kept = [t for t in tensors.values() if not isinstance(t, nn.Parameter)] + [out]
        node = next(iter(aliases.values())).grad_fn
        node.seen = [(t.detach(), t._version) for t in kept]
        return out


class Reverse(torch.autograd.Function):
    """The identity forward; backward, the reward of positive (negative) outputs changes sign."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, positive: bool, negative: bool) -> Tensor:
        reverse = torch.zeros_like(z, dtype=torch.bool)
        if positive:
            reverse |= z > 0
        if negative:
            reverse |= z < 0
        ctx.save_for_backward(reverse)
        return z.view_as(z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, reward: Tensor) -> Any:
        (reverse,) = ctx.saved_tensors
        return torch.where(reverse, -reward, reward), None, None


def backward(out: Tensor, reward: Tensor) -> None:
    """Leave ``.feedback`` on every parameter, whether or not the model's input requires grad.

    ``torch.autograd.grad((out,), (x,), grad_outputs=(reward,))`` does the same and returns the
    input reward; no ``.grad`` changes with either.

    Args:
        out: output of a forward run inside ``composite.context(model)``.
        reward: same shape and dtype as ``out``, positive for what is to be strengthened.

    Raises:
        ValueError: ``reward`` has another shape, or no composite made ``out``.
    """
    if reward.shape != out.shape:
        raise ValueError(
            f"backward: reward: expected shape {tuple(out.shape)} like out, "
            f"got {tuple(reward.shape)}"
        )
    leaves, made = _leaves(out)
    if not made:
        raise ValueError(
            "backward: out: expected the output of a model that ran inside composite.context(model)"
        )
    torch.autograd.grad((out,), leaves, grad_outputs=(reward.detach(),), allow_unused=True)


def _leaves(out: Tensor) -> tuple[list[Tensor], bool]:
    """Leaves of the graph behind ``out``, and whether a layer of a composite is in it."""
    leaves: list[Tensor] = []
    seen: set[Any] = set()
    stack: list[Any] = [out.grad_fn]
    made = False
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        made = made or getattr(node, "uphill", False)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        stack.extend(parent for parent, _ in node.next_functions)
    return leaves, made
