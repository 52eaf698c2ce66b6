"""The weight product of long batches, which packs both operands itself, against the oracle."""

from __future__ import annotations

import ctypes

import pytest
import torch

import lfp_kernels
from lfp_kernels import functional as F
from lfp_kernels import optim

LONG = 1024  # samples from which on csrc/cpu/long_product.h is used

# Around a packed block of the batch (256), eight rows, strips of 32 columns (16 in float64), blocks
# of 512 columns, and tiles of 131,072 elements.
SHAPES = [
    (LONG, 8, 32), (LONG + 1, 7, 31), (LONG + 255, 9, 33), (1280, 1, 1), (1281, 17, 513),
    (1500, 300, 257), (2048, 130, 1030), (1100, 513, 520),
]  # fmt: skip


def feedback(backend: str, x: torch.Tensor, weight: torch.Tensor, s: torch.Tensor):
    bias = torch.zeros_like(s[0])
    with lfp_kernels.use_backend(backend):
        found = F.linear_redistribute(
            x, weight, bias, s, s, need=(False, True, True), signal_in=True
        )
    return found.weight, found.bias


@pytest.mark.parametrize(("n", "out", "columns"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_feedback_matches_the_oracle(n: int, out: int, columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(n + out)
    x, weight, s = torch.randn(n, columns), torch.randn(out, columns), torch.randn(n, out)
    x, weight, s = x.to(dtype), weight.to(dtype), s.to(dtype)
    oracle = feedback("reference", x.double(), weight.double(), s.double())
    same = feedback("reference", x, weight, s)
    actual = feedback("native", x, weight, s)
    for a, r, o in zip(actual, same, oracle):
        assert a.dtype == dtype
        error, largest = float((r.double() - o).abs().max()), float(o.abs().max())
        # In float64 the reference is the oracle itself: terms are summed in another order.
        order = 1 if dtype == torch.float32 else 8
        budget = 2 * (error + order * torch.finfo(dtype).eps * largest)
        assert float((a.double() - o).abs().max()) <= budget


@pytest.mark.parametrize("spec", [optim.SGD(0.1, momentum=0.9), optim.AdamW(0.01)], ids=repr)
def test_update_is_that_of_the_feedback(spec: optim.SGD | optim.AdamW) -> None:
    torch.manual_seed(0)
    x, weight, s = torch.randn(1111, 270), torch.randn(600, 270), torch.randn(1111, 600)
    bias = torch.randn(600)
    results = []
    for backend, dtype in (("native", torch.float32), ("reference", torch.float64)):
        w, b = weight.to(dtype), bias.to(dtype)
        w, b = w.clone(), b.clone()
        bound = optim.BoundOptimizer(spec, [w, b])
        steps = [bound.update_of(p, bound.param_groups[0]) for p in (w, b)]
        with lfp_kernels.use_backend(backend):
            reward = s.to(dtype)
            F.linear_redistribute_update(x.to(dtype), w, b, reward, reward, *steps, signal_in=True)
        results.append([w, b, *steps[0].states, *steps[1].states])
    for actual, oracle in zip(*results):
        error = (actual.double() - oracle.double()).abs()
        assert float((error / (1 + oracle.double().abs())).max()) < 1e-4


def test_same_bits_whatever_the_threads() -> None:
    torch.manual_seed(0)
    x, weight, s = torch.randn(1300, 700), torch.randn(900, 700), torch.randn(1300, 900)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(feedback("native", x, weight, s))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


class _HeapInfo(ctypes.Structure):
    """struct mallinfo2 of glibc's malloc.h."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def _heap_in_use() -> int:
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        pytest.skip("the C library does not tell what is in use (mallinfo2)")
    library.mallinfo2.restype = _HeapInfo
    return int(library.mallinfo2().uordblks)


@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_products_lose_no_memory(layer: str) -> None:
    """torch 2.13 loses a string at every call of an operator that takes one."""
    if layer == "linear":
        x, weight = torch.randn(256, 64), torch.randn(64, 64)

        def call():
            return F.linear(x, weight, relu=True)
    else:
        x, weight = torch.randn(1, 4, 8, 8), torch.randn(4, 4, 3, 3)
        geometry = F.ConvGeometry.make((3, 3))

        def call():
            return F.conv(x, weight, None, geometry, relu=True)

    with lfp_kernels.use_backend("native"):
        for _ in range(50):
            call()
        before = _heap_in_use()
        for _ in range(2000):
            call()
    assert (_heap_in_use() - before) / 2000 < 8  # bytes per call
