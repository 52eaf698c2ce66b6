"""Train neural networks without gradients: fused kernels for Layer-wise Feedback Propagation."""

from . import composites, functional, nn, optim, rewards, rules
from .backends import explain, use_backend
from .composites import backward
from .fused import fuse

__all__ = [
    "backward",
    "composites",
    "explain",
    "functional",
    "fuse",
    "nn",
    "optim",
    "rewards",
    "rules",
    "use_backend",
]
__version__ = "0.1.0"
