"""torch's switch for float32 products reaches the GPU kernels: off by default, then the results are
exact; on, they are those of TF32, whose mantissa has 10 bits.

Runs under ``--simulate cuda|triton``.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conv_cases import channels_last
from conv_cases import layer as conv_case
from linear_cases import case, oracle, run, updates
from torch import Tensor

from lfp_kernels import functional as F
from lfp_kernels import optim, use_backend
from lfp_kernels.ops import _cuda
from lfp_kernels.rules import Epsilon, Gradient

pytestmark = pytest.mark.gpusim
EXACT, LEAST, MOST = 2e-6, 2e-5, 1e-3  # relative errors; a product in TF32 rounds by 2^-11 = 5e-4


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = torch.backends.fp32_precision, matmul.fp32_precision, conv.fp32_precision
    yield
    torch.backends.fp32_precision, matmul.fp32_precision, conv.fp32_precision = before


def by_precision() -> None:
    torch.set_float32_matmul_precision("high")


def by_allow_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


def by_fp32_precision() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def for_everything() -> None:
    torch.backends.fp32_precision = "tf32"


SWITCHES = (by_precision, by_allow_tf32, by_fp32_precision, for_everything)


def error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm())


def check(results: list[tuple[Tensor, Tensor]], tf32: bool) -> None:
    low, high = (LEAST, MOST) if tf32 else (0.0, EXACT)
    for k, (got, truth) in enumerate(results):
        assert low <= error(got, truth) < high, f"result {k}: {error(got, truth)}"


def linear_results(n: int) -> list[tuple[Tensor, Tensor]]:
    """Forward, redistribution and update of a layer, each beside its exact result."""
    x, weight, bias, z, reward = args = case((n,), 72, 68, torch.float32)
    truth = oracle(*args)
    with use_backend("native"):
        forward = F.linear(x, weight, bias)
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    moved = weight.clone()
    _, step, _ = updates(optim.SGD(1.0), moved, bias.clone())
    with use_backend("native"):
        F.linear_redistribute_update(x, moved, bias, z, reward, step)
    found = [(forward, exact), *zip(run("native", *args)[:2], truth)]
    return [*found, (moved.double() - weight, truth[1])]


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("n", [20, 200])
def test_linear_follows_the_switch(n: int, switch) -> None:
    check(linear_results(n), tf32=False)
    switch()
    check(linear_results(n), tf32=True)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    check(linear_results(n), tf32=False)


def test_compiled_functions_follow_the_switch() -> None:
    """The graph holds it as a constant: torch.compile has to notice when it changes."""
    args = case((20,), 72, 68, torch.float32)
    truth = oracle(*args)

    def layer(x, weight, bias, z, reward):
        return F.linear_redistribute(x, weight, bias, z, reward)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for precision, tf32 in (("highest", False), ("high", True), ("highest", False)):
        torch.set_float32_matmul_precision(precision)
        check([*zip(compiled(*args)[:2], truth)], tf32)


def conv_results(layout: str) -> list[tuple[Tensor, Tensor]]:
    *exact, geometry = conv_case("2d-5x5")
    tensors = [t.float() for t in exact]
    exact = [t.double() for t in tensors]
    if layout == "channels_last":
        tensors[0], tensors[3], tensors[4] = channels_last(tensors[0], tensors[3], tensors[4])
    with use_backend("native"):
        forward = F.conv(*tensors[:3], geometry)
        found = F.conv_redistribute(*tensors, geometry, Epsilon(0.05))[:2]
    with use_backend("reference"):
        truth = F.conv_redistribute(*exact, geometry, Epsilon(0.05))[:2]
        return [(forward, F.conv(*exact[:3], geometry)), *zip(found, truth)]


@pytest.mark.parametrize("layout", ["plain", "channels_last"])
def test_convolutions_follow_both_switches(layout: str) -> None:
    """That of cuDNN is on by default and not enough; off, it keeps convolutions exact."""
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    check(conv_results(layout), tf32=False)
    by_precision()
    check(conv_results(layout), tf32=True)
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    check(conv_results(layout), tf32=False)


@pytest.mark.parametrize("n", [20, 200])
def test_operands_are_rounded_to_the_nearest(n: int) -> None:
    """Tensor cores alone cut off the lower bits, which makes every product too small."""
    value, nearest = 1 + 7 * 2**-13, 1 + 2**-10
    x, weight = torch.full((n, 16), value), torch.eye(16)
    z = reward = x  # the gradient's signal
    by_precision()
    with use_backend("native"):
        results = [
            F.linear(x, weight, None),
            F.linear(weight, x, None),
            F.linear_redistribute(x, weight, None, z, reward, Gradient()).input,
            F.linear_redistribute(weight, x[:16], None, weight, weight, Gradient()).input,
            F.linear_redistribute(x[:16], weight, None, weight, weight, Gradient()).weight,
            F.linear_redistribute(weight, weight, None, x[:16], x[:16], Gradient()).weight,
        ]
    for k, result in enumerate(results):
        assert (result == nearest).all(), f"result {k}: {result.flatten()[0]}"


def test_other_types_and_devices_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    by_precision()
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert not _cuda.linear_in_tf32(torch.empty(1, dtype=dtype))
        assert not _cuda.conv_in_tf32(torch.empty(1, dtype=dtype))
    assert _cuda.product_dtype(torch.bfloat16, True) == torch.bfloat16  # asked for by the user
    monkeypatch.setattr(_cuda, "is_gpu", lambda x: x.is_cuda)
    assert not _cuda.linear_in_tf32(torch.empty(1))
