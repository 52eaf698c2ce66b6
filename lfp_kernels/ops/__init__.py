"""One folder per op: schema and fake in ``__init__``, backends as peers beside it."""

from . import activation, batch_norm, combine, conv, linear, pool, reward, update

__all__ = ["activation", "batch_norm", "combine", "conv", "linear", "pool", "reward", "update"]
