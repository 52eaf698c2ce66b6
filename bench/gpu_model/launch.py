"""What is known of a kernel launch before it runs: its traffic, work and shape."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Access:
    """One buffer in one direction. requested: bytes that the threads ask the caches for;
    distinct: bytes that it is about, which DRAM moves at least once."""

    requested: int = 0
    distinct: int = 0


@dataclass
class Launch:
    """One launch. ``kernel`` and ``tokens`` find it in resources.json; "aten" is torch's own."""

    kernel: str
    tokens: tuple[str, ...] = ()
    blocks: int = 1
    threads: int = 256
    shared: int = 0  # dynamic shared memory of a block
    flops: int = 0
    unit: str = "float"  # the type that its products run in
    loads: dict[str, Access] = field(default_factory=dict)
    stores: dict[str, Access] = field(default_factory=dict)

    def load(self, what: str, requested: int, distinct: int | None = None) -> None:
        _add(self.loads, what, requested, distinct)

    def store(self, what: str, requested: int, distinct: int | None = None) -> None:
        _add(self.stores, what, requested, distinct)

    @property
    def accesses(self) -> list[Access]:
        return [*self.loads.values(), *self.stores.values()]

    @property
    def requested(self) -> int:
        return sum(a.requested for a in self.accesses)

    @property
    def distinct(self) -> int:
        return sum(a.distinct for a in self.accesses)


def _add(table: dict[str, Access], what: str, requested: int, distinct: int | None) -> None:
    if not requested:
        return
    access = table.setdefault(what, Access())
    access.requested += requested
    access.distinct = max(access.distinct, requested if distinct is None else distinct)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def accumulator(element: int) -> int:
    """Bytes of the type that elements of ``element`` bytes are summed in."""
    return max(element, 4)


def type_name(element: int, unit: str = "") -> str:
    """The element type as it stands in the names of kernels."""
    return {8: "double", 4: "float", 2: "Half" if unit == "tf32" else "BFloat16"}[element]


def wide(element: int) -> int:
    """Elements of a 16-byte access."""
    return 16 // element


def copy(t: Tensor) -> Launch:
    """torch's own pass that brings a tensor into another layout."""
    launch = Launch("aten", ("copy",))
    launch.load("source", t.nbytes)
    launch.store("copy", t.nbytes)
    return launch


def in_format(tensors: list[Tensor], last: bool) -> list[Launch]:
    """Copies of the tensors that lie in another layout than channels last, or plain."""
    memory = {4: torch.channels_last, 5: torch.channels_last_3d}
    return [
        copy(t)
        for t in tensors
        if not t.is_contiguous(memory_format=memory[t.dim()] if last else torch.contiguous_format)
    ]


def update_in_place(launch: Launch, name: str, size: int, states: int) -> None:
    """A parameter of ``size`` bytes and its optimizer states: read and written."""
    launch.load(name, size)
    launch.store(name, size)
    if states:
        launch.load(f"state of {name}", states * size)
        launch.store(f"state of {name}", states * size)


@dataclass(frozen=True)
class Parameter:
    """Where the feedback of a parameter goes (csrc/cuda/rule_call.cuh, ParameterUpdate)."""

    name: str
    size: int  # bytes
    states: int | None  # optimizer states; None: the feedback is stored

    def finish(self, launch: Launch) -> None:
        if self.states is None:
            launch.load(self.name, self.size)
            launch.store(f"feedback of {self.name}", self.size)
        else:
            update_in_place(launch, self.name, self.size, self.states)


STATES = {0: 0, 1: 1, 2: 2}  # optimizer code -> states: SGD, SGD with momentum, AdamW
