"""A Triton driver whose device is the executor: kernels and wrappers run unmodified on CPU tensors.

    with triton_driver.active(80):
        kernel[grid](x, y, n, BLOCK=256)

Triton compiles as for a GPU of that compute capability, ptxas included; the launcher executes the
PTX. An autotuned kernel runs every configuration once, so that each of them is checked.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase, decompose_descriptor
from triton.runtime.cache import get_cache_manager

from . import engine
from .cuda import shared_optin
from .engine import SimError

_TENSOR_MAP_MAGIC = 0x70616D74  # runtime/tensor_map.h
_FORMATS = {"fp16": "<e", "fp32": "<f", "f32": "<f", "fp64": "<d", "f64": "<d"}
_THREADS_PER_WARP = 32


class SimDriver(DriverBase):
    """Stands in for Triton's CUDA driver."""

    def __init__(self, capability: int = 80):
        self.capability = capability
        self.utils = _Utils(capability)
        self.launcher_cls = _Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, _THREADS_PER_WARP)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        return divmod(self.capability, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> SimpleNamespace:
        return SimpleNamespace(synchronize=lambda: None, current_device=lambda: 0)

    def get_benchmarker(self):
        """Runs each configuration of an autotuned kernel once; all are equally fast."""

        def benchmark(call, quantiles=None, **_):
            call()
            return [1.0] * len(quantiles or [1])

        return benchmark

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(1)

    def clear_cache(self, cache: torch.Tensor) -> None:
        pass


@contextlib.contextmanager
def active(capability: int = 80) -> Iterator[SimDriver]:
    """Makes the executor Triton's device inside the with block.

    Kernels that were launched before keep what Triton compiled for their old device: use a
    different kernel, or another process, for another capability.
    """
    config = triton.runtime.driver
    before = config._active
    driver = SimDriver(capability)
    config.set_active(driver)
    try:
        yield driver
    finally:
        config._active = before


class _Utils:
    """What Triton asks its driver about the device, and the loading of a binary."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": shared_optin(self.capability),
            "max_num_regs": 65536,
            "multiprocessor_count": 108,
            "warpSize": _THREADS_PER_WARP,
            "sm_clock_rate": 1410000,
            "mem_clock_rate": 1215000,
            "mem_bus_width": 5120,
        }

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple:
        registers = spills = 0
        return name, name, registers, spills, 1024

    def unload_module(self, module: str) -> None:
        pass


class _Launcher:
    """Called for every launch of one compiled kernel."""

    def __init__(self, src, metadata):
        if getattr(metadata, "num_ctas", 1) != 1:
            raise SimError("gpusim: thread block clusters (num_ctas > 1) are not modelled")
        self.signature = tuple(src.signature.values())
        self.metadata = metadata
        self.kernel: engine.Kernel | None = None

    def __call__(
        self, x, y, z, stream, function, metadata, launch_metadata, enter_hook, exit_hook, *args
    ):
        if min(x, y, z) < 1:
            return
        if self.kernel is None:
            self.kernel = self._load()
        values = self._flatten(args) + [("*", s) for s in self._scratch(x * y * z)]
        params = self.kernel.params
        if len(values) != len(params):
            raise SimError(f"gpusim: {len(values)} arguments for {len(params)} parameters")
        packed = bytearray(self.kernel.struct.param_bytes)
        for (offset, size), (ty, value) in zip(params, values, strict=True):
            packed[offset : offset + size] = _pack(ty, value, size)
        if enter_hook:
            enter_hook(launch_metadata)
        block = (_THREADS_PER_WARP * self.metadata.num_warps, 1, 1)
        self.kernel.launch_packed((x, y, z), block, self.metadata.shared, bytes(packed))
        if exit_hook:
            exit_hook(launch_metadata)

    def _load(self) -> engine.Kernel:
        """The PTX lies next to the cubin in Triton's own cache."""
        name = self.metadata.name
        path = get_cache_manager(self.metadata.hash).get_file(f"{name[:150]}.ptx")
        with open(path) as file:
            return engine.load(file.read(), name)

    def _scratch(self, blocks: int) -> list[torch.Tensor | None]:
        """Triton's last two parameters: global and profile scratch memory."""
        sizes = (self.metadata.global_scratch_size, self.metadata.profile_scratch_size)
        return [torch.empty(s * blocks, dtype=torch.int8) if s else None for s in sizes]

    def _flatten(self, args: tuple) -> list[tuple[str, object]]:
        tensor_maps = list(getattr(self.metadata, "tensordesc_meta", None) or [])
        flat: list[tuple[str, object]] = []
        for ty, arg in zip(self.signature, args, strict=True):
            flat += _flatten(ty, arg, tensor_maps)
        return flat


def _flatten(ty, arg, tensor_maps: list) -> list[tuple[str, object]]:
    """(type, value) of each parameter: constants dropped, tuples and descriptors expanded."""
    if isinstance(ty, tuple):
        return [x for t, a in zip(ty, arg, strict=True) for x in _flatten(t, a, tensor_maps)]
    if ty == "constexpr":
        return []
    if not ty.startswith("tensordesc"):
        return [(ty, arg)]
    rank = len(arg.shape)
    if not tensor_maps:  # a target without TMA: the descriptor is its fields
        types = ["*"] + ["i64"] * 2 * rank + ["i1", "i1"] + ["i32"] * rank + ["i64"] * rank
        fields = decompose_descriptor(arg)
        return list(zip(types, fields, strict=False))
    tensor_map = _tensor_map(arg, tensor_maps.pop(0))
    extents, strides = [("i32", x) for x in arg.shape], [("i64", x) for x in arg.strides]
    return [("tensor map", tensor_map), *extents, *strides]


def _tensor_map(descriptor, meta: dict) -> bytes:
    """sim::TensorMap of runtime/tensor_map.h; its dimensions start with the innermost."""
    element = meta["elem_size"]
    extent = list(descriptor.shape)[::-1]
    stride = [x * element for x in list(descriptor.strides)[::-1][1:]]
    box = list(meta["block_size"])[::-1]
    return struct.pack(
        "<QQIIII5Q4Q5I4x",
        _TENSOR_MAP_MAGIC,
        descriptor.base.data_ptr(),
        len(extent),
        element,
        meta["swizzle"],
        descriptor.padding == "nan",
        *(extent + [1] * 5)[:5],
        *(stride + [0] * 4)[:4],
        *(box + [1] * 5)[:5],
    ).ljust(128, b"\0")


def _pack(ty: str, value: object, size: int) -> bytes:
    if ty in _FORMATS:
        return struct.pack(_FORMATS[ty], value)
    if ty == "bf16":
        return struct.pack("<f", torch.tensor(value, dtype=torch.bfloat16).item())[2:]
    return engine.pack(value, size)
