"""Long float32 sums of the CUDA kernels err no more than those of a library, which adds in blocks.

On one processor (``--simulate cuda --processors 1``) no sum is split over blocks, and a chain of
2000 additions would exceed the error budget; on more, the splits are part of what is checked.
"""

from __future__ import annotations

import pytest
import torch
from linear_cases import SPECS, case, check_all, run, updates

from lfp_kernels import functional as F
from lfp_kernels import use_backend
from lfp_kernels.rules import AlphaBeta
from lfp_kernels.testing import assert_within_budget

pytestmark = pytest.mark.gpusim
LONG = 2000


def test_forward() -> None:
    x, weight, bias, z, _ = case((4,), LONG, 20, torch.float32)
    truth = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    with use_backend("native"):
        assert_within_budget(F.linear(x, weight, bias), z, truth)


@pytest.mark.parametrize("n", [5, 40, 100])
def test_one_pass(n) -> None:
    """The kernels of 32, 64 and 128 rows; two strips of columns, so one processor has one range."""
    args = case((n,), 72, LONG, torch.float32)
    results = []
    for backend, kind in (
        ("native", torch.float32), ("reference", torch.float32), ("reference", torch.float64),
    ):  # fmt: skip
        x, w, b, z, reward = (t.to(kind, copy=True) for t in args)
        _, to_w, to_b = updates(SPECS[0], w, b)
        with use_backend(backend):
            results.append(F.linear_redistribute_update(x, w, b, z, reward, to_w, to_b))
    assert_within_budget(*results)


@pytest.mark.parametrize("shape", [(140, 9, LONG), (LONG, 9, 20)], ids=str)
def test_two_products(shape) -> None:
    args = case(shape[:1], *shape[1:], torch.float32)
    check_all(
        run("native", *args), run("reference", *args), run("reference", *(t.double() for t in args))
    )


def test_two_signals() -> None:
    """Rules of two signals have a tile of their own and sums of twice the length."""
    args = case((3,), LONG // 2, 70, torch.float32)
    results = [run("native", *args, AlphaBeta()), run("reference", *args, AlphaBeta())]
    check_all(*results, run("reference", *(t.double() for t in args), AlphaBeta()))
