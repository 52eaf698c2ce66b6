"""The checks that all other tests rely on can fail."""

from __future__ import annotations

import math

import pytest
import torch

from lfp_kernels.testing import (
    absorbed,
    assert_conserved,
    assert_within_budget,
    linear_oracle,
    poisoned_empty,
)

TRUTH = torch.linspace(-3, 3, 101, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_budget_takes_rounding_and_no_more(dtype):
    same = TRUTH.to(dtype)
    assert_within_budget(same, same, TRUTH)
    step = torch.zeros(101, dtype=torch.float64)
    step[40] = 3 * torch.finfo(dtype).eps
    assert_within_budget((TRUTH + step).to(dtype), same, TRUTH)
    with pytest.raises(AssertionError, match="z: error .* exceeds the budget"):
        assert_within_budget((TRUTH + 5 * step).to(dtype), same, TRUTH, "z")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_budget_refuses_stray_non_finite_values(value):
    bad = TRUTH.clone()
    bad[7] = value
    with pytest.raises(AssertionError):
        assert_within_budget(bad, TRUTH, TRUTH)
    assert_within_budget(bad, bad, bad)
    with pytest.raises(AssertionError, match="non-finite"):
        assert_within_budget(TRUTH, bad, bad)


def test_budget_takes_overflow_where_the_reference_has_it():
    truth = torch.tensor([1e6, 1.0], dtype=torch.float64)
    assert_within_budget(truth.half(), truth.half(), truth)
    with pytest.raises(AssertionError):
        assert_within_budget(torch.tensor([-math.inf, 1.0]).half(), truth.half(), truth)


def test_budget_refuses_other_shapes_and_dtypes():
    with pytest.raises(AssertionError, match="float32"):
        assert_within_budget(TRUTH.float(), TRUTH, TRUTH)
    with pytest.raises(AssertionError, match="shape"):
        assert_within_budget(TRUTH[:1], TRUTH, TRUTH)
    with pytest.raises(AssertionError, match="expected float64"):
        assert_within_budget(TRUTH.float(), TRUTH.float(), TRUTH.float())


def test_oracle_by_hand():
    """One sample, two inputs, one output: z = 2*3 + 1*(-4) + 1 = 3; s = r/z = 2."""
    x, weight = torch.tensor([[2.0, 1.0]]), torch.tensor([[3.0, -4.0]])
    bias, z, reward = torch.tensor([1.0]), torch.tensor([[3.0]]), torch.tensor([[6.0]])
    r_in, w_fb, b_fb = linear_oracle(x, weight, bias, z, reward, eps=1e-15)
    torch.testing.assert_close(r_in, torch.tensor([[12.0, -8.0]]).double())
    torch.testing.assert_close(w_fb, torch.tensor([[12.0, 8.0]]).double())
    torch.testing.assert_close(b_fb, torch.tensor([2.0]).double())
    kept = absorbed(z, reward, bias, eps=1e-15)
    assert float(kept) == pytest.approx(2.0)
    assert_conserved(reward, r_in, kept)


def test_conservation_can_fail():
    reward, half = torch.ones(4, 3), torch.full((4, 6), 0.5)
    assert_conserved(reward, half)
    assert_conserved(reward, half * 0.5, absorbed=6.0)
    for wrong in (half * (1 + 1e-5), half * 0.5, half.double() * (1 + 1e-13)):
        with pytest.raises(AssertionError, match="not conserved"):
            assert_conserved(reward, wrong)


def test_poison_reaches_every_allocation_and_ends():
    with poisoned_empty():
        assert torch.are_deterministic_algorithms_enabled()
        for empty in (torch.empty(9), TRUTH.new_empty(9), torch.empty_like(TRUTH)):
            assert empty.isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError), poisoned_empty():
        raise RuntimeError
    assert not torch.are_deterministic_algorithms_enabled()
