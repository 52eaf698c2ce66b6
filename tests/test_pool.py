"""Average and adaptive average pools against torch in float64; what all pools refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from pool_cases import BACKENDS, DTYPES, WINDOWS, close, is_last, last, layouts, values
from torch import Tensor

from lfp_kernels import functional as F
from lfp_kernels import rules, use_backend
from lfp_kernels.rules import stabilize
from lfp_kernels.testing import assert_within_budget, poisoned_empty

OPS = torch.ops.lfp_kernels
AVG = {1: TF.avg_pool1d, 2: TF.avg_pool2d, 3: TF.avg_pool3d}
ADAPTIVE = {1: TF.adaptive_avg_pool1d, 2: TF.adaptive_avg_pool2d, 3: TF.adaptive_avg_pool3d}


def oracle(pool: Any, x, z, reward, eps=1e-6, below=None, signal_in=False) -> Tensor:
    """Autograd of torch's pool in float64, fed with s."""
    x, z, reward = (t.detach().double() for t in (x, z, reward))
    s = reward if signal_in else reward / stabilize(z, eps)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(pool(x), x, s)
    return (dx * x if below is None else dx * x / stabilize(x, below)).detach()


# ---- average pools


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_avg_pool(window, include, ceil_mode, backend):
    shape, *settings = window
    settings += [ceil_mode, include]
    x, dims = values(shape), len(shape) - 2
    with use_backend(backend):
        for each in layouts(x):
            z = F.avg_pool(each, *settings)
            close(z, AVG[dims](x, *settings))
            r = values(z.shape, seed=5)
            truth = oracle(lambda v: AVG[dims](v, *settings), x, z, r)
            got = F.avg_pool_redistribute(each, z, r, *settings)
            close(got, truth)
            assert is_last(got) == is_last(each)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 3, 9), (2, 3, 6, 5), (2, 3, 4, 4, 5)], ids=str)
def test_divisor_override(backend, shape):
    x, dims = values(shape), len(shape) - 2
    with use_backend(backend):
        z = F.avg_pool(x, 2, 2, 1, divisor_override=3)
        whole = F.avg_pool(x, 2, 2, 1, divisor_override=1)
        close(z, whole / 3)
        close(whole, AVG[dims](x, 2, 2, 1) * 2**dims)
        r = values(z.shape, seed=5)
        got = F.avg_pool_redistribute(x, z, r, 2, 2, 1, divisor_override=3)
    close(got, oracle(lambda v: AVG[dims](v, 2, 2, 1) * (2**dims / 3), x, z, r))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape, size",
    [
        ((2, 3, 7), 3), ((2, 3, 8, 8), 1), ((2, 3, 7, 5), (3, 2)), ((2, 20, 6, 6), (3, 6)),
        ((2, 3, 2, 3), (5, 4)), ((2, 3, 4, 5, 6), (2, 5, 1)), ((1, 1, 1, 1), (2, 2)),
    ],
    ids=str,
)  # fmt: skip
def test_adaptive_avg_pool(shape, size, backend):
    x, dims = values(shape), len(shape) - 2
    with use_backend(backend):
        for each in layouts(x):
            z = ADAPTIVE[dims](each, size)
            r = values(z.shape, seed=5)
            got = F.adaptive_avg_pool_redistribute(each, z, r)
            close(got, oracle(lambda v: ADAPTIVE[dims](v, size), x, z, r))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_without_a_batch_axis(dims, backend):
    shape = (4, 6, 8, 6, 7)[: dims + 2]
    x = values(shape)
    with use_backend(backend):
        z = F.avg_pool(x, 2)
        r = values(z.shape, seed=5)
        whole = F.avg_pool_redistribute(x, z, r, 2)
        one = (2,) * dims  # one size per dimension says how many of them are spatial
        assert torch.equal(F.avg_pool(x[0], one), z[0])
        assert torch.equal(F.avg_pool_redistribute(x[0], z[0], r[0], one), whole[0])
        top, indices = F.max_pool(x, 2)
        single, index = F.max_pool(x[0], one)
        assert torch.equal(single, top[0]) and torch.equal(index, indices[0])
        given = F.max_pool_redistribute(r, indices, x.shape)
        assert torch.equal(F.max_pool_redistribute(r[0], index, x[0].shape), given[0])
        z = ADAPTIVE[dims](x, (3,) * dims)
        r = values(z.shape, seed=6)
        whole = F.adaptive_avg_pool_redistribute(x, z, r)
        assert torch.equal(F.adaptive_avg_pool_redistribute(x[0], z[0], r[0]), whole[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ["plain", "last"])
@pytest.mark.parametrize("settings", [(2, 2, 0), (3, 1, 1)], ids=str)
def test_avg_pools_within_the_error_budget(dtype, order, settings):
    x = values((2, 20, 6, 8), dtype)
    x = last(x) if order == "last" else x
    pools = [
        (lambda v: TF.avg_pool2d(v, *settings), F.avg_pool_redistribute, settings),
        (lambda v: TF.adaptive_avg_pool2d(v, 4), F.adaptive_avg_pool_redistribute, ()),
    ]
    for pool, function, arguments in pools:
        z = pool(x)
        r = values(z.shape, dtype, seed=5)
        found = []
        for backend in BACKENDS:
            with use_backend(backend):
                found.append(function(x, z, r, *arguments))
        assert_within_budget(found[0], found[1], oracle(pool, x, z, r))
    with use_backend("native"):
        z = F.avg_pool(x, *settings)
    assert_within_budget(z, TF.avg_pool2d(x, *settings), TF.avg_pool2d(x.double(), *settings))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ["plain", "last"])
