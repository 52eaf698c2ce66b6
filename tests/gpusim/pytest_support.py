"""What tests of GPU kernels need, and what happens where it is missing."""

from __future__ import annotations

import importlib.util
import os
import warnings

import pytest

from . import toolkit


def require_nvcc() -> None:
    """Skips the calling test, loudly, where there is no nvcc; on CI that is a failure.

    CI is recognised by the variable CI, which the common services set, or by GPUSIM_REQUIRE_CUDA.
    """
    if not toolkit.available():
        _refuse("CUDA", toolkit.HOW_TO_GET_IT)


def require_triton() -> None:
    """The same for torch and triton."""
    for name in ("torch", "triton"):
        if importlib.util.find_spec(name) is None:
            _refuse("TRITON", f"{name} is not installed")


def _refuse(what: str, why: str) -> None:
    if os.environ.get("CI") or os.environ.get("GPUSIM_REQUIRE_CUDA"):
        pytest.fail(f"{what} KERNELS WERE NOT TESTED: {why}", pytrace=False)
    warnings.warn(f"{what} KERNELS WERE NOT TESTED: {why}", stacklevel=3)
    pytest.skip(why)
