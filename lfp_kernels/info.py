"""What this machine and installation are: versions, CPU, threads, compiled libraries.

Every probe is guarded, so that a report comes out of a broken installation too: that is when it
is needed.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

from . import __version__, _library

# the names Linux and macOS give to what the products profit from
CPU_FEATURES = {
    "avx2": ("avx2",),
    "avx512": ("avx512f",),
    "avx512_bf16": ("avx512_bf16",),
    "amx_bf16": ("amx_bf16",),
    "neon": ("asimd", "neon"),
    "sve": ("sve",),
    "arm_bf16": ("bf16",),
}


def _guarded(probe: Callable[[], object]) -> str:
    try:
        return str(probe())
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpuinfo(*keys: str) -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    raise LookupError(f"/proc/cpuinfo has none of {', '.join(keys)}")


def cpu_name() -> str:
    """Model name of the processor."""
    try:
        return _cpuinfo("model name", "Hardware")
    except (OSError, LookupError):
        return platform.processor() or platform.machine()


def _features() -> str:
    flags = set(_cpuinfo("flags", "Features").split())
    return ", ".join(
        f"{name} {'yes' if flags.intersection(names) else 'no'}"
        for name, names in CPU_FEATURES.items()
        if (name in ("neon", "sve", "arm_bf16")) == (platform.machine() in ("aarch64", "arm64"))
    )


def _cores() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{usable} usable of {os.cpu_count()}"


def _build() -> str:
    path = Path(__file__).parent / "_build_info.json"
    if not path.exists():
        return "none: nothing was compiled"
    return ", ".join(f"{key} {value}" for key, value in json.loads(path.read_text()).items())


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none"
    found = []
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        found.append(f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})")
    return ", ".join(found)


def _loaded(library: str) -> Callable[[], str]:
    def probe() -> str:
        reason = _library.why_not_loaded(library)
        return "loaded" if reason is None else f"not loaded: {reason}"

    return probe


def collect() -> dict[str, str]:
    """All facts as name and text, in the order to print them."""
    probes: dict[str, Callable[[], object]] = {
        "lfp_kernels": lambda: __version__,
        "python": platform.python_version,
        "platform": platform.platform,
        "torch": lambda: torch.__version__,
        "numpy": lambda: _version("numpy"),
        "triton": lambda: _version("triton"),
        "CPU": cpu_name,
        "CPU features": _features,
        "CPU code of torch": torch.backends.cpu.get_cpu_capability,
        "cores": _cores,
        "threads": lambda: (
            f"{torch.get_num_threads()} in an op, {torch.get_num_interop_threads()} between ops"
        ),
        "OMP_NUM_THREADS": lambda: os.environ.get("OMP_NUM_THREADS", "not set"),
        "GPU": _gpu,
        "library cpu": _loaded("cpu"),
        "library cuda": _loaded("cuda"),
        "build": _build,
        "LFP_KERNELS_BACKEND": lambda: os.environ.get("LFP_KERNELS_BACKEND") or "not set",
        "LFP_KERNELS_TUNED": lambda: os.environ.get("LFP_KERNELS_TUNED") or "not set",
    }
    return {name: _guarded(probe) for name, probe in probes.items()}


def text() -> str:
    """:func:`collect` as a table."""
    facts = collect()
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())
