"""The operators and shapes of the table: calls on meta tensors, made like a training step's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lfp_kernels import functional as F
from lfp_kernels import optim, rewards
from lfp_kernels.backends import select
from lfp_kernels.ops.spiking.codes import Reset
from lfp_kernels.optim import BoundOptimizer, Update
from lfp_kernels.rules import Epsilon

from .devices import Gpu
from .traffic import Call, model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """``group``: "product"; "small batch": linear feedback up to 128 rows, whose traffic is W;
    "memory": bound by memory; "attention"."""

    network: str
    op: str
    shape: str
    dtype: str
    group: str
    run: Callable[[], Any]

    def calls(self, gpu: Gpu) -> list[Call]:
        return model(self.run, gpu)


def meta(shape: tuple[int, ...], dtype: torch.dtype, last: bool = True) -> Tensor:
    t = torch.empty(shape, dtype=dtype, device="meta")
    return t.contiguous(memory_format=torch.channels_last) if last and t.dim() == 4 else t


def momentum_updates(*params: Tensor) -> list[Update]:
    bound = BoundOptimizer(
        optim.SGD(1e-3, momentum=0.9), [torch.nn.Parameter(p, requires_grad=True) for p in params]
    )
    group = bound.param_groups[0]
    return [bound.update_of(p, group) for p in group["params"]]


CHAIN: dict[str, Any] = {"signal_in": True, "below": Epsilon()}


def linear_cases(size: int, batches: tuple[int, ...]) -> Iterator[Case]:
    for name, dtype in DTYPES.items():
        weight, bias = meta((size, size), dtype), meta((size,), dtype)
        for batch in batches:
            x, z, r = (meta((batch, size), dtype) for _ in range(3))
            to_w, to_b = momentum_updates(weight, bias)
            group = "small batch" if batch <= 128 else "product"
            shape = f"{batch} x {size} x {size}"

            def forward(x=x, weight=weight, bias=bias):
                return F.linear(x, weight, bias, relu=True)

            def update(x=x, weight=weight, bias=bias, z=z, r=r, to_w=to_w, to_b=to_b):
                return F.linear_redistribute_update(x, weight, bias, z, r, to_w, to_b, **CHAIN)

            yield Case("MLP", "linear forward", shape, name, "product", forward)
            yield Case("MLP", "linear redistribute + update", shape, name, group, update)


# x channels, size; z channels, kernel, stride
Layer = tuple[int, int, int, int, int]
RESNET50: tuple[Layer, ...] = (
    (3, 224, 64, 7, 2),
    (64, 56, 64, 1, 1), (64, 56, 64, 3, 1), (64, 56, 256, 1, 1), (256, 56, 64, 1, 1),
    (256, 56, 128, 1, 1), (128, 56, 128, 3, 2), (128, 28, 512, 1, 1), (256, 56, 512, 1, 2),
    (512, 28, 128, 1, 1), (128, 28, 128, 3, 1),
    (512, 28, 256, 1, 1), (256, 28, 256, 3, 2), (256, 14, 1024, 1, 1), (512, 28, 1024, 1, 2),
    (1024, 14, 256, 1, 1), (256, 14, 256, 3, 1),
    (1024, 14, 512, 1, 1), (512, 14, 512, 3, 2), (512, 7, 2048, 1, 1), (1024, 14, 2048, 1, 2),
    (2048, 7, 512, 1, 1), (512, 7, 512, 3, 1),
)  # fmt: skip
VGG16: tuple[Layer, ...] = (
    (3, 224, 64, 3, 1), (64, 224, 64, 3, 1), (64, 112, 128, 3, 1), (128, 112, 128, 3, 1),
    (128, 56, 256, 3, 1), (256, 56, 256, 3, 1), (256, 28, 512, 3, 1), (512, 28, 512, 3, 1),
    (512, 14, 512, 3, 1),
)  # fmt: skip
RESNET50_NORMS = ((64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28),
                  (256, 14), (1024, 14), (512, 14), (512, 7), (2048, 7))  # fmt: skip
VGG16_NORMS = ((64, 224), (128, 112), (256, 56), (512, 28), (512, 14))


def conv_cases(network: str, layers: tuple[Layer, ...], batch: int, dtype: str) -> Iterator[Case]:
    kind = DTYPES[dtype]
    for channels, size, out, k, stride in layers:
        side = (size + 2 * (k // 2) - k) // stride + 1
        x, z = meta((batch, channels, size, size), kind), meta((batch, out, side, side), kind)
        # As the fused step finds it: plain; the operator brings it into channels last.
        weight, r = meta((out, channels, k, k), kind, last=False), meta(tuple(z.shape), kind)
        (to_w,) = momentum_updates(weight)
        geometry = F.ConvGeometry((stride,) * 2, (k // 2,) * 2, (1, 1), False, (0, 0), 1)
        need = channels != 3

        def forward(x=x, weight=weight, geometry=geometry):
            return F.conv(x, weight, None, geometry, relu=True)

        def update(x=x, weight=weight, z=z, r=r, geometry=geometry, to_w=to_w, need=need):
            return F.conv_redistribute_update(
                x, weight, None, z, r, geometry, to_w, None, need_input=need,
                signal_in=True, below=Epsilon() if need else None,
            )  # fmt: skip

        shape = f"{channels}x{size}x{size} -> {out}, {k}x{k}" + (f" / {stride}" * (stride > 1))
        yield Case(network, "conv forward", shape, dtype, "product", forward)
        yield Case(network, "conv redistribute + update", shape, dtype, "product", update)


def norm_cases(network: str, layers: Any, batch: int, dtype: str) -> Iterator[Case]:
    kind = DTYPES[dtype]
    for channels, size in layers:
        x, z, r = (meta((batch, channels, size, size), kind) for _ in range(3))
        gamma, beta, mean, var = (meta((channels,), kind) for _ in range(4))
        batch_mean, invstd = (meta((channels,), torch.float32) for _ in range(2))

        def forward(x=x, gamma=gamma, beta=beta, mean=mean, var=var):
            return F.batch_norm(x, gamma, beta, mean, var, True, 0.1, 1e-5, relu=True)

        def redistribute(x=x, gamma=gamma, beta=beta, z=z, r=r, mean=batch_mean, invstd=invstd):
            return F.batch_norm_redistribute(x, gamma, beta, z, r, mean, invstd, True, **CHAIN)

        shape = f"{channels}x{size}x{size}"
        yield Case(network, "batch norm forward", shape, dtype, "memory", forward)
        yield Case(network, "batch norm redistribute", shape, dtype, "memory", redistribute)


def pool_cases(
    network: str, layers: Any, window: tuple[int, int, int], batch: int, dtype: str
) -> Iterator[Case]:
    kind = DTYPES[dtype]
    for channels, size in layers:
        x = meta((batch, channels, size, size), kind)
        out, indices = F.max_pool(x, *window)
        r = meta(tuple(out.shape), kind)
        shape = f"{channels}x{size}x{size}, {window[0]}x{window[0]} / {window[1]}"

        def forward(x=x):
            return F.max_pool(x, *window)

        def redistribute(r=r, indices=indices, x=x):
            return F.max_pool_redistribute(r, indices, x.shape)

        yield Case(network, "max pool forward", shape, dtype, "memory", forward)
        yield Case(network, "max pool redistribute", shape, dtype, "memory", redistribute)


def other_cases(batch: int, dtype: str) -> Iterator[Case]:
    kind = DTYPES[dtype]
    x = meta((batch, 2048, 7, 7), kind)
    mean, r = (meta((batch, 2048, 1, 1), kind) for _ in range(2))
    yield Case(
        "ResNet-50", "average pool redistribute", "2048x7x7 -> 1x1", dtype, "memory",
        lambda: F.adaptive_avg_pool_redistribute(x, mean, r, **CHAIN),
    )  # fmt: skip
    a, b, s = (meta((batch, 256, 56, 56), kind) for _ in range(3))
    yield Case(
        "ResNet-50", "residual sum redistribute", "256x56x56", dtype, "memory",
        lambda: F.sum_redistribute(a, b, s),
    )  # fmt: skip
    out, y = meta((batch, 1000), kind), torch.empty(batch, dtype=torch.int64, device="meta")
    yield Case(
        "ResNet-50", "softmax reward", f"{batch} x 1000", dtype, "memory",
        lambda: rewards.softmax(out, y),
    )  # fmt: skip
    spikes = meta((25, batch, 1000), kind)
    yield Case(
        "spiking", "rate reward", f"25 x {batch} x 1000", dtype, "memory",
        lambda: rewards.snn_rate(spikes, y),
    )  # fmt: skip
    params = [meta(shape, kind) for shape in ((4096, 4096), (4096,)) * 2]
    for name, spec in (("SGD momentum", optim.SGD(0.1, momentum=0.9)), ("AdamW", optim.AdamW(0.1))):
        bound = BoundOptimizer(spec, [torch.nn.Parameter(p) for p in params])
        for p in bound.param_groups[0]["params"]:
            p.grad = meta(tuple(p.shape), kind)
        yield Case("MLP", f"optimizer step, {name}", "2 x 4096 x 4096", dtype, "memory", bound.step)
    yield Case(
        "MLP", "global norm", "2 x 4096 x 4096", dtype, "memory", lambda: F.global_norm(params)
    )


def spiking_cases(batch: int, dtype: str) -> Iterator[Case]:
    steps, neurons = 25, batch * 1000
    x, kind = meta((steps, neurons), DTYPES[dtype]), DTYPES[dtype]
    beta, threshold = meta((1,), kind), meta((1,), kind)
    neuron, shape = (beta, threshold, 1), f"{steps} x {batch} x 1000"
    op = select("spiking", x)
    for reset in (Reset.SUBTRACT, Reset.SUBTRACT_AT_ONCE):
        bits, membrane, _ = op.forward(x, None, *neuron, steps, reset, True)

        def forward(reset=reset):
            return op.forward(x, None, *neuron, steps, reset, True)

        def feedback(reset=reset, membrane=membrane, bits=bits):
            return op.feedback(
                x, membrane, bits, None, None, *neuron, 1e-6, reset, False, False, False
            )

        name = reset.name.lower().replace("_", " ")
        yield Case("spiking", f"LIF forward, {name}", shape, dtype, "memory", forward)
        yield Case("spiking", f"LIF feedback, {name}", shape, dtype, "memory", feedback)

    def unpack():
        return op.unpack(bits, steps, kind, 0.0, 0, 0)

    yield Case("spiking", "spikes unpacked", shape, dtype, "memory", unpack)
    yield Case(
        "spiking", "noise added", shape, dtype, "memory",
        lambda: op.add_noise(x, steps, 0.1, 0, 0),
    )  # fmt: skip


def attention_cases(tokens: int, heads: int, width: int, dtype: str) -> Iterator[Case]:
    """One sequence, causal, as a decoder has it; its heads lie as a projection leaves them."""
    kind = DTYPES[dtype]
    q, k, v, out, r = (
        meta((1, tokens, heads, width), kind, last=False).transpose(1, 2) for _ in range(5)
    )
    lse = meta((1, heads, tokens), torch.float32)
    shape = f"{tokens} tokens, {heads} x {width}"

    def forward():
        return F.attention(q, k, v, causal=True)

    def redistribute():
        return F.attention_redistribute(q, k, v, out, r, lse=lse, causal=True)

    yield Case("transformer", "attention forward", shape, dtype, "attention", forward)
    yield Case("transformer", "attention redistribute", shape, dtype, "attention", redistribute)


def cases(quick: bool = False) -> list[Case]:
    """The cases of the table; ``quick``: one of each kind."""
    batch = 128
    found = list(linear_cases(4096, (64,) if quick else (32, 64, 128, 1024)))
    for dtype in ("fp32",) if quick else DTYPES:
        for network, convs, norms, pools, window in (
            ("ResNet-50", RESNET50, RESNET50_NORMS, ((64, 112),), (3, 2, 1)),
            ("VGG-16", VGG16, VGG16_NORMS, VGG16_NORMS, (2, 2, 0)),
        ):
            few = 2 if quick else None
            found += conv_cases(network, convs[:few], batch, dtype)
            found += norm_cases(network, norms[:few], batch, dtype)
            found += pool_cases(network, pools[:few], window, batch, dtype)
        found += other_cases(batch, dtype)
        found += spiking_cases(batch, dtype)
        found += attention_cases(2048, 8, 64, dtype)
    return found
