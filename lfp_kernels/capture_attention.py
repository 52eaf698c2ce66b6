"""What a transformer's forward calls beside layers, and the rule of each call."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as TF
from torch import Tensor

from . import autograd
from . import autograd_attention as R
from .attention_masks import module_mask
from .autograd import learned, owned, relevant
from .capture import TABLE, Handler, _bind, _refuse_view, signed

if TYPE_CHECKING:
    from .composites import Attachment
    from .composites.transformer import Transformer


def _active(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _of(at: Attachment) -> Transformer:
    return at.composite  # type: ignore[return-value]


def _softmax(
    at: Attachment, x: Tensor, dim: Any = None, _stacklevel: Any = 3, dtype: Any = None, **_: Any
) -> Tensor:
    if isinstance(_stacklevel, torch.dtype):  # the third of torch.softmax
        dtype = _stacklevel
    return R.SoftmaxReward.apply(owned(x), -1 if dim is None else dim, dtype)


def _product(at: Attachment, function: Any, a: Tensor, b: Tensor, **options: Any) -> Tensor:
    """A product of two activations halves the reward; that with a constant or a parameter hands it
    on."""
    both = _active(a) and _active(b) and not (learned(a) or learned(b))
    shares = (0.5, 0.5) if both else (1.0, 1.0)
    return R.ProductReward.apply(
        owned(a), owned(b), lambda x, y: function(x, y, **options), shares, _of(at).eps
    )


def _einsum(at: Attachment, equation: str, *operands: Any) -> Tensor:
    tensors = operands[0] if isinstance(operands[0], (list, tuple)) else operands
    if len(tensors) != 2:
        at.left_out(torch.einsum, tensors, {})
        return torch.einsum(equation, *operands)
    return _product(at, lambda a, b: torch.einsum(equation, a, b), *tensors)


def _baddbmm(
    at: Attachment, input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1,
    alpha: float = 1,
) -> Tensor:  # fmt: skip
    z = _product(at, lambda x, y: alpha * torch.bmm(x, y), batch1, batch2)
    return z if beta == 0 else TABLE[torch.add](at, z, beta * owned(input))


def _multiply(at: Attachment, function: Any, a: Any, b: Any) -> Any:
    """Numbers, constants and parameters (LayerScale) hand the reward on; of two activations each
    gets half, or the gate (the one behind an activation function) nothing."""
    if not (_active(a) and _active(b)):
        x, other = (a, b) if _active(a) else (b, a)
        forward = function if x is a else lambda v, w: function(w, v)
        return autograd.IdentityReward.apply(owned(x), lambda v: forward(v, other), False)
    if function is not operator.mul:
        at.left_out(function, (a, b), {})
        return function(a, b)
    shares = (0.5, 0.5)
    if learned(a) or learned(b):
        shares, a, b = (1.0, 1.0), owned(a), owned(b)
    elif _of(at).gate == "identity":
        gated = [type(t.grad_fn).__name__.startswith("IdentityReward") for t in (a, b)]
        if gated[0] != gated[1]:
            shares = (0.0, 1.0) if gated[0] else (1.0, 0.0)
    return R.ProductReward.apply(a, b, function, shares, _of(at).eps)


def _power(at: Attachment, input: Any, exponent: Any = 2) -> Any:
    """A power by a positive number is a product with itself, of which nothing is lost: all of the
    reward passes; in mode plain, as there, the gradient."""
    if not isinstance(exponent, (int, float)) or exponent <= 0:
        at.left_out(torch.pow, (input, exponent), {})
        return torch.pow(input, exponent)
    if _of(at).mode == "plain":
        return torch.pow(owned(input), exponent)
    return autograd.IdentityReward.apply(owned(input), lambda x: torch.pow(x, exponent), False)


def _refuse_learned(function: str, **masks: Any) -> None:
    """A mask takes its share of the reward and has no rule that hands it on."""
    for name, mask in masks.items():
        if _active(mask):
            raise ValueError(
                f"composite: {function}: {name}: expected a mask that needs no feedback, got one "
                "with requires_grad=True; detach it, or write attention out: q @ k.mT * scale + "
                f"{name}, softmax, @ v"
            )


def _attention(
    at: Attachment, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    _refuse_learned("scaled_dot_product_attention", attn_mask=attn_mask)
    q, k, v = map(owned, (query, key, value))
    if not enable_gqa and k.shape[:-2] != q.shape[:-2]:  # torch broadcasts the leading dimensions
        front = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
        q, k, v = (t.expand(*front, *t.shape[-2:]) for t in (q, k, v))
    seed = int(torch.randint(2**31, ())) if dropout_p else 0
    options = {"causal": is_causal, "scale": scale, "dropout": dropout_p, "seed": seed}
    mode, eps = _of(at).mode, _of(at).eps
    return R.AttentionReward.apply(q, k, v, attn_mask, options, {"mode": mode, "eps": eps})


def _multi_head(
    at: Attachment, query: Tensor, key: Tensor, value: Tensor, embed_dim_to_check: int,
    num_heads: int, in_proj_weight: Any, in_proj_bias: Any, bias_k: Any, bias_v: Any,
    add_zero_attn: bool, dropout_p: float, out_proj_weight: Tensor, out_proj_bias: Any,
    training: bool = True, key_padding_mask: Any = None, need_weights: bool = True,
    attn_mask: Any = None, use_separate_proj_weight: bool = False, q_proj_weight: Any = None,
    k_proj_weight: Any = None, v_proj_weight: Any = None, static_k: Any = None,
    static_v: Any = None, average_attn_weights: bool = True, is_causal: bool = False,
) -> tuple[Tensor, None]:  # fmt: skip
    """nn.MultiheadAttention: its projections are linear layers, the rest is attention."""
    if bias_k is not None or add_zero_attn or static_k is not None or static_v is not None:
        raise ValueError(
            "composite: multi_head_attention: expected add_bias_kv=False and add_zero_attn=False; "
            "appended keys have no rule"
        )
    if need_weights:
        raise ValueError(
            "composite: multi_head_attention: need_weights: expected False while attached; the "
            "probabilities are never kept"
        )
    name = "multi_head_attention"
    _refuse_learned(name, attn_mask=attn_mask, key_padding_mask=key_padding_mask)
    weights = (q_proj_weight, k_proj_weight, v_proj_weight)
    if not use_separate_proj_weight:
        weights = in_proj_weight.chunk(3)
    layer = at.rule_of_weight(q_proj_weight if use_separate_proj_weight else in_proj_weight)
    biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)

    def heads(x: Tensor, weight: Tensor, bias: Any) -> Tensor:  # [L, N, E] -> [N, heads, L, E / h]
        z = autograd.LinearReward.apply(x, weight, bias, None, layer, at.product_dtype(x))
        return z.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3)

    batched = query.dim() == 3
    inputs = [x if batched else x.unsqueeze(1) for x in (query, key, value)]
    q, k, v = (heads(x, w, b) for x, w, b in zip(inputs, weights, biases))
    mask = module_mask(name, attn_mask, key_padding_mask, q, k, batched=batched)
    causal = is_causal and attn_mask is None  # beside a mask it is a hint that the mask says so
    drop = dropout_p if training else 0.0
    function = TF.scaled_dot_product_attention
    attend = _of(at).handlers()[function]
    y = attend(at, q, k, v, attn_mask=mask, dropout_p=drop, is_causal=causal)
    y = y.permute(2, 0, 1, 3).flatten(-2)
    out_layer = at.rule_of_weight(out_proj_weight)
    z = autograd.LinearReward.apply(
        y, out_proj_weight, out_proj_bias, None, out_layer, at.product_dtype(y)
    )
    return (z if batched else z.squeeze(1)), None


def _norm(at: Attachment, x: Tensor, weight: Any, bias: Any, function: Any, **kind: Any) -> Tensor:
    options = {**kind, "stabilizer": _of(at).eps, "identity": _of(at).norms == "attnlrp"}
    return R.NormReward.apply(x, weight, bias, function, options)


def _layer_norm(
    at: Attachment, input: Tensor, normalized_shape: Any, weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    shape = tuple(normalized_shape)
    flat = input.flatten(-len(shape)) if weight is None and len(shape) > 1 else input

    def norm(x: Tensor) -> Tensor:
        return TF.layer_norm(x.view(input.shape), shape, weight, bias, eps).view(x.shape)

    return _norm(at, flat, weight, bias, norm, eps=eps).view(input.shape)


def _rms_norm(
    at: Attachment, input: Tensor, normalized_shape: Any, weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:  # fmt: skip
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    shape = tuple(normalized_shape)
    flat = input.flatten(-len(shape)) if weight is None and len(shape) > 1 else input

    def norm(x: Tensor) -> Tensor:
        return TF.rms_norm(x.view(input.shape), shape, weight, eps).view(x.shape)

    return _norm(at, flat, weight, None, norm, centred=False, eps=eps).view(input.shape)


def _group_norm(
    at: Attachment, input: Tensor, num_groups: int, weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    return _norm(
        at, input, weight, bias, lambda x: TF.group_norm(x, num_groups, weight, bias, eps),
        groups=num_groups, eps=eps,
    )  # fmt: skip


def _embedding(
    at: Attachment, input: Tensor, weight: Tensor, padding_idx: int | None = None,
    max_norm: float | None = None, norm_type: float = 2.0, scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:  # fmt: skip
    if max_norm is not None or scale_grad_by_freq:
        raise ValueError(
            "composite: embedding: expected max_norm=None and scale_grad_by_freq=False; rows that "
            "change in forward have no rule"
        )
    return R.EmbeddingReward.apply(weight, input, padding_idx, sparse, _of(at).eps)


def _addmm(at: Attachment, input: Tensor, mat1: Tensor, mat2: Tensor, **scale: Any) -> Tensor:
    """A linear layer that keeps its weight as [I, O] (GPT-2's Conv1D)."""
    if any(value != 1 for value in scale.values()):
        at.left_out(torch.addmm, (input, mat1, mat2), {})
        return torch.addmm(input, mat1, mat2, **scale)
    layer, product = at.rule_of_weight(mat2), at.product_dtype(mat1)
    weight, bias = relevant(mat2).t(), relevant(input)
    return autograd.LinearReward.apply(owned(mat1), weight, bias, layer.matrix, layer, product)


def _add(at: Attachment, input: Any, other: Any, *, alpha: Any = 1) -> Any:
    """The rule of sums. A constant (a table of sines, a mask) gets the share that a parameter in
    its place would get: freezing one changes no other's reward."""
    if not _active(input) and alpha == 1:
        input, other = other, input  # the activation decides the dtype
    return TABLE[torch.add](at, input, other, alpha=alpha)


def _repeat(at: Attachment, function: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A parameter for every sample (a class token) is an activation from here on."""
    return function(owned(x), *args, **kwargs)


def _subtract(at: Attachment, a: Any, b: Any, *, alpha: Any = 1) -> Any:
    if _active(b):
        return _add(at, a, autograd.IdentityReward.apply(owned(b), lambda v: -alpha * v, False))
    return _add(at, a, -b)


def _negative(at: Attachment, x: Tensor) -> Tensor:
    return autograd.IdentityReward.apply(owned(x), torch.neg, False)


def _plain(at: Attachment, function: Any, *args: Any, **kwargs: Any) -> Any:
    """The gradient acts on the reward; what arrives at a parameter is signed as elsewhere."""
    return function(*map(owned, args), **{k: owned(v) for k, v in kwargs.items()})


_SOFTMAX: tuple[Any, ...] = (torch.softmax, TF.softmax, Tensor.softmax)
_MATMUL: tuple[Any, ...] = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
_MULTIPLY: tuple[tuple[Any, ...], Any] = (
    (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__),
    operator.mul,
)
_DIVIDE: tuple[tuple[Any, ...], Any] = (
    (torch.div, Tensor.div, Tensor.__truediv__),
    operator.truediv,
)
_ADD: tuple[Any, ...] = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
_SUBTRACT: tuple[Any, ...] = (torch.sub, Tensor.sub, Tensor.__sub__)
_POWER: tuple[Any, ...] = (
    torch.pow,
    Tensor.pow,
    Tensor.__pow__,
    torch.square,
    Tensor.square,
)
_NEGATE: tuple[Any, ...] = (torch.neg, Tensor.neg, Tensor.__neg__)
_REPEATS: tuple[Any, ...] = (
    Tensor.expand,
    Tensor.expand_as,
    Tensor.repeat,
    torch.broadcast_to,
    Tensor.broadcast_to,
    torch.tile,
)
_ROUTES: tuple[Any, ...] = (
    torch.where,
    Tensor.where,
    torch.masked_fill,
    Tensor.masked_fill,
    Tensor.triu,
)


def _shared() -> dict[Any, Handler]:
    table: dict[Any, Handler] = {
        TF.embedding: signed(_embedding, "input"), torch.addmm: _addmm, Tensor.addmm: _addmm,
        TF.multi_head_attention_forward: signed(_multi_head, "query", "key", "value"),
        TF.scaled_dot_product_attention: _attention,
    }  # fmt: skip
    for norm in (_layer_norm, _rms_norm, _group_norm):
        table[getattr(TF, norm.__name__[1:])] = signed(norm, "input")
    table[torch.layer_norm] = table[TF.layer_norm]
    for function in _ADD:
        table[function] = _add
    for function in _POWER:
        table[function] = _power
    for function in _ROUTES:
        table[function] = _bind(_plain, function)
    for function in _REPEATS:
        table[function] = _bind(_repeat, function)
    return table


def _attnlrp() -> dict[Any, Handler]:
    table = _shared()
    for function in _SUBTRACT:
        table[function] = _subtract
    for function in _NEGATE:
        table[function] = _negative
    for function in _SOFTMAX:
        table[function] = _softmax
    for function in _MATMUL:
        table[function] = _bind(_product, function)
    table[torch.einsum] = _einsum
    table[torch.baddbmm] = table[Tensor.baddbmm] = _baddbmm
    for functions, operation in (_MULTIPLY, _DIVIDE):
        for function in functions:
            table[function] = _bind(_multiply, operation)
    return table


def _gradient() -> dict[Any, Handler]:
    """Softmax and products as autograd derives them."""
    table = _shared()
    others = (torch.einsum, torch.baddbmm, Tensor.baddbmm)
    for function in (
        *_SOFTMAX,
        *_MATMUL,
        *_MULTIPLY[0],
        *_DIVIDE[0],
        *_SUBTRACT,
        *_NEGATE,
        *others,
    ):
        table[function] = _bind(_plain, function)
    return table


def _copy_in_place(at: Attachment, input: Tensor, other: Any, *, alpha: Any = 1) -> Tensor:
    _refuse_view(Tensor.add_, input)
    other = torch.as_tensor(owned(other), dtype=input.dtype, device=input.device)
    return R.CopyingSumReward.apply(input, other if alpha == 1 else other * alpha)


def _copying(table: dict[Any, Handler]) -> dict[Any, Handler]:
    """Every operand of a sum gets the whole reward."""
    copied: dict[Any, Handler] = {function: _bind(_plain, function) for function in _ADD}
    for function in (Tensor.add_, Tensor.__iadd__):
        copied[function] = _copy_in_place
    return {**table, **copied}


TABLES: dict[tuple[str, str], dict[Any, Handler]] = {
    (mode, residual): table if residual == "epsilon" else _copying(table)
    for mode, table in (("plain", _gradient()), ("attnlrp", _attnlrp()))
    for residual in ("epsilon", "gradient")
}
