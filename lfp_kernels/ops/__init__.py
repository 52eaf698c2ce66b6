"""One folder per op: schema and fake in ``__init__``, backends as peers that never import each other."""

from . import linear

__all__ = ["linear"]
