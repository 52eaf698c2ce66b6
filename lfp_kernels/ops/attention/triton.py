"""Attention in Triton: what is launched; the equations are those of triton_kernels.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...rules import accumulate_dtype
from .._triton import blocks, launch, power_of_2, registers
from .._triton_product import feedback_mode, forward_mode
from . import empty_heads
from .triton_kernels import ADDS, HIDES, NO_MASK, forward_kernel, key_kernel, query_kernel

WIDEST = 256  # elements of a head: a block's rows are held whole


class _Tiles(NamedTuple):
    """Queries and keys of a block of logits."""

    own: int  # of the side that the program owns
    other: int
    warps: int
    stages: int
    held: bool  # operands of logits are held whole

    def options(self, owns_queries: bool) -> dict[str, Any]:
        m, n = (self.own, self.other) if owns_queries else (self.other, self.own)
        return {
            "M": m, "N": n, "HELD": self.held, "num_warps": self.warps, "num_stages": self.stages,
            **registers(255),
        }  # fmt: skip


def _tiles(mode: str, width: int, crowded: bool) -> _Tiles:
    """The largest for which ptxas keeps everything in registers. ``crowded``: blocks of logits meet
    another of the same size, of random numbers or of a mask that is added."""
    warps = 8 if width > 64 and not torch.version.hip else 4  # AMD's have 64 threads
    if mode == "fp64":
        return _Tiles(16, 16, 4, 1, False)
    if mode == "ieee":
        widest = 64 if width <= 64 and not crowded else 32
        return _Tiles(16 if width > 128 else widest, 16, 4, 1, False)
    wide = width > 128
    if mode == "tf32":
        return _Tiles(16 if wide else 32, 16, 2 * warps if wide else warps, 1, True)
    if wide:
        return _Tiles(16 if crowded else 32, 16, 8, 1, True)
    return _Tiles(32 if crowded or width > 64 else 64, 32, warps, 1, True)


def _rows(t: Tensor) -> Tensor:
    """``t`` with the elements of a head beside each other."""
    return t if t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous()


def _check(q: Tensor, v: Tensor) -> None:
    if max(q.shape[3], v.shape[3]) > WIDEST:
        raise ValueError(
            f"attention: heads of more than {WIDEST} elements do not fit a block of the triton "
            f"backend, got {q.shape[3]} and {v.shape[3]}; fix: use_backend('reference')"
        )


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    shared = q.shape[1] // max(1, k.shape[1])
    return q.shape[2], k.shape[2], q.shape[1], shared, q.shape[3], v.shape[3]


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for t in tensors for stride in t.stride()[:3]]


def _mask_options(mask: Tensor | None) -> tuple[list[int], int]:
    """(strides of the mask, what it does)."""
    if mask is None:
        return [0] * 4, NO_MASK.value
    return list(mask.stride()), (HIDES if mask.dtype == torch.bool else ADDS).value


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float,
    dropout: float, seed: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check(q, v)
    out = empty_heads(q, (*q.shape[:3], v.shape[3]))
    lse = q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))
    q, k, v = _rows(q), _rows(k), _rows(v)
    mode = forward_mode(q.dtype)
    e, f = power_of_2(q.shape[3], 16), power_of_2(v.shape[3], 16)
    strides, kind = _mask_options(mask)
    tiles = _tiles(mode, max(e, f), dropout != 0 or kind == ADDS.value)
    launch(
        forward_kernel, blocks(q.shape[2], tiles.own) * q.shape[0] * q.shape[1], q, q, k, v,
        q if mask is None else mask, out, lse, *_sizes(q, k, v), *_strides(q, k, v), *strides,
        scale, dropout, 1 / (1 - dropout), seed, CAUSAL=causal, MASK=kind, DROPOUT=dropout != 0,
        FOURS=k.shape[2] % 4 == 0, MODE=mode, E=e, F=f, **tiles.options(True),
    )  # fmt: skip
    return out, lse


def redistribute(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, reward: Tensor, mask: Tensor | None,
    causal: bool, scale: float, dropout: float, seed: int, attnlrp: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _check(q, v)
    to_q, to_k, to_v = (empty_heads(t, tuple(t.shape)) for t in (q, k, v))
    if q.shape[1] == 0:
        return to_q, to_k.zero_(), to_v.zero_()
    q, k, v, out, reward = (_rows(t) for t in (q, k, v, out, reward))
    acc, lse = accumulate_dtype(q.dtype), lse.contiguous()
    mode, back = forward_mode(q.dtype), feedback_mode(q.dtype)
    delta = q.new_empty(q.shape[:3], dtype=acc)
    signal = reward
    if attnlrp:  # a float16 signal keeps the range of float32
        dtype = acc if q.dtype == torch.float16 else q.dtype
        signal = q.new_empty(reward.shape, dtype=dtype)
    e, f = power_of_2(q.shape[3], 16), power_of_2(v.shape[3], 16)
    strides, kind = _mask_options(mask)
    given, sizes = q if mask is None else mask, _sizes(q, k, v)
    numbers = (scale, eps, dropout, 1 / (1 - dropout), seed)
    options: dict[str, Any] = {
        "ATTNLRP": attnlrp, "CAUSAL": causal, "MASK": kind, "DROPOUT": dropout != 0,
        "FOURS": k.shape[2] % 4 == 0, "FORWARD": mode, "MODE": back, "E": e, "F": f,
    }  # fmt: skip
    tiles = _tiles(back, max(e, f), dropout != 0 or kind == ADDS.value)
    launch(
        query_kernel, blocks(q.shape[2], tiles.own) * q.shape[0] * q.shape[1], q, q, k, v, out, lse,
        reward, given, to_q, signal, delta, *sizes, *_strides(q, k, v, out, reward, signal),
        *strides, *numbers, **options, **tiles.options(True),
    )  # fmt: skip
    launch(
        key_kernel, blocks(k.shape[2], tiles.own) * k.shape[0] * k.shape[1], q, q, k, v, lse,
        signal, delta, given, to_k, to_v, *sizes, *_strides(q, k, v, signal), *strides, *numbers,
        **options, **tiles.options(False),
    )  # fmt: skip
    return to_q, to_k, to_v
