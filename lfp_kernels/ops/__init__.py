"""One folder per op: schema and fake in ``__init__``, backends as peers beside it."""

from .. import _library
from . import (
    activation,
    alignment,
    attention,
    batch_norm,
    combine,
    conv,
    direct,
    embedding,
    layer_norm,
    linear,
    pool,
    reward,
    softmax,
    spike_events,
    spike_feedback,
    spiking,
    update,
)

__all__ = [
    "activation",
    "alignment",
    "attention",
    "batch_norm",
    "combine",
    "conv",
    "direct",
    "embedding",
    "layer_norm",
    "linear",
    "pool",
    "reward",
    "softmax",
    "spike_events",
    "spike_feedback",
    "spiking",
    "update",
]

# Here and not at the first call: that one may be under torch.compile, which cannot trace a dlopen.
# Loading the CUDA library does not touch a GPU.
for _device in ("cpu", "cuda"):
    _library.why_not_loaded(_device)
