"""Initial contents of module variables."""

from __future__ import annotations

import struct

from . import types
from .parser import PtxError, Variable, split_operands


def initial_bytes(variable: Variable) -> bytes:
    """The bytes of a .global or .const variable before the first launch: zero unless given."""
    text = variable.init.strip()
    items = split_operands(text[1:-1]) if text.startswith("{") else [text] if text else []
    data = b"".join(_element(variable, item) for item in items)
    return data.ljust(variable.size, b"\0")


def _element(variable: Variable, item: str) -> bytes:
    width = types.size(variable.type)
    if item[:2].lower() == "0f":
        return int(item[2:], 16).to_bytes(4, "little")
    if item[:2].lower() == "0d":
        return int(item[2:], 16).to_bytes(8, "little")
    try:
        if "." in item:
            return struct.pack("<f" if width == 4 else "<d", float(item))
        number = int(item.rstrip("U"), 0)
    except ValueError:
        raise PtxError(f"initial value {item} of {variable.name}") from None
    return (number % (1 << 8 * width)).to_bytes(width, "little")
