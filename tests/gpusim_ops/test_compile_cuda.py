"""Every CUDA kernel compiles to machine code that keeps its promises: no spilled registers, the
registers that its launch bounds leave, tensor cores in the products, 16-byte accesses.

Needs nvcc and nvdisasm, no GPU and no --simulate. The machine code is kept in the cache folder of
gpusim, under the hash of what it was made from.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from gpusim import cache, pytest_support, toolkit

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = {"80": "8.0", "86": "8.6", "89": "8.9", "90a": "9.0a", "100": "10.0", "120": "12.0"}
QUICK = ("80", "90a")
pytestmark = pytest.mark.gpusim

# Registers per thread, the first pattern that the mangled name matches. 65536 registers over the
# threads that should be there at once, so more than this costs the latency hiding it was built for.
# A third entry: of these architectures alone, where the next line would mean spills.
BOUNDS: tuple[tuple[str, int] | tuple[str, int, str], ...] = (
    (r"backward_scan_kernel.*Li8E", 168, "100 120"),  # 3 blocks of 128
    (r"held_rows_kernelId", 255, "100 120"),  # 1 block of 256
    (r"reduce_splits_kernel.*KernelEpilogueI.*(Half|BFloat16)", 128, "100 120"),  # 2 blocks of 256
    (r"product_kernel.*Tf32ELi64ELi64E.*KernelEpilogue", 255, "100 120"),  # 2 blocks of 128
    (r"elementwise_kernel", 64),  # 4 blocks of 256
    (r"(root|squares|statistics|feedback|spike_rate|add_ranges|alignment)_kernel", 64),
    (r"over_steps_kernel", 64),
    (r"attention_(queries_|keys_)?kernel", 255),  # 128 threads, two operands in registers
    (r"(forward|backward)_scan_kernel", 128),  # 4 blocks of 128
    (r"reduce_splits_kernel", 80),
    (r"update_kernel", 80),  # 3 blocks of 256
    (r"rows_kernelI.*Reward", 80),
    (r"(planes|rows|spread)_kernel", 128),  # 2 blocks of 256
    (r"(max_pool|give)_kernel", 85),
    (r"direct_sums_kernelIf", 64),
    (r"direct_sums_kernel", 85),  # 3 blocks of 256
    (r"direct_kernel_sums_kernel", 128),
    (r"product_kernel.*SimtCoreI[fd]Li64E", 128),
    # 2 blocks of 128, of linear layers 3
    (r"product_kernel.*BFloat16ELi64ELi64E.*(Pixel|Plane|Kernel)Epilogue", 255),
    (r"product_kernel.*MmaCoreI.*Li64ELi64E", 168),
    (r"(product|one_pass|hopper)_kernel", 255),  # 1 block of 256
)


class Kernel(NamedTuple):
    registers: int
    stack: int
    spilled: int  # bytes of stores and loads


class Compiled(NamedTuple):
    report: dict[str, Kernel]  # by mangled name
    code: dict[str, str]


def toolchain():
    path = ROOT / "csrc" / "cuda" / "toolchain.py"
    spec = importlib.util.spec_from_file_location("toolchain", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def disassembler() -> Path | None:
    """nvdisasm of the toolkit, or the one in Triton's wheel."""
    found = importlib.util.find_spec("triton")
    wheel = Path(found.origin).parent / "backends/nvidia/bin" if found and found.origin else None
    folders = [toolkit.root() / "bin", *([wheel] if wheel else [])]
    return next((f / "nvdisasm" for f in folders if (f / "nvdisasm").exists()), None)


def command(source: Path, arch: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What setup.py runs, for one architecture and to machine code alone."""
    import torch

    include = Path(torch.__file__).parent / "include"
    flags = f"-O3 -std=c++20 -DTORCH_TARGET_VERSION=0x020d000000000000 -isystem {include}"
    with monkeypatch.context() as patch:
        patch.setenv("TORCH_CUDA_ARCH_LIST", ARCHITECTURES[arch])
        build = toolchain().compile_command(cache.compiler(), flags).split()
    return [*build, "-cubin", "-Xptxas", "-v", str(source)]


def headers_of(source: Path) -> list[Path]:
    """The project's headers that a file includes, at any depth."""
    found: dict[Path, None] = {}
    files = [source]
    while files:
        file = files.pop()
        for name in re.findall(r'^#include "([^"]+)"', file.read_text(), flags=re.M):
            header = (file.parent / name).resolve()
            if header not in found:
                found[header] = None
                files.append(header)
    return sorted(found)


def compile_one(source: Path, build: list[str]) -> tuple[str, Path]:
    """(report of ptxas, machine code) of one file, from the cache where it is known."""
    import torch

    options = (word for word in build if not Path(word).is_absolute())
    versions = toolkit.version(), cache.compiler_version(), torch.__version__
    key = cache.digest(*versions, *options, source, *headers_of(source))
    binary = cache.directory() / f"{source.stem}-{key}.cubin"
    report = binary.with_suffix(".ptxas")
    if not (binary.exists() and report.exists()):
        new = cache.temporary(binary)
        done = subprocess.run([*build, "-o", str(new)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        text = cache.temporary(report)
        text.write_text(done.stderr)
        cache.publish(text, report)
        cache.publish(new, binary)
    return report.read_text(), binary


def parse(report: str) -> dict[str, Kernel]:
    pattern = re.compile(
        r"Compiling entry function '(\w+)'.*\n(?:.*\n)*?\s*(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads\n.*Used (\d+) registers"
    )
    return {
        name: Kernel(int(registers), int(stack), int(stores) + int(loads))
        for name, stack, stores, loads, registers in pattern.findall(report)
    }


def disassemble(binary: Path) -> dict[str, str]:
    """Machine code by kernel; skips, loudly, without a disassembler."""
    tool = disassembler()
    if tool is None:
        pytest_support.require_triton()
    assert tool is not None, "neither the CUDA toolkit nor triton brings nvdisasm"
    listing = binary.with_suffix(".sass")
    if not listing.exists():
        done = subprocess.run([tool, "-c", binary], capture_output=True, text=True, check=True)
        new = cache.temporary(listing)
        new.write_text(done.stdout)
        cache.publish(new, listing)
    parts = re.split(r"^//-+ \.text\.(\w+) .*$", listing.read_text(), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))


@pytest.fixture(scope="session")
def jobs(request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, str], Future]]:
    """The files that the collected tests want, two compilers at a time."""
    pytest_support.require_nvcc()
    wanted = {}
    for item in request.session.items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if "source" in params and "arch" in params:
            wanted[params["source"], params["arch"]] = None
    patch = pytest.MonkeyPatch()
    with ThreadPoolExecutor(2) as pool:
        yield {
            (source, arch): pool.submit(
                compile_one, ROOT / source, command(ROOT / source, arch, patch)
            )
            for source, arch in wanted
        }
        pool.shutdown(cancel_futures=True)


