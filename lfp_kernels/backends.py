"""Which implementation runs an op: capability as data, one choice per call, reasons for every no.

Order of preference: native (compiled C++), triton, reference (plain PyTorch, the oracle). A backend
that was asked for never falls back. The automatic choice falls back with a reason that
:func:`explain` prints; landing on ``reference`` for a CUDA tensor warns once.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _library

ORDER = ("native", "triton", "reference")
FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})

_implementations: dict[str, dict[str, Implementation]] = {}
_warned: set[str] = set()
_triton_reason: list[str | None] = []  # of why_no_triton, once it was asked


def _from_environment() -> str | None:
    name = os.environ.get("LFP_KERNELS_BACKEND") or None
    if name is not None and name not in ORDER:
        raise ValueError(f"LFP_KERNELS_BACKEND: expected one of {ORDER}, got {name!r}")
    return name


_requested: str | None = _from_environment()


@dataclass(frozen=True)
class Implementation:
    """One backend of one op and what it can do."""

    module: ModuleType | Callable[[], ModuleType]
    devices: frozenset[str] | None = None  # None: any device
    dtypes: frozenset[torch.dtype] = FLOATS
    needs: str | None = None  # "native": the compiled library of the device; "triton"

    def load(self) -> Any:
        """The module itself."""
        return self.module() if callable(self.module) else self.module


def register(op: str, **modules: ModuleType | Callable[[], ModuleType] | Implementation) -> None:
    """Tell the dispatcher which modules implement ``op`` (native=..., reference=...).

    A function in place of a module imports it when it is first chosen, as Triton's need. An
    :class:`Implementation` says itself what it can do.
    """
    table = _implementations.setdefault(op, {})
    for backend, module in modules.items():
        if isinstance(module, Implementation):
            table[backend] = module
        elif backend == "native":
            table[backend] = Implementation(module, frozenset({"cpu", "cuda"}), needs="native")
        elif backend == "triton":
            table[backend] = Implementation(module, frozenset({"cuda"}), needs="triton")
        else:
            table[backend] = Implementation(module)


def ops() -> list[str]:
    """Names of the registered ops."""
    return sorted(_implementations)


def why_no_triton() -> str | None:
    """Reason why Triton cannot be used, or None. Asks by importing it, the first time."""
    if not _triton_reason:
        try:
            import triton  # noqa: F401
        except Exception as error:
            fix = "pip install triton; it comes with the CUDA and ROCm builds of torch for Linux"
            _triton_reason.append(f"triton cannot be imported ({error}); fix: {fix}")
        else:
            _triton_reason.append(None)
    return _triton_reason[0]


def supports(
    op: str, backend: str, device: str, dtype: torch.dtype, rule: Any = None
) -> str | None:
    """None when ``backend`` can run ``op`` on such tensors by ``rule``, else the reason why not."""
    implementation = _implementations[op].get(backend)
    if implementation is None:
        return f"{op} has no {backend} implementation"
    if implementation.devices is not None and device not in implementation.devices:
        return f"runs on {', '.join(sorted(implementation.devices))} tensors, got {device}"
    if dtype not in implementation.dtypes:
        return f"takes {', '.join(sorted(map(str, implementation.dtypes)))}, got {dtype}"
    reason = None
    if implementation.needs == "triton":
        reason = why_no_triton()
    elif implementation.needs == "native":
        reason = _library.why_not_usable(device)
    if reason is None and rule is not None:
        why_not_rule = getattr(implementation.load(), "why_not_rule", None)
        reason = None if why_not_rule is None else why_not_rule(rule)
    return reason


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every op inside the block on backend ``name``; None restores the automatic choice."""
    global _requested
    if name is not None and name not in ORDER:
        raise ValueError(f"use_backend: name: expected one of {ORDER} or None, got {name!r}")
    before = _requested
    _requested = name
    try:
        yield
    finally:
        _requested = before


def select(op: str, like: Tensor, rule: Any = None, *, dtype: torch.dtype | None = None) -> Any:
    """The implementation module for ``op`` on tensors like ``like``, by ``rule`` if it takes one;
    ``dtype`` is that of the result where ``like`` holds bits.

    Raises:
        RuntimeError: a backend was requested and cannot run this call (its reason is given).
    """
    device, dtype = like.device.type, dtype or like.dtype
    if _requested is not None:
        reason = supports(op, _requested, device, dtype, rule)
        if reason is not None:
            raise RuntimeError(
                f"lfp_kernels: {op}: backend {_requested!r} was requested and cannot run: {reason}"
            )
        return _implementations[op][_requested].load()
    for backend in ORDER:
        if supports(op, backend, device, dtype, rule) is None:
            if backend == "reference" and device == "cuda":
                _warn_once(op, device, dtype, rule)
            return _implementations[op][backend].load()
    table = explain(op, device, dtype, rule)
    raise RuntimeError(f"lfp_kernels: {op}: no backend can run it\n{table}")


def selected(op: str, device: str, dtype: torch.dtype) -> str | None:
    """Name of the backend that would run ``op`` on such tensors, or None."""
    if op not in _implementations:
        return None
    order = ORDER if _requested is None else (_requested,)
    return next((b for b in order if supports(op, b, device, dtype) is None), None)


def _warn_once(op: str, device: str, dtype: torch.dtype, rule: Any) -> None:
    if op not in _warned:
        _warned.add(op)
        warnings.warn(
            f"lfp_kernels: {op} runs on the slow reference backend\n"
            f"{explain(op, device, dtype, rule)}",
            stacklevel=3,
        )


def explain(
    op: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    rule: Any = None,
) -> str:
    """A table: per op and backend whether it can run on ``device`` and ``dtype``, and why not; of
    the ops with weight matrices also whether by ``rule``."""
    if op is not None and op not in _implementations:
        raise ValueError(f"explain: op: expected one of {ops()}, got {op!r}")
    lines = [f"backends for {device} tensors of {dtype}, in order of preference"]
    for name in [op] if op is not None else ops():
        chosen = False
        for backend in ORDER:
            reason = supports(name, backend, device, dtype, rule)
            mark = "no: " + reason if reason else ("yes" if chosen else "chosen")
            chosen = chosen or reason is None
            lines.append(f"  {name:<18} {backend:<10} {mark}")
    return "\n".join(lines)
