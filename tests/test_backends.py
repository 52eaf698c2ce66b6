"""The dispatcher: reasons, requests that never fall back, and the environment switch."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import lfp_kernels
from lfp_kernels import _library, backends
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
    with pytest.raises(RuntimeError, match="'native' was requested and cannot run: runs on c"):
        with lfp_kernels.use_backend("native"):
            backends.select("linear", torch.ones(1, device="meta"))
    with pytest.raises(RuntimeError, match="'triton' was requested and cannot run: runs on cuda"):
        with lfp_kernels.use_backend("triton"):
            F.linear(torch.ones(1, 1), torch.ones(1, 1))


def test_landing_on_reference_for_cuda_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_warned", set())
    # wherever this runs: as if neither the CUDA library nor Triton were there
    monkeypatch.setitem(backends._library._reasons, "cuda", "the cuda library was not built")
    monkeypatch.setattr(backends, "why_no_triton", lambda: "triton cannot be imported")

    class FakeCuda:
        device = torch.device("cuda", 0)
        dtype = torch.float32

    with pytest.warns(UserWarning, match=r"(?s)slow reference backend.*native.*no: "):
        backends.select("linear", FakeCuda())  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.select("linear", FakeCuda())  # type: ignore[arg-type]


def test_explain_lists_every_op_and_reason() -> None:
    text = lfp_kernels.explain()
    for op in backends.ops():
        assert op in text
    assert "triton     no: runs on cuda tensors, got cpu" in lfp_kernels.explain("linear")
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


def test_a_gpu_that_the_library_has_no_code_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "_build_info.json").write_text('{"architectures": ["8.0", "9.0a"]}')
    monkeypatch.setattr(_library, "_FOLDER", tmp_path)
    _library.why_not_built_for.cache_clear()
    assert _library.why_not_built_for((8, 0)) is None
    assert _library.why_not_built_for((8, 9)) is None  # binaries run on later minor versions
    assert _library.why_not_built_for((9, 0)) is None
    reason = _library.why_not_built_for((10, 0))
    assert reason is not None and "built for 8.0 9.0a, this GPU is sm_100" in reason
    assert "TORCH_CUDA_ARCH_LIST=10.0" in reason
    (tmp_path / "_build_info.json").write_text('{"architectures": ["9.0a", "12.0+PTX"]}')
    _library.why_not_built_for.cache_clear()
    assert (
        _library.why_not_built_for((12, 1)) is None and _library.why_not_built_for((13, 0)) is None
    )
    assert _library.why_not_built_for((9, 1)) is not None  # 9.0a is for 9.0 alone
    _library.why_not_built_for.cache_clear()


# ---- rules


def test_a_rule_that_a_backend_lacks_is_its_reason(monkeypatch):
    """The automatic choice goes on to the next backend; a requested one says why not."""
    from lfp_kernels import rules
    from lfp_kernels.ops.linear import native

    def why_not_rule(rule):
        return f"has no kernel of {type(rule).__name__}" if rule.split else None

    monkeypatch.setattr(native, "why_not_rule", why_not_rule, raising=False)
    x, plus = torch.ones(2, 2), rules.ZPlus()
    assert backends.select("linear", x, rules.Zero()) is native
    assert backends.select("linear", x, plus).__name__.endswith("reference")
    assert "has no kernel of ZPlus" in backends.explain("linear", rule=plus)
    assert "has no kernel" not in backends.explain("linear")
    refused = pytest.raises(RuntimeError, match="has no kernel of ZPlus")
    with lfp_kernels.use_backend("native"), refused:
        F.linear_redistribute(x, x, None, x, x, plus)
