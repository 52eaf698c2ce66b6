"""Max pools: winners, ties, NaN and layouts, against torch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as TF
from pool_cases import BACKENDS, DTYPES, WINDOWS, close, is_last, last, layouts, values
from torch import Tensor

from lfp_kernels import functional as F
from lfp_kernels import use_backend
from lfp_kernels.rules import stabilize
from lfp_kernels.testing import assert_within_budget

MAX = {1: TF.max_pool1d, 2: TF.max_pool2d, 3: TF.max_pool3d}


def positions(x: Tensor, indices: Tensor) -> Tensor:
    """What the winners' indices mean: reward 1, 2, 3, ... carried to the places they name."""
    r = torch.arange(1, indices.numel() + 1, dtype=torch.float64).view(indices.shape)
    return F.max_pool_redistribute(r, indices, x.shape)


def torch_positions(x: Tensor, settings, ceil_mode=False) -> Tensor:
    dims = x.dim() - 2
    leaf = x.detach().double().requires_grad_()
    out = MAX[dims](leaf, *settings, ceil_mode=ceil_mode)
    r = torch.arange(1, out.numel() + 1, dtype=torch.float64).view(out.shape)
    return torch.autograd.grad(out, leaf, r)[0]


def fits(window: tuple, dilation: int) -> bool:
    shape, kernel, *_ = window
    kernel = kernel if isinstance(kernel, tuple) else (kernel,) * (len(shape) - 2)
    return all(dilation * (k - 1) < size for k, size in zip(kernel, shape[2:]))


SPREAD = [(window, d) for window in WINDOWS for d in (1, 2) if fits(window, d)]
SPREAD += [
    (((2, 3, 3, 5), 2, 2, 1), 1),  # with ceil_mode: a window behind the input, which is left out
    (((1, 2, 3000), 3, 2, 1), 1),  # a long axis
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("window, dilation", SPREAD, ids=str)
def test_max_pool(window, dilation, ceil_mode, backend):
    shape, *settings = window
    settings.append(dilation)
    x, dims = values(shape), len(shape) - 2
    tied = (x * 1.5).round() / 1.5  # many ties: the first of them wins
    for data in (x, tied):
        for each in layouts(data):
            with use_backend(backend):
                out, indices = F.max_pool(each, *settings, ceil_mode)
                assert out.shape == indices.shape
                assert torch.equal(out, MAX[dims](data, *settings, ceil_mode=ceil_mode))
                got = positions(each, indices)
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
@pytest.mark.parametrize(
    "settings", [(2, 2, 0), (3, 2, 1), (4, 4, 0), (3, 3, 0), (3, 1, 1, 2)], ids=str
)
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
        got = positions(x, indices)
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
