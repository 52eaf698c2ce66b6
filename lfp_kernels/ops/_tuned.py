"""Tiles of Triton's products that were measured on a GPU, in place of the heuristic.

``LFP_KERNELS_TUNED`` names a folder with one table per architecture, such as ``sm_90.json`` or
``gfx942.json``; ``python -m bench tune`` measures and writes it. Sizes are rounded up to powers of
2, so that a table also speaks for the sizes near those that were measured; for what it lacks the
heuristic decides. A table is read once, at the first product: nothing is tuned within a step, and a
size has the same tile in every step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

VARIABLE = "LFP_KERNELS_TUNED"
PRODUCTS = tuple(
    f"{layer} {product}"
    for layer in ("linear", "conv")
    for product in ("forward", "input", "weight")
)
DTYPES = ("float32", "bfloat16", "float16")
MODES = ("ieee", "tf32", "fp16", "bf16")  # fp64 has no tiles to choose from
# What the kernels take: tl.dot wants 16 and powers of 2, a program has at most 1024 threads.
LEGAL: dict[str, Sequence[int]] = {
    "m": (16, 32, 64, 128, 256),
    "n": (16, 32, 64, 128, 256),
    "k": (16, 32, 64, 128),
    "splits": range(1, 65),
    "warps": (1, 2, 4, 8, 16),
    "stages": range(1, 6),
}


class Choice(NamedTuple):
    """Tile [m, k] x [k, n] of a product, parts of k, warps of a program, stages of its loop."""

    m: int
    n: int
    k: int
    splits: int
    warps: int
    stages: int


class Size(NamedTuple):
    """Which product of which layer, the type of its tensors and of its operands (a mode of
    _triton_product.py), and the sizes [m, k] x [k, n], rounded up."""

    product: str
    dtype: str
    mode: str
    m: int
    n: int
    k: int


Table = Mapping[Size, Choice]

folder: str | None = os.environ.get(VARIABLE) or None
_given: Table | None = None  # of using()


def size(product: str, dtype: torch.dtype | str, mode: str, m: int, n: int, k: int) -> Size:
    rounded = (1 << max(v - 1, 0).bit_length() for v in (m, n, k))
    return Size(product, str(dtype).removeprefix("torch."), mode, *rounded)


def choice(product: str, dtype: torch.dtype, mode: str, m: int, n: int, k: int) -> Choice | None:
    """The measured tile of a product; None: there is none."""
    if folder is None and _given is None:
        return None
    found = _looked_up(*size(product, dtype, mode, m, n, k))
    return Choice(*found) if found else None


@torch.compiler.assume_constant_result
def _looked_up(*key: Any) -> tuple[int, ...]:
    """() where the table lacks it. torch.compile cannot trace how a table is read."""
    table = _given if _given is not None else _of_device()
    return tuple(table.get(Size(*key), ()))


@contextmanager
def using(table: Table) -> Iterator[None]:
    """Within the block this table and no other, for measurements and tests."""
    global _given
    before, _given = _given, table
    try:
        yield
    finally:
        _given = before


def architecture() -> str:
    """Of the current device: sm_90, gfx942, ..."""
    properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def _of_device() -> Table:
    if folder is None or not torch.cuda.is_available():
        return {}
    return _read_once(Path(folder), architecture())


@cache
def _read_once(where: Path, name: str) -> Table:
    if not where.is_dir():
        raise ValueError(
            f"{VARIABLE}: expected a folder, got {where}; fix: name the one that python -m bench "
            "tune wrote, or unset the variable"
        )
    path = where / f"{name}.json"
    return read(path) if path.exists() else {}


def read(path: Path) -> dict[Size, Choice]:
    """A table from its file.

    Raises:
        ValueError: it is not one, or a tile in it has sizes that no kernel takes.
    """
    fix = "fix: write it with python -m bench tune"
    try:
        entries = json.loads(path.read_text())["entries"]
        table = {Size(**entry["size"]): Choice(**entry["tile"]) for entry in entries}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected a table of tiles, got {type(error).__name__}: {error}; {fix}"
        ) from error
    for key, tile in table.items():
        fault = _fault(key, tile)
        if fault:
            raise ValueError(f"{path}: {' '.join(map(str, key))}: expected {fault}; {fix}")
    return table


def _fault(key: Size, tile: Choice) -> str | None:
    """What was expected of an entry instead."""
    known = key.product in PRODUCTS and key.dtype in DTYPES and key.mode in MODES
    if not known:
        return f"one of {', '.join(PRODUCTS)}; of {', '.join(DTYPES)}; in {', '.join(MODES)}"
    if any(type(v) is not int or v < 1 or v & (v - 1) for v in key[3:]):
        return "sizes that are powers of 2"
    for field, value in tile._asdict().items():
        if type(value) is not int or value not in LEGAL[field]:
            legal = LEGAL[field]
            return f"{field} one of {', '.join(map(str, legal))}, got {value!r}"
    return None


def write(path: Path, table: Table, facts: Mapping[str, Any], times: Mapping[Size, Any]) -> None:
    """``facts``: of the device and the software; ``times``: what was measured, by size."""
    entries = [
        {"size": key._asdict(), "tile": tile._asdict(), "measured": times.get(key)}
        for key, tile in sorted(table.items())
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**facts, "entries": entries}, indent=1) + "\n")
