"""How many blocks of a kernel a processor holds at once, from its registers and shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from . import resources
from .devices import Gpu
from .launch import Launch

REGISTER_UNIT = 256  # registers are given out per warp in these
SHARED_UNIT = 128


@dataclass(frozen=True)
class Occupancy:
    """``share``: warps present / warps possible. ``limit``: what sets it."""

    registers: int
    spilled: int
    shared: int  # bytes of a block, static and dynamic
    blocks: int  # per processor
    share: float
    limit: str


@cache
def _table() -> dict[str, Any]:
    return resources.read()


def kernels(launch: Launch, architecture: str) -> dict[str, list[int]]:
    """Entries of resources.json that may be the launch's kernel: rules and operands differ."""
    return {
        name: row
        for by_arch in _table().values()
        for name, row in by_arch.get(architecture, {}).items()
        if name.partition("<")[0] == launch.kernel and all(t in name for t in launch.tokens)
    }


def of(launch: Launch, gpu: Gpu) -> Occupancy | None:
    """By the hungriest kernel that the launch may be; None where none is known (torch's own)."""
    found = kernels(launch, gpu.architecture).values()
    if not found:
        return None
    registers, static, spilled = (max(row[k] for row in found) for k in range(3))
    shared = static + launch.shared
    warps = -(-launch.threads // 32)
    per_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    per_block = -(-(shared + gpu.reserved_shared) // SHARED_UNIT) * SHARED_UNIT
    limits = {
        "threads": gpu.threads // (warps * 32),
        "blocks": gpu.blocks,
        # A quarter of the registers belongs to each of the four schedulers.
        "registers": 4 * (gpu.registers // 4 // per_warp) // warps,
        "shared memory": gpu.shared // per_block if shared <= gpu.block_shared else 0,
    }
    blocks = min(limits.values())
    share = blocks * warps * 32 / gpu.threads
    limit = next(name for name, value in limits.items() if value == blocks)
    return Occupancy(registers, spilled, shared, blocks, share, limit)
