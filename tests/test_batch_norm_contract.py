"""Batch normalization: layouts of memory, fakes, compilation, and what is refused."""

from __future__ import annotations

import pytest
import torch
from batch_norm_cases import (
    BACKENDS,
    DTYPES,
    EPS,
    case,
    close,
    forward,
    layouts,
    oracle,
    reward_for,
    run,
    torch_forward,
)

from lfp_kernels import functional as F
from lfp_kernels.testing import poisoned_empty

OPS = torch.ops.lfp_kernels


# ---- memory


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 6), (3, 4, 6, 6), (3, 4, 2, 3, 4)], ids=str)
def test_layouts_of_memory(backend, training, shape):
    x0, weight, bias, mean, var = case(shape)
    r0 = reward_for(x0)
    for x in layouts(x0):
        stats_in = mean.clone(), var.clone()
        want, *_ = torch_forward(x, weight, bias, mean, var, training)
        z, *stats = forward(backend, x, weight, bias, *stats_in, training=training)
        close(z, want)
        dense = torch.empty_like(x).stride()
        assert z.stride() == dense
        truth = oracle(x, weight, bias, z, r0, mean, var, training)
        for r in (r0, *layouts(r0)):
            got = run(backend, x, weight, bias, z, r, *stats, training)
            assert got.input.stride() == dense
            for a, b in zip(got, truth):
                close(a, b, 1e-10)
    for got, want in zip(
        run(backend, x0, weight.repeat(2)[::2].copy_(weight), bias, z, r0, *stats, training),
        run(backend, x0, weight, bias, z, r0, *stats, training),
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 3)], ids=str)
def test_empty(backend, training, shape):
    x, weight, bias, mean, var = case(shape)
    before = mean.clone(), var.clone()
    z, *stats = forward(backend, x, weight, bias, mean, var, training=training)
    assert z.shape == x.shape and torch.equal(mean, before[0]) and torch.equal(var, before[1])
    assert not stats[0].isnan().any() and not stats[1].isnan().any()
    got = run(backend, x, weight, bias, z, x, *stats, training)
    assert got.input.shape == x.shape
    assert got.weight.tolist() == got.bias.tolist() == [0] * shape[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [True, False])
