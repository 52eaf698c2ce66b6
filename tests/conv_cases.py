"""Convolution layers of every kind, their oracle, and optimizer updates, for the tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import lfp_kernels.functional as lf
from lfp_kernels.functional import ConvGeometry
from lfp_kernels.optim import STATES, Update
from lfp_kernels.rules import Epsilon, Rule, stabilize

BACKENDS = ("native", "reference")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
RULE = Epsilon(0.05)
CONVS = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)

# name: (x shape, O, kernel, arguments of ConvGeometry.make)
CASES: dict[str, tuple] = {
    "1d": ((3, 4, 11), 5, (3,), {"padding": 1}),
    "1d-stride-dilation": ((2, 4, 17), 6, (3,), {"stride": 2, "dilation": 3, "padding": 2}),
    "1d-transposed": ((2, 4, 7), 6, (3,), {"stride": 2, "transposed": True, "output_padding": 1}),
    "2d": ((3, 5, 9, 7), 6, (3, 3), {"padding": 1}),
    "2d-5x5": ((4, 6, 12, 12), 16, (5, 5), {}),
    "2d-one-channel": ((4, 1, 13, 13), 6, (5, 5), {}),
    "2d-odd": ((2, 3, 8, 11), 7, (3, 2), {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}),
    "2d-pointwise": ((3, 8, 5, 5), 4, (1, 1), {"stride": 2}),
    "2d-groups": ((2, 6, 8, 8), 8, (3, 3), {"padding": 1, "groups": 2}),
    "2d-depthwise": ((2, 8, 9, 9), 8, (3, 3), {"padding": 1, "groups": 8}),
    "2d-depthwise-even": ((2, 5, 9, 6), 5, (4, 2), {"groups": 5, "dilation": (1, 2)}),
    "2d-depthwise-far": ((2, 4, 6, 6), 4, (3, 3), {"padding": 3, "groups": 4}),
    "2d-depthwise-stride": ((2, 8, 9, 9), 16, (3, 3), {"stride": 2, "padding": 1, "groups": 8}),
    "2d-transposed": (
        (2, 6, 5, 4), 8, (3, 2),
        {"stride": 2, "padding": 1, "transposed": True, "output_padding": (0, 1), "groups": 2},
    ),
    "3d": ((2, 3, 5, 6, 4), 4, (2, 3, 3), {"padding": (1, 1, 0), "stride": (1, 2, 1)}),
    "3d-transposed": ((2, 4, 3, 4, 3), 3, (2, 2, 3), {"stride": (2, 1, 2), "transposed": True}),
    "unit": ((1, 4, 1, 1), 4, (1, 1), {}),
}  # fmt: skip


def layer(name: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, ConvGeometry]:
    """x, weight, bias, z, reward in float64, with z away from the stabilizer's jump."""
    shape, out, kernel, arguments = CASES[name]
    geometry = ConvGeometry.make(kernel, **arguments)
    g = torch.Generator().manual_seed(seed)
    rand = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64)  # noqa: E731
    groups = geometry.groups
    ends = (shape[1], out // groups) if geometry.transposed else (out, shape[1] // groups)
    x, weight, bias = rand(*shape), rand(*ends, *kernel) / 4, rand(out)
    z = forward(x, weight, bias, geometry)
    sign = torch.where(rand(*z.shape) < 0, -1.0, 1.0)
    return x, weight, bias, sign * (0.3 + rand(*z.shape).abs()), rand(*z.shape), geometry


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, g: ConvGeometry) -> Tensor:
    n = len(g.stride) - 1
    if g.transposed:
        return TRANSPOSED[n](
            x, weight, bias, g.stride, g.padding, g.output_padding, g.groups, g.dilation
        )
    return CONVS[n](x, weight, bias, g.stride, g.padding, g.dilation, g.groups)


def oracle(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    z: Tensor,
    reward: Tensor,
    geometry: ConvGeometry,
    rule: Rule = RULE,
    below: Rule | None = None,
    signal_in: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The three results in float64 from torch autograd."""
    x, weight, bias = (t.double().detach().requires_grad_() for t in (x, weight, bias))
    s = reward.double()
    if not signal_in:
        s = rule.prologue(s, z.double())
    with torch.enable_grad():
        out = forward(x, weight, bias, geometry)
        g, w, b = torch.autograd.grad(out, (x, weight, bias), s)
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    g = rule.input_epilogue(g, x) if below is None else g * x / stabilize(x, below.stabilizer)
    return g, rule.weight_epilogue(w, weight), rule.weight_epilogue(b, bias)


def channels_last(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(lf.channels_last(t) if t.dim() in (4, 5) else t for t in tensors)


def hyper(decay: float = 0.01, nesterov: float = 0.0) -> list[float]:
    beta1, beta2 = 0.9, 0.99
    moments = [beta1, beta2, 1e-8, 1 - beta1**3, 1 - beta2**3, 1 - beta1, 1 - beta2]
    return [0.1, decay, 0.7, 0.8, nesterov, *moments]


def update_for(param: Tensor, code: int, nesterov: float = 0.0) -> Update:
    states = [torch.rand_like(param, memory_format=torch.contiguous_format) for _ in range(2)]
    return Update(code, hyper(nesterov=nesterov), states[: STATES[code]])


def copy(update: Update) -> Update:
    return Update(update.code, update.hyper, [t.clone() for t in update.states])
