"""The dispatcher: reasons, requests that never fall back, and the environment switch."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

import lfp_kernels
from lfp_kernels import backends
from lfp_kernels import functional as F


def test_automatic_choice_is_native_on_the_cpu() -> None:
    module = backends.select("linear", torch.ones(1))
    assert module.__name__.endswith("linear.native")


def test_use_backend_is_scoped_and_nests() -> None:
    def chosen() -> str:
        return backends.select("linear", torch.ones(1)).__name__.rsplit(".", 1)[1]

    with lfp_kernels.use_backend("reference"):
        assert chosen() == "reference"
        with lfp_kernels.use_backend("native"):
            assert chosen() == "native"
        assert chosen() == "reference"
    assert chosen() == "native"
    with pytest.raises(ValueError, match="use_backend: name: expected one of"):
        with lfp_kernels.use_backend("nativ"):
            pass


def test_a_requested_backend_never_falls_back() -> None:
    with pytest.raises(RuntimeError, match="'native' was requested and cannot run: runs on cpu"):
        with lfp_kernels.use_backend("native"):
            backends.select("linear", torch.ones(1, device="meta"))
    with pytest.raises(RuntimeError, match="has no triton implementation"):
        with lfp_kernels.use_backend("triton"):
            F.linear(torch.ones(1, 1), torch.ones(1, 1))


def test_landing_on_reference_for_cuda_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_warned", set())

    class FakeCuda:
        device = torch.device("cuda", 0)
        dtype = torch.float32

    with pytest.warns(UserWarning, match=r"(?s)slow reference backend.*native.*no: runs on cpu"):
        backends.select("linear", FakeCuda())  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.select("linear", FakeCuda())  # type: ignore[arg-type]


def test_explain_lists_every_op_and_reason() -> None:
    text = lfp_kernels.explain()
    for op in backends.ops():
        assert op in text
    assert "no: linear has no triton implementation" in lfp_kernels.explain("linear")
    assert "takes" in lfp_kernels.explain("linear", dtype=torch.int32)
    with pytest.raises(ValueError, match="explain: op: expected one of"):
        lfp_kernels.explain("liner")


def test_environment_switch() -> None:
    code = (
        "import torch; from lfp_kernels import backends;"
        "print(backends.select('linear', torch.ones(1)).__name__)"
    )
    for value, expected in (("reference", "linear.reference"), ("fast", "expected one of")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "LFP_KERNELS_BACKEND": value},
            capture_output=True, text=True,
        )  # fmt: skip
        assert expected in done.stdout + done.stderr
