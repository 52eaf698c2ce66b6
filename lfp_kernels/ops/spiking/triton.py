"""Spiking neurons in Triton: what is launched."""

from __future__ import annotations

import torch
from torch import Tensor

from .._triton import blocks, launch
from .codes import planes
from .triton_kernels import backward_kernel, copy_kernel, forward_kernel, over_steps_kernel

WARPS = 4
PROGRAMS = 512  # of a pass over packed spikes or a constant input, where it has so many


def _block(dtype: torch.dtype, most: int = 4) -> int:
    """Neurons of a program: 16 bytes per thread, but ``most`` elements: the registers that scans
    and noise take for more than four are too many."""
    return WARPS * 32 * min(16 // dtype.itemsize, most)


def _channels(beta: Tensor, threshold: Tensor) -> tuple[int, dict[str, bool]]:
    """Channels, and which of the parameters all of them share."""
    shared = {"BETA": beta.numel() == 1, "THRESHOLD": threshold.numel() == 1}
    return max(beta.numel(), threshold.numel()), shared


def forward(
    current: Tensor, state: Tensor | None, beta: Tensor, threshold: Tensor, inner: int,
    steps: int, reset: int, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows, neurons = current.shape
    current, beta, threshold = current.contiguous(), beta.contiguous(), threshold.contiguous()
    bits = current.new_empty((planes(steps), neurons), dtype=torch.uint8)
    membrane = current.new_empty((steps, neurons) if keep else (0,))
    last = current.new_empty((neurons,))
    before = current if state is None else state.contiguous()
    block = _block(current.dtype)
    channels, shared = _channels(beta, threshold)
    launch(
        forward_kernel, blocks(neurons, block), current, current, before, beta, threshold, bits,
        membrane, last, neurons, steps, rows, channels, inner, -0.0, **shared,
        STATE=state is not None, MOVES=rows == steps, RESET=int(reset), KEEP=keep, BLOCK=block,
        num_warps=WARPS,
    )  # fmt: skip
    return bits, membrane, last


def feedback(
    reward: Tensor, membrane: Tensor, bits: Tensor, state: Tensor | None, carry: Tensor | None,
    beta: Tensor, threshold: Tensor, inner: int, eps: float, reset: int, static: bool,
    as_reward: bool, need_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    steps, neurons = reward.shape
    reward, membrane, bits = reward.contiguous(), membrane.contiguous(), bits.contiguous()
    beta, threshold = beta.contiguous(), threshold.contiguous()
    first = reward if state is None else state.contiguous()
    after = reward if carry is None else carry.contiguous()
    signal = reward.new_empty((1 if static else steps, neurons))
    carried = reward.new_empty((neurons,))
    sums = [reward.new_empty((neurons if need_parameters else 0,)) for _ in range(2)]
    block = _block(reward.dtype)
    channels, shared = _channels(beta, threshold)
    launch(
        backward_kernel, blocks(neurons, block), reward, reward, membrane, bits, first, after,
        beta, threshold, signal, carried, *sums, neurons, steps, channels, inner, eps, -0.0,
        **shared, STATE=state is not None, CARRY=carry is not None, RESET=int(reset),
        STATIC=static, AS_REWARD=as_reward, PARAMETERS=need_parameters, BLOCK=block,
        num_warps=WARPS,
    )  # fmt: skip
    return signal, carried, sums[0], sums[1]


def _over_steps(
    source: Tensor, y: Tensor, noise: float, seed: int, first: int, spikes: bool
) -> Tensor:
    steps, neurons = y.shape
    block = _block(y.dtype, 4 if noise else 8)
    across = blocks(neurons, block)
    if across == 0 or steps == 0:
        return y
    rows = min(blocks(PROGRAMS, across), planes(steps))
    each = blocks(planes(steps), rows)  # planes of a program
    launch(
        over_steps_kernel, across * blocks(planes(steps), each), y, source, y, neurons, steps, each,
        across, noise, first * neurons, seed, SPIKES=spikes, NOISY=noise != 0,
        FOURS=neurons % 4 == 0, BLOCK=block, num_warps=WARPS,
    )  # fmt: skip
    return y


def unpack(
    bits: Tensor, steps: int, dtype: torch.dtype, noise: float, seed: int, first: int
) -> Tensor:
    y = bits.new_empty((steps, bits.shape[1]), dtype=dtype)
    return _over_steps(bits.contiguous(), y, noise, seed, first, True)


def add_noise(x: Tensor, steps: int, noise: float, seed: int, first: int) -> Tensor:
    x = x.contiguous()
    y = x.new_empty((steps, x.shape[1]))
    if x.shape[0] != steps:
        return _over_steps(x, y, noise, seed, first, False)
    block, index = _block(y.dtype, 4 if noise else 8), first * x.shape[1]
    launch(
        copy_kernel, blocks(y.numel(), block), y, x, y, y.numel(), noise, index, seed,
        NOISY=noise != 0, FOURS=index % 4 == 0, BLOCK=block, num_warps=WARPS,
    )  # fmt: skip
    return y
