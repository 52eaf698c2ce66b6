"""``pytest --device cuda``: the op tests, unchanged, with their tensors on a real device."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors


class OnDevice(TorchFunctionMode):
    """Tensors that are made without a device, or with a CPU generator, land on ``device``.

    Unlike torch.set_default_device it takes the CPU generators of the tests: those values are drawn
    on the CPU, the same for every device, and moved.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = torch.device(device)

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in _device_constructors() or kwargs.get("device") is not None:
            return func(*args, **kwargs)
        kwargs.pop("device", None)
        if kwargs.get("generator") is not None:
            return func(*args, **kwargs).to(self.device)
        return func(*args, **kwargs, device=self.device)
