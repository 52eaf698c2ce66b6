"""Functions of transformers as autograd functions: backward = redistribution (see autograd.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autograd import _replace
from .functional import (
    attention,
    attention_redistribute,
    embedding_redistribute,
    norm_redistribute,
    softmax_redistribute,
)
from .rules import stabilize


class SoftmaxReward(torch.autograd.Function):
    """Softmax by AttnLRP's rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, dtype: Any):
        p = x.softmax(dim, dtype=dtype)
        ctx.save_for_backward(x.data, p.data)
        ctx.dim = dim
        return p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, reward: Tensor):
        x, p = ctx.saved_tensors
        found = softmax_redistribute(x.to(p.dtype), p, reward, ctx.dim)
        return found.to(x.dtype), None, None


class ProductReward(torch.autograd.Function):
    """A function linear in each of two activations (matmul, bmm, einsum, a gate): ``shares`` of the
    reward to the one and the other, by the epsilon rule."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, function: Callable, shares: tuple[float, float], eps: float
    ):
        z = function(a.data, b.data)
        ctx.save_for_backward(a.data, b.data, z.data)
        ctx.function, ctx.shares, ctx.eps = function, shares, eps
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, reward: Tensor):
        a, b, z = ctx.saved_tensors
        s = reward / stabilize(z, ctx.eps)
        wanted = [n and share != 0 for n, share in zip(ctx.needs_input_grad, ctx.shares)]
        with torch.enable_grad():
            probes = [t.detach().requires_grad_(w) for t, w in zip((a, b), wanted)]
            inputs = [t for t, w in zip(probes, wanted) if w]
            grads = iter(torch.autograd.grad(ctx.function(*probes), inputs, s) if inputs else [])
        first, second = (
            t * next(grads) * share if w else None
            for t, w, share in zip((a, b), wanted, ctx.shares)
        )
        return first, second, None, None, None


class CopyingSumReward(torch.autograd.Function):
    """``a += b``, each operand with the whole reward. As in every in-place call, ``a`` gets new
    storage: what was saved of the old one keeps its values."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor):
        ctx.shape = b.shape
        return _replace(ctx, a, a + b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, reward: Tensor):
        return reward, reward.sum_to_size(ctx.shape)


class AttentionReward(torch.autograd.Function):
    """scaled_dot_product_attention, block by block. ``rule``: mode and eps of its way back."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict, rule: dict
    ):
        out, lse = attention(q, k, v, mask, **options)
        ctx.save_for_backward(q.data, k.data, v.data, out.data, lse, mask)
        ctx.options, ctx.rule = options, rule
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, reward: Tensor):
        q, k, v, out, lse, mask = ctx.saved_tensors
        options = {"lse": lse, **ctx.rule, **ctx.options}
        found = attention_redistribute(q, k, v, out, reward, mask, **options)
        return *found, None, None, None


class NormReward(torch.autograd.Function):
    """Layer, RMS and group norm. ``options`` are those of ``norm_redistribute``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, function: Callable,
        options: dict,
    ):  # fmt: skip
        z = function(x.data)
        ctx.save_for_backward(x.data, weight, bias)
        ctx.options = options
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, reward: Tensor):
        x, weight, bias = ctx.saved_tensors
        return *norm_redistribute(x, weight, bias, reward, **ctx.options), None, None


class EmbeddingReward(torch.autograd.Function):
    """Rows of a table: the feedback of a row is ``|row| * r / stab(row)``, summed over its uses."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, tokens: Tensor, padding: int | None, sparse: bool, eps: float
    ):
        ctx.save_for_backward(weight, tokens)
        ctx.padding, ctx.sparse, ctx.eps = padding, sparse, eps
        return TF.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, reward: Tensor):
        weight, tokens = ctx.saved_tensors
        options = {"padding": ctx.padding, "eps": ctx.eps}
        if not ctx.sparse:
            found = embedding_redistribute(weight, tokens, reward, **options)
            return found, None, None, None, None
        rows = weight[tokens]
        feedback = rows.abs() * (reward / stabilize(rows, ctx.eps))
        if ctx.padding is not None:
            feedback = feedback.masked_fill((tokens == ctx.padding)[..., None], 0.0)
        total = torch.sparse_coo_tensor(
            tokens.reshape(1, -1), feedback.reshape(-1, weight.shape[1]), weight.shape,
            check_invariants=False,
        )  # fmt: skip
        return total, None, None, None, None