def label(name: str) -> str:
    tool = shutil.which("c++filt")
    if tool is None:
        return name
    text = subprocess.run([tool, name], capture_output=True, text=True).stdout.strip()
    return text.replace("lfp::cuda::", "").replace("torch::headeronly::", "")[:200]


def by_arch() -> list:
    marks = {arch: () if arch in QUICK else pytest.mark.slow for arch in ARCHITECTURES}
    return [pytest.param(arch, marks=marks[arch]) for arch in ARCHITECTURES]


# one file for all architectures, then the next: what was edited fails first
targets = [
    pytest.mark.parametrize("source", [str(s.relative_to(ROOT)) for s in SOURCES]),
    pytest.mark.parametrize("arch", by_arch()),
]


def for_every_target(test):
    for mark in targets:
        test = mark(test)
    return test


def bound_of(name: str, arch: str) -> int:
    """0: there is none."""
    for pattern, limit, *architectures in BOUNDS:
        if re.search(pattern, name) and (not architectures or arch in architectures[0].split()):
            return limit
    return 0


@for_every_target
def test_registers(source, arch, jobs) -> None:
    report, _ = jobs[source, arch].result()
    kernels = parse(report)
    assert len(kernels) == report.count("Compiling entry function") > 0
    wrong = []
    for name, kernel in kernels.items():
        bound = bound_of(name, arch)
        assert bound, f"no bound for {label(name)}"
        if kernel.spilled or kernel.registers > bound:
            wrong.append(
                f"{kernel.registers} registers of {bound}, {kernel.spilled} bytes spilled: "
                f"{label(name)}"
            )
    assert not wrong, "\n".join(wrong)


# What the machine code of kernels must hold: (files, pattern of the mangled name, instructions,
# the architectures, all without any).
# 16 bytes; 32 are one access from sm_100 on.
WIDE = r"LDG\.E\.(128|ENL2\.256)", r"STG\.E\.(128|ENL2\.256)"
EXPECTED: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    ("activation combine reward spikes", r"elementwise_kernelILi[248]E", WIDE, ""),
    ("lif", r"(forward|backward)_scan_kernelI.*Li[248]E", WIDE, ""),
    ("spikes", r"over_steps_kernelI.*Li[248]E", WIDE[1:], ""),
    ("update", r"update_kernel", WIDE, ""),
    ("batch_norm", r"(planes|rows)_kernelILi[248]E", WIDE, ""),
    ("pool", r"spread_kernelI.*Li[248]E", WIDE, ""),
    ("max_pool", r"max_pool_kernelI.*Li[248]E", WIDE, ""),
    ("max_pool_redistribute", r"give_kernelI[fd].*Li[24]E", WIDE, ""),
    ("softmax", r"(held|long)_rows_kernelI.*Li[248]E", WIDE, ""),
    ("layer_norm", r"held_rows_kernelI.*Li[248]E", WIDE, ""),
    ("layer_norm group_norm", r"norm_rows_kernelI.*Li[248]E", WIDE, ""),
    ("layer_norm group_norm", r"norm_statistics_kernelI.*Li[248]E", WIDE[:1], ""),
    ("embedding", r"(carried_)?rows_kernelI.*Li[248]E", WIDE, ""),
    ("attention attention_redistribute", r"attention_(\w+_)?kernelI", WIDE, ""),
    (
        "attention attention_redistribute",
        r"attention_(\w+_)?kernelI.*(Half|BFloat)",
        (r"HMMA",),
        "",
    ),
    ("linear conv", r"product_kernelI", WIDE, ""),
    ("linear", r"one_pass_kernelI", WIDE, ""),
    ("linear conv", r"product_kernelI.*MmaCore", (r"HMMA",), ""),
    ("linear", r"hopper_kernelI", (r"HGMMA", r"UTMALDG"), "90a"),
)


@for_every_target
def test_machine_code(source, arch, jobs) -> None:
    _, binary = jobs[source, arch].result()
    kernels = disassemble(binary)
    local = [label(name) for name, code in kernels.items() if re.search(r"\b(LDL|STL)\b", code)]
    assert not local, "\n".join(("local memory:", *local))
    for files, pattern, instructions, architectures in EXPECTED:
        if Path(source).stem not in files.split() or arch not in (architectures or arch).split():
            continue
        found = [name for name in kernels if re.search(pattern, name)]
        assert found, f"no kernel is called {pattern}"
        for instruction in instructions:
            wrong = [label(name) for name in found if not re.search(instruction, kernels[name])]
            assert not wrong, "\n".join((f"no {instruction}:", *wrong))
