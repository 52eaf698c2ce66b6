"""Public functions: validate, choose a backend, run. None needs or builds an autograd graph."""

from .activation import step
from .alignment import alignment_sums
from .attention import Attended, attention, attention_redistribute
from .combine import dropout, dropout_redistribute, sum_redistribute
from .composed import Redistributed
from .conv import (
    ConvGeometry,
    channels_last,
    conv,
    conv_redistribute,
    conv_redistribute_update,
    conv_weight,
)
from .direct import direct_update
from .embedding import embedding_redistribute, embedding_redistribute_update
from .layer_norm import NormFeedback, norm_redistribute
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
from .softmax import softmax_redistribute
from .spike_layers import (
    has_spike_conv,
    has_spike_feedback,
    has_spike_linear,
    has_spike_max_pool,
    spike_conv,
    spike_conv_redistribute,
    spike_lif_feedback,
    spike_linear,
    spike_linear_redistribute,
    spike_max_pool,
    spike_max_pool_redistribute,
    spikes_channels_last,
)
from .spiking import (
    LIFFeedback,
    LIFResult,
    PackedSpikes,
    add_noise,
    lif_feedback,
    lif_forward,
)
from .update import global_norm, optimizer_update

__all__ = [
    "Attended",
    "ConvGeometry",
    "LIFFeedback",
    "LIFResult",
    "NormFeedback",
    "PackedSpikes",
    "Redistributed",
    "adaptive_avg_pool_redistribute",
    "adaptive_max_pool",
    "add_noise",
    "alignment_sums",
    "attention",
    "attention_redistribute",
    "avg_pool",
    "avg_pool_redistribute",
    "batch_norm",
    "batch_norm_redistribute",
    "channels_last",
    "conv",
    "conv_redistribute",
    "conv_redistribute_update",
    "conv_weight",
    "direct_update",
    "dropout",
    "dropout_redistribute",
    "embedding_redistribute",
    "embedding_redistribute_update",
    "global_norm",
    "has_spike_conv",
    "has_spike_feedback",
    "has_spike_linear",
    "has_spike_max_pool",
    "lif_feedback",
    "lif_forward",
    "linear",
    "linear_redistribute",
    "linear_redistribute_update",
    "max_pool",
    "max_pool_redistribute",
    "norm_redistribute",
    "optimizer_update",
    "softmax_redistribute",
    "spike_conv",
    "spike_conv_redistribute",
    "spike_lif_feedback",
    "spike_linear",
    "spike_linear_redistribute",
    "spike_max_pool",
    "spike_max_pool_redistribute",
    "spikes_channels_last",
    "step",
    "sum_redistribute",
]
