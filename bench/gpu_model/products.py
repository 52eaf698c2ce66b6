"""The products of csrc/cuda/product*.cuh and linear_one_pass.cuh, and the linear layer (linear.cu).

A tile of C[M, N] reads its rows of A and its columns of B once, so a launch requests
    tiles_n * bytes(A) + tiles_m * bytes(B) + epilogue,
and with the sum over k split it writes splits * M * N partial sums that a second launch reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lfp_kernels.ops._cuda import TF32

from .devices import Gpu
from .launch import STATES, Launch, Parameter, accumulator, ceil_div, type_name, wide

P_NAME = {"bf16": "BFloat16", "tf32": "Tf32", "float": "float", "double": "double"}
PRODUCT_BYTES = {"float": 4, "double": 8, "bf16": 2, "tf32": 4}


def product_type(dtype: torch.dtype, product: torch.dtype) -> str:
    """dispatch_product: the type that the products of ``dtype`` tensors run in."""
    if dtype == torch.float64:
        return "double"
    if dtype == torch.bfloat16:
        return "bf16"
    if dtype == torch.float16:
        return "tf32"
    return {torch.bfloat16: "bf16", torch.float16: "tf32"}.get(product, "float")


@dataclass(frozen=True)
class Core:
    """The tile of a block. ``shared(along_a, along_b)``: bytes of its stages. ``chain``: longer
    sums also keep totals there; 0: they do not."""

    kernel: str
    token: str
    m: int
    n: int
    k: int
    threads: int
    shared: Callable[[bool, bool], int]
    chain: int = 0


def _simt(unit: str, tile: int) -> Core:
    size = PRODUCT_BYTES[unit]
    k = 32 // size * (2 if tile == 64 else 1)
    operand = k * (tile * size + 16)
    token = f"SimtCore<{unit}, {tile}, {tile}, {k}>"
    chain = {64: 64, 128: 256}[tile] if unit == "float" else 0
    return Core("product_kernel", token, tile, tile, k, 256, lambda *_: 4 * operand, chain)


def _mma(unit: str, tile: int, warp_m: int, warp_n: int) -> Core:
    size = PRODUCT_BYTES[unit]
    k = 64 // size
    threads = 32 * (tile // warp_m) * (tile // warp_n)
    visit = 4 * 16 * (tile // warp_m) * (tile + 4)

    def operand(along_k: bool) -> int:
        pad = 4 if along_k and size == 4 else 8
        return size * (tile * (k + pad) if along_k else k * (tile + pad))

    def shared(along_a: bool, along_b: bool) -> int:
        return max(2 * (operand(along_a) + operand(along_b)), visit)

    token = f"MmaCore<{P_NAME[unit]}, {tile}, {tile}, {k}, {warp_m}, {warp_n}>"
    return Core("product_kernel", token, tile, tile, k, threads, shared)


HOPPER_SHARED = 4 * 6 * 8192 + 64 + 1024
HOPPER = Core("hopper_kernel", "hopper_kernel", 128, 128, 64, 288, lambda *_: HOPPER_SHARED)
LARGE = {
    "float": _simt("float", 128), "double": _simt("double", 64),
    "bf16": _mma("bf16", 128, 64, 32), "tf32": _mma("tf32", 128, 64, 32),
}  # fmt: skip
SMALL = {
    "float": _simt("float", 64), "double": _simt("double", 64),
    "bf16": _mma("bf16", 64, 32, 32), "tf32": _mma("tf32", 64, 32, 32),
}  # fmt: skip


@dataclass(frozen=True)
class Operand:
    """``sweeps``: (buffer, bytes that reading all of the operand once asks for, distinct bytes)."""

    sweeps: list[tuple[str, int, int]]
    along_k: bool

    @staticmethod
    def matrix(name: str, size: int, along_k: bool) -> Operand:
        return Operand([(name, size, size)], along_k)


@dataclass(frozen=True)
class Product:
    """C[m, n] = A B over k, ``parts`` times in one launch."""

    m: int
    n: int
    k: int
    a: Operand
    b: Operand
    epilogue: Callable[[Launch], None]
    flops: int
    tag: str  # the epilogue's name
    parts: int = 1
    row_sums: bool = False
    matrices: bool = False  # plain bfloat16 matrices that TMA may load


def launches_of(p: Product, unit: str, element: int, gpu: Gpu) -> list[Launch]:
    """The launches of tiled_product, or of hopper_product where that applies."""
    if p.m == 0 or p.n == 0 or p.parts == 0:
        return []
    core = _core(p, unit, element, gpu)
    tiles_m, tiles_n = ceil_div(p.m, core.m), ceil_div(p.n, core.n)
    tiles = tiles_m * tiles_n * p.parts
    wanted = _splits(tiles, p.k, core.k, gpu)
    per_split = ceil_div(ceil_div(p.k, wanted), core.k) * core.k
    splits = ceil_div(p.k, per_split) if p.k else 1
    # the input epilogue has the width of its accesses for a second parameter
    end = ", " if p.tag == "InputEpilogue" else ">"
    tag = f"{p.tag}<{type_name(element, unit)}{end}"
    shared = core.shared(p.a.along_k, p.b.along_k)
    if core.chain and per_split > core.chain:
        shared += 4 * core.m * core.n
    main = Launch(
        core.kernel, (core.token, tag), tiles * splits, core.threads, shared, p.flops, unit
    )
    for operand, times in ((p.a, tiles_n), (p.b, tiles_m)):
        for name, sweep, distinct in operand.sweeps:
            main.load(name, times * sweep, distinct)
    if splits == 1:
        p.epilogue(main)
        return [main]
    sums = splits * p.parts * p.m * accumulator(element)
    blocks = ceil_div(max(p.m * ceil_div(p.n, wide(element)), p.m), 256) * p.parts
    second = Launch("reduce_splits_kernel", (tag,), blocks, 256)
    for name, size in (("partial sums", sums * p.n), ("partial row sums", sums * p.row_sums)):
        main.store(name, size)
        second.load(name, size)
    p.epilogue(second)
    return [main, second]


def _core(p: Product, unit: str, element: int, gpu: Gpu) -> Core:
    if p.matrices and unit == "bf16" and element == 2 and gpu.capability == 90:
        tiles = ceil_div(p.m, HOPPER.m) * ceil_div(p.n, HOPPER.n)
        if p.k >= 128 and 2 * tiles >= gpu.processors:
            return HOPPER
    large = LARGE[unit]
    tiles = ceil_div(p.m, large.m) * ceil_div(p.n, large.n) * p.parts
    return large if tiles >= gpu.processors else SMALL[unit]


def _splits(tiles: int, k: int, tile_k: int, gpu: Gpu) -> int:
    """count_splits: enough blocks for every processor, at least 8 tiles of k for each."""
    if tiles >= gpu.processors:
        return 1
    most = ceil_div(k, 8 * tile_k)
    return max(1, min(ceil_div(2 * gpu.processors, max(tiles, 1)), most, 64))


# ---- linear


def signal_sweeps(reward: Tensor, signal_in: bool, size: int | None = None) -> list:
    """s is formed from r and z on the way in; a chained layer is handed s itself."""
    size = reward.nbytes if size is None else size
    names = ["reward"] if signal_in else ["reward", "z"]
    return [(name, size, min(size, reward.nbytes)) for name in names]


@dataclass(frozen=True)
class Layer:
    """A linear layer's call."""

    x: Tensor
    weight: Tensor
    reward: Tensor
    unit: str
    signal_in: bool
    gpu: Gpu

    @property
    def batch(self) -> int:
        return math.prod(self.x.shape[:-1])

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.weight.numel()

    @property
    def packs(self) -> bool:
        """Every row is whole 16-byte packs."""
        return all(s % wide(self.x.element_size()) == 0 for s in self.weight.shape)

    def input_product(self) -> list[Launch]:
        out, inner = self.weight.shape

        def epilogue(launch: Launch) -> None:
            launch.load("x", self.x.nbytes)
            launch.store("input reward", self.x.nbytes)

        a = Operand(signal_sweeps(self.reward, self.signal_in), True)
        b = Operand.matrix("weight", self.weight.nbytes, False)
        p = Product(
            self.batch, inner, out, a, b, epilogue, self.flops, "InputEpilogue",
            matrices=self.packs,
        )  # fmt: skip
        return launches_of(p, self.unit, self.x.element_size(), self.gpu)

    def weight_product(self, weight: Parameter, bias: Parameter | None) -> list[Launch]:
        out, inner = self.weight.shape

        def epilogue(launch: Launch) -> None:
            weight.finish(launch)
            if bias is not None:
                bias.finish(launch)

        a = Operand(signal_sweeps(self.reward, self.signal_in), False)
        b = Operand.matrix("x", self.x.nbytes, False)
        p = Product(
            out, inner, self.batch, a, b, epilogue, self.flops, "WeightEpilogue",
            row_sums=bias is not None, matrices=self.packs,
        )  # fmt: skip
        return launches_of(p, self.unit, self.x.element_size(), self.gpu)

    def one_pass(self, weight: Parameter, bias: Parameter | None, need_input: bool) -> list[Launch]:
        """linear_one_pass.cuh: W is read once; s once per strip of 64 columns, x once per range."""
        out, inner = self.weight.shape
        element = self.x.element_size()
        largest = next(n for n in ONE_PASS_BATCHES[self.unit] if self.batch <= n)
        kind = type_name(element, self.unit)
        strips, tiles = ceil_div(inner, 64), ceil_div(out, 64)
        several = 1 if largest > 64 and self.unit == "bf16" else 2
        wanted = ceil_div(several * self.gpu.processors, strips)
        rows = ceil_div(tiles, min(max(wanted, 1), tiles)) * 64
        ranges = ceil_div(out, rows)
        main = Launch(
            "one_pass_kernel", (f"<{kind}, {P_NAME[self.unit]}, {largest}>",), strips * ranges,
            256, one_pass_shared(self.unit, element, largest), self.flops * (1 + need_input),
            self.unit,
        )  # fmt: skip
        weight.finish(main)  # its load is that of the operand: the tile waits in shared memory
        for name, size, distinct in signal_sweeps(self.reward, self.signal_in):
            main.load(name, strips * size, distinct)
        main.load("x", ranges * self.x.nbytes, self.x.nbytes)
        if bias is not None:
            bias.finish(main)
        if not need_input:
            return [main]
        last, found = main, [main]
        if ranges > 1:
            last = Launch("add_ranges_kernel", (f"<{kind}>",), ceil_div(self.x.numel(), 256), 256)
            size = ranges * self.x.numel() * accumulator(element)
            main.store("partial sums", size)
            last.load("partial sums", size)
            found.append(last)
        last.load("x", self.x.nbytes)
        last.store("input reward", self.x.nbytes)
        return found


