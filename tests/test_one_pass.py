"""The register-blocked update of large layers at small batches, against the float64 oracle."""

from __future__ import annotations

import pytest
import torch
from update_cases import SPECS, check_update, update


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(
    ("n", "rows", "columns"),
    [(1, 1450, 1500), (7, 1537, 1409), (31, 2048, 1024), (32, 1403, 1601), (40, 1025, 2304)],
)
def test_ragged_blocks_match_the_oracle(n: int, rows: int, columns: int, name: str) -> None:
    check_update(n, rows, columns, name, need_input=True)


# Without the input reward, which has a product of its own: a panel of x and a part of one, more
# samples than lines to fetch, more rows of a thread than are packed at once.
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(
    ("n", "rows", "columns"),
    [(47, 700, 523), (49, 1025, 300), (128, 519, 1031), (512, 2100, 130), (500, 1000, 784)],
)
def test_longer_batches_match_the_oracle(n: int, rows: int, columns: int, name: str) -> None:
    check_update(n, rows, columns, name, need_input=False)


def test_two_runs_give_the_same_bits() -> None:
    torch.manual_seed(0)
    x, weight, z = torch.randn(16, 2000), torch.randn(1300, 2000), torch.randn(16, 1300)
    runs = [update(SPECS["momentum"], x, weight, z, "native") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))
