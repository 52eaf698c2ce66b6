"""Traced sums, products, softmax and reductions of activations as stages."""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor, fx

from . import products as P
from . import stages as S
from . import structure as M

_OPERATORS = {
    operator.add: "add", operator.mul: "mul", operator.truediv: "div", operator.sub: "sub",
    operator.neg: "neg", operator.pow: "pow", operator.matmul: "matmul",
    operator.getitem: "getitem",
}  # fmt: skip


def name_of(node: fx.Node) -> str:
    """The torch name of a call, however it is spelled; "" of what torch does not offer."""
    target: Any = node.target
    if node.op == "call_method":
        return str(target) if hasattr(Tensor, str(target)) else ""
    if target in _OPERATORS:
        return _OPERATORS[target]
    if target is getattr:
        return str(node.args[1])
    name = str(getattr(target, "__name__", ""))
    return name if target in (getattr(torch, name, None), getattr(TF, name, None)) else ""


def _both(builder: Any, node: fx.Node, a: Any, b: Any) -> tuple[bool, bool]:
    for value in (a, b):
        if not isinstance(value, (fx.Node, int, float)):
            raise builder.refuse(node, f"{name_of(node)} with {value!r}")
    return builder.active(a), builder.active(b)


# -- sums ----------------------------------------------------------------------------------------


def add(builder: Any, node: fx.Node, given: Any) -> None:
    if given.alpha != 1:
        raise builder.refuse(node, "a sum with alpha")
    copied = builder.composite.residual == "gradient"
    _sum(builder, node, given.input, given.other, copied=copied)


def _sum(builder: Any, node: fx.Node, a: Any, b: Any, *, copied: bool, minus: bool = False) -> None:
    """``a + b`` or, of ``minus``, ``a - b``."""
    live = _both(builder, node, a, b)
    slots = [builder.slot(a)] if live[0] else []
    if live[1] and minus:
        scaled = P.Scaled("neg", builder.composite, lambda values: None)
        slots.append(builder.emit(scaled, [builder.slot(b)], f"{node.name}.minus"))
    elif live[1]:
        slots.append(builder.slot(b))
    rule = builder.composite.function_rule
    if all(live):
        stage: S.Stage = P.CopiedSum() if copied else S.Sum(rule)
        return builder.emit_for(node, stage, slots)
    other = builder.getter(b if live[0] else a)
    if minus and live[0]:
        read = other
        other = lambda values: -read(values)  # noqa: E731
    stage = P.CopiedSum(other) if copied else P.SumWithConstant(rule, other)
    builder.emit_for(node, stage, slots)


def add_in_place(builder: Any, node: fx.Node, a: Any, b: Any) -> None:
    """``a += b``: the stage of ``a + b``, and other names of a see the sum too."""
    live = _both(builder, node, a, b)
    if a in builder.attributes or builder.learned(a) or node.kwargs.get("alpha"):
        raise builder.refuse(node, "this form of a sum in place")
    rule, copied = builder.composite.function_rule, builder.composite.residual == "gradient"
    slots = [builder.slot(a)] if live[0] else []
    if live[1]:
        slots.append(builder.slot(b))
    if all(live):
        stage: S.Stage = P.CopiedSum() if copied else S.Sum(rule)
    else:
        other = builder.getter(b if live[0] else a)
        stage = P.CopiedSum(other) if copied else P.SumWithConstant(rule, other)
    builder.emit_for(node, stage, slots)
    builder.overwrite(node, a)


def subtract(builder: Any, node: fx.Node, given: Any) -> None:
    if given.alpha != 1 or not isinstance(given.input, fx.Node):
        raise builder.refuse(node, "this form of a difference")
    plain = builder.composite.mode == "plain"
    _sum(builder, node, given.input, given.other, copied=plain, minus=True)


# -- products ------------------------------------------------------------------------------------


def multiply(builder: Any, node: fx.Node, given: Any) -> None:
    a, b = given.input, given.other
    composite = builder.composite
    live = _both(builder, node, a, b)
    if not all(live):
        x, other = (a, b) if live[0] else (b, a)
        stage = P.Scaled("mul", composite, builder.getter(other))
        return builder.emit_for(node, stage, [builder.slot(x)])
    if composite.mode == "plain":
        return builder.add(node, P.Product(composite, (1.0, 1.0)), a, b)
    shares = (0.5, 0.5)
    if builder.learned(a) or builder.learned(b):
        shares = (1.0, 1.0)
    elif composite.gate == "identity":
        gated = [_gated(builder, v) for v in (a, b)]
        if gated[0] != gated[1]:
            shares = (0.0, 1.0) if gated[0] else (1.0, 0.0)
    builder.add(node, P.Product(composite, shares), a, b)


