"""CUDA C++ through nvcc: kernels and their host launchers, linked to the stand-in runtime."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from .. import DeviceArray, cache, cuda, statistics
from ..pytest_support import require_nvcc
from .harness import from_bf16, to_bf16

pytestmark = pytest.mark.gpusim

KERNELS = Path(__file__).parent / "kernels"


def build(name: str, arch: str = "80", capability: int = 80) -> ctypes.CDLL:
    require_nvcc()
    path = cuda.build([KERNELS / f"{name}.cu"], name=name, arch=arch, torch=False)
    return cuda.load(path, capability=capability)


def call(function, *args) -> str:
    """Calls a launcher; returns its error text, empty when all went well."""
    function.restype = ctypes.c_char_p
    converted = [
        ctypes.c_void_p(a.data_ptr()) if isinstance(a, DeviceArray)
        else ctypes.c_float(a) if isinstance(a, float)
        else ctypes.c_int(a)
        for a in args
    ]  # fmt: skip
    return function(*converted).decode()


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def reduce() -> ctypes.CDLL:
    return build("reduce")


@pytest.mark.parametrize("columns", [1, 31, 128, 1000])
def test_row_sum(reduce: ctypes.CDLL, columns: int) -> None:
    """Shuffles, __constant__ memory written by the host, a __device__ counter read back."""
    before = reduce.count_rows()
    x, y = DeviceArray(random(9, columns)), DeviceArray(shape=9, dtype=np.float32)
    assert call(reduce.launch_row_sum, x, y, 9, columns, 2.5) == ""
    assert np.allclose(y.array, 2.5 * x.array.astype(np.float64).sum(1), atol=1e-4)
    assert reduce.count_rows() == before + 9


@pytest.mark.parametrize(
    ("bug", "report"),
    [(0, ""), (1, "race: read after write"), (2, "race")],
    ids=["ok", "fence", "sync"],
)
def test_last_block_reduction(reduce: ctypes.CDLL, bug: int, report: str) -> None:
    x = DeviceArray(random(5000))
    parts, count = DeviceArray(np.zeros(7, np.float32)), DeviceArray(np.zeros(1, np.uint32))
    result = DeviceArray(shape=1, dtype=np.float32)
    error = call(reduce.launch_sum, x, parts, count, result, 5000, bug)
    if not bug:
        assert error == ""
        assert np.isclose(result.array[0], x.array.astype(np.float64).sum(), atol=1e-3)
    else:
        assert report in error and "reduce.cu:" in error


def test_shared_memory_opt_in(reduce: ctypes.CDLL) -> None:
    n = 15000  # 60 000 bytes, above the 48 KiB that need no opt-in
    x, y = DeviceArray(random(n)), DeviceArray(shape=n, dtype=np.float32)
    assert "missing opt-in" in call(reduce.launch_reverse, x, y, n, 0)
    assert "missing opt-in" in call(reduce.launch_reverse, x, y, n, 4 * n - 4)
    assert call(reduce.launch_reverse, x, y, n, 4 * n) == ""
    assert (y.array == x.array[::-1]).all()
    assert "opt-in of 200000" in call(reduce.launch_reverse, x, y, n, 200000)


def test_occupancy(reduce: ctypes.CDLL) -> None:
    """By threads, then by shared memory: 164 KiB a processor on sm_80, 1 KiB a block reserved."""
    assert reduce.occupancy(1024, 0) == 2
    assert reduce.occupancy(128, 40 << 10) == 4


SHAPES = [(32, 32, 32), (64, 32, 160), (40, 56, 96)]


@pytest.fixture(scope="module")
def product() -> ctypes.CDLL:
    return build("product")


def run_product(library: ctypes.CDLL, shape: tuple[int, int, int], bug: int) -> tuple[str, float]:
    m, n, k = shape
    a, b = DeviceArray(to_bf16(random(m, k))), DeviceArray(to_bf16(random(k, n)))
    c = DeviceArray(shape=(m, n), dtype=np.float32)
    error = call(library.launch_product, a, b, c, m, n, k, bug)
    expected = from_bf16(a.array).astype(np.float64) @ from_bf16(b.array)
    return error, float(np.abs(c.array - expected).max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tensor_core_product(product: ctypes.CDLL, shape: tuple) -> None:
    error, difference = run_product(product, shape, 0)
    assert error == "" and difference < 1e-4


# Which finding each planted bug gives at some shape; "values": only the result is wrong.
BUGS = {
    "no wait": "uninitialised",
    "wait too shallow": "uninitialised",
    "no sync after wait": "race|uninitialised",
    "no sync before overwrite": "race",
    "no row mask": "out of bounds",
    "wrong fragment": "values",
    "no store mask": "out of bounds|race",
    "misaligned rows": "misaligned",
    "one buffer": "race|uninitialised",
    "no prefetch": "uninitialised|values",
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_found(product: ctypes.CDLL, bug: str) -> None:
    found = set()
    for shape in SHAPES:
        error, difference = run_product(product, shape, list(BUGS).index(bug) + 1)
        found |= {kind for kind in BUGS[bug].split("|") if kind in error}
        if not error and not difference < 1e-4:
            found.add("values")
    assert found & set(BUGS[bug].split("|"))


@pytest.fixture(scope="module")
def hopper() -> ctypes.CDLL:
    return build("hopper", "90a", 90)


@pytest.mark.parametrize("shape", [(64, 64, 64), (100, 72, 192)], ids=str)
def test_hopper_product(hopper: ctypes.CDLL, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    a, b = DeviceArray(to_bf16(random(m, k))), DeviceArray(to_bf16(random(n, k)))
    c = DeviceArray(shape=(m, n), dtype=np.float32)
    assert call(hopper.launch_product, a, b, c, m, n, k, k, True) == ""
    assert np.abs(c.array - from_bf16(a.array) @ from_bf16(b.array).T).max() < 1e-4
    assert "uninitialised" in call(hopper.launch_product, a, b, c, m, n, k, k, False)


def test_tensor_map_is_checked(hopper: ctypes.CDLL) -> None:
    a = DeviceArray(to_bf16(random(64, 65)))
    c = DeviceArray(shape=(64, 64), dtype=np.float32)
    assert call(hopper.launch_product, a, a, c, 64, 64, 64, 65, True) == "tensor map refused"


TORCH_SESSION = """
import copy
import sys
import time
sys.path.insert(0, {parent!r})
import torch
from {package} import cuda, hook_torch
library = cuda.build([{source!r}], name="torch_op")
hook_torch()
cuda.load(library)
x = torch.randn(1000)
y = torch.ops.gpusim_test.leaky(x, 0.01)
assert torch.equal(y, torch.where(x > 0, x, x * 0.01))
assert torch.equal(torch.ops.gpusim_test.leaky(copy.deepcopy(x), 0.01), y)
try:
    torch.ops.gpusim_test.leaky(torch.empty(100), 0.01)
