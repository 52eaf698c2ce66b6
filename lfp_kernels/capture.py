"""Catches the torch calls of a model's forward and gives each its rule.

One table maps torch functions to handlers. Modules need no replacement: nn.Linear calls F.linear,
which is caught with its weight, and the weight tells the layer. What the table does not know runs
as torch defines it; if that takes part in the graph, the composite decides whether the plain
gradient may stand in for a rule.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as TF
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from . import autograd
from .calls import ACTIVATIONS, CONVS, STRUCTURAL, conv_geometry, max_pool_settings, pool_settings
from .nn.spiking import run as run_spiking

if TYPE_CHECKING:
    from .composites import Attachment

Handler = Callable[..., Any]


def _takes_part(*tensors: Any) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in tensors
    )


def signed(handler: Handler, *operands: str) -> Handler:
    """The handler, for which parameters among its arguments are activations (autograd.owned): all
    of them, or the first ones, whose names are given; the others are weights of a layer."""

    def call(at: Attachment, *args: Any, **kwargs: Any) -> Any:
        if at.composite.plain:  # gradients, and no relevance
            return handler(at, *args, **kwargs)
        count = len(operands) or len(args)
        first = (autograd.owned(a) for a in args[:count])
        rest = (autograd.relevant(a) for a in args[count:])
        named = {
            k: autograd.owned(v) if not operands or k in operands else autograd.relevant(v)
            for k, v in kwargs.items()
        }
        return handler(at, *first, *rest, **named)

    return call


def moved(function: Any, args: Any, kwargs: Any) -> Any:
    """A call that moves values. What it cuts out of a parameter is a part of it, and signed where
    it is used; what it copies is an activation from here on."""
    values = [*_flat(args), *kwargs.values()]
    result = function(*args, **kwargs)
    if not any(autograd.learned(v) for v in values) or not _takes_part(*values):
        return result
    if all(autograd.learned(t) for t in _flat((result,)) if isinstance(t, Tensor)):
        return result
    rest = {k: autograd.owned(v) for k, v in kwargs.items()}
    return function(*(autograd.owned(a) for a in args), **rest)


def _linear(at: Attachment, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    layer = at.rule_of_weight(weight)
    return autograd.LinearReward.apply(
        input, weight, bias, layer.matrix, layer, at.product_dtype(input)
    )


def _conv(at: Attachment, dims: int, transposed: bool, *args: Any, **kwargs: Any) -> Tensor:
    x, weight, bias, geometry = conv_geometry(dims, transposed, *args, **kwargs)
    layer = at.rule_of_weight(weight)
    return autograd.ConvReward.apply(
        x, weight, bias, layer.matrix, geometry, layer, at.product_dtype(x)
    )


def _batch_norm(
    at: Attachment,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    rule = at.function_rule if weight is None else at.rule_of_weight(weight).rule
    return autograd.BatchNormReward.apply(
        input, weight, bias, running_mean, running_var, training, momentum, eps, rule
    )


def _avg_pool(at: Attachment, dims: int, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    settings = pool_settings(dims, *args, **kwargs)
    return autograd.AvgPoolReward.apply(input, settings, at.function_rule)


def _adaptive_avg_pool(at: Attachment, pool: Any, input: Tensor, output_size: Any) -> Tensor:
    bound = partial(pool, output_size=output_size)
    return autograd.AdaptiveAvgPoolReward.apply(input, bound, at.function_rule)


def _max_pool(at: Attachment, dims: int, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    if kwargs.pop("return_indices", False):
        return getattr(TF, f"max_pool{dims}d_with_indices")(input, *args, **kwargs)
    return autograd.MaxPoolReward.apply(input, max_pool_settings(dims, *args, **kwargs))


def _add(at: Attachment, input: Any, other: Any, *, alpha: Any = 1, in_place: bool = False) -> Any:
    if not isinstance(input, Tensor):  # 1 + x
        input, other = other, input
    swap = not in_place and autograd.learned(input)  # the activation decides the dtype
    if not in_place:
        input = autograd.owned(input)
    other = autograd.owned(other)
    if not isinstance(other, Tensor):
        other = torch.as_tensor(other, dtype=input.dtype, device=input.device)
    if alpha != 1:
        multiply = at.composite.handlers().get(torch.mul, TABLE[torch.mul])
        other = multiply(at, other, alpha)
    if swap:
        input, other = other, input
    other = other.to(input.dtype) if other.dtype != input.dtype else other
    return autograd.SumReward.apply(input, other, at.function_rule, in_place)


def _scale(at: Attachment, function: Any, input: Any, other: Any) -> Any:
    """Multiplication by a constant: a linear map whose relevance passes whole."""
    if isinstance(input, Tensor) and not isinstance(other, Tensor):
        return autograd.IdentityReward.apply(input, lambda x: function(x, other), False)
    if isinstance(other, Tensor) and not isinstance(input, Tensor) and function is operator.mul:
        return autograd.IdentityReward.apply(other, lambda x: function(input, x), False)
    at.left_out(function, (input, other), {})
    return function(input, other)


def _activation(at: Attachment, function: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    in_place = kwargs.pop("inplace", False)
    name = getattr(function, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):  # relu_, sigmoid_, ...
        in_place, function = True, getattr(torch, name[:-1], None) or getattr(TF, name[:-1])
    if in_place:
        _refuse_view(function, input)
    return autograd.IdentityReward.apply(
        input, lambda x: function(x, *args, **kwargs), bool(in_place)
    )


def _reduce(at: Attachment, function: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return autograd.LinearMapReward.apply(
        input, lambda x: function(x, *args, **kwargs), at.function_rule
    )


def _dropout(
    at: Attachment,
    function: Any,
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Tensor:
    if not training or p == 0:
        return input
    if at.composite.dropout == "conserving" and function is TF.dropout:
        return autograd.DropoutReward.apply(input, p)
    return function(input, p, training)  # the gradient factor mask / (1 - p) acts on the reward


def _spiking(at: Attachment, spiking: Any, x: Tensor, *parameters: Tensor) -> Tensor:
    stage = at.spiking_stage(spiking)
    stage.wants_input = x.requires_grad
    learned = [p for p in parameters if p.requires_grad]
    return autograd.SpikingReward.apply(x, stage, *learned)


def _refuse_view(function: Any, x: Tensor) -> None:
    if x._is_view():
        raise ValueError(
            f"lfp_kernels: in-place {resolve_name(function)} on a view of another tensor: expected "
            "the tensor itself; use the out-of-place form in the model"
        )


def _table() -> dict[Any, Handler]:
    table: dict[Any, Handler] = {
        TF.linear: signed(_linear, "input"), TF.batch_norm: signed(_batch_norm, "input"),
    }  # fmt: skip
    for (dims, transposed), functions in CONVS.items():
        for function in functions:
            table[function] = signed(_bind(_conv, dims, transposed), "input")
    for dims, avg, adaptive in (
        (1, TF.avg_pool1d, TF.adaptive_avg_pool1d),
        (2, TF.avg_pool2d, TF.adaptive_avg_pool2d),
        (3, TF.avg_pool3d, TF.adaptive_avg_pool3d),
    ):
        table[avg] = _bind(_avg_pool, dims)
        table[adaptive] = _bind(_adaptive_avg_pool, adaptive)
        pool = getattr(TF, f"max_pool{dims}d")
        for alias in (pool, getattr(torch, f"max_pool{dims}d"), getattr(TF, f"_max_pool{dims}d")):
            table[alias] = _bind(_max_pool, dims)
    for function in (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__):
        table[function] = _add
    for function in (Tensor.add_, Tensor.__iadd__):
        table[function] = _add_in_place
    for function in (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__):
        table[function] = signed(_bind(_scale, operator.mul))
    for function in (torch.div, Tensor.div, Tensor.__truediv__):
        table[function] = signed(_bind(_scale, operator.truediv))
    for function in (torch.mean, Tensor.mean, torch.sum, Tensor.sum):
        table[function] = signed(_bind(_reduce, function))
    table[run_spiking] = _spiking
    for function in ACTIVATIONS:
        table[function] = signed(_bind(_activation, function))
    for function in (TF.dropout, TF.dropout1d, TF.dropout2d, TF.dropout3d):
        table[function] = signed(_bind(_dropout, function))
    return table


def _bind(handler: Handler, *head: Any) -> Handler:
    """The handler with what the table knows about the function put in front of its arguments."""
    return lambda at, *args, **kwargs: handler(at, *head, *args, **kwargs)


def _add_in_place(at: Attachment, input: Tensor, other: Any, *, alpha: Any = 1) -> Tensor:
    _refuse_view(Tensor.add_, input)
    return _add(at, input, other, alpha=alpha, in_place=True)


TABLE = _table()
_ALWAYS = frozenset(
    {TF.linear, run_spiking, *(f for functions in CONVS.values() for f in functions)}
)
# Not differentiable, or linear maps whose transpose is what autograd does with the reward.
_PLAIN = frozenset(STRUCTURAL)


class RewardMode(TorchFunctionMode):
    """Active while an attached model runs forward."""

    def __init__(self, attachment: Attachment) -> None:
        super().__init__()
        self.attachment = attachment
        self.handlers = attachment.composite.handlers()

    def _has_handler(self, func: Any) -> bool:
        """What a composite of the feedback-alignment family changes; the rest is autograd's."""
        return func in _ALWAYS or (func in ACTIVATIONS and self.attachment.linear)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handler = self.handlers.get(func) or TABLE.get(func)
        if self.attachment.composite.plain and not self._has_handler(func):
            return func(*args, **kwargs)
        if handler is not None:
            if _takes_part(*_flat(args), *kwargs.values()):
                return handler(self.attachment, *args, **kwargs)
            return func(*args, **kwargs)
        if func in _PLAIN:
            return moved(func, args, kwargs)
        _refuse_in_place(func, args)
        result = func(*args, **kwargs)
        if _differentiable(result) and _takes_part(*_flat(args), *kwargs.values()):
            self.attachment.left_out(func, args, kwargs)
            if not self.attachment.composite.plain:
                return moved(func, args, kwargs)
        return result


def _refuse_in_place(func: Any, args: Any) -> None:
    """Layers keep their output's storage; an operation that overwrites it would change the rule."""
    name = getattr(func, "__name__", "")
    writes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    if writes and args and isinstance(args[0], Tensor) and args[0].grad_fn is not None:
        raise ValueError(
            f"lfp_kernels: {resolve_name(func) or name} has no in-place rule: expected the "
            "out-of-place form on an activation; rewrite that line of the model"
        )


def _differentiable(result: Any) -> bool:
    return any(
        isinstance(t, Tensor) and t.grad_fn is not None and t.is_floating_point()
        for t in _flat((result,))
    )


def _flat(values: Any) -> list[Any]:
    flat: list[Any] = []
    for value in values:
        if isinstance(value, (tuple, list)):
            flat.extend(value)
        else:
            flat.append(value)
    return flat
