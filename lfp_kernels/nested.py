"""LFP-epsilon as nested autograd calls: the algorithm as the official package lfprop 1.0.0 runs it.

One autograd.Function per layer keeps the layer's own graph; its backward asks autograd three times
(input, weight, bias) for products with ``r / stab(z)``. Written from the formulas of docs/math.md
alone, so it serves as an oracle for whole networks and as the step that benchmarks compare with;
nothing here is tuned.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .nn import Step, Sum

Reward = Callable[[Tensor, Tensor], Tensor]

EPSILON_LAYERS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm),
    Sum,
)
IDENTITY_LAYERS: tuple[type[nn.Module], ...] = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU),
    *(nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish),
    *(nn.Softplus, nn.Softsign, nn.LogSigmoid),
    Step,
)


def softmax_reward(out: Tensor, labels: Tensor) -> Tensor:
    """``out * (one_hot(labels) - softmax(out))`` [N, C] (docs/math.md, section 5)."""
    one_hot = F.one_hot(labels, out.shape[-1]).to(out.dtype)
    return out * (one_hot - out.softmax(-1))


def _stabilize(z: Tensor, eps: float) -> Tensor:
    """``z + eps * sgn(z)``, one torch op after the other."""
    sign = (z == 0).to(z.dtype) + z.sign()
    return z + sign * eps


class _EpsilonRedistribution(torch.autograd.Function):
    """forward: the layer on detached inputs; backward: one autograd.grad call per result."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Module, eps: float, *inputs: Tensor) -> Tensor:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in inputs]
            z = type(layer).forward(layer, *leaves)
        ctx.layer, ctx.eps = layer, eps
        ctx.save_for_backward(z, *leaves)
        return z.detach()

    @staticmethod
    def backward(ctx: Any, reward: Tensor) -> Any:  # type: ignore[override]
        z, *inputs = ctx.saved_tensors
        with torch.no_grad():
            signal = reward / _stabilize(z, ctx.eps)
        found = torch.autograd.grad(z, inputs, signal, retain_graph=True)
        with torch.no_grad():
            if len(found) == 1:
                rewards = [found[0].mul_(inputs[0])]
            else:  # the operands of a sum get one and the same tensor
                rewards = [g * x for g, x in zip(found, inputs)]
        for parameter in ctx.layer.parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            (g,) = torch.autograd.grad(z, (parameter,), signal, retain_graph=True)
            feedback = parameter.detach().abs().mul_(g)
            before = getattr(parameter, "feedback", None)
            parameter.feedback = feedback if before is None else before + feedback  # type: ignore[attr-defined]
        return None, None, *rewards


class _Identity(torch.autograd.Function):
    """forward: the activation; backward: the reward as it is."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Module, x: Tensor) -> Tensor:
        return type(layer).forward(layer, x)

    @staticmethod
    def backward(ctx: Any, reward: Tensor) -> Any:  # type: ignore[override]
        return None, reward


class NestedReference:
    """Train ``model`` by LFP-epsilon with nested autograd calls.

    Layers: linear, convolution (1-3d, transposed), norms, average pools and
    ``lfp_kernels.nn.Sum`` follow the epsilon rule; activations and ``lfp_kernels.nn.Step`` pass the
    reward on; every other module (max pool, flatten, dropout) acts as in plain autograd. Functional
    calls inside ``forward`` are not caught: they act as in plain autograd too.

    Args:
        model: left as it was at the end of every :meth:`context`.
        eps: stabilizer of every denominator, > 0.
    """

    def __init__(self, model: nn.Module, eps: float = 1e-6) -> None:
        if not eps > 0:
            raise ValueError(f"NestedReference: eps: expected a number > 0, got {eps}")
        self.model = model
        self.eps = eps

    @contextlib.contextmanager
    def context(self) -> Iterator[nn.Module]:
        """Inside the block the model's layers redistribute reward where autograd would
        differentiate."""
        replaced: list[tuple[Any, bool | None]] = []  # layer, its inplace flag
        try:
            for layer in self.model.modules():
                if isinstance(layer, EPSILON_LAYERS):
                    run: Any = partial(_EpsilonRedistribution.apply, layer, self.eps)
                elif isinstance(layer, IDENTITY_LAYERS):
                    run = partial(_Identity.apply, layer)
                else:
                    continue
                if "forward" in vars(layer):
                    raise ValueError(
                        f"NestedReference: {type(layer).__name__} has its own forward already "
                        "(is another composite attached?); detach that first"
                    )
                replaced.append((layer, vars(layer).get("inplace")))
                vars(layer).update(forward=run)
                if hasattr(layer, "inplace"):
                    vars(layer).update(inplace=False)
            yield self.model
        finally:
            for layer, inplace in replaced:
                del layer.forward
                if inplace is not None:
                    layer.inplace = inplace

    def redistribute(
        self, x: Tensor, labels: Tensor, reward: Reward = softmax_reward
    ) -> tuple[Tensor, Tensor]:
        """Set ``.feedback`` (uphill, summed over the batch) on every parameter; call it inside
        :meth:`context`.

        Args:
            x: model input, floating point. labels: second argument of ``reward(out, labels)``.

        Returns:
            (model output, reward at the input, shaped like x)
        """
        for parameter in self.model.parameters():
            parameter.feedback = None  # type: ignore[attr-defined]
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            out = self.model(x)
        (input_reward,) = torch.autograd.grad(out, x, reward(out.detach(), labels))
        return out.detach(), input_reward

    def step(
        self,
        x: Tensor,
        labels: Tensor,
        optimizer: torch.optim.Optimizer,
        reward: Reward = softmax_reward,
    ) -> Tensor:
        """One training step inside :meth:`context`: ``.grad = -.feedback``, ``optimizer.step()``.

        Returns:
            The model output before the update.
        """
        out, _ = self.redistribute(x, labels, reward)
        for parameter in self.model.parameters():
            feedback = parameter.feedback  # type: ignore[attr-defined]
            parameter.grad = None if feedback is None else -feedback
        optimizer.step()
        return out
