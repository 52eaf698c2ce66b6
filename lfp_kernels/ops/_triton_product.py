"""Tiles of matrix products for the Triton kernels: operand types, block sizes, program order.

A product has one of these modes:
  fp64  one column times one row at a time: few devices have tensor cores for float64
  ieee  exact float32
  tf32  float32 operands rounded to 10 bits of mantissa, float16 ones as they are
  fp16, bf16  operands of this type; all modes but fp64 accumulate in float32
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rules import Derivative, Rule
from . import _tuned
from ._cuda import TF32
from ._triton import (
    BLOCK,
    below_code,
    below_eps,
    blocks,
    input_epilogue,
    launch,
    load,
    power_of_2,
    registers,
    store,
    sum_of_parts,
)  # fmt: skip

_PROGRAMS = 128  # as many as a large GPU runs at once; a constant, so that it cannot change bits


@triton.constexpr_function
def operand_type(mode):
    types = {"fp64": tl.float64, "fp16": tl.float16, "bf16": tl.bfloat16}
    return types.get(mode, tl.float32)


@triton.jit
def to_tf32(v):
    """A float32 operand rounded to the nearest value of tf32: tensor cores alone cut bits off."""
    if v.dtype != tl.float32:
        return v.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,r", [v], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def product(a, b, total, MODE: tl.constexpr):
    """total[m, n] + a[m, k] b[k, n]"""
    operand: tl.constexpr = operand_type(MODE)
    if a.shape[1] == 1:  # a column times a row, without tensor cores
        return total + a.to(operand).to(total.dtype) * b.to(operand).to(total.dtype)
    elif MODE == "tf32":
        return tl.dot(to_tf32(a), to_tf32(b), total, input_precision="tf32")
    else:
        return tl.dot(a.to(operand), b.to(operand), total, input_precision="ieee")


@triton.jit
def tile_of(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(part of k, m, n) of a program, int64.

    GROUP rows of tiles run together, so that they share operands in L2.
    """
    split = program // (tiles_m * tiles_n)
    program %= tiles_m * tiles_n
    width = GROUP * tiles_n
    first = program // width * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    m, n = first + program % width % height, program % width // height
    return split.to(tl.int64), m.to(tl.int64), n.to(tl.int64)


GROUP = tl.constexpr(8)


def forward_mode(dtype: torch.dtype, in_tf32: bool = False) -> str:
    """``in_tf32``: float32 tensors may use TF32."""
    if in_tf32:
        return feedback_mode(TF32)
    modes = {torch.float64: "fp64", torch.float32: "ieee", torch.float16: "fp16"}
    return modes.get(dtype, "bf16")


def feedback_mode(product_dtype: torch.dtype) -> str:
    """Mode of the two feedback products; a float16 product keeps the range of float32 for s."""
    if product_dtype == TF32:
        return "ieee" if torch.version.hip else "tf32"
    return forward_mode(product_dtype)


class Tiles(NamedTuple):
    """Block sizes of a product [m, k] x [k, n] and how k is split."""

    m: int
    n: int
    k: int
    splits: int  # parts of k, each a program of its own
    warps: int
    stages: int = 3

    def part(self, k: int) -> int:
        """Elements of k in one part: whole blocks."""
        return blocks(k, self.splits * self.k) * self.k

    def programs(self, m: int, n: int) -> int:
        return _programs(m, n, self.m, self.n, self.splits)

    def options(self) -> dict[str, int]:
        """Meta-parameters of a kernel launch."""
        sizes = {"M": self.m, "N": self.n, "K": self.k}
        return {**sizes, "num_warps": self.warps, "num_stages": self.stages, **registers(255)}


