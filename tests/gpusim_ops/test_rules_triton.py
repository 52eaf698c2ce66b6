"""Every rule of the registry on the Triton kernels, against the reference. Runs under ``pytest
--simulate triton``.
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
EVERY = [pytest.param(rule, id=name) for name, rule in ALL.items()]


def arguments(rule, shape, dtype, nonnegative=False):
    n, n_in, n_out = shape
    x, weight, bias, _, reward = case((n,), n_in, n_out, dtype)
    x = x.relu() if nonnegative else x
    z = torch.nn.functional.linear(x, weight, bias)
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
        args, given = arguments(rule, shape, dtype, nonnegative)
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


# ---- convolutions


def output_of(x, weight, bias, geometry):
    """The layer's own output, whose sign tells with gamma which denominator is well conditioned,
    away from the jumps at 0."""
    z = conv_cases.forward(x.double(), weight.double(), bias.double(), geometry)
    return (z + torch.where(z < 0, -0.5, 0.5)).to(x.dtype)


def conv_arguments(rule, name, dtype, last=False, nonnegative=False):
    x, weight, bias, _, reward, geometry = conv_cases.layer(name)
    x = x.relu() if nonnegative else x
    given = torch.randn(weight.shape, generator=torch.Generator().manual_seed(9)).double()
    given = given.to(dtype) if rule.takes_matrix else None
    x, weight, bias, reward = (t.to(dtype) for t in (x, weight, bias, reward))
    tensors = [x, weight, bias, output_of(x, weight, bias, geometry), reward]
    if last:
        tensors[0], tensors[3], tensors[4] = conv_cases.channels_last(
            tensors[0], tensors[3], tensors[4]
        )
    return tensors, geometry, given


def check_conv(rule, name, dtype, last=False, **options) -> None:
    nonnegative = options.get("nonnegative", False)
    tensors, geometry, given = conv_arguments(rule, name, dtype, last, nonnegative)
    (matrix,) = wide([given])
    results = []
    for backend, args, b in (
        ("native", tensors, given),
        ("reference", tensors, given),
        ("reference", wide(tensors), matrix),
    ):
        with use_backend(backend):
            results.append(
                F.conv_redistribute(
                    *args, geometry, rule, matrix=b, need=(rule.has_input, True, True), **options
                )
            )
    check(*results)


@pytest.mark.parametrize("name", conv_cases.CASES)
@pytest.mark.parametrize("rule", ["random_sign_feedback", "alpha_beta", "zbox"])
def test_every_kind_of_convolution(rule, name) -> None:
    check_conv(ALL[rule], name, torch.float64)


@pytest.mark.parametrize("last", [False, True], ids=["plain", "channels_last"])
@pytest.mark.parametrize("rule", EVERY)
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
@pytest.mark.parametrize("rule", EVERY)
def test_convolution_update(rule, last) -> None:
    results = []
    for backend in ("native", "reference"):
        (x, w, b, z, reward), geometry, given = conv_arguments(rule, "2d-odd", torch.float64, last)
        to_w, to_b = conv_cases.update_for(w, 1), conv_cases.update_for(b, 1)
        for state in (*to_w.states, *to_b.states):
            state.fill_(0.5)
        with use_backend(backend):
            input_reward = F.conv_redistribute_update(
                x, w, b, z, reward, geometry, to_w, to_b, rule, matrix=given,
                need_input=rule.has_input,
            )  # fmt: skip
        results.append((input_reward, w, b))
    check(*results, results[1])
