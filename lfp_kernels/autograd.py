"""Layers as autograd functions: forward as usual, backward = redistribution instead of derivative.

What flows backwards is the negative reward, so that a ``.grad`` is the negative feedback and every
optimizer that descends strengthens what was rewarded. Everything is linear in it.

Activations are saved as ``.data`` aliases: :mod:`lfp_kernels.capture` turns in-place operations
into a change of storage, so an alias keeps the values that the layer saw. Parameters are saved as
themselves, so that torch notices an update between forward and backward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import functional as F
from .rules import Rule

if TYPE_CHECKING:
    from .composites.attach import LayerRule


def _kept(rule: Rule, x: Tensor, weight: Tensor, bias: Any, z: Tensor, matrix: Any) -> tuple:
    """What backward reads; None where the rule does not."""
    return x.data, weight, bias, z.data if rule.reads_output else None, matrix


def _layer_backward(ctx: Any, reward: Tensor, redistribute: Any) -> tuple:
    """(input reward, weight feedback, bias feedback, gradient of the feedback matrix)"""
    x, weight, bias, z, matrix = ctx.saved_tensors
    need = ctx.needs_input_grad[:3]
    layer: LayerRule = ctx.layer
    teacher = layer.teacher if need[0] else None
    found = redistribute(
        x, weight, bias, reward if z is None else z, reward,
        need=(need[0] and teacher is None, *need[1:]), matrix=matrix, product_dtype=ctx.product,
    )  # fmt: skip
    first = found.input if teacher is None else teacher(reward, x)
    # A learned feedback matrix takes the same step as the weight (Kolen-Pollack).
    learned = found.weight if ctx.needs_input_grad[3] else None
    return first, found.weight, found.bias, learned


class LinearReward(torch.autograd.Function):
    """``x W^T + b`` by the rule."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        matrix: Tensor | None,
        layer: LayerRule,
        product: Any,
    ):
        z = F.linear(x, weight, bias)
        ctx.save_for_backward(*_kept(layer.rule, x, weight, bias, z, matrix))
        ctx.layer, ctx.product = layer, product
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, reward: Tensor):
        def redistribute(x: Tensor, weight: Any, bias: Any, z: Tensor, r: Tensor, **options: Any):
            return F.linear_redistribute(x, weight, bias, z, r, ctx.layer.rule, **options)

        return *_layer_backward(ctx, reward, redistribute), None, None


class ConvReward(torch.autograd.Function):
    """Convolution, transposed convolution included, by the rule."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        matrix: Tensor | None,
        geometry: F.ConvGeometry,
        layer: LayerRule,
        product: Any,
    ):
        z = F.conv(x, weight, bias, geometry)
        ctx.save_for_backward(*_kept(layer.rule, x, weight, bias, z, matrix))
        ctx.geometry, ctx.layer, ctx.product = geometry, layer, product
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, reward: Tensor):
        def redistribute(x: Tensor, weight: Any, bias: Any, z: Tensor, r: Tensor, **options: Any):
            return F.conv_redistribute(
                x, weight, bias, z, r, ctx.geometry, ctx.layer.rule, **options
            )

        return *_layer_backward(ctx, reward, redistribute), None, None, None


class BatchNormReward(torch.autograd.Function):
    """Batch normalisation by the rule; running statistics are updated once, in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        rule: Rule,
    ):
        z, mean, invstd = F.batch_norm(
            x, weight, bias, running_mean, running_var, training, momentum, eps
        )
        ctx.save_for_backward(x.data, weight, bias, z.data, mean, invstd)
        ctx.training, ctx.rule = training, rule
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, reward: Tensor):
        x, weight, bias, z, mean, invstd = ctx.saved_tensors
        feedback = F.batch_norm_redistribute(
            x, weight, bias, z, reward, mean, invstd, ctx.training, ctx.rule,
            need=ctx.needs_input_grad[:3],
        )  # fmt: skip
        return *feedback, None, None, None, None, None, None


class AvgPoolReward(torch.autograd.Function):
    """Average pooling by the rule. ``settings`` are the arguments after ``x`` of F.avg_pool."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: tuple, rule: Rule):
        z = F.avg_pool(x, *settings)
        ctx.save_for_backward(x.data, z.data)
        ctx.settings, ctx.rule = settings, rule
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, reward: Tensor):
        x, z = ctx.saved_tensors
        settings: tuple[Any, Any, Any, bool, bool, Any] = ctx.settings
        return F.avg_pool_redistribute(x, z, reward, *settings, rule=ctx.rule), None, None


class AdaptiveAvgPoolReward(torch.autograd.Function):
    """Adaptive average pooling by the rule. ``pool`` is the torch function, output size bound."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pool: Any, rule: Rule):
        z = pool(x)
        ctx.save_for_backward(x.data, z.data)
        ctx.rule = rule
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, reward: Tensor):
        x, z = ctx.saved_tensors
        return F.adaptive_avg_pool_redistribute(x, z, reward, ctx.rule), None, None


