"""Public functions: validate, choose a backend, run. None needs or builds an autograd graph."""

from .activation import step
from .alignment import alignment_sums
from .combine import dropout, dropout_redistribute, sum_redistribute
from .composed import Redistributed
from .conv import (
    ConvGeometry,
    channels_last,
    conv,
    conv_redistribute,
    conv_redistribute_update,
)
from .direct import direct_update
from .linear import linear, linear_redistribute, linear_redistribute_update
from .norm import batch_norm, batch_norm_redistribute
from .pool import (
    adaptive_avg_pool_redistribute,
    adaptive_max_pool,
    avg_pool,
    avg_pool_redistribute,
    max_pool,
    max_pool_redistribute,
)
from .update import global_norm, optimizer_update

__all__ = [
    "ConvGeometry",
    "Redistributed",
    "adaptive_avg_pool_redistribute",
    "adaptive_max_pool",
    "alignment_sums",
    "avg_pool",
    "avg_pool_redistribute",
    "batch_norm",
    "batch_norm_redistribute",
    "channels_last",
    "conv",
    "conv_redistribute",
    "conv_redistribute_update",
    "direct_update",
    "dropout",
    "dropout_redistribute",
    "global_norm",
    "linear",
    "linear_redistribute",
    "linear_redistribute_update",
    "max_pool",
    "max_pool_redistribute",
    "optimizer_update",
    "step",
    "sum_redistribute",
]
