"""Direct feedback alignment on the Triton kernels of the linear layer."""

from __future__ import annotations

from typing import Any

from ..linear import triton as linear
from . import by_linear


def direct_update(*arguments: Any) -> None:
    by_linear.direct_update(linear, *arguments)
