"""Sums that several blocks share and a second launch adds up: every epilogue has to follow there
instead. Runs under ``pytest --simulate cuda|triton``."""

from __future__ import annotations

import pytest
import torch
from conv_cases import channels_last
from linear_cases import SPECS, case, run, updates

from lfp_kernels import functional as F
from lfp_kernels import use_backend
from lfp_kernels.rules import DERIVATIVES, AlphaBeta, Epsilon
from lfp_kernels.testing import assert_within_budget

pytestmark = pytest.mark.gpusim

BELOW = [None, Epsilon(0.25), DERIVATIVES["tanh"]]
LONG = 1100  # of a sum; more than two parts of every kernel's


def compare(make, wide_sums: bool = False) -> None:
    """make(backend, dtype) -> tensors; in float32 against the reference and its float64.

    wide_sums: the reference adds a thousand products in blocks of its library's choice, ours one
    after the other: 1e-5 of the largest value, not twice the reference's own error.
    """
    got, same, truth = (
        make(backend, dtype)
        for backend, dtype in (
            ("native", torch.float32), ("reference", torch.float32), ("reference", torch.float64),
        )
    )  # fmt: skip
    for k, (a, b, c) in enumerate(zip(got, same, truth)):
        assert (a is None) == (b is None)
        if a is not None:
            if wide_sums:
                scale = float(c.abs().max())
                torch.testing.assert_close(a.double(), c, rtol=0, atol=1e-5 * scale)
            else:
                assert_within_budget(a, b, c, f"result {k}")


@pytest.mark.parametrize("below", BELOW, ids=repr)
@pytest.mark.parametrize("shape", [(LONG, 24, 20), (40, 24, LONG), (33, LONG, 9)], ids=str)
def test_linear_redistribute(shape, below) -> None:
    n, n_in, n_out = shape
    args = case((n,), n_in, n_out, torch.float32)

    def make(backend, dtype):
        tensors = [t.to(dtype) for t in args]
        return run(backend, *tensors, below=below)

    compare(make)


@pytest.mark.parametrize("below", BELOW, ids=repr)
@pytest.mark.parametrize("shape", [(LONG, 24, 20), (40, 24, LONG), (5, 70, LONG), (3, 9, 600)])
def test_linear_update(shape, below) -> None:
    n, n_in, n_out = shape
    args = case((n,), n_in, n_out, torch.float32)

    def make(backend, dtype):
        x, w, b, z, reward = (t.to(dtype, copy=True) for t in args)
        _, to_w, to_b = updates(SPECS[1], w, b)
        with use_backend(backend):
            r = F.linear_redistribute_update(x, w, b, z, reward, to_w, to_b, below=below)
        return r, w, b, *to_w.states, *to_b.states

    compare(make)


@pytest.mark.parametrize("layout", ["plain", "channels last"])
@pytest.mark.parametrize("below", BELOW, ids=repr)
@pytest.mark.parametrize("outputs, size", [(130, 3), (12, 7)])  # few channels: sums over taps too
def test_convolution(outputs, size, below, layout) -> None:
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=g)

    geometry = F.ConvGeometry.make((size, size), padding=(size // 2, size // 2))
    args = [draw(2, 5, 6, 5), draw(outputs, 5, size, size), draw(outputs)]
    args += [draw(2, outputs, 6, 5), draw(2, outputs, 6, 5)]
    if layout == "channels last":
        args = list(channels_last(*args))

    def make(backend, dtype):
        with use_backend(backend):
            return F.conv_redistribute(*(t.to(dtype) for t in args), geometry, below=below)

    compare(make, wide_sums=True)


def test_operands_that_are_no_dense_tensors() -> None:
    """Slices and expanded tensors: what the kernels read is arranged like what they write."""
    x, w, b, z, reward = case((12,), 8, 6, torch.float32)
    wide = torch.stack([x, x], 1)[:, 0]
    flat = reward[:1].expand(12, 6)

    def make(backend, dtype):
        return run(backend, wide.to(dtype), w.to(dtype), b.to(dtype), z.to(dtype), flat.to(dtype))

    compare(make)
    images = torch.randn(2, 6, 4, 10)[..., ::2]
    stats = torch.randn(6), torch.rand(6) + 0.5

    def norm(backend, dtype):
        v, mean, invstd = (t.to(dtype) for t in (images, *stats))
        weight = torch.linspace(-1, 1, 6, dtype=dtype)
        with use_backend(backend):
            out, *found = F.batch_norm(v, weight, weight, None, None, True, 0.1, 1e-5, relu=False)
            back = F.batch_norm_redistribute(v, weight, weight, v, v, mean, invstd, True)
        return out, *found, *back

    compare(norm)


@pytest.mark.parametrize("rule", [Epsilon(), AlphaBeta()], ids=repr)
def test_convolution_of_no_dense_tensors(rule) -> None:
    g = torch.Generator().manual_seed(0)
    geometry = F.ConvGeometry.make((3, 3), padding=(1, 1))
    weight, bias = torch.randn(4, 3, 3, 3, generator=g), torch.randn(4, generator=g)
    x = torch.randn(2, 3, 5, 12, generator=g)[..., ::2]
    z = F.conv(x.double(), weight.double(), bias.double(), geometry).float()
    reward = torch.randn(2, 4, 5, 1, generator=g).expand(z.shape)

    def make(backend, dtype):
        with use_backend(backend):
            args = (t if dtype == torch.float32 else t.to(dtype) for t in (x, weight, bias, z))
            return F.conv_redistribute(*args, reward.to(dtype), geometry, rule)

    compare(make, wide_sums=True)