def test_chain_forms_and_rules(backend, order):
    x = values((2, 5, 6, 8))
    x = last(x) if order == "last" else x
    pools = [
        (lambda v: TF.avg_pool2d(v, 3, 2, 1), F.avg_pool_redistribute, (3, 2, 1)),
        (lambda v: TF.adaptive_avg_pool2d(v, (4, 3)), F.adaptive_avg_pool_redistribute, ()),
    ]
    for pool, function, arguments in pools:
        z = pool(x)
        r, nan = values(z.shape, seed=5), torch.full_like(z, math.nan)
        with use_backend(backend):
            got = function(x, z, r, *arguments, rule=rules.Epsilon(1e-2))
            close(got, oracle(pool, x, z, r, eps=1e-2))
            s = r / stabilize(z, 1e-2)
            close(function(x, nan, s, *arguments, signal_in=True), got)  # z is not looked at
            below = function(x, nan, s, *arguments, signal_in=True, below=rules.Epsilon(1e-3))
            close(below, oracle(pool, x, z, s, signal_in=True, below=1e-3))
            plain = function(x, z, r, *arguments, rule=rules.Gradient())
            leaf = x.clone().requires_grad_()
            close(plain, torch.autograd.grad(pool(leaf), leaf, r)[0])


# ---- memory and machinery


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (0, 3, 6), (0, 1, 4, 4, 4)], ids=str)
def test_empty(backend, shape):
    x = values(shape)
    with use_backend(backend):
        z = F.avg_pool(x, 2)
        assert F.avg_pool_redistribute(x, z, z, 2).shape == x.shape
        assert F.adaptive_avg_pool_redistribute(x, z, z).shape == x.shape
        for settings in ((2,), (3, 1, 1)):
            out, indices = F.max_pool(x, *settings)
            assert F.max_pool_redistribute(out, indices, x.shape).shape == x.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ["plain", "last"])
def test_every_element_is_written_and_reruns_have_the_same_bits(dtype, order):
    x = values((3, 21, 26, 34), dtype)
    x = last(x) if order == "last" else x
    threads, found = torch.get_num_threads(), []
    try:
        for count in (threads, 1, 3):
            torch.set_num_threads(count)
            with poisoned_empty():
                results = []
                for settings in ((2, 2, 0), (3, 2, 1), (2, 3, 0)):
                    out, indices = F.max_pool(x, *settings)
                    r = values(out.shape, dtype, seed=3)
                    results += [out, F.max_pool_redistribute(r, indices, x.shape)]
                    z = F.avg_pool(x, *settings).abs() + 1
                    results.append(F.avg_pool_redistribute(x, z, r, *settings))
                    results.append(F.adaptive_avg_pool_redistribute(x, z, r))
            found.append(results)
    finally:
        torch.set_num_threads(threads)
    for got in found:
        for a, b in zip(got, found[0]):
            assert torch.equal(a, b) and not a.isnan().any()


