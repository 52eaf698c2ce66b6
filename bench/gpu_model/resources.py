"""Registers and shared memory of every kernel, as ptxas reports them: resources.json.

    python -m bench gpu-model --resources

compiles csrc/cuda/*.cu for both architectures (minutes) and rewrites the file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

FILE = Path(__file__).parent / "resources.json"
SOURCES = Path(__file__).resolve().parents[2] / "csrc/cuda"
ARCHITECTURES = ("80", "90a")
FLAGS = [
    "-std=c++20",
    "-O3",
    "-DTORCH_TARGET_VERSION=0x020d000000000000",
    "-DUSE_CUDA",
    "--expt-relaxed-constexpr",
]
# Longest first: what makes a demangled name long and says nothing.
_NOISE = (
    (r"torch::headeronly::(detail::)?", ""), (r"c10::", ""), (r"lfp::cuda::", ""), (r"lfp::", ""),
    (r"\(anonymous namespace\)::", ""), (r"\(bool\)1", "true"), (r"\(bool\)0", "false"),
    (r"\((int|unsigned int|unsigned long|long)\)", ""),
)  # fmt: skip


def compile_all() -> dict[str, Any]:
    """{source: {architecture: {kernel: [registers, static shared bytes, spilled bytes]}}}

    Raises:
        ValueError: there is no CUDA compiler, or a file does not compile.
    """
    return {
        source.name: {arch: of_source(source, arch) for arch in ARCHITECTURES}
        for source in sorted(SOURCES.glob("*.cu"))
    }


def of_source(source: Path, arch: str) -> dict[str, list[int]]:
    toolchain = _toolchain()
    try:
        nvcc = str(toolchain.root() / "bin/nvcc")
    except toolchain.NotFound as error:
        raise ValueError(f"bench gpu-model: {error}") from error
    include = Path(torch.__file__).parent / "include"
    target = ["-gencode", f"arch=compute_{arch},code=sm_{arch}", "-cubin", "-Xptxas", "-v"]
    with tempfile.TemporaryDirectory() as folder:
        output = ["-o", f"{folder}/x.cubin", str(source), "-isystem", str(include)]
        found = subprocess.run([nvcc, *FLAGS, *target, *output], capture_output=True, text=True)
    if found.returncode:
        raise ValueError(f"bench gpu-model: {source.name}, sm_{arch}:\n{found.stderr[-2000:]}")
    return parse(_demangled(found.stderr))


def parse(report: str) -> dict[str, list[int]]:
    """Kernel -> [registers, static shared bytes, spilled bytes] of a report of ptxas -v."""
    kernels: dict[str, list[int]] = {}
    name, spilled = "", 0
    for line in report.splitlines():
        if found := re.search(r"Compiling entry function '(.*)' for", line):
            name, spilled = short_name(found[1]), 0
        elif found := re.search(r"(\d+) bytes spill stores", line):
            spilled = int(found[1])
        elif name and (found := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            kernels[name] = [int(found[1]), int(shared[1]) if shared else 0, spilled]
            name = ""
    return kernels


def short_name(demangled: str) -> str:
    """The kernel and its template arguments: no namespaces, no parameters."""
    name = demangled.removeprefix("void ")
    for pattern, replacement in _NOISE:
        name = re.sub(pattern, replacement, name)
    depth = 0
    for k, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:k]
    return name


def _demangled(report: str) -> str:
    filt = shutil.which("c++filt") or shutil.which("cu++filt")
    if filt is None:
        raise ValueError("bench gpu-model: needs c++filt (binutils) to read the names of kernels")
    return subprocess.run([filt], input=report, capture_output=True, text=True, check=True).stdout


def _toolchain() -> ModuleType:
    spec = importlib.util.spec_from_file_location("toolchain", SOURCES / "toolchain.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digest() -> str:
    """Of the sources that the kernels are made of."""
    files = [*SOURCES.glob("*.cu*"), *SOURCES.parent.glob("*.h")]
    contents = b"".join(path.read_bytes() for path in sorted(files))
    return hashlib.sha256(contents).hexdigest()[:16]


def stale() -> bool:
    """Whether the table was made from other sources."""
    return not FILE.exists() or json.loads(FILE.read_text()).get("sources") != digest()


def write(found: dict[str, Any], sources: str) -> Path:
    """``sources``: their digest before they were compiled. One line per kernel: a diff shows which
    one changed."""
    lines = ["{", f' "sources": "{sources}",']
    for s, (source, by_arch) in enumerate(found.items()):
        lines.append(f" {json.dumps(source)}: {{")
        for a, (arch, kernels) in enumerate(by_arch.items()):
            rows = ",\n".join(f"   {json.dumps(k)}: {v}" for k, v in sorted(kernels.items()))
            end = "," if a + 1 < len(by_arch) else ""
            lines.append(f"  {json.dumps(arch)}: {{\n{rows}\n  }}{end}")
        lines.append(" }" + ("," if s + 1 < len(found) else ""))
    FILE.write_text("\n".join([*lines, "}"]) + "\n")
    return FILE


def read() -> dict[str, Any]:
    """{source: {architecture: {kernel: ...}}}"""
    found = json.loads(FILE.read_text()) if FILE.exists() else {}
    found.pop("sources", None)
    return found
