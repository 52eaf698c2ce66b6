"""Argument checks whose messages name op, argument, what was expected, what came, and the fix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import FLOATS
from .optim import STATES, Update
from .rules import REGISTRY, Derivative, Rule, RuleCall


def tensor(op: str, name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name}: expected a torch.Tensor, got {type(value).__name__}")
    return value


def floating(op: str, name: str, value: Any) -> Tensor:
    tensor(op, name, value)
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{op}: {name}: expected float64, float32, bfloat16 or float16, got {value.dtype}; "
            f"convert it with .float()"
        )
    return value


def like(op: str, name: str, value: Any, other: Tensor, other_name: str) -> Tensor:
    """Same dtype and device as ``other``."""
    tensor(op, name, value)
    if value.dtype != other.dtype:
        raise TypeError(
            f"{op}: {name}: expected {other.dtype} like {other_name}, got {value.dtype}; "
            f"convert it with .to({other.dtype})"
        )
    if value.device != other.device:
        raise ValueError(
            f"{op}: {name}: expected device {other.device} like {other_name}, got {value.device}; "
            f"move it with .to({str(other.device)!r})"
        )
    return value


def shape(op: str, name: str, value: Tensor, expected: Sequence[int]) -> Tensor:
    if tuple(value.shape) != tuple(expected):
        raise ValueError(
            f"{op}: {name}: expected shape {tuple(expected)}, got {tuple(value.shape)}"
        )
    return value


def rule(op: str, value: Any) -> Rule:
    if not isinstance(value, Rule):
        raise TypeError(
            f"{op}: rule: expected one of lfp_kernels.rules ({', '.join(sorted(REGISTRY))}), "
            f"got {value!r}; for example lfp_kernels.rules.Epsilon(eps=1e-6)"
        )
    return value


def plain_rule(op: str, value: Any) -> Rule:
    """A rule that functions without a weight matrix have."""
    rule(op, value)
    if not value.has_plain_form:
        raise ValueError(
            f"{op}: rule: {type(value).__name__} is a rule of weight matrices; expected Epsilon, "
            "Zero or Gradient here (composites choose rules per layer)"
        )
    return value


def product_dtype(op: str, value: torch.dtype | None, like: Tensor) -> torch.dtype:
    """Dtype of the feedback products: the tensors' own, or bfloat16 for float32 tensors."""
    if value is None or value == like.dtype:
        return like.dtype
    if value == torch.bfloat16 and like.dtype == torch.float32:
        return value
    raise ValueError(
        f"{op}: product_dtype: expected {like.dtype} or None"
        + (", or torch.bfloat16" if like.dtype == torch.float32 else "")
        + f", got {value}"
    )


def rule_call(
    op: str,
    x: Tensor,
    weight: Tensor,
    rule: Rule,
    need_input: bool,
    matrix: Any,
    below: Any,
    signal_in: bool,
    nonnegative: bool,
    dtype: torch.dtype | None,
) -> RuleCall:
    """The call of a layer's redistribution, with everything in it that a kernel relies on."""
    product = product_dtype(op, dtype, x)
    if need_input and not rule.has_input:
        raise ValueError(
            f"{op}: rule: {type(rule).__name__} is a rule of weights and has no input reward; use "
            f"Separate(input=Epsilon(), weight={type(rule).__name__}())"
        )
    if matrix is None:
        if need_input and rule.takes_matrix:
            raise ValueError(
                f"{op}: matrix: expected the feedback matrix of {type(rule).__name__}, a tensor of "
                f"shape {tuple(weight.shape)}, got None"
            )
    elif not rule.takes_matrix:
        matrix = None
    else:
        like(op, "matrix", matrix, weight, "weight")
        shape(op, "matrix", matrix, weight.shape)
    divides = isinstance(below, Rule) and below.chains and rule.chains
    if not (below is None or divides or isinstance(below, Derivative)):
        raise ValueError(
            f"{op}: below: expected a rule that divides by its output, below a rule that "
            f"multiplies by its input (epsilon), or a rules.Derivative, got {below!r}, {rule!r}"
        )
    if signal_in and rule.split:
        raise ValueError(
            f"{op}: signal_in: expected False with {type(rule).__name__}, which has two signals"
        )
    return RuleCall(rule, matrix, below, signal_in, nonnegative, product)


def update(op: str, name: str, value: Any, param: Tensor) -> Update:
    """An optimizer update whose states fit ``param``: the kernels write through them."""
    if not isinstance(value, Update):
        raise TypeError(
            f"{op}: {name}: expected an lfp_kernels.optim.Update, got {type(value).__name__}; "
            "BoundOptimizer.update_of makes one"
        )
    if value.live is not None and op != "optimizer_update":
        raise ValueError(
            f"{op}: {name}: expected an update known to the host, got one of a capturable "
            "optimizer, which reads the device; use functional.optimizer_update"
        )
    if STATES.get(value.code) != len(value.states):
        raise ValueError(
            f"{op}: {name}: expected a code of {STATES} with its number of states, "
            f"got code {value.code} with {len(value.states)}"
        )
    for k, state in enumerate(value.states):
        # The names are built for a message alone: this runs per parameter and step.
        if state.dtype != param.dtype or state.shape != param.shape or state.device != param.device:
            like(op, f"{name}.states[{k}]", state, param, "its parameter")
            shape(op, f"{name}.states[{k}]", state, param.shape)
        if not state.is_contiguous():
            raise ValueError(
                f"{op}: {name}.states[{k}]: expected a contiguous tensor, got strides "
                f"{state.stride()}; make it so with .contiguous()"
            )
    return value
