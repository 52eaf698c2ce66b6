"""Every rule of the registry on the Triton kernels, against the reference; what convolutions do not
have is refused by name. Runs under ``pytest --simulate triton``.
"""

from __future__ import annotations

import conv_cases
import pytest
import torch
from linear_cases import SPECS, case, run, updates

from lfp_kernels import functional as F
from lfp_kernels import rules, use_backend
from lfp_kernels.testing import assert_within_budget

pytestmark = pytest.mark.gpusim

OPTIONS: dict[str, dict[str, float]] = {
    "noisy_feedback": {"amplitude": 2.0, "seed": 2**33 + 5},
    "random_sign_feedback": {"bound": 2.0, "seed": 2**33 + 5},
    "sign_feedback": {"scale": 0.3},
    "gamma": {"gamma": 2.0},
    "alpha_beta": {"alpha": 2.5, "beta": 1.5},
    "zbox": {"low": -3.0, "high": 3.0},  # of the inputs drawn here
}
ALL = {
    name: cls(**({"eps": 0.01} if hasattr(cls(), "eps") else {}), **OPTIONS.get(name, {}))
    for name, cls in rules.REGISTRY.items()
}
ONE = [pytest.param(rule, id=name) for name, rule in ALL.items() if not rule.split]
TWO = [pytest.param(rule, id=name) for name, rule in ALL.items() if rule.split]
EVERY = [pytest.param(rule, id=name) for name, rule in ALL.items()]


def arguments(rule, shape, dtype):
    n, n_in, n_out = shape
    x, weight, bias, z, reward = case((n,), n_in, n_out, dtype)
    z = z + torch.where(z < 0, -0.5, 0.5).to(dtype)  # away from the jumps at 0
    g = torch.Generator().manual_seed(9)
    given = torch.randn(weight.shape, generator=g, dtype=torch.float64).to(dtype)
    return (x, weight, bias, z, reward), (given if rule.takes_matrix else None)


def wide(tensors):
    return [None if t is None else t.double() for t in tensors]


def check(got, same, truth) -> None:
    for name, a, b, c in zip(("input", "weight", "bias"), got, same, truth):
        assert (a is None) == (b is None) == (c is None), name
        if a is None:
            continue
        if a.dtype == torch.float64:  # the reference is the truth
            torch.testing.assert_close(a, c, rtol=1e-10, atol=1e-10 * float(c.abs().max()))
        else:
            assert_within_budget(a, b, c, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7, 13, 9), (3, 20, 600)], ids=str)
@pytest.mark.parametrize("rule", EVERY)
def test_linear(rule, shape, dtype) -> None:
    for nonnegative in (False, True) if rule.split else (False,):
        args, given = arguments(rule, shape, dtype)
        if nonnegative:
            args = (args[0].relu(), *args[1:])
        options = {"need": (rule.has_input, True, True), "nonnegative": nonnegative}
        got = run("native", *args, rule, matrix=given, **options)
        same = run("reference", *args, rule, matrix=given, **options)
        (matrix,) = wide([given])
        check(got, same, run("reference", *wide(args), rule, matrix=matrix, **options))


@pytest.mark.parametrize("rule", EVERY)
def test_linear_update(rule) -> None:
    args, given = arguments(rule, (7, 40, 9), torch.float32)
    results = []
    for backend, kind in (
        ("native", torch.float32),
        ("reference", torch.float32),
        ("reference", torch.float64),
    ):
        x, w, b, z, reward = (t.to(kind, copy=True) for t in args)
        _, to_w, to_b = updates(SPECS[1], w, b)
        matrix = None if given is None else given.to(kind)
        with use_backend(backend):
            input_reward = F.linear_redistribute_update(
                x, w, b, z, reward, to_w, to_b, rule, matrix=matrix, need_input=rule.has_input
            )
        results.append((input_reward, w, b))
    check(*results)


@pytest.mark.parametrize("function", rules.DERIVATIVES)
@pytest.mark.parametrize("name", ["feedback", "random_sign_feedback", "epsilon", "zplus"])
def test_derivative_of_the_activation_below(name, function) -> None:
    rule = ALL[name]
    args, given = arguments(rule, (7, 13, 9), torch.float64)
    below = rules.DERIVATIVES[function]
    got = run("native", *args, rule, matrix=given, below=below)
    want = run("reference", *args, rule, matrix=given, below=below)
    check(got, want, want)


@pytest.mark.parametrize("rule", ONE)
def test_convolution(rule) -> None:
    x, weight, bias, z, reward, geometry = conv_cases.layer("2d-transposed")
    generator = torch.Generator().manual_seed(9)
    given = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    options = {"need": (rule.has_input, True, True), "matrix": given if rule.takes_matrix else None}
    args = x, weight, bias, z, reward, geometry, rule
    with use_backend("reference"):
        want = F.conv_redistribute(*args, **options)
    with use_backend("native"):
        if rule.matrix_code in (rules.Matrix.WEIGHT, rules.Matrix.GIVEN):
            check(F.conv_redistribute(*args, **options), want, want)
        else:
            with pytest.raises(NotImplementedError, match="conv_redistribute: rule .* has no Trit"):
                F.conv_redistribute(*args, **options)


@pytest.mark.parametrize("rule", TWO)
def test_convolutions_refuse_rules_with_two_signals(rule) -> None:
    x, weight, bias, z, reward, geometry = conv_cases.layer("2d")
    match = f"{type(rule).__name__} has no Triton kernel"
    with use_backend("native"), pytest.raises(NotImplementedError, match=match):
        F.conv_redistribute(x, weight, bias, z, reward, geometry, rule)
