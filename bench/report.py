"""Rows, files of rows, and the tables on the terminal."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from .environment import Environment
from .timing import paired_ratio, percentile


@dataclass(frozen=True)
class Row:
    """One variant of one workload or operator. ``to_x`` is its time over x's, paired by round."""

    kind: str  # step, op
    name: str
    variant: str
    dtype: str
    device: str
    batch: int
    repeats: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    to_floor: float | None
    to_floor_aten: float | None
    to_sgd: float | None
    speedup_on_reference: float | None  # reference's time over this one
    to_fp32: float | None
    to_sgd_compiled: float | None
    speedup_on_reference_compiled: float | None
    gflops: float  # products' FLOPs per second / 1e9
    gbs: float  # least memory traffic per second / 1e9
    peak_bytes: int | None
    allocated_bytes: int | None
    peak_to_sgd: float | None
    allocated_to_sgd: float | None
    machine: str
    cores: int
    threads: int
    commit: str
    torch: str
    python: str
    date: str

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        return self.kind, self.name, self.variant, self.dtype, self.device


BASES = {
    "to_floor": "floor",
    "to_floor_aten": "floor_aten",
    "to_sgd": "sgd",
    "to_fp32": "fused_fp32",
    "to_sgd_compiled": "sgd_compiled",
}
SPEEDUPS = {
    "speedup_on_reference": "reference",
    "speedup_on_reference_compiled": "reference_compiled",
}


def rows_of(
    kind: str,
    name: str,
    dtype: str,
    device: str,
    batch: int,
    times: dict[str, list[float]],
    work: tuple[int, int],
    environment: Environment,
    memory: dict[str, dict[str, int]] | None = None,
) -> list[Row]:
    """One row per variant of ``times``, whose ratios are taken round by round."""
    memory = memory or {}
    rows = []
    for variant, seconds in times.items():
        median = statistics.median(seconds)
        ratios: dict[str, Any] = {
            column: paired_ratio(seconds, times[base]) if base in times else None
            for column, base in BASES.items()
        }
        for column, base in SPEEDUPS.items():
            ratios[column] = paired_ratio(times[base], seconds) if base in times else None
        own, sgd = memory.get(variant), memory.get("sgd")
        for size in ("peak", "allocated"):
            value = own[f"{size}_bytes"] if own else None
            ratios[f"{size}_bytes"] = value
            ratios[f"{size}_to_sgd"] = value / sgd[f"{size}_bytes"] if value and sgd else None
        rows.append(
            Row(
                kind=kind,
                name=name,
                variant=variant,
                dtype=dtype,
                device=device,
                batch=batch,
                repeats=len(seconds),
                median_ms=median * 1e3,
                p10_ms=percentile(seconds, 10) * 1e3,
                p90_ms=percentile(seconds, 90) * 1e3,
                gflops=work[0] / median / 1e9,
                gbs=work[1] / median / 1e9,
                **ratios,
                **asdict(environment),
            )
        )
    return rows


def write(rows: Sequence[Row], folder: Path) -> list[Path]:
    """results.csv and results.jsonl in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    table, lines = folder / "results.csv", folder / "results.jsonl"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        writer.writerows({k: "" if v is None else v for k, v in asdict(r).items()} for r in rows)
    lines.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    return [table, lines]


def read(path: Path) -> list[Row]:
    """Rows of a results.csv or .jsonl, or of the folder that holds one.

    Raises:
        ValueError: the file is missing or is not a file of rows.
    """
    if path.is_dir():
        path = path / "results.csv"
    if not path.exists():
        raise ValueError(f"bench: {path}: no such file; fix: python -m bench run --out FOLDER")
    if path.suffix == ".jsonl":
        records = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        with path.open(newline="") as file:
            records = list(csv.DictReader(file))
    try:
        return [_row(record) for record in records]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"bench: {path}: not a file of benchmark rows: {error!r}") from error


def _row(record: dict[str, Any]) -> Row:
    values: dict[str, Any] = {}
    for name, kind in get_type_hints(Row).items():
        value = record[name]
        if value in ("", None):
            values[name] = None
        else:
            values[name] = next(t for t in (int, float, str) if t in _types(kind))(value)
    return Row(**values)


def _types(kind: Any) -> tuple[type, ...]:
    return getattr(kind, "__args__", (kind,))


COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("variant", "variant", "{}"),
    ("median_ms", "median ms", "{:.3f}"),
    ("p10_ms", "p10", "{:.3f}"),
    ("p90_ms", "p90", "{:.3f}"),
    ("to_floor", "/floor", "{:.2f}"),
    ("to_floor_aten", "/floor_aten", "{:.2f}"),
    ("to_sgd", "/sgd", "{:.2f}"),
    ("speedup_on_reference", "reference/", "{:.2f}"),
    ("to_fp32", "/fused_fp32", "{:.2f}"),
    ("to_sgd_compiled", "/sgd_compiled", "{:.2f}"),
    ("speedup_on_reference_compiled", "reference_compiled/", "{:.2f}"),
    ("gflops", "GFLOP/s", "{:.0f}"),
    ("gbs", "GB/s", "{:.1f}"),
    ("peak_bytes", "peak MiB", "mib"),
    ("peak_to_sgd", "peak/sgd", "{:.2f}"),
    ("allocated_bytes", "alloc MiB", "mib"),
    ("allocated_to_sgd", "alloc/sgd", "{:.2f}"),
)


def cell(value: Any, form: str) -> str:
    if value is None:
        return ""
    return f"{value / 2**20:.1f}" if form == "mib" else form.format(value)


def columns_of(rows: Iterable[Row]) -> list[tuple[str, str, str]]:
    """The columns in which some row has a value."""
    rows = list(rows)
    return [c for c in COLUMNS if any(getattr(row, c[0]) is not None for row in rows)]


def table(rows: Sequence[Row]) -> str:
    """The variants of one workload or operator."""
    columns = columns_of(rows)
    lines = [[title for _, title, _ in columns]]
    lines += [[cell(getattr(row, name), form) for name, _, form in columns] for row in rows]
    widths = [max(len(line[k]) for line in lines) for k in range(len(columns))]
    text = []
    for line in lines:
        first, rest = line[0].ljust(widths[0]), zip(line[1:], widths[1:])
        text.append("  ".join([first, *(value.rjust(width) for value, width in rest)]).rstrip())
    row = rows[0]
    return f"{row.kind} {row.name} ({row.dtype}, batch {row.batch})\n  " + "\n  ".join(text)


def figures(rows: Sequence[Row], targets: dict[tuple[str, str], str]) -> list[str]:
    """One line per figure to reach: what it is, what came, whether it is met."""
    by_variant = {row.variant: row for row in rows}
    lines = []
    for (variant, column), target in targets.items():
        row = by_variant.get(variant)
        value = getattr(row, column) if row is not None else None
        if row is None or value is None:
            continue
        relation, bound = target.split()
        met = value <= float(bound) if relation == "<=" else value >= float(bound)
        mark = "met" if met else "NOT met"
        lines.append(f"{row.name:<26} {variant:<7} {column:<21} {value:6.2f}  {target:<8} {mark}")
    return lines
