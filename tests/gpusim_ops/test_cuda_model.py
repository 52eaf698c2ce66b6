"""The byte formulas of bench/gpu_model against the bytes that the executed kernels move.

Every launch is compared: what its threads request (exactly), and the distinct bytes among that
(exactly). Runs under ``--simulate cuda``; ``--capability 90 --processors 4`` takes the TMA kernels.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as TF
from gpusim import counting
from torch import Tensor

import lfp_kernels
from bench import specs
from bench.gpu_model import devices, traffic
from lfp_kernels import functional as F
from lfp_kernels import optim, rewards
from lfp_kernels.backends import select
from lfp_kernels.ops.spiking.codes import Reset
from lfp_kernels.optim import BoundOptimizer
from lfp_kernels.rules import Epsilon

pytestmark = pytest.mark.gpusim
CHAIN = {"signal_in": True, "below": Epsilon()}


@pytest.fixture
def gpu(request) -> devices.Gpu:
    option = request.config.getoption
    return replace(
        devices.A100, capability=option("--capability"), processors=option("--processors")
    )


def values(shape, dtype=torch.float32, last=False) -> Tensor:
    t = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    memory = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.contiguous(memory_format=memory[t.dim()]) if last else t


def check(call, gpu: devices.Gpu, warm: bool = False) -> traffic.Recorder:
    """``warm``: the first call sets up what later ones find."""
    if warm:
        call()
    with counting() as counts, traffic.Recorder(gpu) as recorder:
        call()
    model = [x for c in recorder.calls for x in c.launches if x.kernel != "aten"]
    names = [launch.kernel for launch in counts.launches]
    assert len(model) == len(names), f"{[x.kernel for x in model]} launched as {names}"
    for expected, counted in zip(model, counts.launches):
        assert expected.kernel in counted.kernel
        formula, found = (expected.requested, expected.distinct), (
            counted.bytes, counted.unique_bytes,
        )  # fmt: skip
        detail = [
            f"{b.name}: {b.load.bytes} ({b.load.unique_bytes}), {b.store.bytes}"
            for b in counted.buffers
        ]
        assert formula == found, f"{expected} counted {detail}"
    return recorder


# ---- linear

LINEAR = {  # batch, in, out: one pass and two products, split or not, ragged or not
    "one pass": (5, 200, 264),
    "one pass, several ranges": (3, 40, 700),
    "two products": (140, 72, 68),
    "split sums": (300, 24, 20),
    "boxes of TMA": (150, 264, 200),
    "ragged": (131, 67, 33),
}
SPECS = {"sgd": optim.SGD(0.1), "momentum": optim.SGD(0.1, momentum=0.9), "adamw": optim.AdamW(0.1)}


def linear_case(shape, dtype):
    n, inner, out = shape
    x, weight, bias = values((n, inner), dtype), values((out, inner), dtype), values((out,), dtype)
    return x, weight, bias, values((n, out), dtype), values((n, out), dtype)


def updates(weight, bias, spec=SPECS["momentum"]):
    bound = BoundOptimizer(spec, [torch.nn.Parameter(weight), torch.nn.Parameter(bias)])
    return [bound.update_of(p, bound.param_groups[0]) for p in bound.param_groups[0]["params"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LINEAR)
def test_linear(name, dtype, gpu) -> None:
    x, weight, bias, z, reward = linear_case(LINEAR[name], dtype)
    check(lambda: F.linear(x, weight, bias, relu=True), gpu)
    check(lambda: F.linear_redistribute(x, weight, bias, z, reward), gpu)
    check(lambda: F.linear_redistribute(x, weight, None, z, reward, need=(False, True, False)), gpu)
    spec = SPECS["adamw" if dtype == torch.float32 else "momentum"]
    to_w, to_b = updates(weight, bias, spec)
    arguments = (x, weight, bias, z, reward, to_w, to_b)
    check(lambda: F.linear_redistribute_update(*arguments, **CHAIN), gpu)


# ---- memory-bound operators

LAYOUTS = pytest.mark.parametrize("last", [False, True], ids=["plain", "last"])


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 32, 40, 40), (5, 11, 3, 3)], ids=str)
def test_batch_norm(shape, dtype, last, gpu) -> None:
    x = values(shape, dtype, last)
    vectors = [values((shape[1],), dtype).abs() + 1 for _ in range(4)]
    for training in (True, False):
        forward = partial(F.batch_norm, x, *vectors, training, 0.1, 1e-5)
        check(partial(forward, relu=True), gpu)
        z, *stats = forward()
        arguments = (x, *vectors[:2], z, values(shape, dtype, last), *stats, training)
        check(partial(F.batch_norm_redistribute, *arguments), gpu)
        check(partial(F.batch_norm_redistribute, *arguments, **CHAIN), gpu)


POOLS = {
    "tiles": ((4, 16, 28, 28), (2, 2, 0)),
    "overlaps": ((2, 16, 56, 56), (3, 2, 1)),
    "parts of planes": ((1, 2, 131, 97), (3, 2, 1)),
    "several planes": ((96, 20, 4, 4), (2, 2, 0)),
    "odd channels": ((1, 11, 40, 40), (3, 2, 1)),
}


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", POOLS)
def test_pools(name, dtype, last, gpu) -> None:
    shape, window = POOLS[name]
    x = values(shape, dtype, last)
    check(lambda: F.max_pool(x, *window), gpu)
    out, indices = F.max_pool(x, *window)
    check(lambda: F.max_pool_redistribute(values(out.shape, dtype, last), indices, shape), gpu)
    z, r = (values(TF.avg_pool2d(x.float(), *window).shape, dtype, last) for _ in range(2))
    check(lambda: F.avg_pool_redistribute(x, z, r, *window), gpu)
    mean = values((*shape[:2], 1, 1), dtype, last)
    check(lambda: F.adaptive_avg_pool_redistribute(x, mean, mean.clone(), **CHAIN), gpu)


def test_elementwise(gpu) -> None:
    a, b, r = (values((2, 3, 41)) for _ in range(3))
    check(lambda: F.step(a), gpu)
    check(lambda: F.sum_redistribute(a, b, r), gpu)
    mask = (a > 0).to(torch.uint8)
    check(lambda: torch.ops.lfp_kernels.dropout_redistribute(r, mask, 2.0), gpu)


@pytest.mark.parametrize("classes", [10, 300, 13001])
def test_rewards(classes, gpu) -> None:
    out = values((6, classes))
    y = torch.arange(6) % classes
    for reward in (
        rewards.softmax, rewards.sigmoid, rewards.correct_classification, rewards.misclassification,
    ):  # fmt: skip
        check(partial(reward, out, y), gpu)
    check(lambda: rewards.maximize(out), gpu)
    check(lambda: rewards.regression(out, out.clone()), gpu)


@pytest.mark.parametrize("steps", [25, 400])
def test_spike_rate(steps, gpu) -> None:
    spikes, y = (values((steps, 7, 45)) > 1).float(), torch.arange(7)
    check(lambda: rewards.snn_rate(spikes, y), gpu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("neurons", [24, 35, 1040])
def test_spiking(neurons, dtype, gpu) -> None:
    x, state = values((21, neurons), dtype), values((neurons,), dtype)
    one, channels = values((1,), dtype), values((5 if neurons == 35 else 4,), dtype)
    op = select("spiking", x)
    for k, reset in enumerate(Reset):
        beta, inner = (channels, neurons // channels.numel()) if k % 2 else (one, 1)
        neuron = (beta, one.clone() if k < 2 else channels.clone(), inner)
        begin, sums = state if k % 2 else None, k > 1
        check(partial(op.forward, x[:1], begin, *neuron, 21, reset, sums), gpu)
        bits, membrane, _ = op.forward(x, begin, *neuron, 21, reset, True)
        arguments = (x.clone(), membrane, bits, begin, None, *neuron, 1e-6, reset)
        check(partial(op.feedback, *arguments, sums, False, sums), gpu)
    for first in (0, 1):
        check(partial(op.unpack, bits, 21, dtype, 0.5, 1, first), gpu)
        check(partial(op.add_noise, x, 21, 0.5, 1, first), gpu)
        check(partial(op.add_noise, x[:1], 21, 0.5, 1, first), gpu)


def test_updates_and_norm(gpu) -> None:
    params = [torch.nn.Parameter(values((100 + k,))) for k in range(70)]
    for spec in SPECS.values():
        groups = [{"params": params[k::11], "lr": 0.01 * (k + 1)} for k in range(11)]
        bound = BoundOptimizer(spec, groups)
        for p in params:
            p.grad = values(p.shape)
        check(bound.step, gpu, warm=True)
    live = optim.AdamW(torch.tensor(0.1, dtype=torch.float64), capturable=True)
    bound = BoundOptimizer(live, [{"params": params[:60]}, {"params": params[60:], "lr": 0.1}])
    bound.param_groups[1]["lr"] = torch.tensor(0.2)
    check(bound.step, gpu, warm=True)
    tensors = [values((k * 37 % 9001 + 1,)) for k in range(170)]
    check(lambda: F.global_norm([*tensors, values((9000,), torch.bfloat16)]), gpu)


# ---- convolution

CONVS = {  # x, weight; stride, padding, dilation, groups, transposed
    "3x3": ((2, 20, 12, 12), (24, 20, 3, 3), (1, 1, 1, 1, False)),
    "3x3, odd sizes": ((2, 7, 9, 11), (5, 7, 3, 3), (1, 1, 1, 1, False)),
    "7x7 stride 2": ((1, 3, 30, 30), (16, 3, 7, 7), (2, 3, 1, 1, False)),
    "3x3 stride 2": ((2, 16, 13, 12), (16, 16, 3, 3), (2, 1, 1, 1, False)),
    "1x1": ((2, 16, 8, 8), (32, 16, 1, 1), (1, 0, 1, 1, False)),
    "1x1 stride 2": ((2, 16, 9, 9), (32, 16, 1, 1), (2, 0, 1, 1, False)),
    "groups, dilation": ((2, 16, 10, 10), (32, 8, 3, 3), (1, 2, 2, 2, False)),
    "depthwise": ((2, 24, 9, 9), (24, 1, 3, 3), (1, 1, 1, 24, False)),
    "few channels": ((3, 1, 28, 28), (16, 1, 5, 5), (1, 0, 1, 1, False)),
    "transposed": ((2, 8, 7, 7), (8, 12, 3, 3), (2, 1, 1, 1, True)),
}


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONVS)
def test_convolution(name, dtype, last, gpu) -> None:
    shape, kernel, (stride, padding, dilation, groups, transposed) = CONVS[name]
    x, weight = values(shape, dtype, last), values(kernel, dtype)
    channels = kernel[1] * groups if transposed else kernel[0]
    bias = values((channels,), dtype)
    pairs = ((stride,) * 2, (padding,) * 2, (dilation,) * 2)
    geometry = F.ConvGeometry(*pairs, transposed, (0, 0), groups)
    check(lambda: F.conv(x, weight, bias, geometry), gpu)
    z = values(F.conv(x, weight, bias, geometry).shape, dtype, last)
    arguments = (x, weight, bias, z, z.clone())
    check(lambda: F.conv_redistribute(*arguments, geometry), gpu)
    to_w, to_b = updates(weight, bias)
    check(lambda: F.conv_redistribute_update(*arguments, geometry, to_w, to_b, **CHAIN), gpu)


def test_the_copy_of_a_weight_serves_both_directions(gpu) -> None:
    x, weight = values((2, 20, 6, 6), last=True), values((24, 20, 3, 3))
    geometry = F.ConvGeometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    kernel = F.conv_weight(x, weight, geometry)
    assert kernel is not weight and torch.equal(kernel, weight)
    z = F.conv(x, kernel, None, geometry)
    back = partial(F.conv_redistribute, x, weight, None, z, z.clone(), geometry, Epsilon())
    runs = [partial(F.conv, x, kernel, None, geometry), partial(back, arranged=kernel)]
    for run in runs:
        assert all(n.kernel != "aten" for c in check(run, gpu).calls for n in c.launches)
    assert torch.equal(back(arranged=2 * kernel).input, 2 * back().input)  # it is what is read
    plain = x.contiguous()
    assert F.conv_weight(plain, weight, geometry) is weight


# ---- whole steps


@pytest.mark.parametrize("name", ["lenet", "vgg_bn", "wide"])
def test_training_step(name, gpu) -> None:
    """Every launch of a fused step, those of our kernels, is one that the model has."""
    if name == "lenet":
        model, shape = specs.lenet(), (2, 1, 28, 28)
    elif name == "vgg_bn":
        model, shape = specs.vgg_bn(8, (4, 8), (16, 16)), (3, 3, 8, 8)
    else:  # channels last: forward and back share a copy of W
        model, shape = specs.vgg_bn(8, (32, 32), (16, 16)), (2, 3, 8, 8)
    step = lfp_kernels.fuse(
        model.train(), lfp_kernels.composites.Epsilon(), optimizer=optim.SGD(1e-3, momentum=0.9)
    )
    x, y = values(shape), torch.arange(shape[0])
    recorder = check(lambda: step(x, y), gpu, warm=True)
    moved = math.fsum(c.distinct for c in recorder.calls)
    print(f"{name}: {sum(len(c.launches) for c in recorder.calls)} launches, {moved:.0f} bytes")
