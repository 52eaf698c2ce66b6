"""Average and max pools of x [N, C, *], 1 to 3 spatial dimensions: schemas and fakes."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..._library import define
from ...backends import register
from ..conv.layout import empty, strided_channels_last
from . import native, reference


def output_size(
    size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool
) -> int:
    """Outputs of a pool along one axis, as torch counts them."""
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    out = (room + (stride - 1 if ceil_mode else 0)) // stride + 1
    # the last window has to start inside the input or the padding before it
    return out - 1 if ceil_mode and (out - 1) * stride >= size + padding else out


def output_shape(x: Tensor, kernel, stride, padding, dilation, ceil_mode: bool) -> tuple[int, ...]:
    """Shape of a pool's output for x [N, C, *]."""
    axes = zip(x.shape[2:], kernel, stride, padding, dilation)
    return (*x.shape[:2], *(output_size(*axis, ceil_mode) for axis in axes))


def tiles(x: Tensor, kernel, stride, padding, dilation, out_shape) -> bool:
    """Whether the windows tile the input and have so few places that one byte names the winner."""
    places = 1
    for k in kernel:
        places *= k
    return places <= 256 and all(
        i == o * k and s == k and p == 0 and d == 1
        for i, o, k, s, p, d in zip(x.shape[2:], out_shape[2:], kernel, stride, padding, dilation)
    )


def _avg_redistribute(
    x, z, reward, kernel, stride, padding, count_include_pad, divisor, rule, params, chain
) -> Tensor:
    return empty(x, x.shape, strided_channels_last(x))


def _adaptive_redistribute(x, z, reward, rule, params, chain) -> Tensor:
    return empty(x, x.shape, strided_channels_last(x))


def _max_forward(x, kernel, stride, padding, dilation, ceil_mode) -> tuple[Tensor, Tensor]:
    shape = output_shape(x, kernel, stride, padding, dilation, ceil_mode)
    out = empty(x, shape, strided_channels_last(x))
    positions = 1
    for size in x.shape[2:]:
        positions *= size
    if tiles(x, kernel, stride, padding, dilation, shape):
        dtype = torch.uint8
    else:
        dtype = torch.int32 if positions <= 2**31 - 1 else torch.int64
    return out, torch.empty_like(out, dtype=dtype)


def _max_redistribute(reward, indices, input_shape) -> Tensor:
    return empty(reward, input_shape, strided_channels_last(indices))


def _triton() -> ModuleType:
    from . import triton

    return triton


_RULE = "int rule, float[] params, int chain"
define(
    "avg_pool_redistribute(Tensor x, Tensor z, Tensor reward, int[] kernel, int[] stride, "
    f"int[] padding, bool count_include_pad, int? divisor, {_RULE}) -> Tensor",
    _avg_redistribute,
)
define(
    f"adaptive_avg_pool_redistribute(Tensor x, Tensor z, Tensor reward, {_RULE}) -> Tensor",
    _adaptive_redistribute,
)
define(
    "max_pool_forward(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, "
    "bool ceil_mode) -> (Tensor, Tensor)",
    _max_forward,
)
define(
    "max_pool_redistribute(Tensor reward, Tensor indices, SymInt[] input_shape) -> Tensor",
    _max_redistribute,
)
register("pool", native=native, triton=_triton, reference=reference)
