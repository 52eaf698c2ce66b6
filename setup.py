"""Builds lfp_kernels/_C_cpu.so on the LibTorch stable ABI: one library for many torch versions.

LFP_KERNELS_BUILD = auto (default: build what this machine can, say what was left out) | none |
cpu | cuda (fail when it cannot be built).
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


def ninja_file(cxx: str, torch_dir: Path, build: Path, library: Path) -> str:
    flags = (
        "-O3 -std=c++20 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall "
        f"-DTORCH_TARGET_VERSION={TARGET_VERSION} -isystem {torch_dir / 'include'}"
    )
    # --no-as-needed: libtorch_cpu resolves the shim functions even when ld thinks it unused.
    link = f"-shared -L{torch_dir / 'lib'} -Wl,--no-as-needed -ltorch_cpu -ltorch -Wl,--as-needed"
    sources = sorted((ROOT / "csrc/cpu").glob("*.cpp"))
    objects = [build / f"{source.stem}.o" for source in sources]
    lines = [
        f"rule cxx\n  command = {cxx} {flags} -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d",
        f"rule link\n  command = {cxx} $in {link} -o $out",
    ]
    lines += [f"build {o}: cxx {s}" for s, o in zip(sources, objects)]
    lines.append(f"build {library}: link {' '.join(map(str, objects))}\n")
    return "\n".join(lines)


class Build(build_ext):
    """Compiles with ninja, not setuptools: the libraries are no Python modules."""

    def run(self) -> None:
        chosen = mode()
        if chosen == "none":
            return
        if chosen == "cuda":
            raise BuildRefused(
                "lfp_kernels: LFP_KERNELS_BUILD=cuda: this version has no CUDA kernels; "
                "use auto or cpu"
            )
        target = ROOT if self.inplace else Path(self.build_lib).resolve()
        try:
            self.build_cpu(target / "lfp_kernels" / "_C_cpu.so")
        except BuildRefused as refusal:
            if chosen != "auto":
                raise
            print(refusal, "\nlfp_kernels: going on without compiled kernels", file=sys.stderr)

    def build_cpu(self, library: Path) -> None:
        cxx, torch_dir = compiler(), torch_root()
        build = Path(self.build_temp).resolve() / "cpu"
        build.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(ninja_file(cxx, torch_dir, build, library))
        ninja = shutil.which("ninja") or str(Path(sys.executable).parent / "ninja")
        run([ninja, "-C", str(build)])
        import torch

        info = {"torch": torch.__version__, "compiler": cxx, "machine": platform.machine()}
        (library.parent / "_build_info.json").write_text(json.dumps(info))


class Native(Distribution):
    def has_ext_modules(self) -> bool:
        return mode() != "none"


setup(
    ext_modules=[Extension("lfp_kernels._C_cpu", [])] if mode() != "none" else [],
    cmdclass={"build_ext": Build},
    distclass=Native,
)
