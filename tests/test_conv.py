"""Convolution: both backends against torch autograd in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conv_cases import BACKENDS, CASES, DTYPES, RULE, channels_last, forward, layer, oracle

import lfp_kernels.functional as lf
from lfp_kernels.backends import use_backend
from lfp_kernels.functional import ConvGeometry
from lfp_kernels.rules import Epsilon, Gradient, Rule
from lfp_kernels.testing import assert_within_budget, poisoned_empty


@pytest.mark.parametrize("layout", ["plain", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_redistribute_matches_autograd(name: str, dtype: torch.dtype, layout: str) -> None:
    *tensors, geometry = layer(name)
    x, weight, bias, z, reward = (t.to(dtype) for t in tensors)
    if layout == "channels_last":
        x, z, reward = channels_last(x, z, reward)
    expected = oracle(x, weight, bias, z, reward, geometry)
    results = {}
    for backend in BACKENDS:
        with use_backend(backend), poisoned_empty():
            results[backend] = lf.conv_redistribute(x, weight, bias, z, reward, geometry, RULE)
    for actual, reference, truth in zip(*results.values(), expected):
        # The oracle rounds as much as float64 results do: those must agree to a few roundings.
        exact = torch.finfo(dtype).eps * 20
        scale = exact * truth.abs().max().item()
        torch.testing.assert_close(reference.double(), truth, rtol=exact, atol=scale)
        if dtype == torch.float64:
            torch.testing.assert_close(actual, truth, rtol=exact, atol=scale)
        else:
            assert_within_budget(actual, reference, truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_forward(name: str, relu: bool, backend: str) -> None:
    *tensors, geometry = layer(name)
    expected = forward(*tensors[:3], geometry)
    if relu:
        expected = expected.relu()
    for dtype in DTYPES:
        x, weight, bias = (t.to(dtype) for t in tensors[:3])
        for inputs in ((x, weight), channels_last(x, weight)):
            with use_backend(backend):
                z = lf.conv(*inputs, bias, geometry, relu=relu)
                plain = lf.conv(*inputs, None, geometry)
            scale = torch.finfo(dtype).eps * 8 * (1 + expected.abs().max().item())
            assert (z.double() - expected).abs().max().item() <= scale
            assert z.dtype == dtype
            want = forward(*tensors[:2], None, geometry)
            assert (plain.double() - want).abs().max().item() <= scale


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("shape", [(37, 4, 40, 40), (3, 4, 200, 200)])
@pytest.mark.parametrize("layout", ["plain", "channels_last"])
def test_large_batches_run_in_chunks(shape: tuple[int, ...], layout: str) -> None:
    """More than one chunk of samples (the number of threads decides), the last one short."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, generator=g)
    weight, bias = torch.randn(24, shape[1], 3, 3, generator=g) / 8, torch.randn(24, generator=g)
    geometry = ConvGeometry.make((3, 3), padding=1)
    z = forward(x, weight, bias, geometry).abs() + 0.3
    reward = torch.randn(z.shape, generator=g)
    if layout == "channels_last":
        x, z, reward = channels_last(x, z, reward)
    expected = oracle(x, weight, bias, z, reward, geometry)
    for product in (None, torch.bfloat16):
        results = {}
        for backend in BACKENDS:
            with use_backend(backend):
                results[backend] = lf.conv_redistribute(
                    x, weight, bias, z, reward, geometry, RULE, product_dtype=product
                )
        again = lf.conv_redistribute(
            x, weight, bias, z, reward, geometry, RULE, product_dtype=product
        )
        for k, truth in enumerate(expected):
            actual, reference = results["native"][k], results["reference"][k]
            if product is not None:  # bfloat16 products of float32 tensors: its precision
                scale = torch.finfo(product).eps * truth.abs().max().item()
                error = (reference.double() - truth).abs().max().item()
                assert (actual.double() - truth).abs().max().item() <= 2 * (error + scale)
            else:
                assert_within_budget(actual, reference, truth)
            assert torch.equal(actual, again[k])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["1d", "2d", "2d-depthwise", "3d", "2d-transposed"])
