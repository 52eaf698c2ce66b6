"""The register-blocked update of large layers at small batches, against the float64 oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lfp_kernels
from lfp_kernels import functional as F
from lfp_kernels import optim

SPECS = {
    "sgd": optim.SGD(lr=0.1, weight_decay=0.01),
    "momentum": optim.SGD(lr=0.1, momentum=0.9, nesterov=True),
    "adamw": optim.AdamW(lr=0.01),
}


def update(spec: optim.SGD | optim.AdamW, x: Tensor, weight: Tensor, z: Tensor, backend: str):
    """Weight, input reward and states after one update from states that are not zero."""
    weight = weight.clone()
    bound = optim.BoundOptimizer(spec, [weight])
    step = bound.update_of(weight, bound.param_groups[0])
    for state in step.states:
        state.copy_(weight.square() + 0.1)
    with lfp_kernels.use_backend(backend):
        input_reward = F.linear_redistribute_update(x, weight, None, z, z.cos(), step)
    return [weight, input_reward, *step.states]


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(
    ("n", "rows", "columns"),
    [(1, 1450, 1500), (7, 1537, 1409), (31, 2048, 1024), (32, 1403, 1601), (40, 1025, 2304)],
)
def test_ragged_blocks_match_the_oracle(n: int, rows: int, columns: int, name: str) -> None:
    torch.manual_seed(n)
    x, weight = torch.randn(n, columns), torch.randn(rows, columns)
    z = torch.randn(n, rows)
    z += z.sign()  # away from 0, where the signal is ill-conditioned
    spec = SPECS[name]
    oracle = update(spec, x.double(), weight.double(), z.double(), "reference")
    same = update(spec, x, weight, z, "reference")
    actual = update(spec, x, weight, z, "native")
    assert len(actual) == len(oracle)
    for a, s, o in zip(actual, same, oracle):
        assert torch.isfinite(a).all()
        error = float((s.double() - o).abs().max())
        budget = 2 * (error + torch.finfo(torch.float32).eps * float(o.abs().max()))
        assert float((a.double() - o).abs().max()) <= budget


def test_two_runs_give_the_same_bits() -> None:
    torch.manual_seed(0)
    x, weight, z = torch.randn(16, 2000), torch.randn(1300, 2000), torch.randn(16, 1300)
    runs = [update(SPECS["momentum"], x, weight, z, "native") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))
