"""Every rule of the registry on the Triton kernels, against the reference. Runs under ``pytest
--simulate triton``.
"""

from __future__ import annotations

import conv_cases
import pytest
import torch
from rule_cases import (
    ALL,
    RULES,
    check_conv,
    check_conv_update,
    check_derivative,
    check_linear,
    check_linear_update,
)  # fmt: skip

from lfp_kernels import rules

pytestmark = pytest.mark.gpusim


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7, 13, 9), (3, 20, 600)], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_linear(rule, shape, dtype) -> None:
    check_linear(rule, shape, dtype)


@pytest.mark.parametrize("rule", RULES)
def test_linear_update(rule) -> None:
    check_linear_update(rule, torch.float32)


@pytest.mark.parametrize("function", rules.DERIVATIVES)
@pytest.mark.parametrize("name", ["feedback", "random_sign_feedback", "epsilon", "zplus"])
def test_derivative_of_the_activation_below(name, function) -> None:
    check_derivative(ALL[name], function)


@pytest.mark.parametrize("name", conv_cases.CASES)
@pytest.mark.parametrize("rule", ["random_sign_feedback", "alpha_beta", "zbox"])
def test_every_kind_of_convolution(rule, name) -> None:
    check_conv(ALL[rule], name, torch.float64)


@pytest.mark.parametrize("last", [False, True], ids=["plain", "channels_last"])
@pytest.mark.parametrize("rule", RULES)
def test_convolution(rule, last) -> None:
    """Few channels and many: the two orders of k."""
    check_conv(rule, "2d-transposed", torch.float64, last)
    check_conv(rule, "2d-odd", torch.float32, last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", ["noisy_feedback", "zplus", "alpha_beta", "gamma"])
def test_convolution_of_many_channels(rule, dtype, monkeypatch) -> None:
    case = (2, 20, 5, 6), 36, (3, 2), {"padding": 1, "groups": 1}
    monkeypatch.setitem(conv_cases.CASES, "many", case)
    for last in (False, True):
        check_conv(ALL[rule], "many", dtype, last)
    if ALL[rule].split:
        check_conv(ALL[rule], "many", dtype, nonnegative=True)


@pytest.mark.parametrize("function", rules.DERIVATIVES)
@pytest.mark.parametrize("name", ["random_sign_feedback", "alpha_beta"])
def test_derivative_of_the_activation_below_a_convolution(name, function) -> None:
    check_conv(ALL[name], "2d-odd", torch.float64, below=rules.DERIVATIVES[function])


@pytest.mark.parametrize("last", [False, True], ids=["plain", "channels_last"])
@pytest.mark.parametrize("rule", RULES)
def test_convolution_update(rule, last) -> None:
    check_conv_update(rule, last)
