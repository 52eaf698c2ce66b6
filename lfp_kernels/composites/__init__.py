"""Which layer gets which rule: composites, and how a model is attached to one."""

from .attach import Attachment, LayerRule
from .base import DEFAULTS, DROPOUTS, FIRST, LAYERS, Composite
from .direct import DirectFeedbackAlignment, NonlinearFeedback, TargetFeedback
from .feedback import (
    BatchSignSymmetry,
    FeedbackAlignment,
    FixedSignSymmetry,
    KolenPollack,
    LinBP,
    NoisyFeedbackAlignment,
    UniformSignSymmetry,
    WeightMirror,
)  # fmt: skip
from .redistribution import backward, check_finite
from .relevance import Epsilon, EpsilonAlpha2Beta1, EpsilonGammaBox, EpsilonPlus
from .transformer import Transformer

__all__ = [
    "DEFAULTS", "DROPOUTS", "FIRST", "LAYERS", "Attachment", "BatchSignSymmetry", "Composite",
    "DirectFeedbackAlignment", "Epsilon", "EpsilonAlpha2Beta1", "EpsilonGammaBox", "EpsilonPlus",
    "FeedbackAlignment", "FixedSignSymmetry", "KolenPollack", "LayerRule", "LinBP",
    "NoisyFeedbackAlignment", "NonlinearFeedback", "TargetFeedback", "Transformer",
    "UniformSignSymmetry", "WeightMirror", "backward", "check_finite",
]  # fmt: skip
