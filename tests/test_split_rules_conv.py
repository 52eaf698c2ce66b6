"""Rules with two signals on convolutions: native against the reference, which the linear layer's
oracle vouches for (test_split_rules.py)."""

from __future__ import annotations

import pytest
import torch
from conv_cases import CASES, channels_last, forward, layer
from linear_cases import BACKENDS, SPECS, updates
from test_split_rules import RULES, assert_equal_but_for_rounding, oracle, split_case

from lfp_kernels import functional as F
from lfp_kernels import use_backend
from lfp_kernels.rules import DERIVATIVES, Parts
from lfp_kernels.testing import assert_within_budget


def conv_case(name, rule, dtype=torch.float64, nonnegative=False):
    """x within what the rule expects of it, and z of the sign that the layer gives it: under any
    other the two sides that gamma divides by would cancel."""
    x, weight, bias, _, reward, geometry = layer(name)
    if rule.parts_code == Parts.BOX:
        x = torch.sigmoid(x)
    elif nonnegative:
        x = x.relu()
    z = forward(x, weight, bias, geometry)
    z = z + torch.where(z < 0, -0.5, 0.5)  # away from the jumps at 0
    return [t.to(dtype) for t in (x, weight, bias, z, reward)], geometry


def conv_run(backend, tensors, geometry, rule, **options):
    with use_backend(backend):
        return F.conv_redistribute(*tensors, geometry, rule, **options)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("nonnegative", [False, True])
def test_convolution_float64(rule, name, nonnegative):
    tensors, geometry = conv_case(name, rule, nonnegative=nonnegative)
    want = conv_run("reference", tensors, geometry, rule)
    for arguments in (tensors, channels_last(*tensors)):
        got = conv_run("native", arguments, geometry, rule, nonnegative=nonnegative)
        for a, b in zip(got, want):
            assert_equal_but_for_rounding(a, b)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["1d", "2d", "2d-groups", "2d-depthwise", "2d-transposed", "3d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_convolution_is_within_the_error_budget(rule, name, dtype):
    tensors, geometry = conv_case(name, rule, dtype)
    truth = conv_run("reference", [t.double() for t in tensors], geometry, rule)
    same = conv_run("reference", tensors, geometry, rule)
    got = conv_run("native", tensors, geometry, rule)
    for part, a, b, c in zip(("input", "weight", "bias"), got, same, truth):
        assert_within_budget(a, b, c, part)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_pointwise_convolution_is_the_linear_layer(rule, backend):
    """Every pixel is a sample of a linear layer, whose oracle holds here too."""
    x, weight, bias, z, reward = split_case(rule, (4 * 5 * 3,), 8, 6)
    image = lambda t: t.view(4, 5, 3, -1).permute(0, 3, 1, 2)  # noqa: E731
    geometry = F.ConvGeometry.make((1, 1))
    got = conv_run(
        backend, (image(x), weight[..., None, None], bias, image(z), image(reward)), geometry, rule
    )
    want = oracle(rule, x, weight, bias, z, reward)
    flat = (got.input.permute(0, 2, 3, 1).reshape(x.shape), got.weight[..., 0, 0], got.bias)
    for a, b in zip(flat, want):
        assert_equal_but_for_rounding(a, b)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("function", DERIVATIVES)
def test_convolution_with_a_derivative_below(rule, function):
    tensors, geometry = conv_case("2d", rule)
    x = tensors[0]
    slope = {"relu": (x > 0).double(), "tanh": 1 - x * x, "sigmoid": x * (1 - x)}[function]
    plain = conv_run("native", tensors, geometry, rule).input
    got = conv_run("native", tensors, geometry, rule, below=DERIVATIVES[function]).input
    torch.testing.assert_close(got, plain * slope, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{type(s).__name__}-{s.state_names[0]}")
def test_convolution_update(rule, spec):
    tensors, geometry = conv_case("2d", rule, torch.float32)
    found = {}
    for backend, dtype in (
        ("native", torch.float32), ("reference", torch.float32), ("truth", torch.float64),
    ):  # fmt: skip
        x, weight, bias, z, reward = (t.to(dtype, copy=True) for t in tensors)
        _, step_w, step_b = updates(spec, weight, bias)
        with use_backend("reference" if backend == "truth" else backend):
            r_in = F.conv_redistribute_update(
                x, weight, bias, z, reward, geometry, step_w, step_b, rule
            )
        found[backend] = r_in, weight, bias
    for a, b, c in zip(*found.values()):
        assert_within_budget(a, b, c)


@pytest.mark.parametrize("rule", RULES)
def test_convolution_update_leaves_a_bias_alone(rule):
    (x, weight, bias, z, reward), geometry = conv_case("2d", rule)
    want = conv_run("reference", (x, weight, bias, z, reward), geometry, rule).weight
    before, w = bias.clone(), weight.clone()
    _, step, _ = updates(SPECS[0], w, bias)
    with use_backend("native"):
        F.conv_redistribute_update(x, w, bias, z, reward, geometry, step, rule=rule)
    assert torch.equal(bias, before)
    assert_equal_but_for_rounding(w, weight - 0.1 * (0.01 * weight - want))


@pytest.mark.parametrize("rule", RULES)
def test_convolution_in_several_chunks(rule):
    """Large enough for several chunks of samples; one of them has a negative value."""
    g = torch.Generator().manual_seed(0)
    rand = lambda *size: torch.rand(*size, generator=g)  # noqa: E731
    x, weight, bias = rand(9, 8, 180, 180), rand(8, 8, 3, 3) - 0.5, rand(8) - 0.5
    if rule.parts_code != Parts.BOX:
        x[7, 3, 100, 100] = -3.0
    z = torch.nn.functional.conv2d(x, weight, bias)
    z = z + torch.where(z < 0, -0.5, 0.5)
    args, geometry = (x, weight, bias, z, rand(*z.shape) - 0.5), F.ConvGeometry.make((3, 3))
    truth = conv_run("reference", [t.double() for t in args], geometry, rule)
    same = conv_run("reference", args, geometry, rule)
    got = conv_run("native", args, geometry, rule)
    for part, a, b, c in zip(("input", "weight", "bias"), got, same, truth):
        assert_within_budget(a, b, c, part)


@pytest.mark.parametrize("rule", RULES)
def test_convolution_of_nothing(rule):
    tensors, geometry = conv_case("2d", rule, torch.float32)
    tensors = [t[:0] if k in (0, 3, 4) else t for k, t in enumerate(tensors)]
    got = conv_run("native", tensors, geometry, rule)
    assert got.input.shape == tensors[0].shape
    assert (got.weight == 0).all() and (got.bias == 0).all()