def test_every_element_is_written_and_reruns_have_the_same_bits(dtype, last):
    x, weight, bias, mean, var = case((5, 9, 13, 11), dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    r, found = reward_for(x), []
    threads = torch.get_num_threads()
    try:
        for count in (threads, 1, 3):
            torch.set_num_threads(count)
            with poisoned_empty():
                z, *stats = forward("native", x, weight, bias, mean.clone(), var.clone())
                found.append((z, *stats, *run("native", x, weight, bias, z, r, *stats, True)))
    finally:
        torch.set_num_threads(threads)
    for got in found[1:]:
        for a, b in zip(got, found[0]):
            assert torch.equal(a, b) and not a.isnan().any()


def test_offsets_beyond_32_bits():
    """Two samples 2^31 elements apart, on untouched pages."""
    stride = 2**31 + 64
    x, weight, bias, mean, var = case((2, 3, 4, 4), torch.bfloat16)
    far = torch.empty(stride + 48, dtype=x.dtype).as_strided(x.shape, (stride, 16, 4, 1)).copy_(x)
    for got, want in zip(
        forward("native", far, weight, bias, mean.clone(), var.clone()),
        forward("native", x, weight, bias, mean, var),
    ):
        assert torch.equal(got, want)


# ---- torch machinery


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.operators
def test_opcheck(training):
    x, weight, bias, mean, var = case((4, 3, 5, 5), torch.float32)
    quick = ("test_schema", "test_faketensor")  # the others trace through autograd: slow
    for k, each in enumerate((x, x.bfloat16(), layouts(x)[0], layouts(x)[2], layouts(x)[3])):
        z, *stats = forward("native", each, weight, bias, mean, var, training=training)
        for op, args in (
            (OPS.batch_norm_forward, (each, weight, bias, mean, var, training, 0.1, EPS, True)),
            (
                OPS.batch_norm_redistribute,
                (each, weight, bias, z, reward_for(each), *stats, training, 0,
                 [1e-6, 1.0, 0.0, 0.0, 0.0], k != 1, True, k != 2, k % 4),
            ),
        ):  # fmt: skip
            if k == 0:
                torch.library.opcheck(op.default, args)
            else:
                torch.library.opcheck(op.default, args, test_utils=quick)


def test_compiles_without_graph_breaks():
    x, weight, bias, mean, var = case((4, 3, 5, 5), torch.float32)

    def layer(x, r, mean, var):
        z, *stats = F.batch_norm(x * 2, weight, bias, mean, var, True, 0.1, EPS, relu=True)
        return z, *F.batch_norm_redistribute(x * 2, weight, bias, z, r, *stats, True)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    twins = mean.clone(), var.clone()
    r = reward_for(x).abs()
    for got, want in zip(compiled(x, r, mean, var), layer(x, r, *twins)):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(mean, twins[0])  # updated once under the compiler, too


def test_no_graph_is_built():
    x, weight, bias, mean, var = case((4, 3, 5, 5))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    z, *stats = forward("native", *leaves, mean, var)
    assert not z.requires_grad
    got = run("native", *leaves, z, reward_for(x), *stats, True)
    assert not any(t.requires_grad for t in got)


# ---- errors


def test_errors_name_the_argument_and_leave_the_statistics_alone():
    x, weight, bias, mean, var = case((4, 3, 5, 5))
    before = mean.clone(), var.clone()

    def refused(error, match, **changes):
        names = ("x", "weight", "bias", "running_mean", "running_var")
        given = dict(zip(names, (x, weight, bias, mean, var)), training=True, momentum=0.1, eps=EPS)
        with pytest.raises(error, match=match):
            F.batch_norm(**(given | changes))

    refused(TypeError, "batch_norm: x: .*int64", x=x.long())
    refused(ValueError, r"batch_norm: x: .*\[N, C, \*\].*\(3,\)", x=torch.ones(3))
    refused(ValueError, r"weight: expected shape \(3,\), got \(4,\)", weight=torch.ones(4).double())
    refused(TypeError, "bias: expected torch.float64 like x.*float32", bias=bias.float())
    refused(ValueError, "running_mean: expected shape", running_mean=mean[:2])
    refused(ValueError, "running_var: expected a tensor, got None", running_var=None)
    refused(ValueError, "weight: expected device cpu.*meta", weight=weight.to("meta"))
    refused(TypeError, "momentum: expected a finite number, got None", momentum=None)
    refused(ValueError, "eps: expected a number >= 0", eps=-1.0)
    one = x[:1, :, :1, :1]
    refused(ValueError, r"more than 1 value per channel.*\(1, 3, 1, 1\)", x=one)
    F.batch_norm(one, weight, bias, mean, var, False, 0.1, EPS)  # no statistics of one value needed
    assert torch.equal(mean, before[0]) and torch.equal(var, before[1])


def test_redistribute_errors_name_the_argument():
    x, weight, bias, mean, var = case((4, 3, 5, 5))
    z, *stats = forward("native", x, weight, bias, mean, var)
    names = ("x", "weight", "bias", "z", "reward", "mean", "invstd", "training")
    given = dict(zip(names, (x, weight, bias, z, x, *stats, True)))

    def refused(error, match, **changes):
        with pytest.raises(error, match="batch_norm_redistribute: " + match):
            F.batch_norm_redistribute(**(given | changes))

    refused(ValueError, "reward: expected shape", reward=x[:2])
    refused(ValueError, "z: expected shape", z=z[:, :, 1:])
    refused(TypeError, "z: expected torch.float64 like x", z=z.float())
    refused(TypeError, "mean: expected a torch.Tensor, got NoneType", mean=None)
    refused(ValueError, "invstd: expected shape", invstd=stats[1][:2])
    refused(TypeError, "rule: expected one of", rule=1e-6)
