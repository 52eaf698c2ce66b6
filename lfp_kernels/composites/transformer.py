"""The composite of transformers and language models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .. import known_modules
from ..rules import Epsilon as EpsilonRule
from .base import Composite

MODES = ("attnlrp", "plain")
GATES = ("half", "identity")
RESIDUALS = ("epsilon", "gradient")
NORMS = ("attnlrp", "epsilon")
_KNOWN = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.Embedding, nn.MultiheadAttention)


class Transformer(Composite):
    """LFP-epsilon for layers with weights, and rules for what transformers do beside them: softmax,
    products of activations, attention, normalisation, embeddings (docs/transformers.md).

    Args:
        mode: "attnlrp" (arXiv 2402.05602): every product halves the reward, softmax passes on what
            its logits explain, norms hand the reward on; see there what is conserved. "plain": the
            gradient acts on the reward there, and norms follow the epsilon rule with their whole
            derivative, as the official package really runs.
        eps: stabilizer of every denominator, > 0.
        residual: what the operands of a sum of activations get: "epsilon": the share that each
            contributed; "gradient": the whole reward each, as the official package really runs.
        norms: "attnlrp": the division by the deviation hands the reward on, mean, weight and bias
            follow epsilon; "epsilon": the whole derivative. None: that of the mode.
        gate: of a product of an activation function's output with another activation: "half" to
            each, or "identity": all to the other one (mode "attnlrp").
        layers, default, dropout, feedback_dtype: see :class:`Composite`.
    """

    def __init__(
        self,
        mode: str = "attnlrp",
        eps: float = 1e-6,
        *,
        residual: str = "epsilon",
        norms: str | None = None,
        gate: str = "half",
        layers: Any = (),
        **options: Any,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"Transformer: mode: expected one of {MODES}, got {mode!r}")
        if gate not in GATES:
            raise ValueError(f"Transformer: gate: expected one of {GATES}, got {gate!r}")
        if residual not in RESIDUALS:
            raise ValueError(
                f"Transformer: residual: expected one of {RESIDUALS}, got {residual!r}"
            )
        if norms not in (None, *NORMS):
            raise ValueError(f"Transformer: norms: expected one of {NORMS} or None, got {norms!r}")
        super().__init__(EpsilonRule(eps), layers=layers, **options)
        self.norms = norms or ("attnlrp" if mode == "attnlrp" else "epsilon")
        self.mode, self.eps, self.residual, self.gate = mode, eps, residual, gate

    reenters = True

    def handlers(self) -> dict[Any, Any]:
        from ..capture_attention import TABLES  # it knows composites

        return TABLES[self.mode, self.residual]

    def knows(self, module: nn.Module) -> bool:
        return isinstance(
            module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.Embedding, nn.MultiheadAttention)
        )

    def as_one_call(self, module: nn.Module) -> Callable[..., Any] | None:
        return known_modules.as_one_call(module)

    def is_activation(self, module: nn.Module) -> bool:
        return known_modules.is_activation(module)
