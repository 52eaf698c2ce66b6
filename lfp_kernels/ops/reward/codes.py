"""Reward codes; csrc/rewards.h holds the same numbers."""

from __future__ import annotations

from enum import IntEnum


class Kind(IntEnum):
    SOFTMAX = 0
    SIGMOID = 1
    MAXIMIZE = 2
    MINIMIZE = 3
    BOUNDED_SOFTMAX = 4
    CORRECT_CLASSIFICATION = 5
    MISCLASSIFICATION = 6
    BINARY_SIGMOID = 7
    REGRESSION = 8


# Rewards whose target is one value per output; the others take one label per row, or none.
VALUE_TARGET = frozenset({Kind.BINARY_SIGMOID, Kind.REGRESSION})
# Rewards that can do without a target: they aim at one neuron or at all.
NEURON_TARGET = frozenset({Kind.MAXIMIZE, Kind.MINIMIZE})
