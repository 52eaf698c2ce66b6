"""Rewards whose rows and times are longer than what a kernel holds at once, against the reference.

Runs under ``pytest --simulate cuda|triton``.
"""

from __future__ import annotations

import math

import pytest
import torch

from lfp_kernels import rewards, use_backend
from lfp_kernels.backends import select
from lfp_kernels.ops.reward.codes import Kind

pytestmark = pytest.mark.gpusim


@pytest.mark.parametrize("classes", [4095, 4097, 13001])
@pytest.mark.parametrize(
    "kind",
    [rewards.softmax, rewards.correct_classification, rewards.misclassification],
    ids=lambda kind: kind.__name__,
)
def test_wide_rows(kind, classes) -> None:
    out = 3 * torch.randn(6, classes, generator=torch.Generator().manual_seed(0))
    out[0] += torch.linspace(0, 9, classes)  # the largest logit grows from block to block
    out[1, 1], out[1, classes - 1] = 99.0, math.nan  # the first NaN is the arg-max, not the label
    out[2, 3] = out[2, classes - 2] = 50.0  # a tie: the first wins
    out[4, classes - 1] = 60.0
    y = torch.tensor([classes - 1, 1, 3, 0, classes - 1, 7])
    results = []
    for backend in ("native", "reference"):
        with use_backend(backend):
            results.append(kind(out, y))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("classes", [5, 4097])
def test_labels_that_nobody_checked(classes) -> None:
    """On a GPU a label out of range makes its row NaN: here past the checks, as it would arrive."""
    out = torch.randn(4, classes)
    y = torch.tensor([classes, 0, -1, classes - 1])
    with use_backend("native"):
        got = select("reward", out).reward(out, y, Kind.SOFTMAX, [0.0, 1.0, 0.0, -1.0])
    assert got.isnan().all(1).tolist() == [True, False, True, False]
    assert not got[1::2].isnan().any()


@pytest.mark.parametrize("steps", [63, 65, 200])
def test_many_steps_of_spikes(steps) -> None:
    spikes = (torch.randn(steps, 7, 45, generator=torch.Generator().manual_seed(0)) > 0).float()
    results = []
    for backend in ("native", "reference"):
        with use_backend(backend):
            results.append(rewards.snn_rate(spikes, torch.arange(7)))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-30)