# The largest batch of each kernel.
ONE_PASS_BATCHES = {"bf16": (128,), "tf32": (64,), "float": (32, 64, 128), "double": (32,)}


def one_pass_shared(unit: str, element: int, batch: int) -> int:
    """sizeof(OnePassKernel::Shared) and the memory of visit."""
    size = PRODUCT_BYTES[unit]
    if unit in ("float", "double"):  # the tile that is multiplied is W itself
        return size * (2 * batch + 64) * (64 + 16 // size)
    exact = 64 * (64 * element + 16)
    return size * (2 * batch * 72 + 64 * 72) + exact + 4 * 64 * 68


def _redistribute(
    layer: Layer, weight: Parameter | None, bias: Parameter | None, need_input: bool
) -> list[Launch]:
    if weight is not None and layer.batch <= ONE_PASS_BATCHES[layer.unit][-1] and layer.x.numel():
        return layer.one_pass(weight, bias, need_input)
    found = layer.input_product() if need_input else []
    if weight is None and bias is not None:
        raise NotImplementedError("the feedback of a bias alone is not modelled")
    return found + (layer.weight_product(weight, bias) if weight is not None else [])


def _layer(a: dict[str, Any], gpu: Gpu) -> Layer:
    unit = product_type(a["x"].dtype, a["product"])
    return Layer(a["x"], a["weight"], a["reward"], unit, bool(a["chain"] & 1), gpu)


def linear_forward(a: dict[str, Any], gpu: Gpu) -> list[Launch]:
    return _forward(a, gpu, a["x"].dtype)


def linear_forward_tf32(a: dict[str, Any], gpu: Gpu) -> list[Launch]:
    return _forward(a, gpu, TF32)


def _forward(a: dict[str, Any], gpu: Gpu, product: torch.dtype) -> list[Launch]:
    x, weight, bias = a["x"], a["weight"], a["bias"]
    batch, (out, inner), element = math.prod(x.shape[:-1]), weight.shape, x.element_size()

    def epilogue(launch: Launch) -> None:
        if bias is not None:
            launch.load("bias", batch * out * element, bias.nbytes)
        launch.store("z", batch * out * element)

    p = Product(
        batch, out, inner, Operand.matrix("x", x.nbytes, True),
        Operand.matrix("weight", weight.nbytes, True), epilogue, 2 * batch * weight.numel(),
        "ForwardEpilogue", matrices=inner % 8 == 0,
    )  # fmt: skip
    return launches_of(p, product_type(x.dtype, product), element, gpu)


def linear_redistribute(a: dict[str, Any], gpu: Gpu) -> list[Launch]:
    weight = Parameter("weight", a["weight"].nbytes, None) if a["need_weight"] else None
    has_bias = a["need_bias"] and a["bias"] is not None
    bias = Parameter("bias", a["bias"].nbytes, None) if has_bias else None
    return _redistribute(_layer(a, gpu), weight, bias, a["need_input"])


def linear_redistribute_update(a: dict[str, Any], gpu: Gpu) -> list[Launch]:
    weight = Parameter("weight", a["weight"].nbytes, STATES[a["optimizer"]])
    bias = None
    if a["bias"] is not None:
        bias = Parameter("bias", a["bias"].nbytes, STATES[a["bias_optimizer"]])
    return _redistribute(_layer(a, gpu), weight, bias, a["need_input"])