def _gated(builder: Any, value: fx.Node) -> bool:
    """Whether an activation function made the value; dropout that does nothing stands aside."""
    stage = builder.maker(value)
    while isinstance(stage, M.Dropout) and not (stage.module.training and stage.module.p):
        stage = next((s for s in builder.stages if s.output == stage.inputs[0]), None)
    return isinstance(stage, (M.Activation, P.Scaled))


def divide(builder: Any, node: fx.Node, given: Any) -> None:
    live = _both(builder, node, given.input, given.other)
    if given.rounding_mode is not None or live != (True, False):
        raise builder.refuse(node, "a division by an activation")
    stage = P.Scaled("div", builder.composite, builder.getter(given.other))
    builder.emit_for(node, stage, [builder.slot(given.input)])


def negate(builder: Any, node: fx.Node, given: Any) -> None:
    builder.add(node, P.Scaled("neg", builder.composite, lambda values: None), given.input)


def power(builder: Any, node: fx.Node, given: Any) -> None:
    exponent = getattr(given, "exponent", 2)
    positive = isinstance(exponent, (int, float)) and exponent > 0
    if not positive or not isinstance(given.input, fx.Node):
        raise builder.refuse(node, "a power by what is no positive number")
    builder.add(node, P.Power(builder.composite, exponent), given.input)


def matmul(builder: Any, node: fx.Node, given: Any) -> None:
    """``a @ b``, or einsum of two."""
    *equation, a, b = vars(given).values()
    if equation and not isinstance(equation[0], str):
        raise builder.refuse(node, "this form of einsum")
    composite = builder.composite
    live = _both(builder, node, a, b)
    learned = builder.learned(a) or builder.learned(b)
    share = 0.5 if all(live) and not learned else 1.0
    kind = P.MatrixProduct if not equation else partial(P.Contraction, equation[0])
    builder.add(node, kind(composite, share, live), a, b)


def refuse_scales(builder: Any, node: fx.Node, given: Any) -> None:
    for name in ("beta", "alpha"):
        if getattr(given, name) != 1:
            raise builder.refuse(node, f"{name_of(node)} with {name} other than 1")


def baddbmm(builder: Any, node: fx.Node, given: Any) -> None:
    """``input + a @ b``; its sum is one of products: residual="gradient" does not reach it."""
    refuse_scales(builder, node, given)
    a, b, c = given.batch1, given.batch2, given.input
    live = _both(builder, node, a, b)
    if not any(live):
        raise builder.refuse(node, "baddbmm of two constants")
    composite = builder.composite
    learned = builder.learned(a) or builder.learned(b)
    product = P.MatrixProduct(composite, 0.5 if all(live) and not learned else 1.0, live)
    z = builder.emit(product, [builder.slot(a), builder.slot(b)], f"{node.name}.product")
    plain = composite.mode == "plain"
    if builder.active(c):
        stage: S.Stage = P.CopiedSum() if plain else S.Sum(composite.function_rule)
        return builder.emit_for(node, stage, [z, builder.slot(c)])
    other = builder.getter(c)
    stage = P.CopiedSum(other) if plain else P.SumWithConstant(composite.function_rule, other)
    builder.emit_for(node, stage, [z])


def softmax(builder: Any, node: fx.Node, given: Any) -> None:
    third = getattr(given, "_stacklevel", 3)
    dtype = third if isinstance(third, torch.dtype) else given.dtype  # torch.softmax's third
    if not isinstance(given.dim, int) or isinstance(dtype, fx.Node) or isinstance(third, fx.Node):
        raise builder.refuse(node, "this form of softmax")
    builder.add(node, P.Softmax(builder.composite, given.dim, dtype), given.input)


def reduce(builder: Any, node: fx.Node, given: Any) -> None:
    dims = given.dim
    constant = dims is None or isinstance(dims, int) or all(isinstance(d, int) for d in dims)
    if not constant or given.dtype is not None:
        raise builder.refuse(node, f"this form of {name_of(node)}")
    rule = builder.composite.function_rule
    builder.add(node, P.Reduction(rule, name_of(node), dims, given.keepdim), given.input)
