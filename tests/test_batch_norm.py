"""Batch normalization: native and reference against torch's autograd in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from batch_norm_cases import (
    BACKENDS,
    DTYPES,
    EPS,
    case,
    close,
    forward,
    oracle,
    reward_for,
    run,
    torch_forward,
)

from lfp_kernels import functional, rules
from lfp_kernels.rules import stabilize
from lfp_kernels.testing import assert_within_budget

# 2-d, tiny planes (parts of rows), one channel, odd planes, planes of several blocks, 3-d volumes,
# many channels, many rows
SHAPES = [
    (7, 5), (4, 3, 2), (3, 1, 5), (2, 5, 7, 9), (3, 4, 1, 1), (2, 3, 6, 6), (2, 2, 3, 4, 5),
    (40, 300), (3, 20, 8, 8), (2, 2, 150, 150), (1, 2, 3), (1100, 3), (5, 3, 40, 33),
]  # fmt: skip


# ---- forward


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_forward_matches_torch(backend, shape, training, affine):
    x, weight, bias, mean, var = case(shape, affine=affine)
    want, want_mean, want_var = torch_forward(x, weight, bias, mean, var, training, 0.3)
    out, used_mean, invstd = forward(
        backend, x, weight, bias, mean, var, training=training, momentum=0.3
    )
    close(out, want)
    close(mean, want_mean)
    close(var, want_var)
    axes = [d for d in range(x.dim()) if d != 1]
    close(used_mean, x.mean(axes) if training else mean)
    true_var = x.var(axes, unbiased=False) if training else var
    close(invstd, 1 / (true_var + EPS).sqrt())
    relu = forward(
        backend, x, weight, bias, mean.clone(), var.clone(), training=training, relu=True
    )
    if training:
        assert torch.equal(relu.out, out.relu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 5, 6), (2, 3, 40, 40), (64, 40, 3, 3)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_forward_within_the_error_budget(dtype, shape, training):
    args = case(shape, dtype)
    results = []
    for backend in BACKENDS:
        stats = [t.clone() for t in args[3:]]
        results.append((*forward(backend, *args[:3], *stats, training=training), *stats))
    out, mean, var = torch_forward(*args, training)
    for k, truth in ((0, out), (3, mean), (4, var)):
        assert_within_budget(results[0][k], results[1][k], truth)
    assert results[0][1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("layout", ["plain", "last"])
@pytest.mark.parametrize("offset", [1e3, 1e4])
def test_statistics_do_not_cancel(layout, offset):
    """A mean far above the deviation: E[x^2] - E[x]^2 would leave no digit of the variance."""
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(6, 5, 24, 24, generator=g) + offset).float()
    x[0] = 0  # the first sample is no guide to the mean of the others
    if layout == "last":
        x = x.contiguous(memory_format=torch.channels_last)
    got = forward("native", x, None, None, None, None)
    x64 = x.double()
    close(got.mean.double(), x64.mean((0, 2, 3)), 2e-7)
    close(got.invstd.double(), 1 / (x64.var((0, 2, 3), unbiased=False) + EPS).sqrt(), 1e-6)
    assert float((got.out - torch_forward(x, None, None, None, None, True)[0]).abs().max()) < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_running_statistics_means_batch_statistics(backend):
    x, weight, bias, _, _ = case((4, 3, 5))
    eval_mode = forward(backend, x, weight, bias, None, None, training=False)
    train_mode = forward(backend, x, weight, bias, None, None, training=True)
    for a, b in zip(eval_mode, train_mode):
        assert torch.equal(a, b)
    close(eval_mode.out, torch_forward(x, weight, bias, None, None, True)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_running_statistics_move_once_in_place_and_not_in_eval(backend):
    x, weight, bias, mean, var = case((6, 3, 4, 4))
    store = torch.zeros(3, 2, dtype=torch.float64)
    strided = store[:, 0]  # buffers need not be contiguous
    strided.copy_(mean)
    before = var.clone()
    forward(backend, x, weight, bias, strided, var, training=False)
    assert torch.equal(strided, mean) and torch.equal(var, before)
    for _ in range(2):
        forward(backend, x, weight, bias, strided, var, momentum=0.25)
    batch = x.mean((0, 2, 3))
    close(strided, 0.75 * (0.75 * mean + 0.25 * batch) + 0.25 * batch)
    assert not store[:, 1].any()
    zero = case((6, 3, 4, 4))[3]
    forward(backend, x, weight, bias, zero, var, momentum=0.0)
    assert torch.equal(zero, mean)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
def test_sixteen_bit_activations_with_float32_parameters(backend, training):
    x, *rest = case((4, 3, 6, 6), torch.bfloat16)
    weight, bias, mean, var = (t.float() for t in rest)
    want, want_mean, _ = torch_forward(x, weight, bias, mean, var, training)
    got = forward(backend, x, weight, bias, mean, var, training=training)
    assert got.out.dtype == torch.bfloat16 and mean.dtype == torch.float32
    torch.testing.assert_close(got.out.double(), want, rtol=2**-8, atol=2**-8)
    close(mean.double(), want_mean, 1e-6)
    r = reward_for(x)
    fed = run(backend, x, weight, bias, got.out, r, *got[1:], training)
    assert fed.weight.dtype == fed.bias.dtype == torch.float32


# ---- redistribute


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_redistribute_matches_autograd(backend, shape, training, affine):
    x, weight, bias, mean, var = case(shape, affine=affine, seed=1)
    truth_stats = mean.clone(), var.clone()
    z, *stats = forward(backend, x, weight, bias, mean, var, training=training)
    r = reward_for(x) * z  # as in a network: reward in proportion to the activation
    got = run(backend, x, weight, bias, z, r, *stats, training)
    truth = oracle(x, weight, bias, z, r, *truth_stats, training)
    for name, a, b in zip(("input", "weight", "bias"), got, truth):
        assert (a is None) == (b is None), name
        if a is not None:
            close(a, b, 1e-12)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)  # float64: the test above
@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 5, 6), (2, 3, 40, 40), (64, 40, 3, 3)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_redistribute_within_the_error_budget(dtype, shape, training):
    x, weight, bias, mean, var = case(shape, dtype, seed=2)
    stats_in = mean.clone(), var.clone()
    z, *stats = forward("reference", x, weight, bias, mean, var, training=training)
    z = torch.where(z.abs() < 0.25, 0.25, z)  # 1/eps at a zero would drown everything else
    args = x, weight, bias, z, reward_for(x), *stats, training
    truth = oracle(*args[:5], *stats_in, training)
    for name, a, b, c in zip(
        ("input", "weight", "bias"), run("native", *args), run("reference", *args), truth
    ):
        assert_within_budget(a, b, c, name)


# What a layer without a weight matrix has: rules of one signal, with W for their matrix.
PLAIN = [
    rule
    for rule in (cls() for cls in rules.REGISTRY.values())
    if rule.has_plain_form or rule.is_epsilon_but_for_its_prologue
]


@pytest.mark.parametrize("rule", PLAIN, ids=lambda r: r.name)
@pytest.mark.parametrize("training", [True, False])
def test_every_rule_is_the_same_on_both_backends(rule, training):
    x, weight, bias, mean, var = case((4, 5, 3, 3))
    z, *stats = forward("native", x, weight, bias, mean, var, training=training)
    args = x, weight, bias, z, reward_for(x), *stats, training, rule
    for got, want in zip(run("native", *args), run("reference", *args)):
        close(got, want, 1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
def test_relu_output_serves_as_z(backend, training):
    x, weight, bias, mean, var = case((4, 3, 6, 6))
    z, *stats = forward(backend, x, weight, bias, mean, var, training=training)
    r = reward_for(x) * (z > 0)  # no reward reaches what the ReLU cut off
    full = run(backend, x, weight, bias, z, r, *stats, training)
    for got, want in zip(run(backend, x, weight, bias, z.relu(), r, *stats, training), full):
        close(got, want, 1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 7, 7)], ids=str)
def test_chain_forms(backend, training, shape):
    x, weight, bias, mean, var = case(shape)
    stats_in = mean.clone(), var.clone()
    z, *stats = forward(backend, x, weight, bias, mean, var, training=training)
    r = reward_for(x)
    s = r / stabilize(z, 1e-2)
    plain = run(backend, x, weight, bias, z, r, *stats, training, rules.Epsilon(1e-2))
    z = torch.full_like(z, math.nan)  # not looked at
    signal = run(backend, x, weight, bias, z, s, *stats, training, signal_in=True)
    for got, want in zip(signal, plain):
        close(got, want)
    options = {"below": rules.Epsilon(1e-3), "signal_in": True}
    got = run(backend, x, weight, bias, z, s, *stats, training, **options).input
    truth = oracle(
        x, weight, bias, z, s, *stats_in, training, below=1e-3, signal_in=True
    )[0]  # fmt: skip
    close(got, truth, 1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("need", list(itertools.product([True, False], repeat=3)))
def test_masks(backend, training, need):
    x, weight, bias, mean, var = case((4, 3, 6, 6))
    z, *stats = forward(backend, x, weight, bias, mean, var, training=training)
    args = x, weight, bias, z, reward_for(x), *stats, training
    full, got = run(backend, *args), run(backend, *args, need=need)
    for want, have, wanted in zip(full, got, need):
        assert (have is not None) == wanted
        assert not wanted or torch.equal(have, want)
    only_weight = run(backend, x, weight, None, *args[3:])
    assert only_weight.bias is None and torch.equal(only_weight.weight, full.weight)
    only_bias = run(backend, x, None, bias, *args[3:])
    assert only_bias.weight is None and torch.equal(only_bias.bias, full.bias)


@pytest.mark.parametrize("training", [True, False])
def test_nan_stays_in_its_channel(training):
    x, weight, bias, mean, var = case((3, 4, 5, 5), torch.float32)
    x[1, 2, 0, 0] = math.nan
    z, *stats = forward("native", x, weight, bias, mean, var, training=training, relu=True)
    assert z[1, 2, 0, 0].isnan() and not z[:, [0, 1, 3]].isnan().any()
    got = run("native", x, weight, bias, z, reward_for(x), *stats, training)
    assert got.weight.isnan().tolist() == [False, False, True, False]
    assert got.input[1, 2, 0, 0].isnan() and not got.input[:, [0, 1, 3]].isnan().any()


@pytest.mark.parametrize("rule", [rules.ZPlus(), rules.FixedFeedback()], ids=lambda r: r.name)
def test_rules_of_weight_matrices_are_refused(rule):
    x = torch.randn(4, 3)
    stats = torch.zeros(3), torch.ones(3)
    with pytest.raises(ValueError, match="rule of weight matrices; expected Epsilon, Zero or Grad"):
        functional.batch_norm_redistribute(x, None, None, x, x, *stats, False, rule)
