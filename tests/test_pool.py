"""Average, adaptive average and max pools: native and reference against torch in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor

from lfp_kernels import functional as F
from lfp_kernels import rules, use_backend
from lfp_kernels.rules import stabilize
from lfp_kernels.testing import assert_within_budget, poisoned_empty

OPS = torch.ops.lfp_kernels
BACKENDS = ("native", "reference")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
AVG = {1: TF.avg_pool1d, 2: TF.avg_pool2d, 3: TF.avg_pool3d}
ADAPTIVE = {1: TF.adaptive_avg_pool1d, 2: TF.adaptive_avg_pool2d, 3: TF.adaptive_avg_pool3d}
MAX = {1: TF.max_pool1d, 2: TF.max_pool2d, 3: TF.max_pool3d}
# shape of x; kernel, stride, padding
WINDOWS = [
    ((2, 3, 11), 2, 2, 0),
    ((2, 3, 12), (5,), (2,), (2,)),
    ((2, 3, 8, 8), 2, 2, 0),  # 2 x 2 windows that tile
    ((3, 20, 28, 36), 2, None, 0),
    ((2, 19, 6, 9), (2, 3), (2, 3), 0),  # other windows that tile
    ((2, 3, 9, 7), 2, 2, 0),  # a row and a column left out
    ((2, 5, 9, 11), 3, 2, 1),  # the first pool of a ResNet
    ((2, 17, 7, 40), (1, 3), (1, 1), (0, 1)),
    ((1, 2, 5, 5), (4, 5), (3, 1), (2, 0)),
    ((2, 3, 7, 7), 2, 3, 0),  # gaps between the windows
    ((1, 2, 4, 6, 4), 2, 2, 0),
    ((2, 3, 5, 4, 6), (3, 2, 3), (2, 1, 2), (1, 1, 0)),
]


def values(shape, dtype=torch.float64, seed=0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


def layouts(x: Tensor) -> list[Tensor]:
    """x, in other places of memory."""
    padded = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)[..., ::2].copy_(x)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    found = [x, padded, turned]
    if x.dim() > 3:
        found.append(last(x))
        spread = torch.zeros(*x.shape[:2], 2 * x.shape[2], *x.shape[3:], dtype=x.dtype)
        found.append(last(spread)[:, :, ::2].copy_(x))
    return found


def last(x: Tensor) -> Tensor:
    memory = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=memory[x.dim()])


def is_last(x: Tensor) -> bool:
    return x.dim() > 3 and x.stride(1) == 1


def close(got: Tensor, want: Tensor, scale: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=scale, atol=scale * float(want.abs().max()))


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


# ---- max pools


def positions(x: Tensor, indices: Tensor, settings, ceil_mode=False) -> Tensor:
    """What the winners' indices mean: reward 1, 2, 3, ... carried to the places they name."""
    r = torch.arange(1, indices.numel() + 1, dtype=torch.float64).view(indices.shape)
    return F.max_pool_redistribute(r, indices, x.shape)


