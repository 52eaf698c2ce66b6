"""Attention and relevance through it (csrc/cuda/attention*): a block owns rows of queries or of
keys and reads the rows of the other side that it sees, a tile at a time.

No masks but the causal one: the bytes of another depend on which of its elements are shared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .devices import Gpu
from .launch import Launch, accumulator, ceil_div, type_name

# AttentionOf (attention_core.cuh): own rows, other rows and threads, by unit and width.
BLOCKS = {
    ("bf16", 64): (64, 64, 128), ("bf16", 128): (64, 32, 128), ("bf16", 256): (32, 32, 128),
    ("tf32", 64): (64, 32, 128), ("tf32", 128): (32, 32, 128), ("tf32", 256): (16, 16, 128),
    ("float", 64): (64, 32, 256), ("float", 128): (32, 32, 256), ("float", 256): (16, 16, 256),
    ("double", 64): (32, 32, 256), ("double", 128): (16, 16, 256), ("double", 256): (16, 16, 256),
}  # fmt: skip
UNITS = {
    torch.bfloat16: "bf16", torch.float16: "tf32", torch.float32: "float", torch.float64: "double",
}  # fmt: skip


@dataclass(frozen=True)
class _Call:
    """Sizes of a call, and the block that takes it."""

    batch: int
    heads: int
    queries: int
    width: int
    key_heads: int
    keys: int
    values: int
    causal: bool
    element: int
    unit: str

    @classmethod
    def of(cls, a: dict[str, Any]) -> _Call:
        q, k, v = a["q"], a["k"], a["v"]
        if a["mask"] is not None:
            raise ValueError("bench gpu-model: attention: the model knows no mask but causal")
        batch, heads, queries, width = q.shape
        return cls(
            batch, heads, queries, width, k.shape[1], k.shape[2], v.shape[3], a["causal"],
            q.element_size(), UNITS[q.dtype],
        )  # fmt: skip

    @property
    def widest(self) -> int:
        return next(w for w in (64, 128, 256) if max(self.width, self.values) <= w)

    @property
    def block(self) -> tuple[int, int, int]:
        return BLOCKS[self.unit, self.widest]

    @property
    def pairs(self) -> int:
        """Queries and keys that they see, of all heads."""
        n, s = self.queries, self.keys
        seen = n * s
        if self.causal:
            short = min(n, s)
            seen = short * (short + 1) // 2 + (n - short) * s
        return self.batch * self.heads * seen

    def launch(self, kernel: str, rows: int, heads: int, shared: int, products: int) -> Launch:
        """``products``: elements of operands that a pair multiplies."""
        own, _, threads = self.block
        name = type_name(self.element, self.unit)
        operand = "Tf32" if self.unit == "tf32" else name
        tokens = (f"<{name}, AttentionOf<{operand}, {self.widest}>",)
        blocks = self.batch * heads * ceil_div(rows, own)
        return Launch(kernel, tokens, blocks, threads, shared, 2 * self.pairs * products, self.unit)

    def key_rows(self) -> Iterator[int]:
        """Keys that each block of queries of one head reads: whole tiles."""
        own, other, _ = self.block
        for first in range(0, self.queries, own):
            end = min(self.keys, first + own) if self.causal else self.keys
            yield min(ceil_div(end, other) * other, self.keys)

    def query_rows(self) -> Iterator[int]:
        """Queries that each block of keys reads of one head."""
        own, other, _ = self.block
        for first in range(0, self.keys, own):
            yield max(0, self.queries - (first // other * other if self.causal else 0))

    def load_keys(self, launch: Launch) -> None:
        """k and v by all blocks of queries."""
        rows = list(self.key_rows())
        for name, width in (("k", self.width), ("v", self.values)):
            size = self.batch * width * self.element
            launch.load(name, self.heads * sum(rows) * size, self.key_heads * max(rows) * size)

    def bytes_of(self, *parts: tuple[int, int, int]) -> int:
        """Shared memory of members (rows, columns, element), 16 bytes of padding on the rows of
        tiles (element > 0), none on plain arrays (element < 0)."""
        total = 0
        for rows, columns, element in parts:
            if element > 0:
                total = ceil_div(total, 16) * 16 + rows * (columns * element + 16)
            else:
                total += rows * columns * -element
        return ceil_div(total, 16) * 16

    @property
    def operand(self) -> int:
        return 4 if self.unit == "tf32" else self.element


def attention_forward(a: dict[str, Any], gpu: Gpu) -> list[Launch]:
    call = _Call.of(a)
    if call.batch * call.heads * call.queries == 0:
        return []
    (own, other, _), w, p = call.block, call.widest, call.operand
    acc = accumulator(call.element)
    rest = [(own, other, p)] if call.unit in ("bf16", "tf32") else [(1, acc, -1)]
    shared = call.bytes_of(
        (own, w, p), (other, w, p), (other, w, p), (own, other + 1, -acc), (own, other, p), *rest,
        (own, 1, -acc),
    )  # fmt: skip
    launch = call.launch(
        "attention_kernel", call.queries, call.heads, shared, call.width + call.values
    )
    rows = call.batch * call.heads * call.queries
    launch.load("q", a["q"].nbytes)
    call.load_keys(launch)
    launch.store("out", rows * call.values * call.element)
    launch.store("lse", rows * acc)
    return [launch]


def attention_redistribute(a: dict[str, Any], gpu: Gpu) -> list[Launch]:
    """Own rows are read again at the end by AttnLRP, which multiplies with them."""
    call, found = _Call.of(a), []
    (own, other, _), w, p = call.block, call.widest, call.operand
    acc, most = accumulator(call.element), max(own, other)
    tiles = [(own, w, p), (own, w, p), (other, w, p), (other, w, p), (own, other, p)]
    statistics = [(most, 1, -acc), (most, 1, -acc)]
    attnlrp, again = a["attnlrp"], 2 if a["attnlrp"] else 1
    rows = call.batch * call.heads * call.queries
    signal = p if attnlrp else call.element
    q, k, v = a["q"], a["k"], a["v"]
    if rows:
        products = 2 * call.width + call.values
        launch = call.launch(
            "attention_queries_kernel", call.queries, call.heads,
            call.bytes_of(*tiles, *statistics), products,
        )  # fmt: skip
        launch.load("q", again * q.nbytes, q.nbytes)
        call.load_keys(launch)
        for name in ("out", "reward"):
            launch.load(name, rows * call.values * call.element)
        launch.load("lse", rows * acc)
        launch.store("signal", rows * call.values * signal * attnlrp)
        launch.store("delta", rows * acc)
        launch.store("r_q", q.nbytes)
        found.append(launch)
    if call.batch * call.key_heads * call.keys:
        read = list(call.query_rows())
        products = 2 * call.width + 2 * call.values
        launch = call.launch(
            "attention_keys_kernel", call.keys, call.key_heads,
            call.bytes_of(*tiles, *statistics) + call.bytes_of((own, other, p)), products,
        )  # fmt: skip
        _own_rows(launch, again, k, v)
        heads = call.batch * call.heads
        for name, size in (
            ("q", call.width * call.element), ("s", call.values * signal), ("lse", acc),
            ("delta", acc),
        ):  # fmt: skip
            launch.load(name, heads * sum(read) * size, heads * max(read) * size)
        launch.store("r_k", k.nbytes)
        launch.store("r_v", v.nbytes)
        found.append(launch)
    return found


def _own_rows(launch: Launch, again: int, k: Tensor, v: Tensor) -> None:
    for name, t in (("k", k), ("v", v)):
        launch.load(name, again * t.nbytes, t.nbytes)
