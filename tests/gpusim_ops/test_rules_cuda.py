"""Every rule of the registry on the CUDA kernels where tiles end: ragged and aligned shapes, sums
split over blocks, every dtype, stored and updated in place. Runs under ``pytest --simulate cuda``.
"""

from __future__ import annotations

import conv_cases
import pytest
import torch
from linear_cases import DTYPES, SPECS, updates
from rule_cases import (
    ALL,
    RULES,
    arguments,
    check_conv,
    check_conv_update,
    check_derivative,
    check_linear,
    check_linear_update,
)  # fmt: skip

from lfp_kernels import functional as F
from lfp_kernels import rules, use_backend

pytestmark = pytest.mark.gpusim

# Packs and none, one tile and several, a sum long enough to be split over blocks.
SHAPES = ((7, 13, 9), (70, 68, 132), (3, 600, 20))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_linear(rule, shape, dtype) -> None:
    check_linear(rule, shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_linear_update(rule, dtype) -> None:
    check_linear_update(rule, dtype)


@pytest.mark.parametrize("function", rules.DERIVATIVES)
@pytest.mark.parametrize("name", ["feedback", "random_sign_feedback", "epsilon", "alpha_beta"])
def test_derivative_of_the_activation_below(name, function) -> None:
    check_derivative(ALL[name], function)


def test_a_frozen_bias_counts() -> None:
    rule = ALL["zplus"]
    (x, weight, bias, z, reward), _ = arguments(rule, (7, 13, 9), torch.float64)
    found = []
    for backend in ("native", "reference"):
        w, b = weight.clone(), bias.clone()
        _, step, _ = updates(SPECS[0], w, b)
        with use_backend(backend):
            F.linear_redistribute_update(x, w, b, z, reward, step, None, rule)
        assert torch.equal(b, bias)
        found.append(w)
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", conv_cases.CASES)
@pytest.mark.parametrize("rule", ["random_sign_feedback", "alpha_beta", "zbox"])
def test_every_kind_of_convolution(rule, name) -> None:
    check_conv(ALL[rule], name, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["plain", "channels_last"])
@pytest.mark.parametrize("rule", RULES)
def test_convolution(rule, last, dtype) -> None:
    for name in ("2d-odd", "2d-transposed", "2d-pointwise"):
        check_conv(rule, name, dtype, last)


@pytest.mark.parametrize("last", [False, True], ids=["plain", "channels_last"])
@pytest.mark.parametrize("rule", RULES)
def test_convolution_update(rule, last) -> None:
    check_conv_update(rule, last)
