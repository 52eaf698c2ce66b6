"""``no_grad`` for functions that mostly run inside another one that has it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def no_grad(function: Callable[P, R]) -> Callable[P, R]:
    """`function` without autograd, as by ``torch.no_grad()``.

    That makes and enters a context at each call, some microseconds, which a step of a small network
    would pay at every layer; here only the outermost call does.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with torch.no_grad():
            return function(*args, **kwargs)

    return call
