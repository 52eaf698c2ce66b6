"""Finds the CUDA compiler: on the machine, or in the PyPI wheels of the test extra."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from functools import cache
from pathlib import Path

HOW_TO_GET_IT = (
    "no CUDA compiler: put nvcc on PATH, set CUDA_HOME, or install the wheels nvidia-cuda-nvcc, "
    "nvidia-nvvm, nvidia-cuda-crt, nvidia-cuda-runtime and nvidia-cuda-cccl, all ==13.0.*"
)


class ToolkitNotFound(RuntimeError):
    """There is no nvcc; the message says how to get one."""


@cache
def root() -> Path:
    """Root of the CUDA toolkit: $CUDA_HOME, that of nvcc on PATH, or that of the wheels."""
    for candidate in (_from_environment(), _from_path(), *_from_wheels()):
        if candidate and (candidate / "bin" / "nvcc").exists():
            return candidate
    raise ToolkitNotFound(HOW_TO_GET_IT)


def available() -> bool:
    try:
        root()
    except ToolkitNotFound:
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
    raise ToolkitNotFound(f"no CUDA headers under {root()}")


@cache
def version() -> str:
    """What nvcc says of itself; part of the cache key of what it compiles."""
    return subprocess.run([nvcc(), "--version"], capture_output=True, text=True).stdout


def _from_environment() -> Path | None:
    home = os.environ.get("CUDA_HOME")
    return Path(home) if home else None


def _from_path() -> Path | None:
    """nvcc on PATH may be a wrapper script: only its own dry run knows where the toolkit lies."""
    program = shutil.which("nvcc")
    if not program:
        return None
    dry = subprocess.run([program, "--dryrun", "x.cu"], capture_output=True, text=True)
    match = re.search(r"TOP=(\S+)", dry.stdout + dry.stderr)
    return Path(match.group(1)).resolve() if match else None


def _from_wheels() -> list[Path]:
    return [Path(sysconfig.get_path(p)) / "nvidia" / "cu13" for p in ("platlib", "purelib")]