class MaxPoolReward(torch.autograd.Function):
    """Max pooling: the winner takes all, the first index on ties."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: tuple):
        ctx.batched = x.dim() == len(settings[0]) + 2
        batch = x if ctx.batched else x.unsqueeze(0)
        z, winner = F.max_pool(batch, *settings)
        ctx.save_for_backward(winner)
        ctx.shape = batch.shape
        return z if ctx.batched else z.squeeze(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, reward: Tensor):
        (winner,) = ctx.saved_tensors
        if ctx.batched:
            return F.max_pool_redistribute(reward, winner, ctx.shape), None
        return F.max_pool_redistribute(reward.unsqueeze(0), winner, ctx.shape).squeeze(0), None


class ParameterReward(torch.autograd.Function):
    """A parameter where an activation may stand (a position, a class token): the feedback of what
    got relevance r is ``sign(w) * r``, as a bias of ``w`` would get it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor):
        ctx.save_for_backward(weight)
        return weight.data.view_as(weight)  # no part of a parameter any more

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, reward: Tensor):
        (weight,) = ctx.saved_tensors
        return reward * weight.sign()


def learned(value: Any) -> bool:
    """A parameter or a part of one (the first rows of a table of positions)."""
    parameter = torch.nn.Parameter
    return isinstance(value, parameter) or isinstance(getattr(value, "_base", None), parameter)


def owned(value: Any) -> Any:
    """A trainable parameter as an activation that signs its feedback; so in a list of tensors.
    Everything else is returned as it is."""
    if isinstance(value, (list, tuple)) and any(learned(v) for v in value):
        return type(value)([owned(v) for v in value])
    return ParameterReward.apply(value) if learned(value) and value.requires_grad else value


def relevant(weight: Any) -> Any:
    """A weight or bias of a layer, which signs its feedback. Where the weight was computed (scaled,
    masked, converted, joined), relevance flows on, and is signed at the parameters it came from."""
    if not isinstance(weight, Tensor) or weight.grad_fn is None or learned(weight):
        return weight
    nodes, seen = [weight.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if type(node).__name__.endswith("RewardBackward"):  # relevance arrives there
            return ParameterReward.apply(weight)
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            continue  # a function of others (compat's Deposit) knows what it takes
        nodes += [n for n, _ in node.next_functions if n is not None and n not in seen]
    return weight  # computed outside of forward, or by functions that take feedback


class SumReward(torch.autograd.Function):
    """``a + b`` by the rule: each operand takes the share it contributed."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, rule: Rule, in_place: bool):
        ctx.save_for_backward(a.data, b.data)
        ctx.rule = rule
        if in_place:
            return _replace(ctx, a, a + b)
        return a + b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, reward: Tensor):
        a, b = ctx.saved_tensors
        first, second = F.sum_redistribute(a, b, reward, ctx.rule)
        need = ctx.needs_input_grad
        return first if need[0] else None, second if need[1] else None, None, None


class IdentityReward(torch.autograd.Function):
    """Activations: any elementwise function forward, the reward unchanged backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Any, in_place: bool):
        y = function(x.data)
        return _replace(ctx, x, y) if in_place else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, reward: Tensor):
        return reward, None, None


class LinearMapReward(torch.autograd.Function):
    """A linear function without parameters (mean, sum, ...) by the rule, by its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Any, rule: Rule):
        z = function(x.data)
        ctx.save_for_backward(x.data, z.data)
        ctx.function, ctx.rule = function, rule
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, reward: Tensor):
        x, z = ctx.saved_tensors
        s = ctx.rule.prologue(reward, z)
        with torch.enable_grad():
            probe = x.detach().requires_grad_()
            (g,) = torch.autograd.grad(ctx.function(probe), probe, s)
        return ctx.rule.input_epilogue(g, x), None, None


class DropoutReward(torch.autograd.Function):
    """Dropout whose reward is multiplied by the mask alone (conserving)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float):
        y, mask = F.dropout(x, p)
        ctx.save_for_backward(mask)
        ctx.p = p
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, reward: Tensor):
        (mask,) = ctx.saved_tensors
        return F.dropout_redistribute(reward, mask, ctx.p, conserving=True), None


class SpikingReward(torch.autograd.Function):
    """A spiking network as one function: its rewards are scanned backwards over time.

    ``stage`` is the one of the fused way (fused/spiking.py); here its feedback becomes ``.grad``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, stage: Any, *parameters: Tensor):
        ctx.stage, ctx.parameters = stage, parameters
        ctx.wants_input = stage.wants_input
        ctx.run, out = stage.forward_alone(x)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *rewards: Any):
        ctx.stage.wants_input = ctx.wants_input
        first, feedback = ctx.stage.redistribute_alone(ctx.run, rewards[0])
        return first, None, *(feedback.get(id(p)) for p in ctx.parameters)


def _replace(ctx: Any, target: Tensor, value: Tensor) -> Tensor:
    """What an in-place operation does to ``target``, in new storage: saved aliases keep the old."""
    target.data = value
    ctx.mark_dirty(target)
    return target
