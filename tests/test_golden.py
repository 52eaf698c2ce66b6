"""Both ways to train against stored results of the official package lfprop 1.0.0, float64."""

from __future__ import annotations

import pytest
import torch
from golden_networks import NETWORKS, Golden, load
from torch import Tensor

import lfp_kernels
from lfp_kernels import optim, rewards

RELATIVE = 1e-9
BACKENDS = ("native", "reference")


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest error over the largest entry; a stored zero (a zero weight's feedback) is exact."""
    actual, expected = actual.detach().double(), expected.double()
    error, scale = float((actual - expected).abs().max()), float(expected.abs().max())
    return error / scale if scale else error


@pytest.fixture(params=NETWORKS)
def golden(request: pytest.FixtureRequest) -> Golden:
    return load(request.param)


def check_buffers(golden: Golden) -> None:
    buffers = dict(golden.model.named_buffers())
    assert buffers.keys() == golden.buffers_after.keys()
    for name, buffer in buffers.items():
        assert relative(buffer, golden.buffers_after[name]) < RELATIVE, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_drop_in(golden: Golden, backend: str) -> None:
    x = golden.x.clone().requires_grad_()
    with lfp_kernels.use_backend(backend), golden.composite.context(golden.model):
        out = golden.model(x)
        reward = rewards.softmax(out, golden.y)
        lfp_kernels.backward(out, reward)
    assert relative(out, golden.out) < RELATIVE
    assert relative(reward, golden.reward) < RELATIVE
    assert x.grad is not None
    assert relative(-x.grad, golden.input_reward) < RELATIVE
    for name, parameter in golden.model.named_parameters():
        assert parameter.grad is not None
        assert relative(-parameter.grad, golden.feedback[name]) < RELATIVE, name
    check_buffers(golden)


@pytest.mark.parametrize("clip_norm", [None, 1e9])
@pytest.mark.parametrize("backend", BACKENDS)
def test_fused(golden: Golden, backend: str, clip_norm: float | None) -> None:
    before = {k: p.detach().clone() for k, p in golden.model.named_parameters()}
    with lfp_kernels.use_backend(backend):
        step = lfp_kernels.fuse(
            golden.model,
            golden.composite,
            reward="softmax",
            optimizer=optim.SGD(lr=1.0, clip_norm=clip_norm),
        )
        result = step(golden.x, golden.y)
    assert relative(result.out, golden.out) < RELATIVE
    assert relative(result.reward, golden.reward) < RELATIVE
    for name, parameter in golden.model.named_parameters():
        moved = parameter.detach() - before[name]
        # The update is the feedback itself at lr 1; what float64 loses in w + f - w is allowed for.
        size = float(golden.feedback[name].abs().max()) or 1.0
        rounding = 4e-16 * float(before[name].abs().max()) / size
        assert relative(moved, golden.feedback[name]) < RELATIVE + rounding, name
    check_buffers(golden)


@pytest.mark.parametrize("name", ["mlp", "lenet"])
def test_float32_within_budget(name: str) -> None:
    golden = load(name)
    model = golden.model.float()
    with golden.composite.context(model):
        out = model(golden.x.float())
        lfp_kernels.backward(out, golden.reward.float())
    with lfp_kernels.use_backend("reference"):
        reference = load(name).model.float()
        with golden.composite.context(reference):
            lfp_kernels.backward(reference(golden.x.float()), golden.reward.float())
    oracles = golden.feedback
    for (key, parameter), other in zip(model.named_parameters(), reference.parameters()):
        assert parameter.grad is not None and other.grad is not None
        oracle = oracles[key]
        error = float((other.grad.double() + oracle).abs().max())
        budget = 2 * (error + torch.finfo(torch.float32).eps * float(oracle.abs().max()))
        assert float((parameter.grad.double() + oracle).abs().max()) <= budget, key
