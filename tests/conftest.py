"""``pytest --simulate cuda|triton``: the op tests, unchanged, with GPU kernels behind "native".

The kernels run on CPU tensors in the executor of tests/gpusim, every memory access checked. The
CUDA library is built with its ops registered where the CPU ops stand, so it takes their place for
the whole process; the Triton modules take the place of the native ones in the registry.
"""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

CAPABILITY = 80
CUDA_SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--simulate",
        choices=("cuda", "triton"),
        help="run the op tests with the CUDA C++ or the Triton kernels, executed on the CPU",
    )
    parser.addoption("--device", help="run the op tests on this device, such as cuda")
    parser.addoption(
        "--capability",
        type=int,
        default=CAPABILITY,
        help="compute capability of the simulated GPU: 80, 90, ...",
    )
    parser.addoption(
        "--processors",
        type=int,
        default=108,
        help="multiprocessors of the simulated GPU; few make small products large for it",
    )


def pytest_configure(config: pytest.Config) -> None:
    if device := config.getoption("--device"):
        from on_device import OnDevice

        OnDevice(device).__enter__()
    which = config.getoption("--simulate")
    if which is None:
        return
    from gpusim import hook_torch

    hook_torch()
    _copy_foreign_memory()
    capability = config.getoption("--capability")
    if which == "cuda":
        simulate_cuda(capability, config.getoption("--processors"))
    else:
        simulate_triton(capability)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of what only the CPU does (marker host) are left out where GPU kernels run, those of
    the compiled libraries' operators where Triton's do, which has none."""
    simulated = config.getoption("--simulate")
    if simulated is None and config.getoption("--device") in (None, "cpu"):
        return
    left_out = ("host", "operators") if simulated == "triton" else ("host",)
    kept = [i for i in items if not any(i.get_closest_marker(name) for name in left_out)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _copy_foreign_memory() -> None:
    """The checker knows what torch's allocator gave: memory from elsewhere is copied there."""
    import torch

    def copying(make):
        @functools.wraps(make)
        def copy(*args, **kwargs):
            return _copied(make(*args, **kwargs))

        return copy

    for name in ("from_numpy", "as_tensor", "load"):
        setattr(torch, name, copying(getattr(torch, name)))


def _copied(value):
    import torch

    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return value


def simulate_cuda(capability: int, processors: int) -> None:
    import torch
    from gpusim import cuda

    # The CPU library stays out: its ops would stand where the simulated ones go.
    with mock.patch.object(torch.ops, "load_library"):
        from lfp_kernels import _library
    _library._reasons.update(cpu=None, cuda="the simulation has its place")

    # LFP_SIM_SOURCES=linear.cu,... builds only these, while others are being written.
    names = os.environ.get("LFP_SIM_SOURCES")
    sources = [CUDA_SOURCES / n for n in names.split(",")] if names else CUDA_SOURCES.glob("*.cu")
    arch = "90a" if capability == 90 else str(capability)
    library = cuda.build(
        sorted(sources), name="lfp_kernels_simulated", arch=arch,
        flags=["-DLFP_SIMULATED", "--expt-relaxed-constexpr"],
    )  # fmt: skip
    cuda.load(library, capability=capability, processors=processors)
    from lfp_kernels.ops import _cuda

    _cuda.is_gpu = lambda x: True


def simulate_triton(capability: int) -> None:
    import torch
    import torch.utils._triton
    import triton
    from gpusim.triton_driver import SimDriver
    from torch._inductor import config as inductor
    from torch._inductor.runtime import triton_heuristics

    from lfp_kernels import backends
    from lfp_kernels.ops import _cuda

    _cuda.is_gpu = lambda x: True
    driver = SimDriver(capability)
    triton.runtime.driver.set_active(driver)
    # dynamo looks for a GPU before it understands a Triton kernel; inductor would compile it for
    # the device of the tensors, and in other processes
    torch.utils._triton.has_triton = lambda: True
    triton_heuristics.GPUTarget = lambda *_: driver.get_current_target()
    inductor.compile_threads = 1
    for table in backends._implementations.values():
        if "triton" in table:
            table["native"] = replace(table["triton"], devices=None)


@pytest.fixture
def one_thread():
    """Tiny products gain nothing from more threads, and a busy machine makes them crawl."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def mnist(tmp_path):
    """A folder with tiny files in the form of MNIST's."""
    from app_files import make_mnist

    folder = tmp_path / "mnist"
    folder.mkdir()
    return make_mnist(folder)
