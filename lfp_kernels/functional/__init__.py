"""Public functions: validate, choose a backend, run. None needs or builds an autograd graph."""

from .linear import Redistributed, linear, linear_redistribute, linear_redistribute_update

__all__ = ["Redistributed", "linear", "linear_redistribute", "linear_redistribute_update"]
