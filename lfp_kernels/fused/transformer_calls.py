"""Traced calls of transformers as stages."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as TF
from torch import fx, nn

from ..composites import Transformer
from . import transformer as T

_METHODS = ("unbind", "chunk", "split")
_FUNCTIONS = (torch.unbind, torch.chunk, torch.split)


def module_stage(builder: Any, node: fx.Node, module: nn.Module) -> T.Stage | None:
    """The stage of a module that composites.Transformer has a rule for, or None."""
    composite = builder.composite
    if not isinstance(composite, Transformer):
        return None
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None or module.scale_grad_by_freq:
            raise builder.refuse(node, f"{node.target} (Embedding whose rows change in forward)")
        return T.Embedding(module, composite)
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return T.Norm(module, composite)
    return None


def function_stage(builder: Any, node: fx.Node) -> bool:
    """Adds the stage of a call that takes tensors apart, or of attention; whether it was one."""
    target: Any = node.target
    x: Any = node.args[0] if node.args else None
    method = node.op == "call_method" and target in _METHODS
    if method or target in _FUNCTIONS:
        name = str(getattr(target, "__name__", target))
        builder.taken_apart.add(node)
        builder.add(node, T.TakeApart(name, (*node.args[1:], *node.kwargs.values())), x)
        return True
    if target is operator.getitem and x in builder.taken_apart:
        builder.add(node, T.Item(int(node.args[1])), x)  # type: ignore[arg-type]
        return True
    if target is TF.scaled_dot_product_attention and isinstance(builder.composite, Transformer):
        q, k, v, options = _attention(*node.args, **node.kwargs)  # type: ignore[arg-type]
        if options["mask"] is not None or options["drop"] or options["grouped"]:
            raise builder.refuse(node, "attention with a mask, dropout or grouped heads")
        stage = T.Attention(options["causal"], options["scale"], builder.composite)
        builder.add(node, stage, q, k, v)
        return True
    return False


def _attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> tuple[Any, Any, Any, dict[str, Any]]:  # fmt: skip
    options = {"mask": attn_mask, "drop": dropout_p, "causal": is_causal, "scale": scale}
    return query, key, value, {**options, "grouped": enable_gqa}
