"""Traced calls of transformers as stages: which rule of capture_attention.py becomes which stage.

What no reward can reach (masks, positions, sizes) is computed as torch defines it; the drop-in way
decides by ``requires_grad``, and here ``builder.active`` says the same before anything runs.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import Tensor, fx, nn

from .. import nn as lfp_nn
from ..composites import Transformer
from . import product_calls as C
from . import routes as R
from . import structure as M
from . import transformer as T
from .attention_modules import multi_head
from .linear_views import TransposedLinear

# Linear in their inputs; the drop-in way leaves them to torch too (calls.STRUCTURAL).
_MOVES = (
    "stack", "hstack", "vstack", "roll", "flip", "where", "index_select", "gather",
    "repeat_interleave", "triu", "clone",
)  # fmt: skip
_VIEWS = ("narrow", "select", "movedim", "swapaxes", "swapdims", "t", "T", "H", "mT", "mH")
_CASTS = ("to", "float", "double", "bfloat16", "half", "type", "type_as")
_REPEATS = ("expand", "expand_as", "broadcast_to", "repeat", "tile")


def module_stage(builder: Any, node: fx.Node, module: nn.Module) -> bool:
    """Adds the stages of a module that composites.Transformer has a rule for; whether it was."""
    composite = builder.composite
    if not isinstance(composite, Transformer):
        return False
    x: Any = node.args[0] if node.args else None
    if isinstance(module, nn.MultiheadAttention) and builder.time is None:
        multi_head(builder, node, module)
        return True
    if composite.is_activation(module):
        kind = type(module).__name__
        builder.add(node, M.Activation(module, kind, derivative=not builder.linear), x)
        return True
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None or module.scale_grad_by_freq:
            raise builder.refuse(node, f"{node.target} (Embedding whose rows change in forward)")
        _embed(builder, node, x, module.weight, module.padding_idx, module.sparse)
        return True
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)):
        kind = {nn.RMSNorm: "rms_norm", nn.GroupNorm: "group_norm"}.get(type(module), "layer_norm")
        slot = builder.slot(x)
        stage = T.Norm(
            kind, lambda values: module(values[slot]), module.weight,
            getattr(module, "bias", None), composite, eps=module.eps,
            axes=len(getattr(module, "normalized_shape", (1,))),
            groups=getattr(module, "num_groups", None),
        )  # fmt: skip
        builder.add(node, stage, x)
        return True
    if isinstance(module, lfp_nn.Sum) and builder.time is None:
        C.add(builder, node, SimpleNamespace(input=node.args[0], other=node.args[1], alpha=1))
        return True
    if isinstance(module, (nn.Softmax, nn.Softmax2d)) and builder.active(x):
        dim = -3 if isinstance(module, nn.Softmax2d) else module.dim
        C.softmax(builder, node, SimpleNamespace(input=x, dim=dim, dtype=None))
        return True
    return False


def function_stage(builder: Any, node: fx.Node) -> bool:
    """Adds the stages of a call that transformers make; whether it was one."""
    x: Any = node.args[0] if node.args else None
    if node.target is operator.getitem and x in builder.tuples:
        found = builder.tuples[x]
        if node.args[1] in (0, -2):
            builder.slots[node] = found[0]
        elif node.users:
            raise builder.refuse(node, "the probabilities of attention")
        return True
    name = C.name_of(node)
    if name in ("unbind", "chunk", "split"):
        _take_apart(builder, node, name)
        return True
    if node.target is operator.getitem and x in builder.taken_apart:
        if not isinstance(node.args[1], int):
            raise builder.refuse(node, "some parts of a tensor")
        builder.add(node, T.Item(node.args[1]), x)
        return True
    if not isinstance(builder.composite, Transformer) or builder.time is not None:
        return False
    if name == "scaled_dot_product_attention":
        _attention(builder, node)
        return True
    if not any(builder.active(n) for n in node.all_input_nodes):
        return False
    if node.target in (operator.iadd, "add_"):
        C.add_in_place(builder, node, *node.args[:2])
        return True
    if name in _CALLS:
        make, form = _CALLS[name]
        make(builder, node, form and _given(builder, node, form))
        return True
    if name in ("reshape", "flatten", "contiguous") and builder.learned(x):
        weight = builder.attributes.get(x)
        if weight is None or not weight.is_contiguous():  # a copy is no part of the parameter
            raise builder.refuse(node, f"{name} of a part of a parameter")
    return False


def _given(builder: Any, node: fx.Node, form: Callable[..., None]) -> Any:
    """The arguments of a call by their names in ``form``."""
    try:
        bound = inspect.signature(form).bind(*node.args, **node.kwargs)
    except TypeError:
        raise builder.refuse(node, f"this form of {C.name_of(node)}") from None
    bound.apply_defaults()
    return SimpleNamespace(**bound.arguments)


# -- layers as functions -------------------------------------------------------------------------


def _embed(
    builder: Any, node: fx.Node, tokens: Any, weight: Tensor, padding: int | None, sparse: bool
) -> None:
    read = builder.getter(tokens)
    builder.emit_for(node, T.Embedding(read, weight, padding, sparse, builder.composite), [])


def _embedding(builder: Any, node: fx.Node, given: Any) -> None:
    weight = builder.attributes.get(given.weight)
    if not isinstance(weight, nn.Parameter) or given.max_norm is not None:
        raise builder.refuse(node, "this form of embedding")
    if given.scale_grad_by_freq or builder.active(given.input):
        raise builder.refuse(node, "this form of embedding")
    _embed(builder, node, given.input, weight, given.padding_idx, given.sparse)


def _norm(builder: Any, node: fx.Node, given: Any) -> None:
    name = C.name_of(node)
    weight, bias = (builder.constant(v) for v in (given.weight, getattr(given, "bias", None)))
    if any(isinstance(v, fx.Node) for v in (weight, bias)):
        raise builder.refuse(node, f"{name} whose weight is computed")
    shape = list(vars(given).values())[1]  # or the number of groups
    axes = weight.dim() if weight is not None else 1
    if weight is None and name != "group_norm":
        if not isinstance(shape, (tuple, list)):
            raise builder.refuse(node, f"{name} over computed dimensions")
        axes = len(shape)
    if isinstance(given.eps, fx.Node) or (isinstance(shape, fx.Node) and name == "group_norm"):
        raise builder.refuse(node, f"{name} with computed settings")
    stage = T.Norm(
        name, builder.reshaper(node), weight, bias, builder.composite, eps=given.eps, axes=axes,
        groups=shape if name == "group_norm" else None,
    )  # fmt: skip
    builder.add(node, stage, given.input)


def _addmm(builder: Any, node: fx.Node, given: Any) -> None:
    """A linear layer that keeps its weight as [I, O] (GPT-2's Conv1D)."""
    C.refuse_scales(builder, node, given)
    weight, bias = (builder.constant(v) for v in (given.mat2, given.input))
    if not isinstance(weight, Tensor):
        raise builder.refuse(node, "addmm whose mat2 is no parameter of the model")
    if not isinstance(bias, Tensor) or bias.dim() != 1:
        raise builder.refuse(node, "addmm whose input is no vector of the model")
    stage = TransposedLinear(weight, bias, builder.layer_of(weight), builder.composite)
    builder.add(node, stage, given.mat1)


def _dropout(builder: Any, node: fx.Node, given: Any) -> None:
    if given.inplace or any(isinstance(v, fx.Node) for v in (given.p, given.training)):
        raise builder.refuse(node, "this form of dropout")
    composite = builder.composite
    conserving = composite.dropout == "conserving"
    settings = SimpleNamespace(p=given.p, training=given.training)
    builder.add(node, M.Dropout(settings, conserving), given.input)


def _attention_form(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: Any = 0.0,
    is_causal: Any = False, *, scale: Any = None, enable_gqa: Any = False,
) -> None:  # fmt: skip
    """How torch calls the arguments of attention."""


def _attention(builder: Any, node: fx.Node) -> None:
    given = _given(builder, node, _attention_form)
    options = {"causal": given.is_causal, "scale": given.scale, "dropout": given.dropout_p}
    for name, value in options.items():
        if isinstance(value, fx.Node):
            raise builder.refuse(node, f"attention whose {name} is computed")
    if builder.active(given.attn_mask):
        raise builder.refuse(node, "attention whose mask is learned")
    stage = T.Attention(builder.composite, builder.getter(given.attn_mask), options)
    slots = [builder.slot(v) for v in (given.query, given.key, given.value)]
    builder.emit_for(node, stage, slots)


# -- routes --------------------------------------------------------------------------------------


def _index(builder: Any, node: fx.Node, given: Any) -> None:
    parts = given.index if isinstance(given.index, tuple) else (given.index,)
    basic = all(p is None or p is Ellipsis or isinstance(p, slice) or _is_size(p) for p in parts)
    if not basic:  # a copy
        return _move(builder, node, given)
    builder.add(node, R.Index(builder.resolver(node)), given.input)


def _is_size(value: Any) -> bool:
    """A number, or a node that holds one: what may index, without copying, beside slices."""
    if not isinstance(value, fx.Node):
        return isinstance(value, int) and not isinstance(value, bool)
    if value.op == "call_method":
        return value.target in ("dim", "numel") or (value.target == "size" and len(value.args) > 1)
    if value.target is operator.getitem:
        of: Any = value.args[0]
        shape = isinstance(of, fx.Node) and of.target in (getattr, "size")
        return shape and isinstance(value.args[1], int)
    arithmetic = (operator.add, operator.sub, operator.mul, operator.floordiv, operator.neg)
    return value.target in arithmetic and all(_is_size(a) for a in value.args)


def _fill(builder: Any, node: fx.Node, given: Any) -> None:
    if builder.active(given.value) or builder.active(given.mask):
        raise builder.refuse(node, "masked_fill by an activation")
    builder.add(node, R.Fill(builder.reshaper(node), builder.resolver(node)), given.input)


def _take_apart(builder: Any, node: fx.Node, name: str) -> None:
    sizes, options = list(node.args[1:]), dict(node.kwargs)
    last = options.pop("dim", None)
    arguments = (*sizes, *options.values(), *(() if last is None else (last,)))
    if fx.node.map_arg(arguments, lambda n: None) != arguments:
        raise builder.refuse(node, f"{name} into computed sizes")
    builder.taken_apart.add(node)
    builder.add(node, T.TakeApart(name, arguments), node.args[0])


def _detach(builder: Any, node: fx.Node, given: Any) -> None:
    """No reward passes here, because the model says so."""
    builder.emit_for(node, M.Host(builder.reshaper(node)), [])


def _cast(builder: Any, node: fx.Node, given: Any) -> None:
    x: Any = node.args[0]
    if builder.learned(x):
        builder.emit_for(node, R.Uncast(builder.reshaper(node)), [builder.slot(x)])
    else:
        _move(builder, node, given)


def _move(builder: Any, node: fx.Node, given: Any) -> None:
    """``expand`` and its like, and whatever copies, make an activation of a parameter."""
    name = C.name_of(node)
    call, slots = builder.reshaper(node), {}
    like = name in _CASTS or name == "expand_as"  # what comes second says how, not what
    for value in node.all_input_nodes[: 1 if like else None]:
        if not builder.active(value):
            continue
        slot = builder.slot(value)
        slots[value] = slot if name in _VIEWS else builder.signed(slot)
        call.resolve.slots[value] = slots[value]
    if not slots:
        return builder.emit_for(node, M.Host(call), [])
    stage = R.Expand(call) if name in _REPEATS[:3] and len(slots) == 1 else R.Moved(call)
    stage.views = name in _VIEWS
    builder.emit_for(node, stage, list(slots.values()))


_Make = Callable[[Any, fx.Node, Any], None]
# The calls, by name: what makes the stage, and the form of the arguments (None: not looked at).
_CALLS: dict[str, tuple[_Make, Callable[..., None] | None]] = {
    "add": (C.add, lambda input, other, *, alpha=1: None),
    "sub": (C.subtract, lambda input, other, *, alpha=1: None),
    "mul": (C.multiply, lambda input, other: None),
    "div": (C.divide, lambda input, other, *, rounding_mode=None: None),
    "pow": (C.power, lambda input, exponent: None),
    "square": (C.power, lambda input: None),
    "neg": (C.negate, lambda input: None),
    "matmul": (C.matmul, lambda input, other: None),
    "einsum": (C.matmul, lambda equation, a, b: None),
    "bmm": (C.matmul, lambda input, mat2: None),
    "addmm": (_addmm, lambda input, mat1, mat2, *, beta=1, alpha=1: None),
    "baddbmm": (C.baddbmm, lambda input, batch1, batch2, *, beta=1, alpha=1: None),
    "softmax": (C.softmax, lambda input, dim=None, _stacklevel=3, dtype=None: None),
    "mean": (C.reduce, lambda input, dim=None, keepdim=False, *, dtype=None: None),
    "sum": (C.reduce, lambda input, dim=None, keepdim=False, *, dtype=None: None),
    "layer_norm": (_norm, lambda input, normalized_shape, weight=None, bias=None, eps=1e-5: None),
    "rms_norm": (_norm, lambda input, normalized_shape, weight=None, eps=None: None),
    "group_norm": (_norm, lambda input, num_groups, weight=None, bias=None, eps=1e-5: None),
    "dropout": (_dropout, lambda input, p=0.5, training=True, inplace=False: None),
    "getitem": (_index, lambda input, index: None),
    "masked_fill": (_fill, lambda input, mask, value: None),
    "detach": (_detach, None),
    "embedding": (
        _embedding,
        lambda input, weight, padding_idx=None, max_norm=None, norm_type=2.0,
        scale_grad_by_freq=False, sparse=False: None,
    ),
    **dict.fromkeys((*_MOVES, *_VIEWS, *_REPEATS), (_move, None)),
    **dict.fromkeys(_CASTS, (_cast, None)),
}  # fmt: skip
