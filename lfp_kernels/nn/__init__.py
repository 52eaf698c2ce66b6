"""Modules that feedback propagation understands and torch.nn lacks."""

from .basic import Step, Sum
from .neurons import IF, LIF
from .snntorch import from_snntorch
from .spiking import Spiking

__all__ = ["IF", "LIF", "Spiking", "Step", "Sum", "from_snntorch"]
