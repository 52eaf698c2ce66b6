"""Modules of other packages that spell one function as many, known by the name of their class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as TF
from torch import nn

from . import autograd

_RMS_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Phi3RMSNorm", "T5LayerNorm")
_GELUS = ("NewGELU", "FastGELU", "QuickGELU", "GELUActivation")  # and NewGELUActivation, ...


def as_one_call(module: nn.Module) -> Callable[..., Any] | None:
    """A forward that makes one call of what ``module`` computes by many, or None."""
    if type(module).__name__ in _RMS_NORMS:
        weight: Any = module.weight
        eps: Any = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        return lambda x: TF.rms_norm(x, weight.shape, weight, eps)
    if is_activation(module):
        original = module.forward
        return lambda x: autograd.IdentityReward.apply(x, original, False)
    return None


def is_activation(module: nn.Module) -> bool:
    """Whether ``module`` is an activation function that its forward spells out."""
    known = type(module).__name__.startswith(_GELUS)
    if not known and type(module).__module__ != "transformers.activations":
        return False
    return not any(True for _ in (*module.children(), *module.parameters()))
