"""Leaky integrate-and-fire neurons that step: one call, one time step.

The part of ``snntorch.Leaky`` that lfprop's networks use, under its names, so that they need no
snntorch. Layers over all time steps: :class:`lfp_kernels.nn.Spiking`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ....functional.spiking import RESETS
from ....nn.neurons import _Spike
from .activations import Step


class Surrogate:
    """``x > 0 ? 1 : 0``, backward the derivative of a smooth stand-in (None: zero)."""

    def __init__(self, surrogate: str | None) -> None:
        self.surrogate = surrogate

    def __call__(self, x: Tensor) -> Tensor:
        return _Spike.apply(x, self.surrogate)


# What makes the function that fires, by name.
SPIKE_GRAD_MAP: dict[str, Callable[[], Any]] = {
    "step": Step,
    "atan": partial(Surrogate, "atan"),
    "fast_sigmoid": partial(Surrogate, "fast_sigmoid"),
}


class Leaky(nn.Module):
    """``mem = beta * mem + input`` less the reset; ``spk = mem > threshold``.

    Args:
        beta, threshold: numbers or tensors that broadcast against the input; beta acts in [0, 1].
        spike_grad: function that fires (``SPIKE_GRAD_MAP``); None: with the surrogate "atan".
        surrogate_disable: fire without a derivative.
        init_hidden: return the spikes alone. output: return (spikes, membrane) even so.
        learn_beta, learn_threshold: make it a parameter.
        reset_mechanism: "subtract", "zero" or "none".
        reset_delay: reset in the step after the spike (True) or at once.
        inhibition, state_quant, graded_spikes_factor, learn_graded_spikes_factor: must keep their
            defaults.
    """

    mem: Tensor
    beta: Tensor
    threshold: Tensor

    def __init__(
        self,
        beta: float | Tensor,
        threshold: float | Tensor = 1.0,
        spike_grad: Callable[[Tensor], Tensor] | None = None,
        surrogate_disable: bool = False,
        init_hidden: bool = False,
        inhibition: bool = False,
        learn_beta: bool = False,
        learn_threshold: bool = False,
        reset_mechanism: str = "subtract",
        state_quant: Any = False,
        output: bool = False,
        graded_spikes_factor: float = 1.0,
        learn_graded_spikes_factor: bool = False,
        reset_delay: bool = True,
    ) -> None:
        super().__init__()
        for name, value, expected in (
            ("inhibition", inhibition, False),
            ("state_quant", state_quant, False),
            ("graded_spikes_factor", graded_spikes_factor, 1.0),
            ("learn_graded_spikes_factor", learn_graded_spikes_factor, False),
        ):
            if value != expected:
                raise ValueError(f"Leaky: {name}: expected {expected}, got {value!r}; leave it out")
        if reset_mechanism not in RESETS:
            raise ValueError(
                f"Leaky: reset_mechanism: expected one of {RESETS}, got {reset_mechanism!r}"
            )
        if surrogate_disable:
            spike_grad = Surrogate(None)
        self.spike_grad = Surrogate("atan") if spike_grad is None else spike_grad
        self.init_hidden, self.output = init_hidden, output
        self.reset_mechanism, self.reset_delay = reset_mechanism, reset_delay
        # The order of snntorch's state_dict.
        self._keep("threshold", threshold, learn_threshold)
        self._keep("graded_spikes_factor", 1.0, False)
        self.register_buffer("reset_mechanism_val", torch.tensor(RESETS.index(reset_mechanism)))
        self._keep("beta", beta, learn_beta)
        self.register_buffer("mem", torch.zeros(0), persistent=False)

    def _keep(self, name: str, value: float | Tensor, learn: bool) -> None:
        tensor = torch.as_tensor(value, dtype=None if torch.is_tensor(value) else torch.float32)
        if learn:
            self.register_parameter(name, nn.Parameter(tensor.detach().clone()))
        else:
            self.register_buffer(name, tensor)

    def reset_mem(self) -> Tensor:
        """Neurons at rest, cut off from the past."""
        self.mem = torch.zeros_like(self.mem)
        return self.mem

    def forward(self, input_: Tensor, mem: Tensor | None = None) -> Any:
        if mem is not None:
            if self.init_hidden:
                raise TypeError("Leaky: mem: expected None, as init_hidden=True keeps the membrane")
            self.mem = mem
        state = self.mem if self.mem.shape == input_.shape else torch.zeros_like(input_)
        reset = self.spike_grad(state - self.threshold).detach()
        if self.reset_mechanism == "zero":
            state = (1 - reset) * state
        charged = self.beta.clamp(0, 1) * state + input_
        if self.reset_mechanism == "subtract":
            charged = charged - reset * self.threshold
        spikes = self.spike_grad(charged - self.threshold)
        if not self.reset_delay:
            now = spikes - reset  # what the reset of the last step did not take already
            if self.reset_mechanism == "subtract":
                charged = charged - now * self.threshold
            elif self.reset_mechanism == "zero":
                charged = charged - now * charged
        self.mem = charged
        return (spikes, charged) if self.output or not self.init_hidden else spikes
