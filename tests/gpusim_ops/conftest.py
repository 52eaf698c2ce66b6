"""These tests need a simulated GPU: without ``--simulate`` they are not collected. Those that only
compile the kernels, test_compile_*, need none and are collected without it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    simulated = config.getoption("--simulate")
    if collection_path.name.startswith("test_compile_"):
        return None if simulated is None else True
    needs = {"cuda": "test_cuda_", "triton": "test_triton_"}
    if simulated is None:
        return True
    if collection_path.name == "test_cuda_hopper.py" and config.getoption("--capability") != 90:
        return True
    others = [prefix for which, prefix in needs.items() if which != simulated]
    return True if collection_path.name.startswith(tuple(others)) else None
