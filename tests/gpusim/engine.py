"""Loads translated kernels and launches them on the C++ executor."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from . import cache as store
from . import ptx as ptx_package
from .ptx import parse, translate


class SimError(RuntimeError):
    """A launch went wrong: the message lists what the checker found, one finding a line."""


@dataclass
class Statistics:
    """What this process did, for tests of the cache and for timing."""

    launches: int = 0
    translated: int = 0
    compiled: int = 0


statistics = Statistics()
_seed = int(os.environ.get("GPUSIM_SEED", "0"))


class _Kernel(ctypes.Structure):
    """sim::Kernel of runtime/sim.h."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("body", ctypes.c_void_p),
        ("static_shared", ctypes.c_uint),
        ("param_bytes", ctypes.c_uint),
        ("param_count", ctypes.c_uint),
        ("params", ctypes.POINTER(ctypes.c_uint * 2)),
        ("location_count", ctypes.c_uint),
        ("locations", ctypes.c_void_p),
        ("files", ctypes.c_void_p),
        ("max_threads", ctypes.c_uint),
        ("global_granule", ctypes.c_uint),
        ("shared_granule", ctypes.c_uint),
    ]


@cache
def runtime() -> ctypes.CDLL:
    """The executor's library, compiled at first use."""
    sources = sorted(store.RUNTIME.glob("*.cpp"))
    headers = sorted(store.RUNTIME.glob("*.h"))
    path = store.shared_library("runtime", sources, ["-O2"], headers)
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    library.sim_report.restype = ctypes.c_char_p
    library.sim_counts.restype = ctypes.c_char_p
    library.sim_variable_create.restype = ctypes.c_void_p
    library.sim_variable_create.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p]
    library.sim_register.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_char_p,
        ctypes.c_int,
    ]
    library.sim_unregister.argtypes = [ctypes.c_void_p]
    library.sim_rename.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    library.sim_seed.argtypes = [ctypes.c_uint64]
    library.sim_time_limit.argtypes = [ctypes.c_double]
    library.sim_seed(_seed)
    return library


# -O1 halves the compile time of -O2 at about the same speed of the kernels that tests run.
_KERNEL_FLAGS = ("-O1", "-w", "-fno-strict-aliasing")


_KERNEL_HEADERS = ("kernel.h", "floating.h", "operations.h", "numeric.h", "sim.h")


@cache
def _header_version() -> str:
    headers = (store.RUNTIME / header for header in _KERNEL_HEADERS)
    return store.digest(store.compiler_version(), *store.CXX_FLAGS, *_KERNEL_FLAGS, *headers)


@cache
def _kernel_header() -> Path:
    """Folder with the precompiled kernel.h."""
    flags = [*store.CXX_FLAGS, *_KERNEL_FLAGS]
    folder = store.directory() / f"header-{_header_version()}"
    compiled = folder / "kernel.h.gch"
    if not compiled.exists():
        folder.mkdir(exist_ok=True)
        new = store.temporary(compiled)
        source = ["-x", "c++-header", store.RUNTIME / "kernel.h"]
        store.run([store.compiler(), *flags, f"-I{store.RUNTIME}", *source, "-o", new])
        store.publish(new, compiled)
    return folder


def _compile(source: str, name: str) -> Path:
    header = _kernel_header()
    key = store.digest(source, header.name)
    final = store.directory() / f"kernel-{name[:40]}-{key}.so"
    if not final.exists():
        statistics.compiled += 1
        text, new = final.with_suffix(f".{os.getpid()}.cpp"), store.temporary(final)
        text.write_text(source)
        flags = [*store.CXX_FLAGS, *_KERNEL_FLAGS, f"-I{header}", f"-I{store.RUNTIME}"]
        store.run([store.compiler(), *flags, "-shared", text, "-o", new])
        store.publish(text, final.with_suffix(".cpp"))
        store.publish(new, final)
    return final


@cache
def _translator_version() -> str:
    sources = sorted(Path(ptx_package.__file__).parent.glob("*.py"))
    return store.digest(_header_version(), *sources)


