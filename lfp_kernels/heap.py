"""Gives memory that glibc keeps without use back to the system.

A step frees as it walks, and glibc cannot always use a freed aligned block for an equal
request (bug 14581; the small blocks between that oneDNN asks for make it the rule). The heap then
grows step by step while what is in use stays the same (docs/performance.md, A small GPT).
"""

from __future__ import annotations

import ctypes
from typing import Any

EVERY = 16  # steps between two looks at the heap
SLACK = 256 << 20  # bytes of free memory that are always left


class _Info(ctypes.Structure):
    """struct mallinfo2 of malloc.h."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def _c_library() -> Any:
    """The C library where it is glibc >= 2.33, else None."""
    try:
        library = ctypes.CDLL(None)
        library.mallinfo2.restype = _Info
        library.malloc_trim.argtypes = [ctypes.c_size_t]
    except (AttributeError, OSError, TypeError):
        return None
    return library


_LIBRARY = _c_library()


def heap_bytes() -> tuple[int, int]:
    """Bytes of the C library's heap: (in use, free but kept); (0, 0) where it does not say."""
    if _LIBRARY is None:
        return 0, 0
    info = _LIBRARY.mallinfo2()
    return int(info.uordblks), int(info.fordblks)


class Heap:
    """Call :meth:`step` after every step on the CPU, fused or drop-in."""

    def __init__(self) -> None:
        self.steps = 0
        self.trims = 0

    def step(self) -> None:
        self.steps += 1
        if self.steps % EVERY:
            return
        used, free = heap_bytes()
        # The next step needs about what is in use once more; the rest is growth.
        if free > 2 * used + SLACK:
            _LIBRARY.malloc_trim(0)
            self.trims += 1


HEAP = Heap()