@pytest.mark.operators
def test_opcheck():
    x = values((2, 3, 8, 8), torch.float32)
    quick = ("test_schema", "test_faketensor")  # the others trace through autograd: slow
    sizes, tail = ([2, 2], [2, 2], [0, 0]), (0, [1e-6, 1.0, 0.0, 0.0, 0.0], 0)
    for k, each in enumerate((x, last(x), layouts(x)[1], layouts(x)[4], x[:, :, :7], x[:, :, :1])):
        z = TF.avg_pool2d(each, 2, 2) if each.shape[2] > 1 else None
        calls: list[tuple] = [
            (OPS.max_pool_forward, (each, [1, 2], [1, 2], [0, 1], [1, 2], True)),
            (OPS.adaptive_avg_pool_redistribute, (each, each, each, *tail)),
        ]
        if z is not None:
            out, indices = F.max_pool(each, 2)
            calls += [
                (OPS.max_pool_forward, (each, *sizes, [1, 1], False)),
                (OPS.max_pool_redistribute, (out, indices, list(each.shape))),
                (OPS.avg_pool_redistribute, (each, z, z, *sizes, True, None, *tail)),
            ]
        for op, args in calls:
            if k == 0:
                torch.library.opcheck(op.default, args)
            else:
                torch.library.opcheck(op.default, args, test_utils=quick)


def test_compiles_without_graph_breaks_and_builds_no_graph():
    x = values((2, 3, 8, 8), torch.float32).requires_grad_()

    def layer(x, r):
        out, indices = F.max_pool(x * 2, 2)
        z = F.avg_pool(out, 2, 2)
        s = F.avg_pool_redistribute(out, z, r, 2, 2)
        return F.max_pool_redistribute(s, indices, x.shape) + 1

    r = values((2, 3, 2, 2), torch.float32)
    plain = layer(x, r)
    assert not plain.requires_grad
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x.detach(), r), plain)


# ---- errors


def test_errors_name_the_argument():
    x, half = values((2, 3, 8, 8)), values((2, 3, 4, 4))
    cases: list[tuple[type[Exception], str, Any]] = [
        (TypeError, "avg_pool: x: .*int64", lambda: F.avg_pool(x.long(), 2)),
        (ValueError, "max_pool: kernel_size: .*>= 1", lambda: F.max_pool(x, 0)),
        (ValueError, "max_pool: stride: .*2 of them", lambda: F.max_pool(x, 2, (2, 2, 2))),
        (ValueError, "max_pool: padding: .*half", lambda: F.max_pool(x, 2, 2, 2)),
        (ValueError, "avg_pool: x: .*hold a window", lambda: F.avg_pool(x, 9)),
        (ValueError, "avg_pool: x: .*kernel_size", lambda: F.avg_pool(x, (2, 2, 2, 2))),
        (
            ValueError, "avg_pool: divisor_override: .*0",
            lambda: F.avg_pool(x, 2, divisor_override=0),
        ),
        (
            ValueError, r"avg_pool_redistribute: reward: expected shape \(2, 3, 4, 4\)",
            lambda: F.avg_pool_redistribute(x, half, x, 2),
        ),
        (
            TypeError, "avg_pool_redistribute: z: expected torch.float64",
            lambda: F.avg_pool_redistribute(x, half.float(), half, 2),
        ),
        (
            TypeError, "adaptive_avg_pool_redistribute: rule: expected one of",
            lambda: F.adaptive_avg_pool_redistribute(x, half, half, 1e-6),
        ),
        (
            ValueError, "adaptive_avg_pool_redistribute: z: expected the output",
            lambda: F.adaptive_avg_pool_redistribute(x, half[0], half[0]),
        ),
        (
            ValueError, "max_pool_redistribute: indices: expected shape",
            lambda: F.max_pool_redistribute(half, F.max_pool(x, 4)[1], x.shape),
        ),
        (
            TypeError, "max_pool_redistribute: indices: .*bool",
            lambda: F.max_pool_redistribute(half, half > 0, x.shape),
        ),
        (
            ValueError, "max_pool_redistribute: input_shape: ",
            lambda: F.max_pool_redistribute(half, F.max_pool(x, 2)[1], (3, 3, 8, 8)),
        ),
    ]  # fmt: skip
    for error, match, call in cases:
        with pytest.raises(error, match=match):
            call()


@pytest.mark.host  # a GPU would have to be waited for; tests/gpusim_ops says what it does
@pytest.mark.parametrize("order", ["plain", "last"])
def test_indices_of_another_input_are_refused(order):
    x = values((2, 3, 9, 9))
    x = last(x) if order == "last" else x
    out, indices = F.max_pool(x, 3, 2, 1)
    with pytest.raises(RuntimeError, match="max_pool_redistribute: indices point outside"):
        F.max_pool_redistribute(out, indices, (2, 3, 5, 5))
    out, indices = F.max_pool(x[:, :, :8, :8], 2)
    with pytest.raises(RuntimeError, match="max_pool_redistribute: .*tile"):
        F.max_pool_redistribute(out, indices, (2, 3, 9, 9))
