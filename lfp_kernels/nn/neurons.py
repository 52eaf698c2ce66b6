"""Spiking neurons as modules. They run inside :class:`Spiking`, which knows the time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import LIFResult, lif_forward
from ..functional.spiking import RESETS

SURROGATES = (None, "atan", "fast_sigmoid")


class LIF(nn.Module):
    """Leaky integrate-and-fire neurons: ``u_t = beta * u_{t-1} + I_t`` less the reset,
    ``spike_t = u_t > threshold`` (docs/math.md, section 6).

    Args:
        beta: decay per step, in [0, 1]: a number, or a tensor with one value per channel.
        threshold: as beta, positive.
        reset: "subtract" takes the threshold off after a spike, "zero" drops the membrane, "none".
        reset_delay: "subtract" acts in the step after the spike (True) or at once.
        learn_beta, learn_threshold: make it a parameter. Its feedback: ``lif_feedback``.
        surrogate: derivative of the spike under plain autograd, where no rule is at work: None
            (zero: a step function has no other), "atan" or "fast_sigmoid".
    """

    beta: Tensor
    threshold: Tensor

    def __init__(
        self,
        beta: float | Tensor,
        threshold: float | Tensor = 1.0,
        reset: str = "subtract",
        reset_delay: bool = True,
        learn_beta: bool = False,
        learn_threshold: bool = False,
        *,
        surrogate: str | None = None,
    ) -> None:
        super().__init__()
        if reset not in RESETS:
            raise ValueError(f"LIF: reset: expected one of {RESETS}, got {reset!r}")
        if surrogate not in SURROGATES:
            raise ValueError(f"LIF: surrogate: expected one of {SURROGATES}, got {surrogate!r}")
        decay = _values("beta", beta)
        if not bool(((decay >= 0) & (decay <= 1)).all()):
            raise ValueError(f"LIF: beta: expected values in [0, 1], got {beta}")
        limit = _values("threshold", threshold)
        if not bool((limit > 0).all()):
            raise ValueError(f"LIF: threshold: expected positive values, got {threshold}")
        self.reset, self.reset_delay, self.surrogate = reset, reset_delay, surrogate
        for name, value, learn in (
            ("beta", decay, learn_beta),
            ("threshold", limit, learn_threshold),
        ):
            if learn:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def extra_repr(self) -> str:
        def show(t: Tensor) -> str:
            return f"{t.item():g}" if t.numel() == 1 else f"[{t.numel()}]"

        delay = "" if self.reset_delay else ", reset_delay=False"
        return f"beta={show(self.beta)}, threshold={show(self.threshold)}, {self.reset}{delay}"

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError(
            "LIF: forward: a neuron needs time; put the layers into lfp_kernels.nn.Spiking("
            "nn.Sequential(...), steps=T) and call that"
        )

    @property
    def decay(self) -> Tensor:
        """beta as it acts: a learned one is kept in [0, 1]."""
        return self.beta.clamp(0, 1)

    def scan(
        self, current: Tensor, *, steps: int | None = None, state: Tensor | None = None,
        keep: bool = True,
    ) -> LIFResult:  # fmt: skip
        """:func:`lfp_kernels.functional.lif_forward` with this module's neurons."""
        return lif_forward(
            current, self.decay, self.threshold, steps=steps, reset=self.reset,
            reset_delay=self.reset_delay, state=state, keep=keep,
        )  # fmt: skip

    def scan_with_graph(
        self, current: Tensor, *, steps: int | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same step by step in torch operations, for autograd: (spikes [T, N, ...], state)."""
        static = steps is not None
        count = len(current) if steps is None else steps
        like = current if static else current[0]
        shape = (-1, *[1] * (like.dim() - 2)) if self.beta.numel() > 1 else ()
        beta = self.decay.reshape(shape)
        limit = self.threshold.reshape(
            (-1, *[1] * (like.dim() - 2)) if self.threshold.numel() > 1 else ()
        )
        u = torch.zeros_like(like) if state is None else state
        spikes = []
        for t in range(count):
            off = (u > limit).detach()
            if self.reset == "zero":
                u = torch.where(off, torch.zeros_like(u), u)
            charged = beta * u + (current if static else current[t])
            u = torch.where(off, charged - limit, charged) if self.reset == "subtract" else charged
            spike = _Spike.apply(u - limit, self.surrogate)
            spikes.append(spike)
            if self.reset == "subtract" and not self.reset_delay:
                u = torch.where(spike.detach() > 0, charged - limit, charged)
        return torch.stack(spikes), u


class IF(LIF):
    """Integrate-and-fire neurons that do not leak: :class:`LIF` with beta = 1."""

    def __init__(
        self,
        threshold: float | Tensor = 1.0,
        reset: str = "subtract",
        reset_delay: bool = True,
        learn_threshold: bool = False,
        *,
        surrogate: str | None = None,
    ) -> None:
        super().__init__(
            1.0, threshold, reset, reset_delay, False, learn_threshold, surrogate=surrogate
        )


def _values(name: str, value: float | Tensor) -> Tensor:
    if not isinstance(value, (int, float, Tensor)):
        raise TypeError(f"LIF: {name}: expected a number or a tensor, got {type(value).__name__}")
    tensor = torch.as_tensor(value).detach().clone()
    tensor = tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())
    if tensor.dim() > 1 or not tensor.numel():
        raise ValueError(
            f"LIF: {name}: expected a number or shape [C], got shape {tuple(tensor.shape)}"
        )
    return tensor


class _Spike(torch.autograd.Function):
    """``x > 0``; backward the derivative of a smooth stand-in, or none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, surrogate: str | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.surrogate = surrogate
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        (x,) = ctx.saved_tensors
        if ctx.surrogate == "atan":  # of arctan(pi x) / pi
            return grad / (1 + (math.pi * x) ** 2), None
        if ctx.surrogate == "fast_sigmoid":  # of x / (1 + 25 |x|), scaled to 1 at 0
            return grad / (1 + 25 * x.abs()) ** 2, None
        return torch.zeros_like(grad), None
