"""Traced layers that forward writes as functions: F.linear, F.conv2d, F.max_pool2d, F.pad, ..."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor, fx

from .. import calls
from . import stages as S
from . import structure as M


def layer_call(builder: Any, node: fx.Node) -> bool:
    """Adds the stage of the call; whether it was a layer."""
    target: Any = node.target
    args: list[Any] = [builder.constant(a) for a in node.args]
    kwargs: dict[str, Any] = {k: builder.constant(v) for k, v in node.kwargs.items()}
    x: Any = node.args[0] if node.args else None
    stage = _weighted(builder, node, args, kwargs) or _pool(builder, node, args, kwargs)
    if target is TF.pad:
        stage = _pad(builder, node)
    if stage is not None:
        builder.add(node, stage, x)
    return stage is not None


def _weighted(builder: Any, node: fx.Node, args: list[Any], kwargs: Any) -> S.Stage | None:
    composite = builder.composite
    if node.target is TF.linear:
        weight, bias = _signature(lambda input, weight, bias=None: (weight, bias), args, kwargs)
        _check_weight(builder, node, weight, bias)
        return S.Linear(weight, bias, builder.layer_of(weight), composite)
    for form, functions in calls.CONVS.items():
        if node.target in functions:
            _, weight, bias, geometry = calls.conv_geometry(*form, *args, **kwargs)
            _check_weight(builder, node, weight, bias)
            return S.Conv(weight, bias, geometry, builder.layer_of(weight), composite)
    return None


def _check_weight(builder: Any, node: fx.Node, weight: Any, bias: Any) -> None:
    if not isinstance(weight, Tensor) or not isinstance(bias, (Tensor, type(None))):
        raise builder.refuse(node, "a layer whose weight is computed")


def _pool(builder: Any, node: fx.Node, args: list[Any], kwargs: Any) -> S.Stage | None:
    target: Any = node.target
    rule = builder.composite.function_rule
    for dims in (1, 2, 3):
        if target in (getattr(TF, f"max_pool{dims}d"), getattr(torch, f"max_pool{dims}d")):
            if kwargs.pop("return_indices", False):
                raise builder.refuse(node, f"max_pool{dims}d with return_indices=True")
            return M.MaxPool(calls.max_pool_settings(dims, *args[1:], **kwargs))
        if target is getattr(TF, f"avg_pool{dims}d"):
            return S.AvgPool(calls.pool_settings(dims, *args[1:], **kwargs), rule)
        if target is getattr(TF, f"adaptive_avg_pool{dims}d"):
            size = args[1] if len(args) > 1 else kwargs["output_size"]
            return S.AdaptiveAvgPool(target, size, rule)
    return None


def _pad(builder: Any, node: fx.Node) -> S.Stage:
    form = lambda input, pad, mode="constant", value=0: (input, pad, mode, value or 0)  # noqa: E731
    _, amounts, *how = _signature(form, node.args, node.kwargs)
    if how != ["constant", 0] or not all(isinstance(a, int) and a >= 0 for a in amounts):
        raise builder.refuse(node, f"F.pad({amounts}, {how})")
    return M.Pad(tuple(amounts))


def _signature(form: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    bound = inspect.signature(form).bind(*args, **kwargs)
    bound.apply_defaults()
    return form(*bound.args, **bound.kwargs)
