"""The Triton kernels of norms, softmax and embeddings compile for every target, without spills."""

from __future__ import annotations

import pytest
import test_compile_triton as targets
import torch
from test_compile_triton import STATES, empty, requests_of, update

pytestmark = pytest.mark.gpusim
_ = requests_of  # a fixture


def run_layer_norm(op, dtype) -> None:
    for rows, columns in ((8192, 768), (512, 8192), (99, 77)):
        x, weight = empty(rows, columns, dtype=dtype), empty(columns, dtype=dtype)
        op.redistribute(x, weight, weight, x, True, 1e-5, 1e-6, False)
        op.redistribute(x, weight, None, x, False, 1e-5, 1e-6, True)
    planes, weight = empty(64, 128, 784, dtype=dtype), empty(128, dtype=dtype)
    for identity in (False, True):
        op.group_redistribute(planes, weight, weight, planes, 32, 1e-5, 1e-6, identity)


def run_softmax(op, dtype) -> None:
    for columns in (197, 1024, 50000):
        x = empty(512, columns, dtype=dtype)
        op.redistribute(x, x, x)


def run_embedding(op, dtype) -> None:
    weight, tokens = empty(50000, 768, dtype=dtype), empty(4096, dtype=torch.int64)
    reward = empty(4096, 768, dtype=dtype)
    op.redistribute(weight, tokens, reward, -1, 1e-6)
    for code in STATES:
        op.redistribute_update(weight, tokens, reward, 0, 1e-6, update(weight, code))


RUNS = {"layer_norm": run_layer_norm, "softmax": run_softmax, "embedding": run_embedding}


@pytest.fixture(autouse=True)
def runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, run in RUNS.items():
        monkeypatch.setitem(targets.RUNS, name, run)


@pytest.mark.parametrize("capability", targets.NVIDIA)
@pytest.mark.parametrize("name", RUNS)
def test_nvidia(name, capability, requests_of, tmp_path):
    targets.test_nvidia(name, capability, requests_of, tmp_path)


@pytest.mark.parametrize("name", RUNS)
def test_amd(name, requests_of):
    targets.test_amd(name, requests_of)
