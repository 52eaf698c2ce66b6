"""Convolutions (csrc/cuda/conv*.cu*): implicit products that read x, r and z where the kernel's
window lies. A tile of positions asks for every (tap, channel) of its window: taps that neighbours
share come from the caches, so requested bytes are up to taps times the distinct ones. Unfolded
tensors, s and raw products exist in no memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lfp_kernels.ops._cuda import TF32
from lfp_kernels.ops.conv.layout import strided_channels_last

from .devices import Gpu
from .launch import STATES, Launch, Parameter, accumulator, ceil_div, in_format, type_name, wide
from .products import P_NAME, Operand, Product, launches_of, product_type
from .windows import Geometry

DIRECT_PAIRS = 16  # groups with so many pairs of channels or fewer: sums are formed directly


@dataclass(frozen=True)
class Source:
    """A tensor on its way into a product: as it is, or s from r and z."""

    names: list[str]
    tensor: Tensor

    def sweeps(self, elements: int, distinct: int) -> list[tuple[str, int, int]]:
        size = self.tensor.element_size()
        return [(name, elements * size, distinct * size) for name in self.names]


@dataclass(frozen=True)
class Conv:
    """One call. ``last``: everything runs in channels last."""

    g: Geometry
    last: bool
    unit: str
    gpu: Gpu

    @property
    def element(self) -> int:
        return self.g.x.element_size()

    @property
    def direct(self) -> bool:
        return self.g.large_channels * self.g.small_channels <= DIRECT_PAIRS

    @property
    def _types(self) -> str:
        return f"<{type_name(self.element, self.unit)}, {P_NAME[self.unit]}, "

    @property
    def _kernel_epilogue(self) -> str:
        return f"KernelEpilogue<{type_name(self.element, self.unit)}>"

    def _run(self, p: Product) -> list[Launch]:
        return launches_of(p, self.unit, self.element, self.gpu)

    def kernel_copy(self, weight: Tensor) -> list[Launch]:
        """Channels last reads W with its taps before its channels: one pass over W where it lies
        otherwise and the caller has made no such copy."""
        if self.direct or not self.last:
            return []
        return in_format([weight], True)

    def position_product(
        self, is_up: bool, source: Source, is_input: bool, bias: Tensor | None
    ) -> list[Launch]:
        """Sums at the positions of the small side (down) or the large one (up)."""
        g, size = self.g, self.element
        window = g.up if is_up else g.down
        target = g.large if is_up else g.small
        from_channels = g.small_channels if is_up else g.large_channels
        channels = g.large_channels if is_up else g.small_channels
        total = from_channels * g.groups

        def epilogue(launch: Launch) -> None:
            if is_input:
                launch.load("x", g.x.nbytes)
            elif bias is not None:
                reads = target.numel()
                if not self.last and not self.direct:  # once per run of a row
                    runs = ceil_div(window.positions, wide(size))
                    reads = channels * runs * g.groups * window.phases
                launch.load("bias", reads * size, bias.nbytes)
            launch.store("input reward" if is_input else "z", target.nbytes)

        if self.direct:
            launch = Launch(
                "direct_sums_kernel", (self._types,), self._direct_blocks(target, window), 256,
                flops=g.flops, unit="float",
            )  # fmt: skip
            reads = channels * g.groups * from_channels * window.real_meetings
            for name, sweep, distinct in source.sweeps(reads, total * window.touched):
                launch.load(name, sweep, distinct)
            launch.load("weight", reads * size, g.weight.nbytes)
            epilogue(launch)
            return [launch]
        pixels = Operand(source.sweeps(total * window.meetings, total * window.touched), self.last)
        kernel = Operand.matrix("weight", g.weight.nbytes, not (self.last and is_up))
        k = window.most_taps * from_channels
        parts, tag = g.groups * window.phases, "PixelEpilogue" if self.last else "PlaneEpilogue"
        if self.last:
            p = Product(
                window.positions, channels, k, pixels, kernel, epilogue, g.flops, tag, parts
            )
        else:
            p = Product(
                channels, window.positions, k, kernel, pixels, epilogue, g.flops, tag, parts
            )
        return self._run(p)

    def _direct_blocks(self, target: Tensor, window: Any) -> int:
        depthwise = self.g.large_channels == self.g.small_channels == 1
        channels = target.shape[1]
        pack = wide(self.element)
        if self.last and depthwise and channels % pack == 0:
            channels //= pack
        return ceil_div(window.positions * channels, 256) * window.phases

    def kernel_product(
        self, small: Source, large: Source, weight: Parameter | None, bias: Parameter | None
    ) -> list[Launch]:
        """The feedback of W; that of b on the way, but for transposed convolutions."""
        g, found = self.g, []
        if bias is not None and g.transposed:
            found += self._direct_sums(large, None, None, bias)
            bias = None
        if weight is None:
            if bias is not None:
                raise NotImplementedError("the feedback of a bias alone is not modelled")
            return found
        if self.direct:
            return found + self._direct_sums(small, large, weight, bias)

        def epilogue(launch: Launch) -> None:
            weight.finish(launch)
            if bias is not None:
                bias.finish(launch)

        window, channels = g.down, g.large.shape[1]
        positions = small.tensor.numel()
        a = Operand(small.sweeps(positions, positions), not self.last)
        reads = channels * window.meetings
        b = Operand(large.sweeps(reads, channels * window.touched), not self.last)
        p = Product(
            g.small_channels, g.large_channels * g.taps, window.positions, a, b, epilogue,
            g.flops, "KernelEpilogue", g.groups, bias is not None,
        )  # fmt: skip
        return found + self._run(p)

    def _direct_sums(
        self, rows: Source, source: Source | None, weight: Parameter | None, bias: Parameter | None
    ) -> list[Launch]:
        """direct_kernel_sums: eight taps at a time; without a source the sums of the rows alone."""
        g, window = self.g, self.g.down
        channels, taps = (g.large_channels, g.taps) if source else (1, 0)
        row_channels = rows.tensor.shape[1]
        pairs = row_channels * channels
        positions = rows.tensor.numel() // row_channels
        blocks = ceil_div(pairs, 32) if self.last else pairs
        chunks = max(ceil_div(taps, 8), 1)
        wanted = ceil_div(4 * self.gpu.processors, blocks * chunks)
        bound = min(max(min(wanted, ceil_div(positions, 1024)), 1), 256)
        splits = ceil_div(positions, ceil_div(positions, bound))
        main = Launch(
            "direct_kernel_sums_kernel", (self._types,), blocks * chunks * splits, 256,
            flops=g.flops if source else 0, unit="float",
        )  # fmt: skip
        for name, sweep, distinct in rows.sweeps(chunks * pairs * positions, rows.tensor.numel()):
            main.load(name, sweep, distinct)
        if source is not None:
            reads, distinct = pairs * window.meetings, g.large.shape[1] * window.touched
            for name, sweep, some in source.sweeps(reads, distinct):
                main.load(name, sweep, some)
        sums = splits * accumulator(self.element)
        items = max(row_channels * ceil_div(channels * taps, wide(self.element)), row_channels)
        last = Launch("reduce_splits_kernel", (self._kernel_epilogue,), ceil_div(items, 256), 256)
        row_sums = sums * row_channels * (bias is not None)
        for name, size in (("partial sums", sums * pairs * taps), ("partial row sums", row_sums)):
            main.store(name, size)
            last.load(name, size)
        for parameter in (weight, bias):
            if parameter is not None:
                parameter.finish(last)
        return [main, last]


def _geometry(a: dict[str, Any], z: Tensor) -> Geometry:
    return Geometry(
        a["x"], z, a["weight"], a["stride"], a["padding"], a["dilation"], a["transposed"],
        a["groups"],
    )  # fmt: skip


def conv_forward(a: dict[str, Any], gpu: Gpu, z: Tensor) -> list[Launch]:
    return _forward(a, gpu, z, a["x"].dtype)


def conv_forward_tf32(a: dict[str, Any], gpu: Gpu, z: Tensor) -> list[Launch]:
    return _forward(a, gpu, z, TF32)


def _forward(a: dict[str, Any], gpu: Gpu, z: Tensor, product: torch.dtype) -> list[Launch]:
    x, weight = a["x"], a["weight"]
    last = strided_channels_last(x) or strided_channels_last(weight)
    conv = Conv(_geometry(a, z), last, product_type(x.dtype, product), gpu)
    product = conv.position_product(a["transposed"], Source(["x"], x), False, a["bias"])
    return [*in_format([x], last), *conv.kernel_copy(weight), *product]


def _redistribute(
    a: dict[str, Any], gpu: Gpu, weight: Parameter | None, bias: Parameter | None
) -> list[Launch]:
    x, reward = a["x"], a["reward"]
    last = strided_channels_last(x) or strided_channels_last(reward)
    unit = product_type(x.dtype, a["product"])
    conv = Conv(_geometry(a, reward), last, unit, gpu)
    signal_in = bool(a["chain"] & 1)
    found = in_format([x, reward] if signal_in else [x, a["z"], reward], last)
    s = Source(["reward"] if signal_in else ["reward", "z"], reward)
    plain = Source(["x"], x)
    if a["need_input"]:
        found += conv.kernel_copy(a["weight"] if a["matrix"] is None else a["matrix"])
        found += conv.position_product(not a["transposed"], s, True, None)
    small, large = (plain, s) if a["transposed"] else (s, plain)
    return found + conv.kernel_product(small, large, weight, bias)


def conv_redistribute(a: dict[str, Any], gpu: Gpu, results: Any) -> list[Launch]:
    weight = Parameter("weight", a["weight"].nbytes, None) if a["need_weight"] else None
    has_bias = a["need_bias"] and a["bias"] is not None
    return _redistribute(
        a, gpu, weight, Parameter("bias", a["bias"].nbytes, None) if has_bias else None
    )


def conv_redistribute_update(a: dict[str, Any], gpu: Gpu, result: Any) -> list[Launch]:
    weight = Parameter("weight", a["weight"].nbytes, STATES[a["optimizer"]])
    bias = None
    if a["bias"] is not None:
        bias = Parameter("bias", a["bias"].nbytes, STATES[a["bias_optimizer"]])
    return _redistribute(a, gpu, weight, bias)
