"""Products and pooling of packed spikes that touch only what neurons that fired touch (CPU).

Callers ask ``has_...`` first, and use the dense layers on unpacked spikes where the answer is no.
Signals and results have time in front: [T, N, ...].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _validate as check
from .. import ops
from .._no_grad import no_grad
from ..backends import select, selected
from ..ops.conv.geometry import ConvGeometry
from .composed import Redistributed
from .spiking import LIFFeedback, PackedSpikes, finish_feedback, reset_code, rows_like

_ = ops  # registers the schemas
_DTYPES = (torch.float32, torch.float64)


def _has(spikes: PackedSpikes, dtype: torch.dtype) -> bool:
    device = spikes.bits.device.type
    return (
        device == "cpu" and dtype in _DTYPES and selected("spike_events", device, dtype) == "native"
    )


def has_spike_linear(spikes: PackedSpikes, weight: Tensor) -> bool:
    """Whether :func:`spike_linear` runs this layer: spikes [T, N, I] on a CPU in float32/64."""
    return spikes.bits.dim() == 3 and _has(spikes, weight.dtype)


def has_spike_conv(spikes: PackedSpikes, weight: Tensor, geometry: ConvGeometry) -> bool:
    """Whether :func:`spike_conv` runs this layer: 2-d, stride, dilation and groups 1."""
    unit = (1, 1)
    return (
        spikes.bits.dim() == 5
        and weight.dim() == 4
        and not geometry.transposed
        and (tuple(geometry.stride), tuple(geometry.dilation), geometry.groups) == (unit, unit, 1)
        and _has(spikes, weight.dtype)
    )


def has_spike_max_pool(spikes: PackedSpikes, settings: tuple) -> bool:
    """Whether :func:`spike_max_pool` runs this layer: two-dimensional, without dilation."""
    kernel, _, _, dilation, _ = settings
    return (
        spikes.bits.dim() == 5
        and len(kernel) == 2
        and tuple(dilation) == (1, 1)
        and _has(spikes, torch.float32)
    )


@no_grad
def spike_linear(spikes: PackedSpikes, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b`` [T, N, O] of spikes x [T, N, I]."""
    _check("spike_linear", spikes, 3, weight, 2, bias)
    op = select("spike_events", weight)
    return op.spike_linear_forward(spikes.bits, spikes.steps, weight, bias)


@no_grad
def spike_linear_redistribute(
    spikes: PackedSpikes,
    weight: Tensor,
    bias: Tensor | None,
    signal: Tensor,
    *,
    need: tuple[bool, bool, bool] = (True, True, True),
    magnitude: bool = True,
) -> Redistributed:
    """Input reward ``x * (signal W)`` [T, N, I], weight feedback ``|W| * signal^T x``, and bias
    feedback ``|b| * sum signal`` (without |W| and |b| with ``magnitude=False``)."""
    op = "spike_linear_redistribute"
    _check(op, spikes, 3, weight, 2, bias)
    check.like(op, "signal", signal, weight, "weight")
    check.shape(op, "signal", signal, (*spikes.shape[:2], weight.shape[0]))
    found = select("spike_events", weight).spike_linear_redistribute(
        spikes.bits, spikes.steps, weight, bias, signal, magnitude, *_wanted(need, bias)
    )
    return _result(found, _wanted(need, bias))


@no_grad
def spike_conv(
    spikes: PackedSpikes, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry
) -> Tensor:
    """Two-dimensional convolution [T, N, O, H', W'] of spikes [T, N, C, H, W]."""
    _check("spike_conv", spikes, 5, weight, 4, bias)
    op = select("spike_events", weight)
    return op.spike_conv2d_forward(spikes.bits, spikes.steps, weight, bias, list(geometry.padding))


@no_grad
def spike_conv_redistribute(
    spikes: PackedSpikes,
    weight: Tensor,
    bias: Tensor | None,
    signal: Tensor,
    geometry: ConvGeometry,
    *,
    need: tuple[bool, bool, bool] = (True, True, True),
    magnitude: bool = True,
) -> Redistributed:
    """As :func:`spike_linear_redistribute`, of :func:`spike_conv` with ``signal``
    [T, N, O, H', W']."""
    op = "spike_conv_redistribute"
    _check(op, spikes, 5, weight, 4, bias)
    check.like(op, "signal", signal, weight, "weight")
    size = [
        n + 2 * p - k + 1 for n, p, k in zip(spikes.shape[3:], geometry.padding, weight.shape[2:])
    ]
    check.shape(op, "signal", signal, (*spikes.shape[:2], weight.shape[0], *size))
    found = select("spike_events", weight).spike_conv2d_redistribute(
        spikes.bits, spikes.steps, weight, bias, signal, list(geometry.padding), magnitude,
        *_wanted(need, bias),
    )  # fmt: skip
    return _result(found, _wanted(need, bias))


