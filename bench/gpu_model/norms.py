"""Batch norm (csrc/cuda/channel_passes.cuh, batch_norm.cu).

With batch statistics every value depends on sums over all of its channel: the operands are read
once to sum and once to write. A block also reads what it must know of its channels, and leaves a
pair of float64 partial sums for each.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .devices import Gpu
from .launch import Launch, accumulator, ceil_div, type_name, wide

NARROW, MAX_LANES, PASS_BLOCKS, MIN_CHUNK, PARTIAL_SHARE = 32, 8, 4096, 4096, 800
PAIR = 16  # bytes


class Cut:
    """How the blocks cut x [outer, C, inner]; struct Cut."""

    def __init__(self, x: Tensor) -> None:
        channels = x.shape[1]
        outer, inner = 1, x.numel() // max(channels, 1)
        if channels > 1 and x.numel():
            outer, inner = x.numel() // (channels * x.stride(1)), x.stride(1)
        element = x.element_size()
        self.channels = channels
        width = channels * inner
        self.rows = inner < NARROW
        pack = wide(element)
        pack = pack if (width if self.rows else inner) % pack == 0 else 1
        self.pack = pack
        if self.rows:
            lanes = 1
            while lanes < MAX_LANES and lanes * pack < width:
                lanes *= 2
            columns = max(ceil_div(width, lanes * pack), 1)
            splits = min(PASS_BLOCKS // columns, outer * element // PARTIAL_SHARE)
            length = outer
        else:
            columns = channels
            splits = min(PASS_BLOCKS // channels, outer * inner // MIN_CHUNK)
            length = outer * inner
        chunk = max(ceil_div(length, max(splits, 1)), 1)
        if not self.rows:
            chunk = ceil_div(chunk, pack) * pack
        self.splits = ceil_div(length, chunk)
        self.blocks = self.splits * columns
        # What blocks read of channels: by planes one channel per block, by rows one per column.
        self.channel_reads = self.splits * (width if self.rows else channels)
        self.partials = (self.splits * inner if self.rows else self.splits) * channels


def _size(t: Tensor | None) -> int:
    return 0 if t is None else t.nbytes


def _pass(cut: Cut, body: str, channel_bytes: dict[str, int], x: Tensor) -> Launch:
    """channel_bytes: of one channel."""
    kernel = "rows_kernel" if cut.rows else "planes_kernel"
    launch = Launch(
        kernel, (f"<{cut.pack}, {body}<{type_name(x.element_size())}",), cut.blocks, 256
    )
    for name, size in channel_bytes.items():
        launch.load(name, size * cut.channel_reads, size * cut.channels)
    return launch


def second_read(op: str, a: dict[str, Any]) -> int:
    """Bytes that batch statistics have to be read for again: x, and the reward and z with it."""
    if not a["training"] or not a.get("need_input", True):
        return 0
    operands = 1 if op == "batch_norm_forward" else (2 if a["chain"] & 1 else 3)
    return operands * a["x"].nbytes


def batch_norm_forward(a: dict[str, Any], gpu: Gpu) -> list[Launch]:
    x = a["x"]
    cut, acc = Cut(x), accumulator(x.element_size())
    channels = cut.channels
    sums = a["training"] and x.numel() != 0
    found = []
    if sums:
        first = _pass(cut, "Forward", {}, x)
        first.load("x", x.nbytes + cut.channel_reads * x.element_size(), x.nbytes)
        first.store("partial sums", PAIR * cut.partials)
        found.append(first)
    statistics = Launch(
        "statistics_kernel", (f"<{type_name(x.element_size())}",), ceil_div(channels, 8), 256
    )
    for name in ("running_mean", "running_var"):
        statistics.load(name, _size(a[name]))
        statistics.store(name, _size(a[name]) * sums)
    if sums:
        statistics.load("partial sums", PAIR * cut.partials)
        statistics.load("x", channels * x.element_size())
    for name in ("weight", "bias"):
        statistics.load(name, _size(a[name]))
    for name in ("mean", "invstd"):
        statistics.store(name, channels * acc)
    statistics.store("coefficients", 3 * channels * acc)
    found.append(statistics)
    if x.numel():
        last = _pass(cut, "Forward", {"coefficients": 3 * acc}, x)
        last.load("x", x.nbytes)
        last.store("out", x.nbytes)
        found.append(last)
    return found


def batch_norm_redistribute(a: dict[str, Any], gpu: Gpu) -> list[Launch]:
    x, gamma, beta = a["x"], a["weight"], a["bias"]
    cut, acc = Cut(x), accumulator(x.element_size())
    need_input = a["need_input"]
    need_weight = a["need_weight"] and gamma is not None
    need_bias = a["need_bias"] and beta is not None
    batch = a["training"] and need_input and x.numel() != 0
    sums = (batch or need_weight or need_bias) and x.numel() != 0
    at_once = need_input and not a["training"]
    operands = ["x", "reward"] + ([] if a["chain"] & 1 else ["z"])
    vectors = {"mean": a["mean"], "weight": gamma, "invstd": a["invstd"]}
    of_channel = {n: _size(t) // max(cut.channels, 1) for n, t in vectors.items()}

    def one_pass(sums: bool, write: bool, of_channel: dict[str, int]) -> Launch:
        launch = _pass(cut, "Redistribute", of_channel, x)
        for name in operands:
            launch.load(name, x.nbytes)
        launch.store("partial sums", PAIR * cut.partials * sums)
        launch.store("input reward", x.nbytes * write)
        return launch

    found = []
    if sums or (at_once and x.numel()):
        found.append(one_pass(sums, at_once, of_channel))
    if batch or need_weight or need_bias:
        feedback = Launch(
            "feedback_kernel", (f"<{type_name(x.element_size())}",), ceil_div(cut.channels, 8), 256
        )
        feedback.load("partial sums", PAIR * cut.partials * sums)
        for name, t in (("invstd", a["invstd"]), ("weight", gamma), ("bias", beta)):
            feedback.load(name, _size(t))
        feedback.store("terms", 2 * acc * cut.channels * batch)
        feedback.store("feedback of weight", _size(gamma) * need_weight)
        feedback.store("feedback of bias", _size(beta) * need_bias)
        found.append(feedback)
    if batch:
        found.append(one_pass(False, True, {**of_channel, "terms": 2 * acc}))
    return found
