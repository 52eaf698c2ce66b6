"""Every Triton kernel compiles for every target: to machine code of NVIDIA's without spills, for
AMD to the code object, as far as it goes without a GPU. kernel_requests.py says what is compiled.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
from gpusim.pytest_support import require_triton

pytestmark = pytest.mark.gpusim

try:
    import kernel_requests as source
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    OPS = tuple(source.RUNS)
except ModuleNotFoundError:  # the fixture below says so
    OPS = ("triton",)

# Compute capability: shared memory that a block may have, in KiB. 86 and 89 differ from 80 in it.
NVIDIA = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
QUICK = (80, 90)
AMD, AMD_SHARED = "gfx942", 64
TYPES = (torch.float32, torch.bfloat16, torch.float16)
PRODUCTS = ("linear", "conv")


@pytest.fixture(autouse=True)
def has_triton() -> None:
    require_triton()


def targets() -> list:
    marks = {c: () if c in QUICK else pytest.mark.slow for c in NVIDIA}
    return [pytest.param(c, marks=m) for c, m in marks.items()]


def compiled(request, target):
    asked = ASTSource(request.kernel, request.signature, request.constexprs, request.attributes)
    return triton.compile(asked, target=target, options=request.options)


def machine_code(binary: bytes, folder: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    path = folder / "kernel.cubin"
    path.write_bytes(binary)
    done = subprocess.run([str(tool), "-c", str(path)], capture_output=True, text=True, check=True)
    return done.stdout


def check_nvidia(request, capability: int, folder: Path) -> str:
    """Its machine code, without accesses to local memory."""
    kernel = compiled(request, GPUTarget("cuda", capability, 32))
    code = machine_code(kernel.asm["cubin"], folder)
    label = f"{request.kernel.__name__} {request.constants} {request.options}"
    assert "EXIT" in code, label
    spills = [line for line in code.splitlines() if " LDL" in line or " STL" in line]
    assert not spills, f"{label}: {len(spills)} accesses to local memory"
    assert kernel.metadata.shared <= NVIDIA[capability] * 1024, label
    return code


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("capability", targets())
@pytest.mark.parametrize("name", OPS)
def test_nvidia(name, capability, dtype, tmp_path):
    found = source.requests(name, dtype)
    assert found
    for request in found:
        check_nvidia(request, capability, tmp_path)


@pytest.mark.parametrize("capability", targets())
@pytest.mark.parametrize("name", PRODUCTS)
def test_tf32(name, capability, tmp_path):
    """Products of float32 tensors on tensor cores, where torch's switch asks for them."""
    found = source.requests(name, torch.float32, tf32=True)
    found = [r for r in found if r.constants.get("MODE") == "tf32"]
    assert found
    for request in found:
        code = check_nvidia(request, capability, tmp_path)
        thin = min(request.constants[size] for size in "MNK") < 16
        assert thin or re.search(r"\b(UTC)?[HGQ]+MMA", code), request.constants


@pytest.mark.parametrize("dtype", (*TYPES, torch.float64), ids=str)
@pytest.mark.parametrize("name", OPS)
def test_amd(name, dtype):
    for request in source.requests(name, dtype, amd=AMD):
        kernel = compiled(request, GPUTarget("hip", AMD, 64))
        label = f"{request.kernel.__name__} {request.constants}"
        assert "s_endpgm" in kernel.asm["amdgcn"], label
        assert kernel.asm["hsaco"][:4] == b"\x7fELF", label
        assert kernel.metadata.shared <= AMD_SHARED * 1024, label
        if dtype != torch.float64:
            assert re.search(r"vgpr_spill_count: +0\b", kernel.asm["amdgcn"]), label


def test_no_kernel_is_left_out():
    """Each kernel of the package is among those that the tests above compile."""
    package = importlib.import_module("lfp_kernels.ops")
    kernels = set()
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if "triton" in module.name.rsplit(".", 1)[1]:
            members = vars(importlib.import_module(module.name)).values()
            found = [m for m in members if isinstance(m, triton.JITFunction)]
            kernels |= {(f.__module__, f.__name__) for f in found if f.__name__.endswith("kernel")}
    for amd in (None, AMD):
        asked = [r for name in OPS for r in source.requests(name, torch.float32, amd)]
        seen = Counter((r.kernel.__module__, r.kernel.__name__) for r in asked)
        assert kernels == set(seen), f"left out: {kernels - set(seen)}"


@pytest.mark.parametrize("name", PRODUCTS)
def test_half_precision_products_use_tensor_cores(name, tmp_path):
    instructions = {80: "HMMA", 90: "HGMMA"}
    for request in source.requests(name, torch.bfloat16):
        # Rules with two signals are exact: their sums divide the reward.
        if request.kernel.__name__.startswith("finish") or request.constants["MODE"] == "ieee":
            continue
        thin = min(request.constants[size] for size in "MNK") < 16
        for capability, instruction in instructions.items():
            code = check_nvidia(request, capability, tmp_path)
            assert thin or instruction in code or "HMMA" in code, request.constants
