"""Spiking networks against stored results of the official package lfprop 1.0.0, float32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from golden_networks import FOLDER
from torch import Tensor, nn

import lfp_kernels
from lfp_kernels import composites, functional, optim, rewards
from lfp_kernels.compat.lfprop.model.spiking_networks import Leaky, NoisyWrapper, SpikingLayer
from lfp_kernels.compat.lfprop.propagation.propagator_snn import LFPSNNEpsilonComposite
from lfp_kernels.compat.lfprop.rewards.reward_functions import SnnCorrectClassRewardSpikesRateCoded
from lfp_kernels.nn import LIF, Spiking

RELATIVE = 1e-5
BACKENDS = ("native", "reference")
LAYERS = {
    "snn_mlp": lambda: [nn.Linear(12, 32), nn.Linear(32, 5)],
    "snn_conv": lambda: [nn.Conv2d(2, 6, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96, 4)],
}


@dataclass
class Golden:
    layers: list[nn.Module]  # with the stored weights
    beta: float
    eps: float
    steps: int
    stored: dict[str, Tensor]

    @property
    def feedback(self) -> list[Tensor]:
        return [value for key, value in self.stored.items() if key.startswith("f/")]

    def spiking(self, chunk: int | None = None) -> Spiking:
        chain: list[nn.Module] = []
        for layer in self.layers:
            chain.append(layer)
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                chain.append(LIF(self.beta))
        return Spiking(nn.Sequential(*chain), self.steps, chunk=chunk)

    def stepping(self) -> nn.Sequential:
        chain: list[nn.Module] = []
        for layer in self.layers:
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                neurons = Leaky(self.beta, init_hidden=True, output=layer is self.layers[-1])
                layer = SpikingLayer(NoisyWrapper(layer, 0.0, False), neurons)
            chain.append(layer)
        return nn.Sequential(*chain)


@pytest.fixture(params=LAYERS)
def golden(request: pytest.FixtureRequest) -> Golden:
    with np.load(FOLDER / f"{request.param}.npz", allow_pickle=False) as file:
        stored = {key: torch.from_numpy(np.array(file[key])) for key in file.files}
    layers = LAYERS[request.param]()
    weights = [value for key, value in stored.items() if key.startswith("p/")]
    with torch.no_grad():
        for parameter, value in zip(nn.ModuleList(layers).parameters(), weights, strict=True):
            parameter.copy_(value)
    steps = int(stored["T"])
    return Golden(layers, float(stored["beta"]), float(stored["eps"]), steps, stored)


def relative(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.detach() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_drop_in(golden: Golden, backend: str, chunk: int | None) -> None:
    spiking = golden.spiking(chunk)
    x = golden.stored["x"].clone().requires_grad_()
    with lfp_kernels.use_backend(backend), composites.Epsilon(golden.eps).context(spiking):
        out = spiking(x)
        reward = rewards.snn_rate(out, golden.stored["y"])
        lfp_kernels.backward(out, reward)
    assert torch.equal(out.detach(), golden.stored["spikes"])
    assert relative(reward, golden.stored["reward"]) < RELATIVE
    assert x.grad is not None
    assert relative(-x.grad, golden.stored["input_reward"]) < RELATIVE
    for parameter, feedback in zip(spiking.parameters(), golden.feedback, strict=True):
        assert parameter.grad is not None
        assert relative(-parameter.grad, feedback) < RELATIVE


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_fused(golden: Golden, backend: str, chunk: int | None) -> None:
    spiking = golden.spiking(chunk)
    before = [parameter.detach().clone() for parameter in spiking.parameters()]
    with lfp_kernels.use_backend(backend):
        step = lfp_kernels.fuse(
            spiking,
            composites.Epsilon(golden.eps),
            reward=rewards.snn_rate,
            optimizer=optim.SGD(lr=1.0),
        )
        result = step(golden.stored["x"], golden.stored["y"])
    assert torch.equal(result.out, golden.stored["spikes"])
    assert relative(result.reward, golden.stored["reward"]) < RELATIVE
    for parameter, old, feedback in zip(spiking.parameters(), before, golden.feedback, strict=True):
        # At lr 1 the update is the feedback itself, but for what float32 loses in w + f - w.
        rounding = 1.2e-7 * float(parameter.detach().abs().max() / feedback.abs().max())
        assert relative(parameter.detach() - old, feedback) < RELATIVE + rounding


def test_stepping(golden: Golden) -> None:
    """lfprop's own loop, one call per time step."""
    network = golden.stepping()
    reward_func = SnnCorrectClassRewardSpikesRateCoded("cpu")
    x = golden.stored["x"].clone().requires_grad_()
    with LFPSNNEpsilonComposite(epsilon=golden.eps).context(network) as modified:
        spikes = torch.stack([modified(x)[0] for _ in range(golden.steps)])
        reward = reward_func(spikes, golden.stored["y"])
        (found,) = torch.autograd.grad((spikes,), (x,), grad_outputs=(reward,))
    assert torch.equal(spikes.detach(), golden.stored["spikes"])
    assert relative(found, golden.stored["input_reward"]) < RELATIVE
    named = {f"f/{name}": p for name, p in network.named_parameters()}
    for key, value in golden.stored.items():
        if key.startswith("f/"):
            assert relative(named[key].feedback, value) < RELATIVE, key  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_layer_by_layer(golden: Golden, backend: str, dtype: torch.dtype) -> None:
    """Each layer's own numbers from the stored spikes and rewards that leave the network."""
    steps, y = golden.steps, golden.stored["y"]
    first, *between, last = (layer.to(dtype) for layer in golden.layers)
    x = golden.stored["x"].to(dtype)
    neurons = {"beta": golden.beta, "eps": golden.eps}

    def over_time(layer: nn.Module, value: Tensor) -> Tensor:
        return layer(value.flatten(0, 1)).unflatten(0, (steps, len(y)))

    with lfp_kernels.use_backend(backend), torch.no_grad():
        hidden = functional.lif_forward(first(x), golden.beta, steps=steps)
        spikes = hidden.spikes.unpack(dtype)
        seen = spikes
        for layer in between:
            seen = over_time(layer, seen)
        out = functional.lif_forward(over_time(last, seen), golden.beta)
        assert torch.equal(out.spikes.unpack(), golden.stored["spikes"])
        assert out.membrane is not None and hidden.membrane is not None
        reward = golden.stored["reward"].to(dtype)
        signal = functional.lif_feedback(reward, out.membrane, out.spikes, **neurons).signal
        weight, bias = last.weight, last.bias
        found = [weight.abs() * torch.einsum("tnc,tnk->ck", signal, seen)]
        found.append(bias.abs() * signal.sum((0, 1)))
        reward = seen * (signal @ weight)
        if between:  # the winner of a window takes its reward, the first one on ties
            flat, pool = spikes.flatten(0, 1), between[0]
            assert isinstance(pool, nn.MaxPool2d)
            pooled, index = TF.max_pool2d(flat, 2, return_indices=True)
            reward = TF.max_unpool2d(reward.reshape(pooled.shape), index, 2)
            reward = reward.unflatten(0, (steps, len(y)))
        scanned = functional.lif_feedback(
            reward, hidden.membrane, hidden.spikes, **neurons, sum_steps=True
        ).signal
    probe = x.clone().requires_grad_()
    slopes = torch.autograd.grad(first(probe), [*first.parameters(), probe], scanned)
    found = [p.abs() * g for p, g in zip(first.parameters(), slopes)] + found
    assert relative(x * slopes[-1], golden.stored["input_reward"]) < RELATIVE
    for value, feedback in zip(found, golden.feedback, strict=True):
        assert relative(value, feedback) < RELATIVE
