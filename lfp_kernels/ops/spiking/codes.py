"""Codes of the neuron's reset; csrc/neuron.h and the Triton kernels hold the same numbers."""

from __future__ import annotations

from enum import IntEnum


class Reset(IntEnum):
    SUBTRACT = 0  # the step after a spike takes the threshold off
    SUBTRACT_AT_ONCE = 1  # the spike itself takes it off
    ZERO = 2  # what is left of a neuron that has fired is dropped
    NONE = 3


PLANE = 8  # time steps in a byte of packed spikes


def planes(steps: int) -> int:
    """Bytes per neuron that hold the spikes of ``steps`` time steps."""
    return -(-steps // PLANE)
