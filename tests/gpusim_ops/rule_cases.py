"""The rules of the registry with telling parameters, and what every GPU backend is asked about each
(test_rules_cuda.py, test_rules_triton.py)."""

from __future__ import annotations

import conv_cases
import pytest
import torch
from linear_cases import SPECS, case, run, updates

from lfp_kernels import functional as F
from lfp_kernels import rules, use_backend
from lfp_kernels.testing import assert_within_budget, poisoned_empty

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
RULES = [pytest.param(rule, id=name) for name, rule in ALL.items()]


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


def check_linear(rule, shape, dtype) -> None:
    for nonnegative in (False, True) if rule.split else (False,):
        args, given = arguments(rule, shape, dtype, nonnegative)
        options = {"need": (rule.has_input, True, True), "nonnegative": nonnegative}
        with poisoned_empty():
            got = run("native", *args, rule, matrix=given, **options)
        same = run("reference", *args, rule, matrix=given, **options)
        (matrix,) = wide([given])
        check(got, same, run("reference", *wide(args), rule, matrix=matrix, **options))


def check_linear_update(rule, dtype) -> None:
    """The input reward is that of the old weight, whose signs decide for every launch."""
    args, given = arguments(rule, (7, 40, 9), dtype)
    results = []
    for backend, kind in (("native", dtype), ("reference", dtype), ("reference", torch.float64)):
        x, w, b, z, reward = (t.to(kind, copy=True) for t in args)
        _, to_w, to_b = updates(SPECS[1], w, b)
        matrix = None if given is None else given.to(kind)
        with use_backend(backend):
            input_reward = F.linear_redistribute_update(
                x, w, b, z, reward, to_w, to_b, rule, matrix=matrix, need_input=rule.has_input
            )
        results.append((input_reward, w, b))
    check(*results)


def check_derivative(rule, function) -> None:
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

    def redistribute(backend, arguments, given):
        with use_backend(backend), poisoned_empty():
            return F.conv_redistribute(
                *arguments, geometry, rule, matrix=given, need=(rule.has_input, True, True),
                **options,
            )  # fmt: skip

    got, same = (redistribute(backend, tensors, given) for backend in ("native", "reference"))
    check(got, same, redistribute("reference", wide(tensors), matrix))


def check_conv_update(rule, last) -> None:
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
