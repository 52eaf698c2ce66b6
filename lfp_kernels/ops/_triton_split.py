"""Rules with two signals in Triton, what linear layers and convolutions share (docs/math.md,
section 3).

  P  = x_a Wp^T + x_b Wn^T     N  = x_a Wn^T + x_b Wp^T     u, v = signals(r, z, P, N)
  g1 = u Wp + v Wn             g2 = u Wn + v Wp             r_in = x_a g1 + x_b g2
  f1 = u^T x_a + v^T x_b       f2 = u^T x_b + v^T x_a       feedback = sign(W) (Wp f1 + Wn f2)
Each line is one launch that reads x and W once and forms their parts in registers; factors that are
0 everywhere are left out. Exact float32 (float64 for float64), whatever product type was asked for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..optim import Update
from ..rules import Gradient, Map, Parts, Rule, RuleCall, Signals, accumulate_dtype
from ._triton import RELU, SIGMOID, TANH, divide, finish, finish_weight, load, stabilize, store
from ._triton_product import Tiles, product

_FINISHED = tl.constexpr(Gradient.code)  # its weight epilogue is the identity
PLUS, _ALPHA_BETA = tl.constexpr(int(Signals.PLUS)), tl.constexpr(int(Signals.ALPHA_BETA))
_GAMMA = tl.constexpr(int(Signals.GAMMA))
_ALL_ONES, _BOX = tl.constexpr(int(Parts.ONES)), tl.constexpr(int(Parts.BOX))
_SQUARE, _ONE = tl.constexpr(int(Map.SQUARE)), tl.constexpr(int(Map.ONES))
VALUE = tl.constexpr(int(Map.VALUE))


@triton.jit
def input_parts(x, inside, a, b, RULE: tl.constexpr):
    """x_a, x_b; 0 outside, which is not the part of 0"""
    KIND: tl.constexpr = (RULE >> 20) & 15
    if KIND == _ALL_ONES:
        zero = tl.zeros_like(x)
        return tl.where(inside, zero + 1, zero), zero
    elif KIND == _BOX:
        return tl.where(inside, x - a, 0.0), tl.where(inside, x - b, 0.0)
    else:
        return tl.where(x < 0, 0.0, x), tl.where(x > 0, 0.0, x)


@triton.jit
def weight_parts(w, inside, RULE: tl.constexpr):
    """Wp, Wn"""
    KIND: tl.constexpr = (RULE >> 24) & 15
    if KIND == _ONE:
        w = tl.where(inside, tl.zeros_like(w) + 1, 0.0)
    elif KIND == _SQUARE:
        w = w * w
    return tl.where(w < 0, 0.0, w), tl.where(w > 0, 0.0, w)


@triton.jit
def add_product(a, b, total, MODE: tl.constexpr):
    """total[m, n] + a[m, k] b[k, n]. Exact float32 sums up each block by itself: in one chain over
    all of k roundings add up. An addition in place of the difference, Triton folds into the chain.
    """
    if MODE == "ieee":
        return total - product(-a, b, tl.zeros_like(total), MODE)
    else:
        return product(a, b, total, MODE)


@triton.jit
def add_compensated(a, b, total, rest, MODE: tl.constexpr):
    """(total[m, n] + a[m, k] b[k, n], rest), for sums that divide the reward, where every
    rounding shows. rest: what the additions of blocks have rounded away (Kahan's summation).
    """
    if MODE == "ieee":
        more = product(a, b, tl.zeros_like(total), MODE) - rest
        after = total + more
        return after, (after - total) - more
    else:
        return product(a, b, total, MODE), rest


@triton.jit
def finish_signals(
    positive, negative, bias_pointer, bias_mask, r_ptr, z_ptr, u_ptr, v_ptr, offset, inside, a, b,
    eps, RULE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """u, v at ``offset`` from the sums P, N without the bias. a, b, eps: of their type."""
    acc: tl.constexpr = positive.dtype
    KIND: tl.constexpr = (RULE >> 16) & 15
    # The bias is a weight whose input is 1; none counts with box and flat.
    if BIAS and ((RULE >> 20) & 15) != _BOX and ((RULE >> 24) & 15) != _ONE:
        bias = load(bias_pointer, bias_mask)
        if ((RULE >> 24) & 15) == _SQUARE:
            bias = bias * bias
        positive += tl.where(bias < 0, 0.0, bias)
        negative += tl.where(bias > 0, 0.0, bias)
    r = load(r_ptr + offset, inside)
    if KIND == _ALPHA_BETA:
        store(u_ptr + offset, divide(a * r, stabilize(positive, eps)), inside)
        store(v_ptr + offset, divide(-b * r, stabilize(negative, eps)), inside)
    elif KIND == _GAMMA:
        z = load(z_ptr + offset, inside)
        up, down = tl.where(z > 0, 1 + a, 1.0).to(acc), tl.where(z > 0, 1.0, 1 + a).to(acc)
        s = divide(r, stabilize(up * positive + down * negative, eps))
        s = tl.where(z == 0, 0.0, s)
        store(u_ptr + offset, up * s, inside)
        store(v_ptr + offset, down * s, inside)
    else:
        tl.static_assert(KIND == PLUS)
        store(u_ptr + offset, divide(r, stabilize(positive, eps)), inside)


@triton.jit
def finish_reward(
    g1, g2, x_ptr, out_ptr, offset, inside, a, b, RULE: tl.constexpr, BELOW: tl.constexpr,
    SECOND: tl.constexpr,
):  # fmt: skip
    """x_a g1 + x_b g2, times the derivative of the activation below"""
    x = load(x_ptr + offset, inside)
    x_a, x_b = input_parts(x, inside, a, b, RULE)
    reward = x_a * g1
    if SECOND:
        reward += x_b * g2
    if BELOW == RELU:
        reward = tl.where(x > 0, reward, 0.0)
    elif BELOW == TANH:
        reward = reward * (1 - x * x)
    elif BELOW == SIGMOID:
        reward = reward * (x * (1 - x))
    store(out_ptr + offset, reward, inside)


@triton.jit
def finish_split_weight(
    f1, f2, w_ptr, out_ptr, a_ptr, b_ptr, offset, inside, hyper, RULE: tl.constexpr,
    OPTIMIZER: tl.constexpr,
):  # fmt: skip
    """sign(w) (Wp f1 + Wn f2), and what OPTIMIZER makes of it"""
    w = load(w_ptr + offset, inside)
    w_p, w_n = weight_parts(w, inside, RULE)
    sign = tl.where(w > 0, 1.0, tl.where(w < 0, -1.0, w)).to(f1.dtype)
    feedback = sign * (w_p * f1 + w_n * f2)
    finish_weight(
        feedback, w, w_ptr, out_ptr, a_ptr, b_ptr, offset, inside, hyper, _FINISHED, OPTIMIZER
    )


def split_mode(x: Tensor) -> str:
    return "fp64" if accumulate_dtype(x.dtype) == torch.float64 else "ieee"


def split_options(tile: Tiles) -> dict[str, int]:
    """Of a launch. A third stage would spill a register here and there."""
    return {**tile.options(), "num_stages": 2}


def has_second_part(call: RuleCall) -> bool:
    """Whether x_b is anything but 0."""
    kind = call.rule.parts_code
    return kind == Parts.BOX or (kind == Parts.SIGN and not call.nonnegative)


def split_bias(
    u: Tensor, v: Tensor | None, bias: Tensor, rule: Rule, update: Update | None
) -> Tensor | None:
    """Feedback of the bias [O] from u, v [N, O, ...] (v None: 0), or with ``update`` its step."""
    acc, summed = u.dtype, [d for d in range(u.dim()) if d != 1]
    above, under = rule.bias_parts(bias.to(acc))
    raw = above * u.sum(summed)
    if v is not None:
        raw += under * v.sum(summed)
    out = bias.new_empty(bias.shape) if update is None else None
    finish(raw * bias.to(acc).sign(), bias.contiguous(), Gradient.code, update, out)
    return out