except RuntimeError as error:
    assert "uninitialised: global memory read" in str(error), error
    assert "torch_op.cu:" in str(error)
else:
    raise AssertionError("reading uninitialised memory went unseen")
print("ok")
"""


def test_torch_op_in_a_process_of_its_own() -> None:
    require_nvcc()
    pytest.importorskip("torch")
    package = cuda.__package__
    root = Path(cuda.__file__).resolve().parents[package.count(".") + 1]
    source = str(KERNELS / "torch_op.cu")
    script = TORCH_SESSION.format(parent=str(root), package=package, source=source)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout.strip() == "ok", result.stderr


def test_build_is_cached_by_content(tmp_path: Path) -> None:
    """An unchanged source compiles nothing; a changed header compiles again."""
    require_nvcc()
    header, source = tmp_path / "value.h", tmp_path / "tiny.cu"
    source.write_text('#include "value.h"\nextern "C" int value() { return VALUE; }\n')
    results = []
    for text in ("1", "1", "2", "1"):
        header.write_text(f"#define VALUE {text}\n")
        path = cuda.build([source], name="tiny", torch=False)
        results.append((path, ctypes.CDLL(str(path)).value()))
    assert [value for _, value in results] == [1, 1, 2, 1]
    assert results[0][0] == results[1][0] == results[3][0] != results[2][0]


def test_edited_while_it_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An object must not be kept under the contents of a file that it was not made of."""
    require_nvcc()
    source = tmp_path / "edited.cu"
    source.write_text('extern "C" int value() { return 1; }\n')
    run = cache.run

    def edit_behind(command, **options):
        said = run(command, **options)
        if source in command:
            source.write_text('extern "C" int value() { return 2; }\n')
        return said

    with monkeypatch.context() as patch, pytest.raises(cache.BuildError, match="edited while"):
        patch.setattr(cache, "run", edit_behind)
        cuda.build([source], name="edited", torch=False)
    path = cuda.build([source], name="edited", torch=False)
    assert ctypes.CDLL(str(path)).value() == 2


def test_interrupt_while_a_kernel_is_made() -> None:
    """Ctrl-C must not hand the launcher garbage: the launch fails, then Python stops."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    try:
        check_interrupt()
    finally:
        signal.signal(signal.SIGINT, before)


def check_interrupt() -> None:
    def interrupted(text: str, name: str) -> int:
        raise KeyboardInterrupt

    message, text = ctypes.create_string_buffer(100), ctypes.create_string_buffer(b"ptx")
    with pytest.raises(KeyboardInterrupt):
        address = ctypes.addressof
        assert cuda._answer(interrupted, address(text), 3, b"k", address(message), 100) is None
        time.sleep(5)
    assert message.value.startswith(b"KeyboardInterrupt")


def test_compile_error_is_shown(tmp_path: Path) -> None:
    require_nvcc()
    source = tmp_path / "broken.cu"
    source.write_text("int broken = nonsense;\n")
    with pytest.raises(cache.BuildError, match="nonsense"):
        cuda.build([source], name="broken", torch=False)


def test_second_use_translates_nothing(product: ctypes.CDLL) -> None:
    run_product(product, SHAPES[0], 0)
    before = (statistics.translated, statistics.compiled)
    run_product(product, SHAPES[0], 0)
    assert (statistics.translated, statistics.compiled) == before