@no_grad
def spike_max_pool(spikes: PackedSpikes, settings: tuple) -> PackedSpikes:
    """Maxima of windows: a window fires when any neuron in it does. ``settings``: kernel, stride,
    padding, dilation (1), ceil_mode."""
    kernel, stride, padding, _, ceil = settings
    op = select("spike_events", spikes.bits, dtype=torch.float32)
    return PackedSpikes(
        op.spike_max_pool2d(spikes.bits, list(kernel), list(stride), list(padding), ceil),
        spikes.steps,
    )


@no_grad
def spike_max_pool_redistribute(spikes: PackedSpikes, reward: Tensor, settings: tuple) -> Tensor:
    """Reward [T, N, C, H, W] of the pooled ``spikes``: the first spike of a window takes the
    window's ``reward``; that of a silent window is 0 below layers that multiply by their input."""
    kernel, stride, padding, _, ceil = settings
    return select("spike_events", reward).spike_max_pool2d_redistribute(
        spikes.bits, reward, list(kernel), list(stride), list(padding), ceil
    )


def has_spike_feedback(like: Tensor) -> bool:
    """Whether :func:`spike_lif_feedback` runs for rewards like this: float32/64 on a CPU."""
    if not like.is_cpu or like.dtype not in _DTYPES:
        return False
    return selected("spike_feedback", "cpu", like.dtype) == "native"


@no_grad
def spike_lif_feedback(
    reward: Tensor,
    spikes: PackedSpikes,
    beta: Tensor,
    threshold: Tensor,
    *,
    membrane: Tensor | None = None,
    current: Tensor | None = None,
    pool: tuple[int, int] | None = None,
    eps: float = 1e-6,
    reset: str = "subtract",
    reset_delay: bool = True,
    state: Tensor | None = None,
    carry: Tensor | None = None,
    sum_steps: bool = False,
    as_reward: bool = False,
    need_parameters: bool = False,
    overwrite: bool = False,
) -> LIFFeedback:
    """:func:`lif_feedback` without stored intermediates.

    Args:
        membrane: as there; or ``current``, the constant current [N, ...] of which the membrane is
            computed again.
        pool: (height, width) of a max pool with that stride that the spikes [T, N, C, H, W] went
            through: ``reward`` is then the pool's [T, N, C, H', W'], and the first spike of a
            window takes it. Spikes must be channels last in memory (:func:`spikes_channels_last`).
        overwrite: the signal [T, N, ...] takes the place of ``membrane`` in memory.

    Other arguments, result and errors as in :func:`lif_feedback`.
    """
    op = "spike_lif_feedback"
    constant = membrane is None
    if (membrane is None) == (current is None):
        raise ValueError(f"{op}: membrane, current: expected one of the two")
    source = current[None] if current is not None else membrane
    assert source is not None
    check.like(op, "reward", reward, source, "the membrane")
    if overwrite and (constant or sum_steps):
        raise ValueError(f"{op}: overwrite: expected a membrane, and sum_steps=False")
    like = spikes.bits
    windows: list[int] = []
    if pool is not None:
        if not spikes_channels_last(spikes):
            raise ValueError(f"{op}: pool: expected spikes that are channels last in memory")
        _, n, c, h, w = spikes.shape
        check.shape(op, "reward", reward, (spikes.steps, n, c, h // pool[0], w // pool[1]))
        reward = reward.movedim(2, -1).reshape(spikes.steps, -1)
        windows = [n, h, w, c, *pool]
    else:
        check.shape(op, "reward", reward, spikes.shape)
        reward = rows_like(reward, like)
    return finish_feedback(
        select("spike_feedback", source), op, source, like, beta, threshold, need_parameters,
        sum_steps,
        lambda backend, values, inner, of: backend.feedback(
            reward, rows_like(source, like), constant, rows_like(like, like), of("state", state),
            of("carry", carry), *values, inner, windows, spikes.steps, eps,
            reset_code(op, reset, reset_delay), sum_steps, as_reward, need_parameters,
            overwrite,
        ),
    )  # fmt: skip


def spikes_channels_last(spikes: PackedSpikes) -> bool:
    """Whether spikes [T, N, C, H, W] lie in memory with the channels innermost."""
    return spikes.bits.dim() == 5 and spikes.bits.movedim(2, -1).is_contiguous()


def _check(
    op: str, spikes: Any, dims: int, weight: Tensor, weight_dims: int, bias: Tensor | None
) -> None:
    if not isinstance(spikes, PackedSpikes) or spikes.bits.dim() != dims:
        raise TypeError(f"{op}: spikes: expected PackedSpikes with {dims - 1} dimensions behind T")
    check.floating(op, "weight", weight)
    if weight.dim() != weight_dims or weight.shape[1] != spikes.shape[2]:
        raise ValueError(
            f"{op}: weight: expected {weight_dims} dimensions, the second of {spikes.shape[2]}, "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None:
        check.like(op, "bias", bias, weight, "weight")
        check.shape(op, "bias", bias, weight.shape[:1])


def _wanted(need: tuple[bool, bool, bool], bias: Tensor | None) -> tuple[bool, bool, bool]:
    return need[0], need[1], need[2] and bias is not None


def _result(found: Any, wanted: tuple[bool, bool, bool]) -> Redistributed:
    first, second, third = (t if want else None for t, want in zip(found, wanted))
    return Redistributed(first, second, third)
