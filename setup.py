"""Builds _C_cpu.so and _C_cuda.so on the LibTorch stable ABI: one file for many torch versions.

LFP_KERNELS_BUILD = auto (default: what this machine can use, CUDA where torch finds a GPU; says
what was left out) | none | cpu | cuda (both, GPU or not; fails when they cannot be built).
TORCH_CUDA_ARCH_LIST = "8.0 9.0a+PTX": what the CUDA kernels are compiled for.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_ext import build_ext
from setuptools.extension import Extension

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc/cuda"))
import toolchain  # noqa: E402

CHOICES = ("auto", "none", "cpu", "cuda")
# The oldest torch whose stable ABI the sources use; the library loads there and in later ones.
TARGET_VERSION = "0x020d000000000000"


class BuildRefused(SystemExit):
    """A build that cannot work ends in one readable line."""


def mode() -> str:
    value = os.environ.get("LFP_KERNELS_BUILD", "auto")
    if value not in CHOICES:
        raise BuildRefused(
            f"lfp_kernels: LFP_KERNELS_BUILD={value!r}; expected {'|'.join(CHOICES)}"
        )
    return value


def torch_root() -> Path:
    try:
        import torch
    except ImportError as error:
        raise BuildRefused(
            f"lfp_kernels: torch is not importable while building ({error}). Install torch>=2.13 "
            "first and build with 'pip install --no-build-isolation .', "
            "or set LFP_KERNELS_BUILD=none for the pure-PyTorch package."
        ) from None
    return Path(torch.__file__).parent


def compiler() -> str:
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        raise BuildRefused(
            f"lfp_kernels: no C++ compiler: {name!r} is not on PATH. Install g++ 12 or newer, "
            "set CXX, or set LFP_KERNELS_BUILD=none for the pure-PyTorch package."
        )
    return name


def run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    if done.returncode:
        raise BuildRefused(f"lfp_kernels: failed: {' '.join(command)}\n{done.stdout}{done.stderr}")


def commands(kind: str, cxx: str, torch_dir: Path) -> tuple[str, str]:
    """How to compile a source and what to link besides, for the library of this kind."""
    flags = f"-O3 -std=c++20 -DTORCH_TARGET_VERSION={TARGET_VERSION} -isystem {torch_dir}/include"
    if kind == "cpu":
        warnings = "-fno-math-errno -fno-trapping-math -Wall"
        return f"{cxx} {flags} -fPIC -fvisibility=hidden {warnings}", ""
    try:
        return toolchain.compile_command(cxx, flags), toolchain.link_flags()
    except toolchain.NotFound as error:
        raise BuildRefused(f"lfp_kernels: {error}") from None


def ninja_file(kind: str, cxx: str, torch_dir: Path, build: Path, library: Path) -> str:
    compile_command, libraries = commands(kind, cxx, torch_dir)
    # --no-as-needed: libtorch_cpu resolves the shim functions even when ld thinks it unused.
    link = f"-shared -L{torch_dir / 'lib'} -Wl,--no-as-needed -ltorch_cpu -ltorch -Wl,--as-needed"
    sources = sorted((ROOT / "csrc" / kind).glob("*.cpp" if kind == "cpu" else "*.cu"))
    objects = [build / f"{source.stem}.o" for source in sources]
    lines = [
        f"rule compile\n  command = {compile_command} -MMD -MF $out.d -c $in -o $out\n"
        "  depfile = $out.d",
        f"rule link\n  command = {cxx} $in {link} {libraries} -o $out",
    ]
    lines += [f"build {o}: compile {s}" for s, o in zip(sources, objects)]
    lines.append(f"build {library}: link {' '.join(map(str, objects))}\n")
    return "\n".join(lines)


class Build(build_ext):
    """Compiles with ninja, not setuptools: the libraries are no Python modules."""

    def run(self) -> None:
        chosen = mode()
        if chosen == "cuda":  # refuse before the first minute of compiling
            commands("cuda", compiler(), torch_root())
        folder = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "lfp_kernels"
        for kind in ("cpu", "cuda"):
            if chosen == "none" or (chosen == "cpu" and kind == "cuda"):
                continue
            try:
                self.build_library(kind, folder / f"_C_{kind}.so", wanted=chosen != "auto")
            except BuildRefused as refusal:
                if chosen != "auto":
                    raise
                print(
                    refusal, f"\nlfp_kernels: going on without the {kind} kernels", file=sys.stderr
                )

    def build_library(self, kind: str, library: Path, wanted: bool) -> None:
        torch_dir = torch_root()
        import torch

        if kind == "cuda" and not wanted and not toolchain.gpu_found(torch):
            return
        cxx, build = compiler(), Path(self.build_temp).resolve() / kind
        build.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(ninja_file(kind, cxx, torch_dir, build, library))
        ninja = shutil.which("ninja") or str(Path(sys.executable).parent / "ninja")
        run([ninja, "-C", str(build)])
        file = library.parent / "_build_info.json"
        info = json.loads(file.read_text()) if kind == "cuda" and file.exists() else {}
        info |= {"torch": torch.__version__, "compiler": cxx, "machine": platform.machine()}
        if kind == "cuda":
            info["architectures"] = toolchain.architectures()
        file.write_text(json.dumps(info))


class Native(Distribution):
    def has_ext_modules(self) -> bool:
        return mode() != "none"


setup(
    ext_modules=[Extension("lfp_kernels._C_cpu", [])] if mode() != "none" else [],
    cmdclass={"build_ext": Build},
    distclass=Native,
)
