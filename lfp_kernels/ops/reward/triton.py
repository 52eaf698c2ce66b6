"""Initial rewards in Triton: csrc/rewards.h again, one or more rows o[C] per program.

A label outside [0, C) makes its row NaN: no memory is misread, whoever calls the kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import BLOCK, accumulate_type, blocks, divide, launch, load, power_of_2, store
from .codes import VALUE_TARGET, Kind

SOFTMAX, SIGMOID = tl.constexpr(Kind.SOFTMAX.value), tl.constexpr(Kind.SIGMOID.value)
MAXIMIZE, MINIMIZE = tl.constexpr(Kind.MAXIMIZE.value), tl.constexpr(Kind.MINIMIZE.value)
BOUNDED_SOFTMAX = tl.constexpr(Kind.BOUNDED_SOFTMAX.value)
CORRECT_CLASSIFICATION = tl.constexpr(Kind.CORRECT_CLASSIFICATION.value)
MISCLASSIFICATION = tl.constexpr(Kind.MISCLASSIFICATION.value)
REGRESSION = tl.constexpr(Kind.REGRESSION.value)
INFINITY = tl.constexpr(float("inf"))

_WHOLE = 4096  # classes up to which a row stays in registers
_STEPS = 64  # time steps up to which a neuron's spikes do


@triton.jit
def sigmoid(v):
    return divide(1.0, 1.0 + tl.exp(-v))


@triton.jit
def sign(v):
    """0 at both zeros; NaN stays NaN."""
    return tl.where(v > 0, 1.0, tl.where(v < 0, -1.0, v))


@triton.jit
def value(o, y, q, low, high, use_sign, KIND: tl.constexpr):
    """Reward of logit o, target y (one-hot entry or value) and row quantity q."""
    if KIND == SOFTMAX:
        return o * (y - q)
    elif KIND == BOUNDED_SOFTMAX:
        bounded = tl.where(q > high.to(o.dtype), 1.0, tl.where(q < low.to(o.dtype), 0.0, q))
        return tl.where(use_sign != 0, sign(o), o) * (y - bounded)
    elif KIND == MAXIMIZE:
        return y * sign(o) * (1.0 - sigmoid(o))
    elif KIND == MINIMIZE:
        return -y * sign(o) * (1.0 - sigmoid(o))
    elif KIND == CORRECT_CLASSIFICATION:
        return y * q * sign(o)
    elif KIND == MISCLASSIFICATION:
        return tl.where(o > q, -1.0, 0.0) * sign(o)
    elif KIND == REGRESSION:
        return (y - o) * (y - o) * (y - o) * sign(o)
    else:  # sigmoid, binary sigmoid
        return o * (y - sigmoid(o))


# What a reward must know of the whole row (RowQuantity of rewards.h), gathered block by block:
#   probability  a = largest logit, b = sum of exp(o - a)
#   winner       a = largest logit, b = its first place, c = place of the first NaN
#   label logit  a = logit of the label
_ROW = {
    Kind.SOFTMAX: "probability",
    Kind.BOUNDED_SOFTMAX: "probability",
    Kind.CORRECT_CLASSIFICATION: "winner",
    Kind.MISCLASSIFICATION: "label logit",
}


@triton.jit
def _gather(o, k, label, classes, a, b, c, ROW: tl.constexpr):
    """(a, b, c) [rows] after the logits o [rows, block] of the classes k; a pad is -inf."""
    if ROW == "probability":
        top = tl.maximum(a, tl.max(o, 1))
        base = tl.where(top == -INFINITY, 0.0, top)  # a block of nothing but -inf
        add = tl.where(k < classes, tl.exp(o - base[:, None]), 0.0)
        b = b * tl.exp(a - base) + tl.sum(add, 1)
        a = top
    elif ROW == "winner":
        top = tl.max(tl.where(o != o, -INFINITY, o), 1)
        place = tl.min(tl.where((o == top[:, None]) & (k < classes), k, classes), 1)
        b = tl.where((top > a) | (b >= classes), place, b)
        a = tl.maximum(a, top)
        c = tl.minimum(c, tl.min(tl.where((o != o) & (k < classes), k, classes), 1))
    elif ROW == "label logit":
        a += tl.sum(tl.where(k == label, o, 0.0), 1)
    return a, b, c


@triton.jit
def _quantity(o, k, classes, a, b, c, ROW: tl.constexpr):
    """The row quantity of rewards.h at the classes k."""
    if ROW == "probability":
        return divide(tl.exp(o - a[:, None]), b[:, None])
    elif ROW == "winner":
        winner = tl.where(c < classes, c, b)
        return tl.where(k == winner[:, None], 1.0, 0.0).to(o.dtype)
    elif ROW == "label logit":
        return a[:, None]
    else:
        return o


@triton.jit
def row_kernel(
    o_ptr, label_ptr, out_ptr, rows, classes, neuron, low: tl.float64, high: tl.float64,
    use_sign: tl.float64, KIND: tl.constexpr, ROW: tl.constexpr, LABELS: tl.constexpr,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[rows, classes] from one label per row or, without LABELS, one neuron (-1: all)."""
    acc: tl.constexpr = accumulate_type(o_ptr.dtype.element_ty)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    if LABELS:
        label = tl.load(label_ptr + row, mask=inside, other=0)
        valid = (label >= 0) & (label < classes)
    else:
        label = tl.zeros([ROWS], tl.int64) + neuron
        valid = inside
    label = label[:, None]
    start = (row * classes)[:, None]
    k = tl.arange(0, BLOCK)[None, :]

    a = tl.full([ROWS], 0.0 if ROW == "label logit" else -INFINITY, acc)
    c = tl.zeros([ROWS], tl.int32) + classes
    b = c if ROW == "winner" else tl.zeros([ROWS], acc)
    o = tl.load(o_ptr + start + k, mask=inside[:, None] & (k < classes), other=-INFINITY).to(acc)
    if ROW != "none":
        a, b, c = _gather(o, k, label, classes, a, b, c, ROW)
        if not WHOLE:
            for at in range(BLOCK, classes, BLOCK):
                mask = inside[:, None] & (at + k < classes)
                o = tl.load(o_ptr + start + at + k, mask=mask, other=-INFINITY).to(acc)
                a, b, c = _gather(o, at + k, label, classes, a, b, c, ROW)
            o = tl.load(o_ptr + start + k, mask=inside[:, None] & (k < classes)).to(acc)

    for at in range(0, 1 if WHOLE else classes, BLOCK):
        mask = inside[:, None] & (at + k < classes)
        if not WHOLE:
            o = tl.load(o_ptr + start + at + k, mask=mask, other=0.0).to(acc)
        y = tl.where((label < 0) | (at + k == label), 1.0, 0.0).to(acc)
        q = _quantity(o, at + k, classes, a, b, c, ROW)
        reward = value(o, y, q, low, high, use_sign, KIND)
        store(out_ptr + start + at + k, tl.where(valid[:, None], reward, float("nan")), mask)