def torch_positions(x: Tensor, settings, ceil_mode=False) -> Tensor:
    dims = x.dim() - 2
    leaf = x.detach().double().requires_grad_()
    out = MAX[dims](leaf, *settings, ceil_mode=ceil_mode)
    r = torch.arange(1, out.numel() + 1, dtype=torch.float64).view(out.shape)
    return torch.autograd.grad(out, leaf, r)[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_max_pool(window, dilation, ceil_mode, backend):
    shape, *settings = window
    kernel = settings[0] if isinstance(settings[0], tuple) else (settings[0],) * (len(shape) - 2)
    if any(dilation * (k - 1) >= size for k, size in zip(kernel, shape[2:])):
        pytest.skip("the window does not fit")
    settings.append(dilation)
    x, dims = values(shape), len(shape) - 2
    tied = (x * 1.5).round() / 1.5  # many ties: the first of them wins
    for data in (x, tied):
        for each in layouts(data):
            with use_backend(backend):
                out, indices = F.max_pool(each, *settings, ceil_mode)
                assert out.shape == indices.shape
                assert torch.equal(out, MAX[dims](data, *settings, ceil_mode=ceil_mode))
                got = positions(each, indices, settings, ceil_mode)
            assert torch.equal(got, torch_positions(data, settings, ceil_mode))
            if backend == "native":
                assert is_last(out) == is_last(each) and is_last(got) == is_last(each)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("settings", [(2, 2, 0), (3, 2, 1), ((2, 3), 1, (1, 1))], ids=str)
@pytest.mark.parametrize("order", ["plain", "last"])
def test_max_pool_dtypes(dtype, settings, order):
    x = values((3, 18, 10, 12), dtype)
    x = last(x) if order == "last" else x
    out, indices = F.max_pool(x, *settings)
    assert torch.equal(out, TF.max_pool2d(x, *settings))
    r = values(out.shape, dtype, seed=3)
    truth = torch.autograd.grad(
        TF.max_pool2d(leaf := x.double().requires_grad_(), *settings), leaf, r.double()
    )[0]
    with use_backend("reference"):
        same = F.max_pool_redistribute(r, indices, x.shape)  # reads the native indices
    got = F.max_pool_redistribute(r, indices, x.shape)
    assert_within_budget(got, same, truth)
    if settings[0] == 2:
        assert torch.equal(got.double(), truth)  # nothing is added up, so nothing is rounded


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", [(2, 2, 0), (3, 2, 1), (4, 4, 0), (3, 3, 0)], ids=str)
@pytest.mark.parametrize("order", ["plain", "last"])
def test_max_pool_special_values(backend, settings, order):
    """NaN wins (the last one of a window), -inf wins among its like (the first one)."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 18, 12, 12, generator=g)
    x[0] = -math.inf
    x[1][torch.rand(18, 12, 12, generator=g) < 0.2] = math.nan
    x[2][torch.rand(18, 12, 12, generator=g) < 0.7] = -math.inf
    x[3][torch.rand(18, 12, 12, generator=g) < 0.3] = math.inf
    x = last(x) if order == "last" else x
    with use_backend(backend):
        out, indices = F.max_pool(x, *settings)
        got = positions(x, indices, settings)
    torch.testing.assert_close(out, TF.max_pool2d(x, *settings), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got, torch_positions(x, settings))


def test_indices_are_as_narrow_as_the_windows_allow():
    assert F.max_pool(values((1, 2, 8, 8)), 2)[1].dtype == torch.uint8
    assert F.max_pool(values((1, 2, 32, 32)), 16)[1].dtype == torch.uint8
    assert F.max_pool(values((1, 2, 34, 34)), 17)[1].dtype == torch.int32  # 289 places
    assert F.max_pool(values((1, 2, 9, 8)), 2)[1].dtype == torch.int32  # a row left out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_adaptive_max_pool(dims, backend):
    x = values((2, 3, 7, 6, 8)[: dims + 2])
    with use_backend(backend):
        out, indices = F.adaptive_max_pool(x, 3)
        r = values(out.shape, seed=3)
        got = F.max_pool_redistribute(r, indices, x.shape)
    pools = {1: TF.adaptive_max_pool1d, 2: TF.adaptive_max_pool2d, 3: TF.adaptive_max_pool3d}
    leaf = x.clone().requires_grad_()
    want = pools[dims](leaf, 3)
    assert torch.equal(out, want)
    close(got, torch.autograd.grad(want, leaf, r)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_max_pool_passes_signals_and_follows_like(backend):
    """reward / stab(out), carried to the winners, is reward / stab(x) there."""
    x = values((2, 6, 8, 8))
    with use_backend(backend):
        out, indices = F.max_pool(x, 3, 2, 1)
        r = values(out.shape, seed=3)
        given = F.max_pool_redistribute(r, indices, x.shape)
        signal = F.max_pool_redistribute(r / stabilize(out, 1e-6), indices, x.shape)
        close(signal, given / stabilize(x, 1e-6))
        for reward in layouts(r):
            for like in (None, x, last(x)):
                got = F.max_pool_redistribute(reward, indices, x.shape, like=like)
                assert torch.equal(got, given)
                assert like is None or got.stride() == like.stride()


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


def test_opcheck():
    x = values((2, 3, 8, 8), torch.float32)
    quick = ("test_schema", "test_faketensor")  # the others trace through autograd: slow
    sizes, tail = ([2, 2], [2, 2], [0, 0]), (0, [1e-6, 1.0], 0)
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
