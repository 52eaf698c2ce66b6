"""Convolution: the update form, masks, layouts, fakes, geometry, and what is refused."""

from __future__ import annotations

import pytest
import torch
from conv_cases import (
    BACKENDS,
    DTYPES,
    RULE,
    channels_last,
    copy,
    hyper,
    layer,
    update_for,
)
from torch import Tensor, nn

import lfp_kernels.functional as lf
from lfp_kernels import rules
from lfp_kernels.backends import use_backend
from lfp_kernels.functional import ConvGeometry
from lfp_kernels.ops.update.reference import apply_update
from lfp_kernels.optim import SGD_MOMENTUM, SGD_PLAIN, STATES, Update


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["1d", "2d", "2d-transposed", "3d"])
def test_empty_batch(name: str, backend: str) -> None:
    *tensors, geometry = layer(name)
    x, weight, bias, z, reward = tensors
    x, z, reward = x[:0], z[:0], reward[:0]
    before = weight.clone(), bias.clone()
    with use_backend(backend):
        assert lf.conv(x, weight, bias, geometry).shape == z.shape
        assert lf.conv(x, weight, bias, geometry, relu=True).shape == z.shape
        r, w, b = lf.conv_redistribute(x, weight, bias, z, reward, geometry, RULE)
        assert r.shape == x.shape and not w.any() and not b.any()
        assert w.shape == weight.shape and b.shape == bias.shape
        update = Update(SGD_PLAIN, hyper(decay=0.5), [])
        lf.conv_redistribute_update(x, weight, bias, z, reward, geometry, update, update)
    torch.testing.assert_close(weight, before[0] * (1 - 0.1 * 0.5))  # weight decay still acts
    torch.testing.assert_close(bias, before[1] * (1 - 0.1 * 0.5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_need_masks(backend: str) -> None:
    *tensors, geometry = layer("2d")
    with use_backend(backend):
        full = lf.conv_redistribute(*tensors, geometry, RULE)
        for bits in range(8):
            need = (bool(bits & 1), bool(bits & 2), bool(bits & 4))
            part = lf.conv_redistribute(*tensors, geometry, RULE, need=need)
            for k in range(3):
                assert (part[k] is not None) == need[k]
                assert not need[k] or torch.equal(part[k], full[k])
        x, weight, _, z, reward = tensors
        assert lf.conv_redistribute(x, weight, None, z, reward, geometry, RULE).bias is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("code", STATES)
@pytest.mark.parametrize("name", ["1d", "2d-groups", "3d-transposed"])
def test_update_form(name: str, code: int, dtype: torch.dtype, backend: str) -> None:
    *tensors, geometry = layer(name)
    x, weight, bias, z, reward = (t.to(dtype) for t in tensors)
    wu, bu = update_for(weight, code, nesterov=1.0), update_for(bias, SGD_MOMENTUM)
    twins = copy(wu), copy(bu)
    w, b = weight.clone(), bias.clone()
    with use_backend(backend):
        r, fw, fb = lf.conv_redistribute(x, weight, bias, z, reward, geometry, RULE)
        apply_update(w, fw, twins[0])
        apply_update(b, fb, twins[1])
        got = lf.conv_redistribute_update(
            x, weight, bias, z, reward, geometry, wu, bu, RULE, need_input=True
        )
    assert torch.equal(got, r)  # the input reward is that of the old weight
    # The fused form rounds the feedback to 16 bits only as part of the result.
    tol = {"rtol": torch.finfo(dtype).eps * 8, "atol": torch.finfo(dtype).eps * 8}
    torch.testing.assert_close(weight, w, **tol)
    torch.testing.assert_close(bias, b, **tol)
    for mine, twin in zip((wu, bu), twins):
        for a, e in zip(mine.states, twin.states):
            torch.testing.assert_close(a, e, **tol)


@pytest.mark.parametrize("backend", BACKENDS)
def test_update_form_options(backend: str) -> None:
    *tensors, geometry = layer("2d")
    x, weight, bias, z, reward = tensors
    start = weight.clone(), bias.clone()
    with use_backend(backend):
        none = lf.conv_redistribute_update(
            x, weight, bias, z, reward, geometry, update_for(weight, SGD_PLAIN), need_input=False
        )
        assert none is None
        assert torch.equal(bias, start[1]) and not torch.equal(weight, start[0])
        # A channels-last weight and a strided bias are updated where they lie.
        last = lf.channels_last(start[0])
        strided = start[1].repeat_interleave(2)[::2]
        update = update_for(weight, SGD_PLAIN)
        lf.conv_redistribute_update(
            x, last, strided, z, reward, geometry, update, update_for(bias, SGD_PLAIN)
        )
        assert not last.is_contiguous()
        torch.testing.assert_close(last, weight)
        assert not torch.equal(strided, bias)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["plain", "channels_last"])
@pytest.mark.parametrize("name", ["2d", "2d-groups", "2d-depthwise", "2d-transposed", "3d"])
def test_an_arranged_weight_changes_nothing(name: str, layout: str, backend: str) -> None:
    *tensors, geometry = layer(name)
    x, weight, bias, z, reward = tensors
    if layout == "channels_last":
        x, z, reward = channels_last(x, z, reward)
    tensors = (x, weight, bias, z, reward)
    with use_backend(backend):
        kernel = lf.conv_weight(x, weight, geometry)
        assert torch.equal(kernel, weight)
        assert torch.equal(lf.conv(x, kernel, bias, geometry), lf.conv(x, weight, bias, geometry))
        for rule in (RULE, rules.ZPlus(), rules.SignFeedback()):
            want = lf.conv_redistribute(*tensors, geometry, rule)
            got = lf.conv_redistribute(*tensors, geometry, rule, arranged=kernel)
            assert all(torch.equal(a, b) for a, b in zip(got, want))
        update = update_for(weight, SGD_PLAIN)
        want = lf.conv_redistribute(*tensors, geometry, RULE).input
        got = lf.conv_redistribute_update(*tensors, geometry, update, None, RULE, arranged=kernel)
        assert torch.equal(got, want)
        with pytest.raises(ValueError, match="arranged: expected shape"):
            lf.conv_redistribute(*tensors, geometry, RULE, arranged=kernel[:1])


@pytest.mark.parametrize("layout", ["plain", "channels_last"])
def test_reruns_are_bit_equal_and_inputs_stay(layout: str) -> None:
    g = torch.Generator().manual_seed(3)
    x, weight = torch.randn(64, 8, 20, 20, generator=g), torch.randn(32, 8, 3, 3, generator=g)
    bias, geometry = torch.randn(32, generator=g), ConvGeometry.make((3, 3), padding=1)
    z = lf.conv(x, weight, bias, geometry)
    reward = torch.randn(z.shape, generator=g)
    if layout == "channels_last":
        x, z, reward = channels_last(x, z, reward)
    tensors = (x, weight, bias, z, reward)
    before = [t.clone() for t in tensors]
    runs = [lf.conv_redistribute(*tensors, geometry) for _ in range(3)]
    signals = [lf.conv_redistribute(*tensors, geometry, signal_in=True) for _ in range(2)]
    for results in (*zip(*runs), *zip(*signals)):
        assert all(torch.equal(results[0], t) for t in results[1:])
    assert all(torch.equal(a, b) for a, b in zip(tensors, before))


def test_layout_follows_the_input() -> None:
    x, weight = torch.randn(2, 1, 8, 8), torch.randn(6, 1, 3, 3)
    geometry = ConvGeometry.make((3, 3), padding=1)
    assert lf.conv(x, weight, None, geometry).is_contiguous()
    last = lf.channels_last(x)
    assert torch.equal(last, x) and last.stride() == (64, 1, 8, 1)
    z = lf.conv(last, weight, None, geometry)
    assert z.is_contiguous(memory_format=torch.channels_last) and not z.is_contiguous()
    result = lf.conv_redistribute(last, weight, None, z, z, geometry)
    assert result.input is not None and result.weight is not None
    assert result.input.is_contiguous(memory_format=torch.channels_last)
    assert result.weight.is_contiguous()


GEOMETRY_2D = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)