@triton.jit
def _value_block(o_ptr, target_ptr, out_ptr, offset, mask, KIND: tl.constexpr):
    o, y = load(o_ptr + offset, mask), load(target_ptr + offset, mask)
    store(out_ptr + offset, value(o, y, o, None, None, None, KIND), mask)


@triton.jit
def value_kernel(o_ptr, target_ptr, out_ptr, count, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Rewards whose target is one value per output."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offset = start + tl.arange(0, BLOCK)
    if start + BLOCK <= count:  # whole blocks need no mask, so their accesses are vectors
        _value_block(o_ptr, target_ptr, out_ptr, offset, None, KIND)
    else:
        _value_block(o_ptr, target_ptr, out_ptr, offset, offset < count, KIND)


def reward(out: Tensor, target: Tensor | None, kind: Kind, params: list[float]) -> Tensor:
    out = out.contiguous()
    result = torch.empty_like(out)
    if out.numel() == 0:
        return result
    if kind in VALUE_TARGET:
        assert target is not None
        launch(
            value_kernel, blocks(out.numel()), out, out, target.contiguous(), result, out.numel(),
            KIND=kind.value, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
        return result
    classes = out.shape[-1]
    rows = out.numel() // classes
    low, high, use_sign, neuron = params
    block = power_of_2(classes, most=_WHOLE)
    tile = max(1, BLOCK // block)
    labels = out if target is None else target.contiguous()
    launch(
        row_kernel, blocks(rows, tile), out, out, labels, result, rows, classes, int(neuron), low,
        high, use_sign, KIND=kind.value, ROW=_ROW.get(kind, "none"), LABELS=target is not None,
        WHOLE=classes <= block, ROWS=tile, BLOCK=block, num_warps=4 if block <= 1024 else 8,
    )  # fmt: skip
    return result


# Rewards at every step are constant + factor * spike, with one constant and factor per neuron:
#   true class  1 - sigma(sum_t s - T/2);   others  -s * (1 - sigma(sum_t (1 - s) - T/2))


@triton.jit(do_not_specialize=["steps"])
def spike_rate_kernel(
    spikes_ptr, label_ptr, out_ptr, steps, neurons, classes, WHOLE: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[steps, neurons] of rate-coded spikes; neuron j belongs to class j % classes."""
    acc: tl.constexpr = accumulate_type(spikes_ptr.dtype.element_ty)
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = j < neurons
    t = tl.arange(0, STEPS)[:, None]
    at = t.to(tl.int64) * neurons + j[None, :]
    s = load(spikes_ptr + at, inside[None, :] & (t < steps))
    fired = tl.sum(s, 0)
    if not WHOLE:
        for first in range(STEPS, steps, STEPS):
            more = spikes_ptr + tl.cast(first, tl.int64) * neurons + at
            fired += tl.sum(load(more, inside[None, :] & (first + t < steps)), 0)
    label = tl.load(label_ptr + j // classes, mask=inside, other=0)
    half = tl.cast(steps // 2, acc)
    is_true = j % classes == label
    constant = tl.where(is_true, 1.0 - sigmoid(fired - half), 0.0)
    factor = tl.where(is_true, 0.0, sigmoid(tl.cast(steps, acc) - fired - half) - 1.0)
    constant = tl.where((label < 0) | (label >= classes), float("nan"), constant)
    if WHOLE:
        store(out_ptr + at, constant + factor * s, inside[None, :] & (t < steps))
    else:
        for first in range(0, steps, STEPS):
            mask = inside[None, :] & (first + t < steps)
            s = load(spikes_ptr + tl.cast(first, tl.int64) * neurons + at, mask)
            store(out_ptr + tl.cast(first, tl.int64) * neurons + at, constant + factor * s, mask)


def spike_rate(spikes: Tensor, labels: Tensor) -> Tensor:
    spikes = spikes.contiguous()
    result = torch.empty_like(spikes)
    if spikes.numel() == 0:
        return result
    steps, classes = spikes.shape[0], spikes.shape[-1]
    neurons = spikes.numel() // steps
    held = power_of_2(steps, most=_STEPS)
    block = 4096 // _STEPS
    launch(
        spike_rate_kernel, blocks(neurons, block), spikes, spikes, labels.contiguous(), result,
        steps, neurons, classes, WHOLE=steps <= held, STEPS=held, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return result
