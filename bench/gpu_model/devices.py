"""GPUs by their data sheets, and the limits of their architecture (CUDA programming guide)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Rates per second; dense tensor-core rates, float32 accumulation."""

    name: str
    architecture: str  # key of resources.json
    capability: int
    processors: int
    bandwidth: float  # bytes
    flops: dict[str, float]  # by the type that products run in
    threads: int = 2048  # per processor, as all of these
    blocks: int = 32
    registers: int = 65536
    shared: int = 0  # bytes per processor
    block_shared: int = 0  # bytes that a block may have
    reserved_shared: int = 1024  # bytes per block that the system takes
    l2: int = 0  # bytes


KIB, TERA = 1024, 1e12

A100 = Gpu(
    "A100 SXM 80GB", "80", 80, 108, 2039e9,
    {"double": 9.7 * TERA, "float": 19.5 * TERA, "tf32": 156 * TERA, "bf16": 312 * TERA},
    shared=164 * KIB, block_shared=163 * KIB, l2=40 * KIB * KIB,
)  # fmt: skip
H100 = Gpu(
    "H100 SXM", "90a", 90, 132, 3350e9,
    {"double": 34 * TERA, "float": 67 * TERA, "tf32": 495 * TERA, "bf16": 989 * TERA},
    shared=228 * KIB, block_shared=227 * KIB, l2=50 * KIB * KIB,
)  # fmt: skip
GPUS = (A100, H100)
