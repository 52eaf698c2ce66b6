"""PTX types: their size, the C++ type that stores a register and the one that computes with it."""

from __future__ import annotations

import re

_SPECIAL_BITS = {"pred": 1, "bf16": 16, "f16x2": 32, "bf16x2": 32, "f32x2": 64, "tf32": 32}
_ARITHMETIC = {"f16": "Half", "bf16": "Bfloat", "f32": "float", "f64": "double"}
FLOATS = frozenset(_ARITHMETIC)


def bits(ptx_type: str) -> int:
    """Width of a value of `ptx_type` in bits (1 for a predicate)."""
    if ptx_type in _SPECIAL_BITS:
        return _SPECIAL_BITS[ptx_type]
    match = re.fullmatch(r"[busf](8|16|32|64|128)", ptx_type)
    if not match:
        raise KeyError(ptx_type)
    return int(match.group(1))


def size(ptx_type: str) -> int:
    """Width in bytes."""
    return bits(ptx_type) // 8


def is_float(ptx_type: str) -> bool:
    return ptx_type in FLOATS


def is_signed(ptx_type: str) -> bool:
    return ptx_type[0] == "s"


def storage(ptx_type: str) -> str:
    """C++ type of a register: registers hold bits, whatever their type."""
    width = bits(ptx_type)
    return {1: "bool", 128: "unsigned __int128"}.get(width, f"uint{width}_t")


def value(ptx_type: str) -> str:
    """C++ type in which an instruction of this type computes."""
    if ptx_type in _ARITHMETIC:
        return _ARITHMETIC[ptx_type]
    return f"int{bits(ptx_type)}_t" if is_signed(ptx_type) else storage(ptx_type)


def wide(ptx_type: str) -> str:
    """C++ integer type of twice the width, for full products and carries."""
    sign = "" if is_signed(ptx_type) else "u"
    width = 2 * bits(ptx_type)
    if width == 128:
        return "__int128" if is_signed(ptx_type) else "unsigned __int128"
    return f"{sign}int{width}_t"