@pytest.mark.parametrize("layout", ["plain", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.operators
def test_opcheck(layout: str, dtype: torch.dtype, channels: int) -> None:
    ops = torch.ops.lfp_kernels
    x, weight = torch.randn(2, channels, 6, 5).to(dtype), torch.randn(4, channels, 3, 3).to(dtype)
    bias, z = torch.randn(4).to(dtype), torch.randn(2, 4, 6, 5).to(dtype)
    if layout == "channels_last":
        x, z = channels_last(x, z)
    checks = ("test_schema", "test_faketensor")

    def check(op, *args) -> None:
        torch.library.opcheck(op.default, args, test_utils=checks)

    check(ops.conv_forward, x, weight, bias, *GEOMETRY_2D, True)
    rule = (0, [1e-6, 1.0, 0.0, 0.0, 0.0])
    for need in ((True, True, True), (False, True, False)):
        check(
            ops.conv_redistribute, x, weight, bias, z, z, None, *GEOMETRY_2D, *rule, *need, 0, dtype
        )  # fmt: skip
    states = [torch.zeros_like(weight)], [torch.zeros_like(bias)]
    check(
        ops.conv_redistribute_update, x, weight, bias, z, z, None, *states, *GEOMETRY_2D, *rule,
        SGD_MOMENTUM, hyper(), SGD_MOMENTUM, hyper(), True, 0, dtype,
    )  # fmt: skip


def test_compiles_without_graph_break() -> None:
    *tensors, geometry = layer("2d")
    x, weight, bias, _, reward = (t.float() for t in tensors)

    def run(x: Tensor, reward: Tensor) -> tuple[Tensor, Tensor | None]:
        z = lf.conv(x, weight, bias, geometry)
        return z, lf.conv_redistribute(x, weight, bias, z, reward, geometry).input

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(x, reward), run(x, reward)):
        assert torch.equal(actual, expected)


def test_geometry_of_modules() -> None:
    conv = nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=1, dilation=2, groups=2)
    assert ConvGeometry.of(conv) == ((2, 1), (1, 1), (2, 2), False, (0, 0), 2)
    same = nn.Conv1d(2, 2, 5, padding="same", dilation=2)
    assert ConvGeometry.of(same).padding == (4,)
    assert ConvGeometry.of(nn.Conv3d(1, 1, 3, padding="valid")).padding == (0, 0, 0)
    up = nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1)
    assert ConvGeometry.of(up) == ((2, 2), (0, 0), (1, 1), True, (1, 1), 1)
    x = torch.randn(2, 2, 9)
    torch.testing.assert_close(
        lf.conv(x, same.weight.data, same.bias.data, ConvGeometry.of(same)), same(x).detach()
    )
    with pytest.raises(ValueError, match="pads one side more"):
        ConvGeometry.of(nn.Conv1d(2, 2, 4, padding="same"))
    with pytest.raises(ValueError, match="padding_mode: expected 'zeros', got 'reflect'"):
        ConvGeometry.of(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(ValueError, match="'same' needs stride 1"):
        ConvGeometry.make((3,), stride=2, padding="same")
    with pytest.raises(ValueError, match="'same' or 'valid', got 'full'"):
        ConvGeometry.make((3,), padding="full")
    with pytest.raises(ValueError, match="stride: expected an int or 2 ints"):
        ConvGeometry.make((3, 3), stride=(1, 1, 1))


def test_bad_arguments_change_nothing() -> None:
    *tensors, geometry = layer("2d")
    x, weight, bias, z, reward = tensors
    wu, bu = update_for(weight, SGD_MOMENTUM), update_for(bias, SGD_MOMENTUM)
    good = dict(
        x=x, weight=weight, bias=bias, z=z, reward=reward, geometry=geometry, weight_update=wu,
        bias_update=bu, rule=RULE,
    )  # fmt: skip
    state = [weight, bias, *wu.states, *bu.states]
    before = [t.clone() for t in state]
    bad = [
        ({"x": x.int()}, TypeError, "x: expected float64"),
        ({"x": x[:, :3]}, ValueError, r"x: expected shape \[N, 5, H, W\]"),
        ({"x": x[..., 0, 0]}, ValueError, r"x: expected shape"),
        ({"x": x[..., :0]}, ValueError, "output of at least 1"),
        ({"weight": weight.float()}, TypeError, "weight: expected torch.float64 like x"),
        ({"weight": weight[0, 0]}, ValueError, "weight: expected shape"),
        ({"bias": bias[:-1]}, ValueError, "bias: expected shape"),
        ({"z": z[:-1]}, ValueError, "z: expected shape"),
        ({"z": z.float()}, TypeError, "z: expected torch.float64"),
        ({"reward": reward[..., 1:]}, ValueError, "reward: expected shape"),
        ({"reward": None}, TypeError, "reward: expected a torch.Tensor"),
        ({"rule": 1e-6}, TypeError, "rule: expected one of"),
        ({"geometry": (1, 1)}, TypeError, "geometry: expected a ConvGeometry"),
        ({"geometry": geometry._replace(stride=(1,))}, ValueError, "geometry.stride: expected 2"),
        ({"geometry": geometry._replace(dilation=(0, 1))}, ValueError, "geometry.dilation"),
        ({"geometry": geometry._replace(padding=(-1, 0))}, ValueError, "geometry.padding"),
        ({"geometry": geometry._replace(groups=5)}, ValueError, "groups: expected a divisor"),
        ({"geometry": geometry._replace(output_padding=(1, 0))}, ValueError, "output_padding"),
        ({"weight_update": None}, TypeError, "weight_update: expected an lfp_kernels"),
        ({"weight_update": Update(SGD_MOMENTUM, hyper(), [])}, ValueError, "states"),
        ({"weight_update": Update(7, hyper(), [])}, ValueError, "got code 7"),
        ({"bias_update": Update(SGD_MOMENTUM, hyper(), wu.states)}, ValueError, "expected shape"),
        ({"bias": None}, ValueError, "bias_update: expected None for a layer without bias"),
        ({"product_dtype": torch.bfloat16}, ValueError, "product_dtype: expected torch.float64"),
    ]
    for backend in BACKENDS:
        for change, error, message in bad:
            with use_backend(backend), pytest.raises(error, match=message) as caught:
                lf.conv_redistribute_update(**{**good, **change})  # type: ignore[arg-type]
            assert "conv_redistribute_update" in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(state, before))
