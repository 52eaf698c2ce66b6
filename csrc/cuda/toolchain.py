"""The CUDA compiler: where it is, and what it compiles for. Used by setup.py and the tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

HOW_TO_GET_IT = (
    "no CUDA compiler: put nvcc on PATH, set CUDA_HOME, or install nvidia-cuda-nvcc nvidia-nvvm "
    "nvidia-cuda-crt nvidia-cuda-runtime nvidia-cuda-cccl, all ==13.0.*"
)
ARCHITECTURES = "8.0 8.6 8.9 9.0a 10.0 12.0+PTX"


class NotFound(RuntimeError):
    """There is no CUDA compiler; the message says how to get one."""


def root() -> Path:
    """The toolkit: $CUDA_HOME, that of nvcc on PATH (which may be a wrapper), or PyPI's wheels."""
    candidates = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    if nvcc := shutil.which("nvcc"):
        dry = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True)
        candidates += map(Path, re.findall(r"TOP=(\S+)", dry.stdout + dry.stderr))
    candidates.append(Path(sysconfig.get_path("platlib")) / "nvidia/cu13")
    for candidate in candidates:
        if (candidate / "bin/nvcc").exists():
            return candidate.resolve()
    raise NotFound(HOW_TO_GET_IT)


def gpu_found(torch: ModuleType) -> bool:
    """Whether torch finds a GPU; without one nobody need wait for six architectures."""
    found = torch.cuda.is_available()
    if torch.version.cuda and not found:
        left_out = "no GPU, so no CUDA kernels; LFP_KERNELS_BUILD=cuda builds them all the same"
        print(f"lfp_kernels: {left_out}", file=sys.stderr)
    return found


def architectures() -> list[str]:
    """TORCH_CUDA_ARCH_LIST, or every GPU generation that the kernels know."""
    return os.environ.get("TORCH_CUDA_ARCH_LIST", ARCHITECTURES).replace(";", " ").split()


def targets() -> str:
    """-gencode flags; +PTX also keeps the portable form for later GPUs."""
    flags = []
    for name in architectures():
        number = name.removesuffix("+PTX").replace(".", "")
        kinds = ("sm", "compute") if name.endswith("+PTX") else ("sm",)
        flags += [f"-gencode arch=compute_{number},code={kind}_{number}" for kind in kinds]
    return " ".join(flags)


def compile_command(cxx: str, flags: str) -> str:
    return (
        f"{root()}/bin/nvcc {flags} -DUSE_CUDA -cudart static --expt-relaxed-constexpr "
        f"-ccbin {cxx} -Xcompiler -fPIC,-fvisibility=hidden {targets()}"
    )


def link_flags() -> str:
    """The static CUDA runtime: the library then loads beside any torch, CPU builds included."""
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib"):
        library = root() / folder / "libcudart_static.a"
        if library.exists():
            return f"-Wl,--exclude-libs,ALL {library} -ldl -lpthread -lrt"
    raise NotFound(f"no libcudart_static.a under {root()}; install nvidia-cuda-runtime")
