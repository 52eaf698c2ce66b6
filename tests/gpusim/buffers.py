"""Memory that the checker knows exactly: arrays for tests, names, and all torch CPU tensors."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import numpy as np

from . import cache as store
from .engine import runtime

RED_ZONE = 4096
POISON = 0xFFB7


class DeviceArray:
    """A numpy array as GPU memory: aligned, with red zones, poisoned unless it gets values."""

    def __init__(self, values: np.ndarray | None = None, *, shape=None, dtype=None, name="array"):
        shape = values.shape if values is not None else np.atleast_1d(shape)
        dtype = np.dtype(values.dtype if values is not None else dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        self._memory = np.full((size + 3 * RED_ZONE) // 2, POISON, np.uint16)
        start = -self._memory.ctypes.data % RED_ZONE + RED_ZONE
        raw = self._memory.view(np.uint8)[start : start + size]
        self.array = raw.view(dtype).reshape(tuple(shape))
        if values is not None:
            self.array[...] = values
        runtime().sim_register(self.data_ptr(), size, name.encode(), values is None)

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def __del__(self):
        if hasattr(self, "array"):
            runtime().sim_unregister(self.data_ptr())


def name(tensor: object, text: str) -> None:
    """Names the buffer that a tensor lies in, for findings and counts."""
    runtime().sim_rename(tensor.data_ptr(), text.encode())


@cache
def _allocator() -> ctypes.CDLL:
    import torch

    root = Path(torch.__file__).parent
    runtime()
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    flags = ["-O2", "-w", f"-I{root}/include", abi]
    link = [f"-L{root}/lib", "-lc10", f"-Wl,-rpath,{root}/lib"]
    source = store.HERE / "torch_allocator.cpp"
    path = store.shared_library(f"allocator-{torch.__version__}", [source], flags, link=link)
    return ctypes.CDLL(str(path))


def hook_torch() -> None:
    """From now on every CPU tensor storage is known to the checker, poisoned and fenced off."""
    import torch

    _allocator().gpusim_hook_torch()
    torch.UntypedStorage.clone = _clone


def unhook_torch() -> None:
    """Gives torch its own allocator back; tensors made meanwhile stay known."""
    import torch

    _allocator().gpusim_unhook_torch()
    if "clone" in vars(torch.UntypedStorage):
        del torch.UntypedStorage.clone


def _clone(storage):
    """What deepcopy of a tensor copies: the constructor of storages asks torch's own allocator,
    whichever was set."""
    import torch

    if storage.device.type != "cpu":
        return torch.storage._StorageBase.clone(storage)
    memory = torch.empty(storage.nbytes(), dtype=torch.uint8)
    return memory.untyped_storage().copy_(storage)
