"""Rows of the table: one operator call on one GPU. Text and CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from . import LABEL, occupancy, roofline
from .devices import Gpu
from .shapes import Case


@dataclass(frozen=True)
class Row:
    """Bytes: requested, distinct and minimum as in launch.py and traffic.py. The kernel is the one
    that takes longest by the roofline; its registers and occupancy are None for torch's own."""

    label: str  # "model, not measured"
    gpu: str
    network: str
    op: str
    shape: str
    dtype: str
    group: str
    launches: int
    copies: int  # of the launches: torch's own passes into another layout
    minimum_bytes: int
    distinct_bytes: int
    requested_bytes: int
    distinct_to_minimum: float
    requested_to_minimum: float
    flops: int
    intensity: float  # FLOPs per distinct byte
    roofline_us: float
    bound: str
    kernel: str
    blocks: int
    registers: int | None
    shared_bytes: int | None
    spilled_bytes: int | None
    blocks_per_processor: int | None
    occupancy: float | None
    occupancy_limit: str


def row_of(case: Case, gpu: Gpu) -> Row:
    calls = case.calls(gpu)
    launches = [launch for call in calls for launch in call.launches]
    minimum = sum(call.minimum for call in calls)
    distinct = sum(call.distinct for call in calls)
    requested = sum(call.requested for call in calls)
    flops = sum(call.flops for call in calls)
    time, _ = roofline.total(launches, gpu)
    longest = max(launches, key=lambda launch: roofline.seconds(launch, gpu)[0])
    found = occupancy.of(longest, gpu)
    return Row(
        label=LABEL, gpu=gpu.name, network=case.network, op=case.op, shape=case.shape,
        dtype=case.dtype, group=case.group, launches=len(launches),
        copies=sum(launch.kernel == "aten" for launch in launches),
        minimum_bytes=minimum, distinct_bytes=distinct, requested_bytes=requested,
        distinct_to_minimum=distinct / minimum, requested_to_minimum=requested / minimum,
        flops=flops, intensity=flops / distinct, roofline_us=time * 1e6,
        bound=roofline.seconds(longest, gpu)[1], kernel=longest.kernel, blocks=longest.blocks,
        registers=found.registers if found else None, shared_bytes=found.shared if found else None,
        spilled_bytes=found.spilled if found else None,
        blocks_per_processor=found.blocks if found else None,
        occupancy=found.share if found else None,
        occupancy_limit=found.limit if found else "",
    )  # fmt: skip


COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("network", "network", "{}"),
    ("op", "operator", "{}"),
    ("shape", "shape", "{}"),
    ("dtype", "dtype", "{}"),
    ("launches", "launches", "{}"),
    ("minimum_bytes", "least MB", "mb"),
    ("distinct_to_minimum", "distinct/least", "{:.3f}"),
    ("requested_to_minimum", "requested/least", "{:.3f}"),
    ("flops", "GFLOP", "giga"),
    ("intensity", "FLOP/byte", "{:.1f}"),
    ("roofline_us", "roofline us", "{:.1f}"),
    ("bound", "bound", "{}"),
    ("kernel", "kernel", "{}"),
    ("registers", "registers", "{}"),
    ("shared_bytes", "shared B", "{}"),
    ("blocks_per_processor", "blocks/SM", "{}"),
    ("occupancy", "occupancy", "{:.0%}"),
    ("occupancy_limit", "limited by", "{}"),
)
LEGEND = (
    "least: every operand read once, every result written once; batch statistics: operands twice",
    "distinct: the bytes of each launch, each once per direction, as DRAM moves them at least",
    "requested: what threads ask of the caches, tiles that share an operand each for themselves",
    "roofline: launches one after the other at data-sheet rates, a bound from below",
    "kernel: the one that takes longest by that; registers and shared memory as ptxas reports them",
)
TEXT_COLUMNS = 4  # the first ones, aligned left


def cell(row: Row, name: str, form: str) -> str:
    value = getattr(row, name)
    if value is None:
        return ""
    scale = {"mb": 1e6, "giga": 1e9}.get(form)
    return f"{value / scale:.2f}" if scale else form.format(value)


def aligned(lines: Sequence[Sequence[str]], left: int) -> list[str]:
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    return [
        "  ".join(
            c.ljust(w) if k < left else c.rjust(w) for k, (c, w) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    ]


def text(rows: Sequence[Row]) -> str:
    """One table per GPU; the header says what it is."""
    parts = []
    for gpu in dict.fromkeys(row.gpu for row in rows):
        lines = [[title for _, title, _ in COLUMNS]]
        lines += [[cell(r, n, f) for n, _, f in COLUMNS] for r in rows if r.gpu == gpu]
        parts.append("\n".join([f"{gpu}: {LABEL}", *aligned(lines, TEXT_COLUMNS)]))
    return "\n\n".join([*parts, "\n".join(LEGEND)])


def write(rows: Sequence[Row], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        writer.writerows({k: "" if v is None else v for k, v in asdict(r).items()} for r in rows)
    return path
