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


def update(
    spec: optim.SGD | optim.AdamW, x: Tensor, weight: Tensor, z: Tensor, backend: str,
    need_input: bool = True,
):  # fmt: skip
    """Weight, input reward and states after one update from states that are not zero."""
    weight = weight.clone()
    bound = optim.BoundOptimizer(spec, [weight])
    step = bound.update_of(weight, bound.param_groups[0])
    for state in step.states:
        state.copy_(weight.square() + 0.1)
    with lfp_kernels.use_backend(backend):
        input_reward = F.linear_redistribute_update(
            x, weight, None, z, z.cos(), step, need_input=need_input
        )
    return [weight, *([input_reward] if need_input else []), *step.states]


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(
    ("n", "rows", "columns"),
    [(1, 1450, 1500), (7, 1537, 1409), (31, 2048, 1024), (32, 1403, 1601), (40, 1025, 2304)],
)
def test_ragged_blocks_match_the_oracle(n: int, rows: int, columns: int, name: str) -> None:
    check_update(n, rows, columns, name, need_input=True)


# Without the input reward, whose product is a library's: a panel of x and a part of one, more
# samples than lines to fetch, more rows of a thread than are packed at once.
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(
    ("n", "rows", "columns"),
    [(47, 700, 523), (49, 1025, 300), (128, 519, 1031), (512, 2100, 130), (500, 1000, 784)],
)
def test_longer_batches_match_the_oracle(n: int, rows: int, columns: int, name: str) -> None:
    check_update(n, rows, columns, name, need_input=False)


def check_update(n: int, rows: int, columns: int, name: str, need_input: bool) -> None:
    torch.manual_seed(n)
    x, weight = torch.randn(n, columns), torch.randn(rows, columns)
    z = torch.randn(n, rows)
    z += z.sign()  # away from 0, where the signal is ill-conditioned
    spec = SPECS[name]
    oracle = update(spec, x.double(), weight.double(), z.double(), "reference", need_input)
    same = update(spec, x, weight, z, "reference", need_input)
    actual = update(spec, x, weight, z, "native", need_input)
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