def tiles(
    m: int, n: int, k: int, mode: str, groups: int = 1, thin: bool = False, heavy: bool = False,
    product: tuple[str, torch.dtype] | None = None,
) -> Tiles:  # fmt: skip
    """A plain heuristic: large blocks where they fill the device, else smaller, else splits.

    Args:
        groups: products of this size that run together. thin: n is too small for tensor cores.
        heavy: registers hold more than the product: optimizer states, or places of a convolution.
        product: its name and the type of its tensors, for which a tile may have been measured.
    """
    if product is not None and groups == 1 and not thin and mode != "fp64":
        measured = _tuned.choice(*product, mode, m, n, k)
        if measured is not None:
            return Tiles(*measured)
    if thin:
        most_m, most_n, block_k, least = 256, n, 1, 1
    elif mode == "fp64":
        most_m, most_n, block_k, least = 32, 32, 1, 1
    elif mode == "ieee":
        most_m, most_n, block_k, least = 64, 64, 16, 16
    else:
        most_m, most_n, block_k, least = 64 if heavy else 128, 128, power_of_2(k, 16, 32), 16
    block_m, block_n = power_of_2(m, least, most_m), power_of_2(n, least, power_of_2(most_n))
    while _programs(m, n, block_m, block_n, groups) < _PROGRAMS and block_m * block_n > 32 * 32:
        if block_m >= block_n:
            block_m //= 2
        else:
            block_n //= 2
    programs = _programs(m, n, block_m, block_n, groups)
    # a part is worth its traffic of sums where it is a long one
    splits = max(1, min(_PROGRAMS // programs, k // (16 * max(block_k, 16)), 64))
    size = block_m * block_n
    warps = 8 if size >= 128 * 128 else 4 if size >= 64 * 64 or mode == "fp64" else 2
    if heavy:
        warps = 8 if size >= 64 * 64 else 4
    return Tiles(block_m, block_n, block_k, splits, 1 if size <= 16 * 16 else warps)


def _programs(m: int, n: int, block_m: int, block_n: int, groups: int) -> int:
    return max(blocks(m, block_m), 1) * max(blocks(n, block_n), 1) * groups


# ---- sums of the parts of a split product, in order, and its epilogue


@triton.jit(do_not_specialize=["parts"])
def finish_forward_kernel(
    raw_ptr, bias_ptr, out_ptr, count, parts, channels, inner, BIAS: tl.constexpr,
    RELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[.., channels, inner] = sum of raw[parts, ...] + bias, its positive part with RELU."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < count
    total = sum_of_parts(raw_ptr, offset, count, parts, mask)
    if BIAS:
        total += load(bias_ptr + offset // inner % channels, mask)
    if RELU:
        total = tl.where(total < 0, 0.0, total)  # NaN passes
    store(out_ptr + offset, total, mask)


@triton.jit(do_not_specialize=["parts"])
def finish_input_kernel(
    raw_ptr, x_ptr, out_ptr, count, parts, below: tl.float64, RULE: tl.constexpr,
    SIGNAL_OUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = input_epilogue(sum of raw[parts, ...], x)"""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < count
    total = sum_of_parts(raw_ptr, offset, count, parts, mask)
    x = load(x_ptr + offset, mask)
    result = input_epilogue(total, x, below.to(total.dtype), RULE, SIGNAL_OUT)
    store(out_ptr + offset, result, mask)


def finish_forward(
    raw: Tensor, bias: Tensor | None, out: Tensor, relu: bool, channels: int, inner: int
) -> None:
    """Bias and relu of ``out`` from raw [parts, *out in the order of its memory]."""
    launch(
        finish_forward_kernel, blocks(out.numel()), out, raw, out if bias is None else bias, out,
        out.numel(), raw.shape[0], channels, inner, BIAS=bias is not None, RELU=relu, BLOCK=BLOCK,
        num_warps=4,
    )  # fmt: skip


def finish_input(
    raw: Tensor, x: Tensor, out: Tensor, rule: Rule, below: Rule | Derivative | None
) -> None:
    """Input reward from raw [parts, *x in the order of its memory]; ``x`` lies like ``out``."""
    launch(
        finish_input_kernel, blocks(out.numel()), out, raw, x, out, out.numel(), raw.shape[0],
        below_eps(below), RULE=rule.code, SIGNAL_OUT=below_code(below),
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
