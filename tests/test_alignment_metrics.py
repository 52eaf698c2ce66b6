"""Alignment sums and the metrics made of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lfp_kernels import composites, functional, metrics, use_backend
from lfp_kernels.testing import assert_within_budget

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (2, 32), (5, 33), (4, 1030), (0, 4), (4, 0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(dtype, shape):
    g = torch.Generator().manual_seed(0)
    a = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
    b = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
    x, y = a.double(), b.double()
    truth = torch.stack([(x * y).sum(1), (x * x).sum(1), (y * y).sum(1)], 1)
    found = {}
    for backend in ("native", "reference"):
        with use_backend(backend):
            found[backend] = functional.alignment_sums(a, b, rows=True)
    assert_within_budget(found["native"], found["reference"], truth)


@pytest.mark.parametrize("count", [1, 4095, 4096, 4097, 3 * 4096 + 5])
def test_whole_tensors_and_strides(count):
    a, b = torch.randn(count, 2)[:, 0], torch.randn(count, 2)[:, 1]
    got = functional.alignment_sums(a, b)
    x, y = a.double(), b.double()
    want = torch.stack([x @ y, x @ x, y @ y])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    assert torch.equal(got, functional.alignment_sums(a, b))


def test_angles():
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert metrics.angle(a, a) == pytest.approx(0, abs=1e-3)
    assert metrics.angle(a, -3 * a) == pytest.approx(180)
    assert metrics.angle(a, a.flip(1)) == pytest.approx(90)
    assert metrics.angle(a, torch.zeros(2, 2)) == 90
    assert metrics.norm_ratio(a, -3 * a) == pytest.approx(3)
    b = torch.tensor([[1.0, 1.0], [0.0, -1.0]])
    assert metrics.delta_angle(a, b) == pytest.approx((45 + 180) / 2)
    found = metrics.gradient_angle({"w": a, "v": a[0]}, {"w": b, "v": a[0]})
    cosine = (a * b).sum() + 1
    want = math.degrees(math.acos(cosine / math.sqrt(6 * 4)))
    assert found["v"] == pytest.approx(0, abs=1e-3) and found["total"] == pytest.approx(want)
    with pytest.raises(ValueError, match=r"gradient_angle: b: expected the names of a"):
        metrics.gradient_angle({"w": a}, {"v": a})


def test_weight_angles():
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 4))
    composite = composites.FeedbackAlignment()
    composite.prepare(model)
    model[2].feedback_weight.copy_(model[2].weight.detach())
    found = metrics.weight_angles(model)
    assert set(found) == {"0", "2"}
    assert found["2"] == pytest.approx(0, abs=0.1) and 80 < found["0"] < 100
    composites.DirectFeedbackAlignment().prepare(nn.Sequential(nn.Linear(3, 2)))


def test_bad_input():
    with pytest.raises(ValueError, match=r"alignment_sums: b: expected shape \(2,\), got \(3,\)"):
        functional.alignment_sums(torch.ones(2), torch.ones(3))
    with pytest.raises(TypeError, match=r"alignment_sums: a: expected float64, float32"):
        functional.alignment_sums(torch.ones(2).int(), torch.ones(2).int())
