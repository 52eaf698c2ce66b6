"""Spiking neurons and networks as plain loops over neurons and time, and cases for the tests."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lfp_kernels.nn import LIF

# (reset, reset_delay) of the four kinds of neurons
RESETS = [("subtract", True), ("subtract", False), ("zero", True), ("none", True)]
RESET_IDS = ["subtract", "at-once", "zero", "none"]


class Trace(NamedTuple):
    """Per step: what entered, the charged membrane, whether it was reset before it could fire, and
    whether it fired; floats, one neuron."""

    entering: list[float]
    charged: list[float]
    resets: list[bool]
    fires: list[bool]
    state: float


def one_neuron(
    current: list[float], beta: float, threshold: float, kind: tuple[str, bool], u: float
) -> Trace:
    """One neuron, written from its definition."""
    reset, delay = kind
    trace = Trace([], [], [], [], 0.0)
    fired = u > threshold
    for i in current:
        if reset == "zero":
            u = 0.0 if fired else u
        before = u
        v = beta * u + i
        resets = reset == "subtract" and before > threshold
        w = v - threshold if resets else v
        fired = w > threshold
        u = (v - threshold if fired else v) if reset == "subtract" and not delay else w
        trace.entering.append(before)
        trace.charged.append(v)
        trace.resets.append(resets)
        trace.fires.append(fired)
    return trace._replace(state=u)


def one_feedback(
    trace: Trace, reward: list[float], beta: float, eps: float, m: float
) -> tuple[list[float], float, float, float]:
    """(signal per step, carry, sum p n, minus sum n (1 + reset)) of one neuron."""
    signal = [0.0] * len(reward)
    beta_sum = threshold_sum = 0.0
    for t in reversed(range(len(reward))):
        p, v = trace.entering[t], trace.charged[t]
        n = (reward[t] + m) / (abs(p) + abs(v - p) + eps)
        m = beta * p * n
        beta_sum += p * n
        threshold_sum -= n * (1 + trace.resets[t])
        signal[t] = n
    return signal, m, beta_sum, threshold_sum


def currents(steps: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Inputs that fire, reset twice in a row, stay silent and go negative."""
    g = torch.Generator().manual_seed(steps * 31 + len(shape))
    return (torch.randn(steps, *shape, generator=g, dtype=torch.float64) + 0.4).to(dtype)


def mlp(reset: tuple[str, bool] = ("subtract", True), **options: object) -> nn.Sequential:
    torch.manual_seed(1)
    name, delay = reset

    def neurons() -> LIF:
        return LIF(0.8, 0.7, name, delay, **options)  # type: ignore[arg-type]

    return nn.Sequential(nn.Linear(12, 20), neurons(), nn.Linear(20, 5), neurons())


def cnn(reset: tuple[str, bool] = ("subtract", True)) -> nn.Sequential:
    torch.manual_seed(2)
    name, delay = reset
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), LIF(0.9, 0.5, name, delay), nn.MaxPool2d(2),
        nn.Conv2d(6, 5, 3), LIF(0.7, 0.4, name, delay), nn.Flatten(), nn.Linear(45, 4),
        LIF(0.9, 0.3, name, delay),
    )  # fmt: skip
