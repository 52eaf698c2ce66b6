"""Batch normalization in Triton over x [N, C, *], in any dense order of the axes.

The equations are those of triton_kernels.py; this module cuts x into tiles and launches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...rules import Rule, accumulate_dtype
from .._triton import (
    arranged_like,
    blocks,
    launch,
    power_of_2,
    prologue_code,
)
from .triton_kernels import (
    feedback_kernel,
    input_kernel,
    moments_kernel,
    normalize_kernel,
    statistics_kernel,
    sums_kernel,
)

_TILE = 2048  # elements of x in flight per program
_NARROW = 32  # below this many contiguous elements a plane is a part of a row
_PROGRAMS = 1024
_PARTS = 128  # parts that a program of the per-channel kernels loads at a time


class Cut(NamedTuple):
    """How the passes cut a dense x, which is [outer, channels, inner] around its channel axis.

    Planes: a group is one channel. Rows (channels_last, 2-d input, tiny planes): a group is a block
    of the ``channels * inner`` columns of [outer, columns]. A part is some of a group's rows of
    tiles; it depends on the shape alone.
    """

    rows: bool
    channels: int
    inner: int
    lines: int  # rows of tiles: rows, or pieces of planes
    groups: int
    parts: int
    step: int  # lines of a part
    height: int  # of a tile, a power of 2
    width: int

    @classmethod
    def of(cls, x: Tensor) -> Cut:
        channels = x.shape[1]
        inner = x.stride(1) if channels > 1 else x.numel()
        outer = x.numel() // (channels * inner)
        rows = inner < _NARROW
        if rows:
            width = power_of_2(channels * inner, most=128)
            lines, groups = outer, blocks(channels * inner, width)
        else:
            width = power_of_2(inner, most=1024)
            lines, groups = outer * blocks(inner, width), channels
        height = _TILE // width
        tiles = blocks(lines, height)
        step = blocks(tiles, max(1, min(_PROGRAMS // groups, tiles))) * height
        parts = blocks(lines, step)
        return cls(rows, channels, inner, lines, groups, parts, step, height, width)

    @property
    def columns(self) -> int:
        """Values of a part: one per channel, or one per column."""
        return self.channels * self.inner if self.rows else self.channels

    def arguments(self) -> tuple[int, ...]:
        return self.channels, self.inner, self.lines, self.parts, self.step

    def options(self) -> dict[str, int]:
        return {"ROWS": self.rows, "HEIGHT": self.height, "WIDTH": self.width, "num_warps": 8}


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty_like(x)
    x = arranged_like(out, x)
    channels, acc = x.shape[1], accumulate_dtype(x.dtype)
    mean, invstd = x.new_empty(channels, dtype=acc), x.new_empty(channels, dtype=acc)
    coefficients = x.new_empty((3, channels), dtype=acc)
    training = training and x.numel() > 0  # no values leave the running statistics alone
    columns, repeat, parts, count = channels, 1, 0, 0
    sums = mean
    if x.numel():
        cut = Cut.of(x)
        columns, parts, count = cut.columns, cut.parts, x.numel() // channels
        repeat = cut.inner if cut.rows else 1
    if training:
        sums = x.new_empty((3, cut.parts, columns), dtype=torch.float64)
        launch(
            moments_kernel, cut.groups * cut.parts, x, x, sums, columns, *cut.arguments(),
            **cut.options(),
        )  # fmt: skip
    launch(
        statistics_kernel, channels, x, sums, _dense(weight), _dense(bias), running_mean,
        running_var, mean, invstd, coefficients, columns, channels, parts, repeat,
        0 if running_mean is None else running_mean.stride(0),
        0 if running_var is None else running_var.stride(0),
        count / max(count - 1, 1), momentum, eps, TRAINING=training, PARTS=_PARTS, num_warps=4,
    )  # fmt: skip
    if x.numel():
        launch(
            normalize_kernel, cut.groups * cut.parts, x, x, out, coefficients, *cut.arguments(),
            RELU=relu, **cut.options(),
        )  # fmt: skip
    return out, mean, invstd


def redistribute(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor,
    reward: Tensor,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    rule: Rule,
    need: tuple[bool, bool, bool],
    below: Rule | None,
    signal_in: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    out = torch.empty_like(x)
    x, reward = arranged_like(out, x), arranged_like(out, reward)
    z = reward if signal_in else arranged_like(out, z)
    weight, bias = _dense(weight), _dense(bias)
    channels, prologue = x.shape[1], prologue_code(rule, signal_in)
    weight_feedback = torch.empty_like(weight) if need[1] and weight is not None else None
    bias_feedback = torch.empty_like(bias) if need[2] and bias is not None else None
    coefficients = x.new_empty((4, channels), dtype=accumulate_dtype(x.dtype))
    columns, parts, repeat, sums, mean = channels, 0, 1, coefficients, mean.contiguous()
    if x.numel():
        cut = Cut.of(x)
        repeat = cut.inner if cut.rows else 1
        if training or weight_feedback is not None or bias_feedback is not None:
            columns, parts = cut.columns, cut.parts
            sums = x.new_empty((2, parts, columns), dtype=torch.float64)
            launch(
                sums_kernel, cut.groups * parts, x, x, z, reward, mean, sums, columns,
                *cut.arguments(), rule.stabilizer, PROLOGUE=prologue, **cut.options(),
            )  # fmt: skip
    launch(
        feedback_kernel, channels, x, sums, weight, bias, mean, invstd.contiguous(), coefficients,
        weight_feedback, bias_feedback, columns, channels, parts, repeat,
        float(x.numel() // max(channels, 1)), TRAINING=training and x.numel() > 0, RULE=rule.code,
        PARTS=_PARTS, num_warps=4,
    )  # fmt: skip
    if need[0] and x.numel():
        launch(
            input_kernel, cut.groups * cut.parts, x, x, z, reward, out, coefficients,
            *cut.arguments(), rule.stabilizer, 1.0 if below is None else below.stabilizer,
            PROLOGUE=prologue, RULE=rule.code, SIGNAL_OUT=below is not None, **cut.options(),
        )  # fmt: skip
    return (out if need[0] else None), weight_feedback, bias_feedback