class Kernel:
    """An executable kernel."""

    def __init__(self, path: Path):
        self._library = ctypes.CDLL(str(path))
        self.struct = _Kernel.in_dll(self._library, "gpusim_kernel")
        self.name = self.struct.name.decode()

    @property
    def address(self) -> int:
        return ctypes.addressof(self.struct)

    @property
    def params(self) -> list[tuple[int, int]]:
        """Offset and size of each parameter."""
        return [tuple(self.struct.params[i]) for i in range(self.struct.param_count)]

    def launch(
        self, grid: Sequence[int] | int, block: Sequence[int] | int, args: Sequence, shared: int = 0
    ) -> None:
        """Runs the kernel; raises SimError with everything the checker found.

        args: one value per parameter: array or tensor (its address), int, float, bytes or None.
        shared: bytes of dynamic shared memory.
        """
        if len(args) != self.struct.param_count:
            raise TypeError(f"{self.name} takes {self.struct.param_count} arguments")
        packed = bytearray(self.struct.param_bytes)
        for (offset, size), arg in zip(self.params, args, strict=True):
            packed[offset : offset + size] = pack(arg, size)
        self.launch_packed(_dim3(grid), _dim3(block), shared, bytes(packed))

    def launch_packed(self, grid: tuple, block: tuple, shared: int, params: bytes) -> None:
        statistics.launches += 1
        dims = ctypes.c_uint * 3
        found = runtime().sim_launch(
            ctypes.byref(self.struct), dims(*grid), dims(*block), ctypes.c_uint(shared), params
        )
        if found:
            raise SimError("gpusim: " + runtime().sim_report().decode().rstrip())


def _dim3(extent: Sequence[int] | int) -> tuple[int, int, int]:
    extent = (extent,) if isinstance(extent, int) else tuple(extent)
    return (*extent, 1, 1)[:3]


def pack(arg: object, size: int) -> bytes:
    """The bytes of one kernel argument."""
    if isinstance(arg, (bytes, bytearray)):
        data = bytes(arg)
    elif arg is None:
        data = bytes(size)
    elif isinstance(arg, float):
        data = struct.pack({2: "<e", 4: "<f", 8: "<d"}[size], arg)
    elif hasattr(arg, "data_ptr"):
        data = arg.data_ptr().to_bytes(8, "little")
    elif hasattr(arg, "ctypes"):
        data = arg.ctypes.data.to_bytes(8, "little")
    else:
        data = (int(arg) & (1 << 8 * size) - 1).to_bytes(size, "little")
    if len(data) != size:
        raise TypeError(f"argument of {len(data)} bytes for a parameter of {size}")
    return data


_kernels: dict[str, Kernel] = {}
_lock = threading.Lock()


def load(ptx: str, name: str | None = None) -> Kernel:
    """The kernel `name` of a PTX text, or its only kernel; raises UnsupportedInstruction.

    Found in this process, else in the cache by the PTX, else translated; its C++ is compiled unless
    the cache has it: a change to the translator costs only the kernels whose C++ it changes.
    """
    key = store.digest(_translator_version(), ptx, name or "")
    with _lock:
        if key not in _kernels:
            runtime()
            path, variables = _find_or_build(key, ptx, name)
            for variable_key, size, init in variables:
                _create_variable(variable_key, size, bytes.fromhex(init))
            _kernels[key] = Kernel(path)
        return _kernels[key]


def _find_or_build(key: str, ptx: str, name: str | None) -> tuple[Path, list]:
    link = store.directory() / f"ptx-{key}.json"
    if link.exists():
        entry = json.loads(link.read_text())
        path = store.directory() / entry["library"]
        if path.exists():
            return path, entry["variables"]
    statistics.translated += 1
    module = parse(ptx)
    if name is None and len(module.entries) != 1:
        raise KeyError(f"the PTX has {len(module.entries)} kernels: name one")
    entry = module.entries[name] if name else next(iter(module.entries.values()))
    path = _compile(translate(module, entry), entry.name)
    variables = [
        [f"{v.name}@{module.key}", v.size, ptx_package.initial_bytes(v).hex()]
        for v in module.variables
        if v.space in ("global", "const")
    ]
    new = store.temporary(link)
    new.write_text(json.dumps({"library": path.name, "variables": variables}))
    store.publish(new, link)
    return path, variables


def _create_variable(key: str, size: int, init: bytes) -> int:
    return runtime().sim_variable_create(key.encode(), size, init)


@cache
def _module(ptx: str):
    return parse(ptx)


def variable(ptx: str, name: str) -> tuple[int, int]:
    """Address and size of a __device__ or __constant__ variable of a module."""
    module = _module(ptx)
    found = next((v for v in module.variables if v.name == name), None)
    if found is None:
        raise KeyError(name)
    key = f"{name}@{module.key}"
    return _create_variable(key, found.size, ptx_package.initial_bytes(found)), found.size


def seed(value: int) -> None:
    """Shuffles threads and blocks of the following launches; 0 restores their natural order."""
    global _seed
    _seed = value
    runtime().sim_seed(value)


@contextlib.contextmanager
def shuffled(value: int) -> Iterator[None]:
    """seed(value) for the with block only."""
    runtime()
    before = _seed
    seed(value)
    try:
        yield
    finally:
        seed(before)


def time_limit(seconds: float) -> None:
    """Longest time a launch may run."""
    runtime().sim_time_limit(seconds)
