"""The figures to reach, and whether the model says they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from . import steps
from .table import Row

MEMORY, SMALL_BATCH = 1.05, 1.10


@dataclass(frozen=True)
class Target:
    what: str
    value: float
    limit: float

    @property
    def met(self) -> bool:
        return self.value <= self.limit

    def __str__(self) -> str:
        mark = "met" if self.met else "NOT met"
        return f"{self.what:<88} {self.value:6.3f}  <= {self.limit:.3f}  {mark}"


def of_rows(rows: Sequence[Row]) -> list[Target]:
    found = []
    for gpu in dict.fromkeys(row.gpu for row in rows):
        mine = [row for row in rows if row.gpu == gpu]
        memory = [row for row in mine if row.group == "memory"]
        if memory:
            worst = max(memory, key=lambda row: row.requested_to_minimum)
            what = f"{gpu}: memory-bound operators, requested/least bytes; worst: {_name(worst)}"
            found.append(Target(what, worst.requested_to_minimum, MEMORY))
        for row in mine:
            if row.group == "small batch":
                what = f"{gpu}: {_name(row)} ({row.kernel}), distinct/least bytes"
                found.append(Target(what, row.distinct_to_minimum, SMALL_BATCH))
    return found


def _name(row: Row) -> str:
    return f"{row.op} {row.shape} {row.dtype}"


def of_steps(comparisons: Sequence[steps.Comparison]) -> list[Target]:
    found = []
    for c in comparisons:
        name, reference = c.network.name, c.reference
        for by, ours in (("operator", c.operators), ("kernel", c.kernels)):
            launches, size = ours.launches / reference.launches, ours.bytes / reference.bytes
            found.append(Target(f"{name} step: launches, by {by} / reference", launches,
                                steps.LAUNCHES))  # fmt: skip
            found.append(Target(f"{name} step: bytes, by {by} / reference", size, steps.BYTES))
    return found
