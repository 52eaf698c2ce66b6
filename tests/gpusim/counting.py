"""Counted memory traffic of launches."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from .engine import runtime


@dataclass
class Traffic:
    """One direction (load, store or atomic) of one buffer."""

    bytes: int = 0
    unique_bytes: int = 0
    requests: int = 0  # warp-wide accesses
    sectors: int = 0  # 32-byte pieces that the requests touch
    ideal_sectors: int = 0  # as many as their distinct bytes need


@dataclass
class BufferCount:
    name: str
    size: int
    load: Traffic
    store: Traffic
    atomic: Traffic


@dataclass
class SharedCount:
    """Shared memory: a wavefront serves 128 bytes, one word of each bank."""

    load_bytes: int = 0
    store_bytes: int = 0
    requests: int = 0
    wavefronts: int = 0
    ideal_wavefronts: int = 0

    @property
    def bank_conflicts(self) -> int:
        return self.wavefronts - self.ideal_wavefronts


@dataclass
class LaunchCount:
    kernel: str
    shared: SharedCount
    buffers: list[BufferCount]

    def __getitem__(self, name: str) -> BufferCount:
        """The count of the buffer with this name."""
        return next(b for b in self.buffers if b.name == name)

    @property
    def bytes(self) -> int:
        """Global memory traffic, each access counted."""
        return sum(t.bytes for b in self.buffers for t in (b.load, b.store, b.atomic))

    @property
    def unique_bytes(self) -> int:
        """Global memory traffic if every byte moved once in each direction."""
        return sum(t.unique_bytes for b in self.buffers for t in (b.load, b.store, b.atomic))


@dataclass
class Counts:
    launches: list[LaunchCount] = field(default_factory=list)


@contextlib.contextmanager
def counting() -> Iterator[Counts]:
    """Counts the launches inside the with block; the result is complete after it."""
    library = runtime()
    counts = Counts()
    library.sim_counts()
    library.sim_count(1)
    try:
        yield counts
    finally:
        library.sim_count(0)
        for launch in json.loads(library.sim_counts().decode()):
            buffers = [
                BufferCount(
                    b["name"], b["size"], *(Traffic(**b[d]) for d in ("load", "store", "atomic"))
                )
                for b in launch["buffers"]
            ]
            counts.launches.append(
                LaunchCount(launch["kernel"], SharedCount(**launch["shared"]), buffers)
            )
