"""The floor of a training step: its bare products, on ready operands, and nothing else.

Per layer: the forward product, the input product (not for the first layer) and the weight product.
``floor`` issues them as the fused step does on a CPU: linear products in float32 and bfloat16
through oneDNN (small ones through ATen), the weight product in row tiles of W (so that a tile's
result stays in cache), convolutions through aten::convolution and one aten::convolution_backward
per product, in channels last where the fused step's plan is; results dropped. ``floor_aten`` issues
the calls that ATen picks for F.linear, F.conv2d and their backward, as autograd does. What neither
holds: bias and activation, the division by z, the factors x and |W|, the update of W and momentum,
batch norm, pools, transposes and conversions of operands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lfp_kernels import functional

DEFINITION = (
    "floor: the step's bare products alone (forward; input, not for the first layer; weight), "
    "issued as the fused step issues them; floor_aten: the same products as ATen picks them"
)
TILE_ELEMENTS = 1 << 20  # of the weight product: full speed of the library, no page faults
SMALL_PRODUCT = 1 << 18  # multiply-adds below which ATen runs it, as in csrc/cpu/aten.cpp

Call = Callable[[], Any]


@dataclass(frozen=True)
class Layer:
    """One layer's products: x and s in the dtypes of the forward and of the feedback products."""

    module: nn.Module
    x: Tensor  # layer input
    z: Tensor  # layer output
    first: bool

    @property
    def weight(self) -> Tensor:
        return self.module.weight.data  # type: ignore[union-attr, return-value]

    @property
    def products(self) -> int:
        return 2 if self.first else 3

    @property
    def flops(self) -> int:
        """Of one product: 2 * outputs * terms per output."""
        terms = self.weight[0].numel()
        return 2 * self.z.numel() * terms

    @property
    def bytes(self) -> int:
        """Operands and result of every product once; W and momentum written, momentum read."""
        one = self.x.nbytes + self.z.nbytes + self.weight.nbytes
        return self.products * one + 2 * self.weight.nbytes


def layers(model: nn.Module, x: Tensor) -> list[Layer]:
    """Linear and convolution layers in the order of execution, with what went through them."""
    found: list[Layer] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.append(Layer(module, inputs[0].contiguous(), output.contiguous(), not found))

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    hooks = [m.register_forward_hook(record) for m in model.modules() if isinstance(m, kinds)]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def calls(
    found: list[Layer],
    feedback_dtype: torch.dtype | None,
    *,
    aten: bool,
    channels_last: bool = False,
) -> list[Call]:
    """The products of one step. ``aten``: as ATen picks them; else as the fused step does, 2-d
    convolutions in channels last if its plan says so."""
    result: list[Call] = []
    for layer in found:
        if isinstance(layer.module, nn.Linear):
            result += _linear(layer, feedback_dtype, aten or not _has_onednn(layer.x))
        else:
            result += _conv(layer, feedback_dtype, aten, channels_last)
    return result


def run_all(products: list[Call]) -> None:
    with torch.no_grad():
        for product in products:
            product()


def _has_onednn(like: Tensor) -> bool:
    return (
        like.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and like.dtype in (torch.float32, torch.bfloat16)
    )


def _product(a: Tensor, b: Tensor) -> Call:
    """a[M, K] b[N, K]^T; b may be a transposed view."""
    if a.numel() * b.shape[0] < SMALL_PRODUCT:
        return partial(torch.ops.aten.linear.default, a, b)
    return partial(torch.ops.mkldnn._linear_pointwise.default, a, b, None, "none", [], "")


def _linear(layer: Layer, feedback_dtype: torch.dtype | None, aten: bool) -> list[Call]:
    x, w = layer.x, layer.weight
    dtype = feedback_dtype or x.dtype
    s = torch.randn_like(layer.z, dtype=dtype)
    xs, ws = x.to(dtype), w.to(dtype)
    if aten:
        result: list[Call] = [partial(torch.mm, x, w.t())]
        if not layer.first:
            result.append(partial(torch.mm, s, ws))
        return [*result, partial(torch.mm, s.t(), xs)]
    result = [_product(x, w)]
    if not layer.first:
        result.append(_product(s, ws.t()))
    rows = max(TILE_ELEMENTS // w.shape[1], 16)
    for begin in range(0, w.shape[0], rows):
        columns = s[:, begin : begin + rows].t().contiguous()
        result.append(_product(columns, xs.t()))
    return result


def _conv(
    layer: Layer, feedback_dtype: torch.dtype | None, aten: bool, channels_last: bool
) -> list[Call]:
    m = layer.module
    assert isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and not isinstance(m.padding, str)
    x, z, w = layer.x, layer.z, layer.weight
    if channels_last and not aten and x.dim() == 4:
        x, z = functional.channels_last(x), functional.channels_last(z)
    dtype = feedback_dtype or x.dtype
    s, xs, ws = torch.randn_like(z, dtype=dtype), x.to(dtype), w.to(dtype)
    geometry = (m.stride, m.padding, m.dilation, False, [0] * len(m.stride), m.groups)

    def backward(need_input: bool, need_weight: bool) -> Call:
        mask = [need_input, need_weight, False]
        return partial(
            torch.ops.aten.convolution_backward.default, s, xs, ws, None, *geometry, mask
        )

    forward: Call = partial(torch.ops.aten.convolution.default, x, w, None, *geometry)
    if aten:  # autograd asks for both at once
        return [forward, backward(not layer.first, True)]
    return [forward, *([] if layer.first else [backward(True, False)]), backward(False, True)]
