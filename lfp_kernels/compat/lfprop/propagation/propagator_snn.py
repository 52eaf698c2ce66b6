"""The rule of spiking layers that step, under lfprop's names.

One call of a layer is one time step. The membrane that a step leaves enters the next one as a
tensor of the graph, and what a step passes on to the steps before it flows back along it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ....functional import lif_feedback, lif_forward
from ....nn.snntorch import leaky_settings
from ..model.spiking_networks import SpikingLayer
from .feedback import Deposit
from .propagator_lxt import ParameterizableComposite, RuleGenerator, _Rule

__all__ = ["LFPEpsilonSNN", "LFPSNNEpsilonComposite", "SpikingLayer"]


class LFPEpsilonSNN(_Rule):
    """LFP-epsilon of one spiking layer (docs/math.md, section 6).

    Args:
        module: a :class:`SpikingLayer`. epsilon: stabilizer, > 0. inplace: without effect.

    Raises:
        TypeError, ValueError: the module is no SpikingLayer, or its neurons are not Leaky.
    """

    whole = True
    module: Any

    def __init__(self, module: nn.Module, epsilon: float = 1e-6, inplace: bool = True) -> None:
        super().__init__(module)
        if not isinstance(module, SpikingLayer):
            raise TypeError(
                f"LFPEpsilonSNN: module: expected a SpikingLayer, got {type(module).__name__}"
            )
        neuron: Any = module.spike_mechanism
        self.reset, self.reset_delay = leaky_settings(
            "LFPEpsilonSNN: module.spike_mechanism", neuron
        )
        self.epsilon, self.inplace = epsilon, inplace
        neuron.mem = neuron.mem.detach()  # what came before is no part of this pass

    def forward(self, x: Tensor) -> Any:
        layer, neuron = self.module.parameterized_layer, self.module.spike_mechanism
        parameters = [*layer.parameters(), neuron.beta, neuron.threshold]
        trained = [p for p in parameters if p.requires_grad]
        if not torch.is_grad_enabled() or not (x.requires_grad or trained):
            return self.run(x)
        known = [x, *trained] if x.requires_grad else trained
        aliases = Deposit.apply(type(layer).__name__, *known)
        if x.requires_grad:
            x, *aliases = aliases
        spikes, neuron.mem = _Step.apply(self, trained, x, neuron.mem, *aliases)
        return (spikes, neuron.mem) if neuron.output or not neuron.init_hidden else spikes


class _Step(torch.autograd.Function):
    """(spikes, membrane) of one step. A reward of the membrane adds to that of the spikes."""

    @staticmethod
    def forward(
        ctx: Any, rule: Any, trained: list[Tensor], x: Tensor, membrane: Tensor, *aliases: Tensor
    ):
        neuron = rule.module.spike_mechanism
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(x.requires_grad)
            current = rule.module.parameterized_layer(leaf)
        drive = current.detach()
        options = {
            "reset": rule.reset,
            "reset_delay": rule.reset_delay,
            "state": membrane.detach() if membrane.shape == drive.shape else None,
        }
        values = (
            _per_channel("beta", neuron.beta.detach().clamp(0, 1), drive),
            _per_channel("threshold", neuron.threshold.detach(), drive),
        )
        found = lif_forward(drive[None], *values, **options)
        ctx.set_materialize_grads(False)
        ctx.rule, ctx.trained, ctx.leaf, ctx.current = rule, trained, leaf, current
        ctx.membrane, ctx.spikes, ctx.values, ctx.options = (
            found.membrane, found.spikes, values, options
        )  # fmt: skip
        return found.spikes.unpack(drive.dtype)[0], found.state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *rewards: Tensor | None):
        rule, neuron = ctx.rule, ctx.rule.module.spike_mechanism
        neuron.mem = neuron.mem.detach()  # the pass is over: a step from here on begins the next
        given = [r for r in rewards if r is not None]
        if not given:
            return (None,) * len(ctx.needs_input_grad)
        own = {id(neuron.beta): "beta", id(neuron.threshold): "threshold"}
        found = lif_feedback(
            sum(given[1:], given[0])[None], ctx.membrane, ctx.spikes, *ctx.values, **ctx.options,
            eps=rule.epsilon, need_parameters=any(id(p) in own for p in ctx.trained),
        )  # fmt: skip
        inside = [p for p in ctx.trained if id(p) not in own]
        wanted = [*inside, ctx.leaf] if ctx.leaf.requires_grad else inside
        slopes: Any = ()
        if wanted:
            slopes = torch.autograd.grad(
                ctx.current, wanted, found.signal[0], retain_graph=True, allow_unused=True
            )
        by_parameter: dict[int, Tensor | None] = {
            id(p): None if g is None else g * p.detach().abs() for p, g in zip(inside, slopes)
        }
        for p in ctx.trained:
            if id(p) in own:
                by_parameter[id(p)] = getattr(found, own[id(p)]).reshape(p.shape).to(p.dtype)
        first = slopes[-1] * ctx.leaf.detach() if ctx.leaf.requires_grad else None
        return None, None, first, found.carry, *(by_parameter[id(p)] for p in ctx.trained)


def _per_channel(name: str, value: Tensor, current: Tensor) -> Tensor:
    """One value, or [C] of a value that broadcasts against ``current`` [N, C, ...]."""
    value = value.to(current.dtype)
    if value.numel() == 1:
        return value.reshape(1)
    own = value[0] if value.dim() == current.dim() and value.shape[0] == 1 else value
    if own.dim() != current.dim() - 1 or own.numel() != own.shape[0]:
        raise ValueError(
            f"LFPEpsilonSNN: {name}: expected one value, or one per channel that broadcasts "
            f"against a current of shape {tuple(current.shape)}, got shape {tuple(value.shape)}"
        )
    return own.reshape(-1)


class LFPSNNEpsilonComposite(ParameterizableComposite):
    """LFP-epsilon for every :class:`SpikingLayer`; what lies between them is plain autograd's.

    Args:
        epsilon: stabilizer of every denominator.
    """

    def __init__(self, epsilon: float = 1e-6) -> None:
        super().__init__({SpikingLayer: RuleGenerator(LFPEpsilonSNN, epsilon=epsilon)})
