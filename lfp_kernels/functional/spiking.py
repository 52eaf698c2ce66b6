"""Spiking neurons: scans forward and backward, packed spikes (docs/math.md, section 6)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _validate as check
from .. import ops
from .._no_grad import no_grad
from ..backends import select
from ..ops.spiking.codes import Reset, planes

_ = ops  # registers the schemas
RESETS = ("subtract", "zero", "none")


@dataclass(frozen=True)
class PackedSpikes:
    """Spikes as bits over time: 1/8 of the memory of bytes, 1/32 of that of floats.

    Attributes:
        bits: uint8 [ceil(T / 8), N, ...]; bit ``t % 8`` of ``bits[t // 8]`` is the spike at step t.
        steps: T.
    """

    bits: Tensor
    steps: int

    @property
    def shape(self) -> torch.Size:
        """[T, N, ...], the shape of the unpacked spikes."""
        return torch.Size((self.steps, *self.bits.shape[1:]))

    @no_grad
    def unpack(
        self, dtype: torch.dtype = torch.float32, *, noise: float = 0.0, seed: int = 0,
        first: int = 0,
    ) -> Tensor:  # fmt: skip
        """Spikes [T, N, ...] as 0 and 1, with Gaussian noise of standard deviation ``noise`` added.

        The noise is a function of ``seed`` and of the element's index alone, with ``first`` the
        time step at which these spikes begin: the same whatever the chunks and the thread count.
        """
        flat = _rows(self.bits)
        backend = select("spiking", self.bits, dtype=dtype)
        spikes = backend.unpack(flat, self.steps, dtype, noise, seed, first)
        return _shaped(spikes, self.bits)

    def flatten(self) -> PackedSpikes:
        """All dimensions behind N as one, in row-major order."""
        return PackedSpikes(self.bits.flatten(2), self.steps)

    def density(self) -> float:
        """Share of spikes among all neurons and steps."""
        ones = int(select("spike_events", self.bits, dtype=torch.float32).spike_count(self.bits))
        return ones / max(1, math.prod(self.shape))


class LIFResult(NamedTuple):
    """Spikes [T, N, ...] packed; membrane potentials [T, N, ...] (None with ``keep=False``) as
    :func:`lif_feedback` reads them; membrane after the last step [N, ...]."""

    spikes: PackedSpikes
    membrane: Tensor | None
    state: Tensor


class LIFFeedback(NamedTuple):
    """``signal`` [T, N, ...] (or its sum over time [N, ...]); ``carry`` [N, ...], the reward that
    flows on to the time before the first step; feedback of ``beta`` and ``threshold``, shaped like
    them, or None."""

    signal: Tensor
    carry: Tensor
    beta: Tensor | None
    threshold: Tensor | None


@no_grad
def lif_forward(
    current: Tensor,
    beta: Tensor | float,
    threshold: Tensor | float = 1.0,
    *,
    steps: int | None = None,
    reset: str = "subtract",
    reset_delay: bool = True,
    state: Tensor | None = None,
    keep: bool = True,
) -> LIFResult:
    """Leaky integrate-and-fire neurons over all time steps in one pass.

    ``u_t = beta * u_{t-1} + I_t``, less the reset; ``spike_t = u_t > threshold``. By ``reset``:
    "subtract" takes the threshold off in the step after a spike, or with ``reset_delay=False`` at
    once; "zero" drops what is left of the membrane (either way: the spikes are the same); "none".

    Args:
        current: I [T, N, ...]; with ``steps`` a constant current [N, ...].
        beta: decay per step, in [0, 1]: a number or a tensor of 1 or C (dimension after N) values.
        threshold: as beta. state: membrane before the first step [N, ...]; None: at rest.
        keep: False drops the membranes (inference).

    Returns:
        LIFResult. ``membrane`` is the stored potential: after the reset at once, before any other.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or range.
    """
    op = "lif_forward"
    check.floating(op, "current", current)
    moving = current[None] if steps is not None else current
    steps = _check_steps(op, steps, current)
    if moving.dim() < 2:
        raise ValueError(f"{op}: current: expected shape [T, N, ...], got {tuple(current.shape)}")
    code = reset_code(op, reset, reset_delay)
    like = moving[0]
    flat = _rows(moving)
    values = [_parameter(op, n, v, like) for n, v in (("beta", beta), ("threshold", threshold))]
    bits, membrane, last = select("spiking", current).forward(
        flat, _state(op, "state", state, moving, moving), *values,
        _inner(moving), steps, code, keep,
    )  # fmt: skip
    return LIFResult(
        PackedSpikes(_shaped(bits, moving), steps),
        _shaped(membrane, moving) if keep else None,
        _shaped(last[None], moving)[0],
    )


@no_grad
def lif_feedback(
    reward: Tensor,
    membrane: Tensor,
    spikes: PackedSpikes,
    beta: Tensor | float,
    threshold: Tensor | float = 1.0,
    *,
    eps: float = 1e-6,
    reset: str = "subtract",
    reset_delay: bool = True,
    state: Tensor | None = None,
    carry: Tensor | None = None,
    sum_steps: bool = False,
    as_reward: bool = False,
    need_parameters: bool = False,
) -> LIFFeedback:
    """Rewards of spikes, scanned backwards over time into the signals of the neurons' currents.

    With p_t the membrane that entered step t and v_t the charged one (docs/math.md, section 6)::

        n_t = (r_t + M) / (|p_t| + |v_t - p_t| + eps);   M = beta * p_t * n_t

    The denominator is absolute: a positive reward always means "fire more". A layer that made the
    currents takes n as its signal (``signal_in=True``).

    Args:
        reward: r [T, N, ...]. membrane, spikes, state, beta, threshold, reset, reset_delay: of
            :func:`lif_forward`. carry: M of the step after the last one [N, ...]; None: 0.
        sum_steps: return the sum of n over time: all that a constant current's layer needs.
        as_reward: return ``I_t * n_t``, the reward of the current itself.
        need_parameters: also the feedback of beta, ``|beta| * sum p_t n_t``, and of the threshold,
            a bias of minus one (and one more where it is taken off): ``-|threshold| * sum n_t``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or range.
    """
    op = "lif_feedback"
    check.floating(op, "membrane", membrane)
    if membrane.dim() < 2:
        raise ValueError(f"{op}: membrane: expected shape [T, N, ...], got {tuple(membrane.shape)}")
    check.like(op, "reward", reward, membrane, "membrane")
    check.shape(op, "reward", reward, membrane.shape)
    if not isinstance(spikes, PackedSpikes):
        raise TypeError(
            f"{op}: spikes: expected the PackedSpikes of lif_forward, got {type(spikes).__name__}"
        )
    check.shape(op, "spikes", spikes.bits, (planes(len(membrane)), *membrane.shape[1:]))
    if not eps > 0:
        raise ValueError(f"{op}: eps: expected a positive number, got {eps}")
    code = reset_code(op, reset, reset_delay)
    return finish_feedback(
        select("spiking", membrane), op, membrane, membrane, beta, threshold, need_parameters,
        sum_steps,
        lambda backend, values, inner, of: backend.feedback(
            rows_like(reward, membrane), _rows(membrane), rows_like(spikes.bits, membrane),
            of("state", state), of("carry", carry), *values, inner, eps, code, sum_steps,
            as_reward, need_parameters,
        ),
    )  # fmt: skip


def finish_feedback(
    backend: Any,
    op: str,
    source: Tensor,
    like: Tensor,
    beta: Tensor | float,
    threshold: Tensor | float,
    need_parameters: bool,
    sum_steps: bool,
    call: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]],
) -> LIFFeedback:
    """The result of ``call(backend, [beta, threshold], inner, of)`` in the dtype of ``source``
    [any, N, ...] and the memory order of ``like``; ``of(name, value)`` makes rows of a state."""
    pairs = (("beta", beta), ("threshold", threshold))
    values = [_parameter(op, name, value, source[0]) for name, value in pairs]
    inner = _inner(like)

    def of(name: str, value: Tensor | None) -> Any:
        return _state(op, name, value, source, like)

    signal, carried, *sums = call(backend, values, inner, of)
    found = [
        _feedback_of(value, s, inner, given) if need_parameters else None
        for value, s, given in zip(values, sums, (beta, threshold))
    ]
    signal = _shaped(signal, like)
    return LIFFeedback(signal[0] if sum_steps else signal, _shaped(carried[None], like)[0], *found)


@no_grad
def add_noise(x: Tensor, noise: float, seed: int, *, steps: int, first: int = 0) -> Tensor:
    """``x`` [T, N, ...], or [1, N, ...] for every one of ``steps`` steps, plus Gaussian noise of
    standard deviation ``noise``: see :meth:`PackedSpikes.unpack`."""
    check.floating("add_noise", "x", x)
    if x.dim() < 2 or x.shape[0] not in (1, steps):
        raise ValueError(
            f"add_noise: x: expected shape [{steps}, N, ...] or [1, N, ...], got {tuple(x.shape)}"
        )
    return _shaped(select("spiking", x).add_noise(_rows(x), steps, noise, seed, first), x)


def reset_code(op: str, reset: str, reset_delay: bool) -> Reset:
    """The code of a reset, or a ValueError that names the choices."""
    if reset not in RESETS:
        raise ValueError(f"{op}: reset: expected one of {RESETS}, got {reset!r}")
    if reset == "subtract":
        return Reset.SUBTRACT if reset_delay else Reset.SUBTRACT_AT_ONCE
    return Reset.ZERO if reset == "zero" else Reset.NONE


def _check_steps(op: str, steps: Any, current: Tensor) -> int:
    if steps is None:
        steps = current.shape[0] if current.dim() else 0
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{op}: steps: expected at least one time step, got {steps!r}")
    return steps


def _parameter(op: str, name: str, value: Tensor | float, like: Tensor) -> Tensor:
    """beta or threshold as a flat tensor of 1 or C values; ``like`` is [N, C, ...]."""
    if not isinstance(value, Tensor):
        return torch.full((1,), float(value), dtype=like.dtype, device=like.device)
    check.like(op, name, value, like, "the current")
    channels = like.shape[1] if like.dim() > 1 else 1
    if value.numel() != 1 and value.shape != (channels,):
        raise ValueError(
            f"{op}: {name}: expected one value or shape ({channels},), got {tuple(value.shape)}"
        )
    return value.detach().reshape(-1)


def _feedback_of(value: Tensor, sums: Tensor, inner: int, given: Tensor | float) -> Tensor:
    """|parameter| times the neurons' sums, summed over the neurons that share an entry."""
    if value.numel() > 1:
        sums = sums.view(-1, value.numel(), inner).sum((0, 2))
    else:
        sums = sums.sum().reshape(1)
    return (value.abs() * sums).reshape(given.shape if isinstance(given, Tensor) else ())


def _state(op: str, name: str, value: Tensor | None, source: Tensor, like: Tensor) -> Any:
    """A membrane or carry [N, ...] like ``source`` [any, N, ...], in memory as ``like``."""
    if value is None:
        return None
    check.like(op, name, value, source, "the membrane")
    check.shape(op, name, value, source.shape[1:])
    return rows_like(value[None], like)[0]


# Neurons in memory order: [T, N, ...] as [T, M] without a copy where each step is dense.


def _channels_last(t: Tensor) -> bool:
    """Channels, the dimension after N, are the innermost in memory."""
    return t.dim() > 3 and not t.is_contiguous() and t.movedim(2, -1).is_contiguous()


def _inner(t: Tensor) -> int:
    return 1 if _channels_last(t) else math.prod(t.shape[3:])


def _rows(t: Tensor) -> Tensor:
    return rows_like(t, t)


def rows_like(t: Tensor, like: Tensor) -> Tensor:
    """``t`` [any, N, ...] as rows [any, M] in the memory order of ``like``."""
    if _channels_last(like):
        t = t.movedim(2, -1)
    return t.reshape(t.shape[0], -1) if t.numel() else t.reshape(t.shape[0], 0)


def _shaped(rows: Tensor, like: Tensor) -> Tensor:
    """``rows`` [any, M] back in the shape and memory order of ``like`` [T, N, ...]."""
    if _channels_last(like):
        return rows.view(len(rows), *like.movedim(2, -1).shape[1:]).movedim(-1, 2)
    return rows.view(len(rows), *like.shape[1:])
