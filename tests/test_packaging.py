"""Laws of the repository and of the package: what is linked, imported, shipped, and how long."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lfp_kernels
from lfp_kernels import _library

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lfp_kernels"
LIBRARY = PACKAGE / "_C_cpu.so"
SOURCES = ("*.py", "*.cpp", "*.cu", "*.h", "*.cuh")


def tracked(*patterns: str) -> list[Path]:
    names = subprocess.run(
        ["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    return [ROOT / name for name in names if (ROOT / name).exists()]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_the_library_is_loaded_here() -> None:
    assert _library.why_not_loaded("cpu") is None


def test_library_uses_the_stable_abi_only() -> None:
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", str(LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    names = [line.split()[-1] for line in symbols.splitlines() if line.strip()]
    assert any(name.startswith("torch_") or name.startswith("aoti_torch_") for name in names)
    for name in names:
        assert not name.startswith(("Py", "_Py")), name
        assert not re.match(r"_ZN?K?\d*(2at|3c10|5torch)", name), name


def test_library_exports_nothing_of_its_own() -> None:
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", "-C", str(LIBRARY)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    strong = [line for line in symbols.splitlines() if re.search(r"\s[TDB]\s", line)]
    assert not [line for line in strong if "lfp::" in line]


def test_no_file_over_400_lines() -> None:
    long = {
        str(path.relative_to(ROOT)): count
        for path in tracked(*SOURCES)
        if (count := len(path.read_text().splitlines())) > 400
    }
    assert not long


def test_setup_stays_under_150_lines() -> None:
    assert len((ROOT / "setup.py").read_text().splitlines()) < 150


def test_no_drawer_named_utils() -> None:
    assert not [p for p in tracked(*SOURCES) if "util" in p.stem]


def test_backends_of_one_op_never_import_each_other() -> None:
    peers = {"reference", "native", "triton"}
    for path in sorted((PACKAGE / "ops").glob("*/*.py")):
        if path.stem not in peers:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = {*(node.module or "").split("."), *(a.name for a in node.names)}
                assert not (names & (peers - {path.stem})), f"{path}: {ast.unparse(node)}"


def test_every_op_has_a_reference_and_a_native_implementation() -> None:
    import torch

    from lfp_kernels import backends

    missing = set()
    for op in backends.ops():
        assert backends.supports(op, "reference", "cpu", torch.float32) is None, op
        if backends.supports(op, "native", "cpu", torch.float32) is not None:
            missing.add(op)
    assert not missing


def test_import_needs_neither_triton_nor_library() -> None:
    code = """
import sys
sys.modules["triton"] = None
import pathlib
exists = pathlib.Path.exists
pathlib.Path.exists = lambda path: path.suffix != ".so" and exists(path)
import torch, lfp_kernels
import lfp_kernels._library as library
from lfp_kernels import functional as F
assert "was not built" in library.why_not_loaded("cpu")
x, w = torch.randn(3, 4), torch.randn(5, 4)
z = F.linear(x, w)
assert F.linear_redistribute(x, w, None, z, z).weight.shape == (5, 4)
model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.ReLU(),
                            torch.nn.MaxPool2d(2), torch.nn.Flatten(), torch.nn.Linear(18, 3))
step = lfp_kernels.fuse(model, lfp_kernels.composites.Epsilon(),
                        optimizer=lfp_kernels.optim.AdamW(1e-3))
step(torch.randn(2, 1, 8, 8), torch.tensor([0, 1]))
try:
    with lfp_kernels.use_backend("native"):
        F.linear(x, w)
except RuntimeError as error:
    assert "was requested and cannot run" in str(error), error
else:
    raise SystemExit("a requested backend fell back")
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_import_does_not_initialise_cuda() -> None:
    done = python("import lfp_kernels, torch; assert not torch.cuda.is_initialized()")
    assert done.returncode == 0, done.stderr


def test_public_names_exist() -> None:
    for name in lfp_kernels.__all__:
        assert hasattr(lfp_kernels, name)
    assert re.fullmatch(r"\d+\.\d+\.\d+", lfp_kernels.__version__)
    assert f'version = "{lfp_kernels.__version__}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"LFP_KERNELS_BUILD": "everything"}, "LFP_KERNELS_BUILD='everything'; expected auto|none"),
        ({"LFP_KERNELS_BUILD": "cpu", "CXX": "no-such-compiler"}, "no C++ compiler"),
        (
            {
                "LFP_KERNELS_BUILD": "cuda",
                "CUDA_HOME": "",
                "PATH": "",
                "CXX": shutil.which("g++") or "",
            },
            "no CUDA compiler",
        ),
    ],
)
def test_a_build_that_cannot_work_ends_in_one_line(
    environment: dict[str, str], expected: str, tmp_path: Path
) -> None:
    copy = copy_sources(tmp_path)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=copy, env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_a_build_without_torch_ends_in_one_line(tmp_path: Path) -> None:
    copy = copy_sources(tmp_path)
    (copy / "torch.py").write_text("raise ImportError('torch is hidden by the test')\n")
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=copy,
        env={**os.environ, "LFP_KERNELS_BUILD": "cpu", "PYTHONPATH": str(copy)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "torch is not importable while building" in done.stderr


@pytest.mark.parametrize("gpu", [True, False])
def test_the_default_build_compiles_for_a_gpu_only_where_one_is(gpu: bool, tmp_path: Path) -> None:
    copy = copy_sources(tmp_path)
    (copy / "torch.py").write_text(
        "class version:\n    cuda = '13.0'\n"
        f"class cuda:\n    is_available = staticmethod(lambda: {gpu})\n"
    )
    nothing = {"LFP_KERNELS_BUILD": "auto", "CXX": "no-such-compiler", "PYTHONPATH": str(copy)}
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=copy, env={**os.environ, **nothing}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "going on without the cpu kernels" in done.stderr
    assert ("going on without the cuda kernels" in done.stderr) == gpu
    assert ("no GPU, so" in done.stderr) != gpu


def test_pure_python_wheel(tmp_path: Path) -> None:
    copy = copy_sources(tmp_path)
    build_wheel(copy, tmp_path / "out", LFP_KERNELS_BUILD="none")
    (wheel,) = (tmp_path / "out").glob("*.whl")
    assert wheel.name.endswith("py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [n for n in names if n.endswith(".so")]
    assert "lfp_kernels/ops/linear/reference.py" in names
    assert not [n for n in names if n.startswith(("tests", "bench"))]


@pytest.mark.slow
def test_compiled_wheel_runs_outside_the_checkout(tmp_path: Path) -> None:
    copy = copy_sources(tmp_path)
    build_wheel(copy, tmp_path / "out", LFP_KERNELS_BUILD="cpu")
    (wheel,) = (tmp_path / "out").glob("*.whl")
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    done = subprocess.run(
        [
            sys.executable, "-c",
            "import lfp_kernels, torch; from lfp_kernels import _library, functional as F;"
            "assert _library.why_not_loaded('cpu') is None;"
            "assert F.linear(torch.ones(2, 3), torch.ones(4, 3)).sum() == 24",
        ],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(target)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def copy_sources(tmp_path: Path) -> Path:
    """The files a source archive would hold, without anything built."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.json")
    shutil.copytree(PACKAGE, copy / "lfp_kernels", ignore=ignore)
    return copy


def build_wheel(source: Path, out: Path, **environment: str) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q",
            "-w", str(out), str(source),
        ],
        env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
