"""PTX text to C++ source."""

from .forms import REGISTRY
from .parser import PtxError, opcodes, parse
from .translator import UnsupportedInstruction, translate
from .variables import initial_bytes

__all__ = [
    "REGISTRY",
    "PtxError",
    "UnsupportedInstruction",
    "initial_bytes",
    "opcodes",
    "parse",
    "translate",
]
