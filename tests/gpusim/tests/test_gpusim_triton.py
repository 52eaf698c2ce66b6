"""Triton kernels through Triton's own compiler and launch path, for several GPU generations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from .. import cache as store
from ..pytest_support import require_triton

pytestmark = pytest.mark.gpusim

CAPABILITIES = (80, 90, 120)
CHECKS = (
    "products",
    "softmax",
    "atomics",
    "elementwise",
    "offsets_beyond_32_bits",
    "tensor_descriptors",
    "many_launches",
    "missing_mask",
    "uninitialised_input",
    "accumulation_without_atomics",
    "accumulator_not_zeroed",
    "findings_name_the_python_line",
    "traffic_is_counted",
)


@cache
def session(capability: int) -> tuple[dict[str, str | None], str]:
    """Outcome of every check of one capability, and what the process wrote besides."""
    require_triton()
    package = f"{__package__}.triton_session"
    root = Path(__file__).resolve().parents[__package__.count(".") + 1]
    environment = dict(os.environ)
    environment.setdefault("TRITON_CACHE_DIR", str(store.directory() / "triton"))
    command = [sys.executable, "-m", package, str(capability)]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    lines = [line for line in result.stdout.splitlines() if line.startswith("[")]
    return dict(json.loads(line) for line in lines), result.stderr


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("check", CHECKS)
def test_triton(check: str, capability: int) -> None:
    outcomes, errors = session(capability)
    assert check in outcomes, errors
    assert outcomes[check] is None, outcomes[check]


def test_no_check_is_forgotten() -> None:
    assert set(session(CAPABILITIES[0])[0]) == set(CHECKS)
