"""Train neural networks without gradients: fused kernels for Layer-wise Feedback Propagation."""

from . import composites, functional, metrics, nn, optim, rewards, rules
from .attribution import Attribution, attribute
from .backends import explain, use_backend
from .composites import backward
from .fused import fuse
from .pruning import Pruned, prune

__all__ = [
    "Attribution",
    "Pruned",
    "attribute",
    "backward",
    "composites",
    "explain",
    "functional",
    "fuse",
    "metrics",
    "nn",
    "optim",
    "prune",
    "rewards",
    "rules",
    "use_backend",
]
__version__ = "0.1.0"
