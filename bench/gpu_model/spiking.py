"""Scans of spiking neurons, packed spikes and noise (csrc/cuda/lif.cu, spikes.cu): a thread keeps
16 bytes of neurons through the steps, so every current, reward, membrane and spike moves once.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from lfp_kernels.ops.spiking.codes import Reset, planes

from .devices import Gpu
from .launch import Launch, accumulator, ceil_div, type_name, wide

SCAN_THREADS, THREADS = 128, 256
PARAMETERS = ("beta", "threshold")


def _width(neurons: int, element: int) -> int:
    """Neurons of a thread: one where rows begin at other addresses than multiples of 16."""
    return wide(element) if neurons % wide(element) == 0 else 1


def _scan(
    kernel: str, a: dict[str, Any], like: Tensor, parameters: tuple[str, ...] = PARAMETERS
) -> Launch:
    """A scan with what it reads per channel: a thread asks for the channel of its first neuron and
    for every other that begins among its neurons."""
    neurons, element = like.shape[1], like.element_size()
    v = _width(neurons, element)
    accumulate = type_name(accumulator(element))
    name = f"<{type_name(element)}, {v}, Neuron<{accumulate}, (Reset){int(a['reset'])}>"
    launch = Launch(kernel, (name,), ceil_div(neurons // v, SCAN_THREADS), SCAN_THREADS)
    for parameter in parameters:
        t, inner, loads = a[parameter], a["inner"], neurons // v
        if t.numel() > 1:
            loads += ceil_div(neurons, inner) - ceil_div(neurons, math.lcm(inner, v))
        launch.load(parameter, loads * element, t.nbytes)
    return launch


def lif_forward(a: dict[str, Any], gpu: Gpu) -> list[Launch]:
    current, neurons, row = a["current"], a["current"].shape[1], a["current"][:1].nbytes
    if neurons == 0:
        return []
    launch = _scan("forward_scan_kernel", a, current)
    launch.load("current", current.nbytes)
    launch.load("state", row * (a["state"] is not None))
    launch.store("bits", planes(a["steps"]) * neurons)
    launch.store("membrane", row * a["steps"] * a["keep"])
    launch.store("last", row)
    return [launch]


def lif_feedback(a: dict[str, Any], gpu: Gpu) -> list[Launch]:
    """Who resets at once reads the spikes; the others see them in the membrane. Without a reset the
    threshold plays no part."""
    reward, row = a["reward"], a["reward"][:1].nbytes
    if reward.shape[1] == 0:
        return []
    parameters = PARAMETERS[: 1 if a["reset"] == Reset.NONE else 2]
    launch = _scan("backward_scan_kernel", a, reward, parameters)
    launch.load("reward", reward.nbytes)
    launch.load("membrane", a["membrane"].nbytes)
    launch.load("bits", a["bits"].nbytes * (a["reset"] == Reset.SUBTRACT_AT_ONCE))
    for name in ("state", "carry"):
        launch.load(name, row * (a[name] is not None))
    launch.store("signal", row if a["static"] else reward.nbytes)
    launch.store("carried", row)
    launch.store("parameter sums", 2 * row * a["need_parameters"])
    return [launch]


def _over_steps(
    source: str, read: Tensor, again: bool, steps: int, neurons: int, element: int, gpu: Gpu
) -> list[Launch]:
    """``again``: each chunk of steps reads the source anew, where few neurons make several."""
    if neurons == 0 or steps == 0:
        return []
    v = _width(neurons, element)
    blocks = ceil_div(neurons // v, THREADS)
    wanted = min(max(ceil_div(4 * gpu.processors, blocks), 1), planes(steps), 65535)
    chunks = ceil_div(steps, 8 * ceil_div(planes(steps), wanted))
    name = f"<{type_name(element)}, {v}, {source}<"
    launch = Launch("over_steps_kernel", (name,), blocks * chunks, THREADS)
    launch.load("source", read.nbytes * (chunks if again else 1), read.nbytes)
    launch.store("y", steps * neurons * element)
    return [launch]


def spikes_unpack(a: dict[str, Any], gpu: Gpu) -> list[Launch]:
    bits, element = a["bits"], a["dtype"].itemsize
    return _over_steps("Spikes", bits, False, a["steps"], bits.shape[1], element, gpu)


def add_noise(a: dict[str, Any], gpu: Gpu) -> list[Launch]:
    x, steps = a["x"], a["steps"]
    neurons, element = x.shape[1], x.element_size()
    if x.shape[0] != steps:
        return _over_steps("Constant", x, True, steps, neurons, element, gpu)
    if x.numel() == 0:
        return []
    # A Philox block is four elements, and a pack of elements begins with one.
    v = wide(element) if a["first"] * neurons % 4 == 0 else 1
    blocks = max(1, ceil_div(x.numel() // v, 2 * THREADS))
    launch = Launch("elementwise_kernel", (f"<{v}, NoisyCopy<{type_name(element)}",), blocks)
    launch.load("x", x.nbytes)
    launch.store("y", x.nbytes)
    return [launch]
