"""Inputs, oracle and comparison for the tests of the linear layer."""

from __future__ import annotations

import math

import torch

from lfp_kernels import functional as F
from lfp_kernels import optim, use_backend
from lfp_kernels.optim import BoundOptimizer
from lfp_kernels.testing import assert_within_budget, linear_oracle

BACKENDS = ("native", "reference")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SPECS = (
    optim.SGD(0.1, weight_decay=0.01),
    optim.SGD(0.1, momentum=0.9, weight_decay=0.01),
    optim.SGD(0.1, momentum=0.9, nesterov=True),
    optim.AdamW(0.01, weight_decay=0.1),
)


def case(batch, n_in, n_out, dtype=torch.float64, bias=True, seed=0):
    """x, weight, bias, z, reward"""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    x, weight = draw(*batch, n_in), draw(n_out, n_in)
    b = draw(n_out) if bias else None
    z = torch.nn.functional.linear(x, weight, b)
    return x, weight, b, z, draw(*batch, n_out)


def oracle(x, weight, bias, z, reward, eps=1e-6):
    rows = math.prod(x.shape[:-1])
    r_in, w_fb, b_fb = linear_oracle(
        x.reshape(rows, weight.shape[1]), weight, bias, z.reshape(rows, weight.shape[0]),
        reward.reshape(rows, weight.shape[0]), eps,
    )  # fmt: skip
    return r_in.reshape(x.shape), w_fb, b_fb


def run(backend, *args, **options):
    with use_backend(backend):
        return F.linear_redistribute(*args, **options)


def options_of(rule, weight):
    """What a rule needs besides the layer: its feedback matrix, and no input reward of a rule of
    weights."""
    g = torch.Generator().manual_seed(7)
    given = torch.randn(weight.shape, generator=g, dtype=torch.float64).to(weight.dtype)
    return {
        "matrix": given if rule.takes_matrix else None,
        "need": (rule.has_input, True, True),
    }


def check_all(got, reference, truth):
    for name, a, b, c in zip(("input", "weight", "bias"), got, reference, truth):
        assert (a is None) == (b is None) == (c is None), name
        if a is not None:
            assert_within_budget(a, b, c, name)


def updates(spec, weight, bias):
    tensors = [weight] if bias is None else [weight, bias]
    bound = BoundOptimizer(spec, tensors)
    both = [bound.update_of(t, bound.param_groups[0]) for t in tensors]
    return bound, both[0], (both[1] if bias is not None else None)