def test_bfloat16_products_of_float32_tensors(name: str, backend: str) -> None:
    *tensors, geometry = layer(name)
    x, weight, bias, z, reward = (t.float() for t in tensors)
    expected = oracle(x, weight, bias, z, reward, geometry)
    with use_backend(backend):
        actual = lf.conv_redistribute(
            x, weight, bias, z, reward, geometry, RULE, product_dtype=torch.bfloat16
        )
    exact = lf.conv_redistribute(x, weight, bias, z, reward, geometry, RULE)
    for k, (a, e) in enumerate(zip(actual, expected)):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), e, rtol=0, atol=0.02 * e.abs().max().item())
        assert k == 2 or not torch.equal(a, exact[k])  # the products did run in bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["1d-transposed", "2d-odd", "3d"])
def test_non_contiguous_unbatched_and_mixed_layouts(name: str, backend: str) -> None:
    *tensors, geometry = layer(name)
    x, weight, bias, z, reward = tensors
    expected = oracle(*tensors, geometry)
    strided = [torch.stack((t, t), -1)[..., 0] for t in tensors]
    assert not any(t.is_contiguous() for t in strided)
    swapped = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, z, reward)]
    mixes = [
        strided,
        [swapped[0], weight, bias, swapped[1], swapped[2]],
        [*channels_last(x, weight), bias, z, reward],
        [x, weight, bias, *channels_last(z, reward)],
        [x, weight, bias.repeat_interleave(2)[::2], z, *channels_last(reward)],
    ]
    with use_backend(backend):
        for mix in mixes:
            for actual, truth in zip(lf.conv_redistribute(*mix, geometry, RULE), expected):
                torch.testing.assert_close(actual, truth, rtol=1e-10, atol=1e-12)
        one = lf.conv_redistribute(x[0], weight, bias, z[0], reward[0], geometry, RULE)
        batch = lf.conv_redistribute(x[:1], weight, bias, z[:1], reward[:1], geometry, RULE)
        assert one.input is not None and batch.input is not None
        assert one.input.shape == x[0].shape
        assert torch.equal(one.input, batch.input[0])
        assert torch.equal(one.weight, batch.weight) and torch.equal(one.bias, batch.bias)
        assert lf.conv(x[0], weight, bias, geometry).shape == z[0].shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", [Epsilon(), Epsilon(0.3), Gradient()], ids=str)
def test_rules_and_chain_forms(rule: Rule, backend: str) -> None:
    *tensors, geometry = layer("2d-odd")
    for below in (None, Epsilon(0.2)) if rule.chains else (None,):
        for signal_in in (False, True):
            expected = oracle(*tensors, geometry, rule, below, signal_in)
            with use_backend(backend):
                actual = lf.conv_redistribute(
                    *tensors, geometry, rule, below=below, signal_in=signal_in
                )
            for a, e in zip(actual, expected):
                torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_signal_of_the_chain_is_the_prologue_below(backend: str) -> None:
    """below=... above and signal_in=True below give what two plain layers give."""
    *lower, g1 = layer("2d")
    x, w1, b1 = lower[:3]
    h = forward(x, w1, b1, g1)
    g2 = ConvGeometry.make((3, 3))
    w2 = torch.randn(4, 6, 3, 3, dtype=torch.float64)
    z2 = forward(h, w2, None, g2)
    r2 = torch.randn_like(z2)
    with use_backend(backend):
        r1 = lf.conv_redistribute(h, w2, None, z2, r2, g2, RULE).input
        s1 = lf.conv_redistribute(h, w2, None, z2, r2, g2, RULE, below=RULE).input
        plain = lf.conv_redistribute(x, w1, b1, h, r1, g1, RULE)
        chain = lf.conv_redistribute(x, w1, b1, h, s1, g1, RULE, signal_in=True)
    for a, e in zip(chain, plain):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


def test_special_values_of_z() -> None:
    z = torch.tensor([0.0, -0.0, 1e-30, -1e-30, float("inf"), float("nan")]).view(1, 1, 1, 6)
    x, weight = torch.ones(1, 1, 1, 6), torch.ones(1, 1, 1, 1)
    geometry = ConvGeometry.make((1, 1))
    for backend in BACKENDS:
        with use_backend(backend):
            r = lf.conv_redistribute(x, weight, None, z, torch.ones_like(z), geometry).input
        assert r is not None
        torch.testing.assert_close(r.flatten()[:5], torch.tensor([1e6, 1e6, 1e6, -1e6, 0.0]))
        assert r.flatten()[5].isnan()
