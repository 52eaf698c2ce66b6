"""The CUDA compiler of the build (csrc/cuda/toolchain.py), and what the executor asks of it."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "csrc" / "cuda"))
from toolchain import HOW_TO_GET_IT, NotFound
from toolchain import root as _root

__all__ = ["HOW_TO_GET_IT", "available", "include", "nvcc", "root", "version"]

root = cache(_root)


def available() -> bool:
    try:
        root()
    except NotFound:
        return False
    return True


def nvcc() -> Path:
    return root() / "bin" / "nvcc"


@cache
def include() -> Path:
    """Folder of the toolkit's headers."""
    for name in ("include", "targets/x86_64-linux/include"):
        if (root() / name / "cuda_runtime_api.h").exists():
            return root() / name
    raise NotFound(f"no CUDA headers under {root()}")


@cache
def version() -> str:
    """What nvcc says of itself; part of the cache key of what it compiles."""
    return subprocess.run([nvcc(), "--version"], capture_output=True, text=True).stdout
