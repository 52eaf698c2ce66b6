"""Spiking networks of lfp_kernels.compat.lfprop; lfprop itself: tests/test_spiking_golden.py and
tests/peers."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from compat_lfprop_cases import RELATIVE, feedback, relative, snapshot
from torch import Tensor, nn

import lfp_kernels
from lfp_kernels.compat.lfprop import backward
from lfp_kernels.compat.lfprop.model import models
from lfp_kernels.compat.lfprop.model.spiking_networks import (
    SPIKE_GRAD_MAP,
    Interpolate,
    Leaky,
    LifCNN,
    NoisyWrapper,
    ResNet,
    SmallLifMLP,
    SpikingLayer,
)
from lfp_kernels.compat.lfprop.propagation.propagator_snn import (
    LFPEpsilonSNN,
    LFPSNNEpsilonComposite,
)
from lfp_kernels.compat.lfprop.rewards.rewards import get_reward
from lfp_kernels.nn import from_snntorch

STEPS = 6
RESETS = [(reset, delay) for reset in ("subtract", "zero", "none") for delay in (True, False)]


def small(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    noise = options.pop("noise", 0.0)
    rates = options.pop("beta", (torch.rand(6, 1, 1), 0.9))

    def layer(inner: nn.Module, beta: Any, **more: Any) -> SpikingLayer:
        neurons = Leaky(beta, **options, **more, init_hidden=True)
        return SpikingLayer(NoisyWrapper(inner, noise, noise > 0), neurons)

    return nn.Sequential(
        layer(nn.Conv2d(2, 6, 3), rates[0]), nn.MaxPool2d(2), nn.Flatten(),
        layer(nn.Linear(54, 5), rates[1], output=True),
    ).double()  # fmt: skip


def rest(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, Leaky):
            module.reset_mem()


def data(scale: float = 3.0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(4, 2, 8, 8).double() * scale, torch.randint(5, (4,))


def propagate(network: Any, x: Tensor, y: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    """lfprop's loop: (spikes, input reward); feedback is on the parameters."""
    reward_func = get_reward("snnratecodedreward", "cpu")
    with LFPSNNEpsilonComposite(**given).context(network) as modified:
        inputs = x.detach().clone().requires_grad_()
        spikes = torch.stack([modified(inputs)[0] for _ in range(STEPS)])
        reward = reward_func(spikes, y)
        (found,) = torch.autograd.grad((spikes,), (inputs,), grad_outputs=(reward,))
    return spikes.detach(), found


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(("reset", "delay"), RESETS)
def test_the_numbers_of_the_library(reset: str, delay: bool, learned: bool) -> None:
    """Step by step and over all steps at once, the same to rounding; learned neurons included."""
    options: dict[str, Any] = {"reset_mechanism": reset, "reset_delay": delay}
    if learned:
        # 1.3 acts as 1.
        options |= {"learn_beta": True, "learn_threshold": True, "beta": (1.3, 0.9)}
    network = small(**options)
    x, y = data()
    spikes, input_reward = propagate(network, x, y, epsilon=1e-4)
    assert 0.02 < spikes.mean() < 0.98
    spiking = from_snntorch(network, STEPS)
    with lfp_kernels.composites.Epsilon(1e-4).context(spiking):
        inputs = x.clone().requires_grad_()
        out = spiking(inputs)
        lfp_kernels.backward(out, lfp_kernels.rewards.snn_rate(out, y))
    assert torch.equal(out.detach(), spikes)
    assert inputs.grad is not None and relative(-inputs.grad, input_reward) < RELATIVE
    assert len(feedback(network)) == (8 if learned else 4)
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        found = parameter.feedback  # type: ignore[attr-defined]
        assert relative(found, -parameter.grad) < RELATIVE and found.abs().max() > 0, name


def test_feedback_is_overwritten_by_the_next_pass_and_grad_stays() -> None:
    network = small()
    x, y = data()
    runs = []
    for _ in range(2):
        rest(network)
        propagate(network, x, y)
        runs.append(feedback(network))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert all(p.grad is None for p in network.parameters())
    rest(network)
    with LFPSNNEpsilonComposite().context(network):  # an input that does not require grad
        spikes = torch.stack([network(x)[0] for _ in range(STEPS)])
        backward(spikes, get_reward("snnratecodedreward", "cpu")(spikes, y))
    for name, value in feedback(network).items():
        assert relative(value, runs[0][name]) < RELATIVE, name


def test_without_a_reset_the_membrane_goes_on_and_the_last_pass_is_over() -> None:
    network = small()
    x, y = data()
    with LFPSNNEpsilonComposite().context(network):
        reward_func = get_reward("snnratecodedreward", "cpu")
        found = []
        for _ in range(2):
            inputs = x.clone().requires_grad_()
            spikes = torch.stack([network(inputs)[0] for _ in range(STEPS)])
            reward = reward_func(spikes, y)
            (of_x,) = torch.autograd.grad((spikes,), (inputs,), grad_outputs=(reward,))
            found.append(spikes.detach())
    twice = from_snntorch(network, 2 * STEPS)(x).detach()
    assert torch.equal(torch.cat(found), twice)
    assert not torch.equal(found[0], found[1])
    last = network[3].spike_mechanism
    assert not last.mem.requires_grad
    expected = {name: value.clone() for name, value in feedback(network).items()}
    rest(network)
    inputs = x.clone().requires_grad_()
    for _ in range(STEPS):
        network(inputs)  # plain steps lead to the same membranes
    with LFPSNNEpsilonComposite().context(network):
        spikes = torch.stack([network(inputs)[0] for _ in range(STEPS)])
        (again,) = torch.autograd.grad((spikes,), (inputs,), grad_outputs=(reward_func(spikes, y),))
    assert relative(again, of_x) < RELATIVE
    for name, value in feedback(network).items():
        assert relative(value, expected[name]) < RELATIVE, name
    assert last.mem.abs().max() > 0
    rest(network)
    assert last.mem.abs().max() == 0


def test_the_network_comes_back_as_it_was() -> None:
    network = small()
    x, y = data()
    keys = list(network.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        propagate(network, x, y)
        rest(network)
        before = snapshot(network)
        with LFPSNNEpsilonComposite().context(network) as modified:
            assert modified is network and list(network.state_dict()) == keys
    for (module, own), (other, now) in zip(snapshot(network), before):
        assert module == other
        assert {k: v for k, v in own.items() if k != "mem"} == {
            k: v for k, v in now.items() if k != "mem"
        }


def test_a_reward_of_the_membrane_adds_to_that_of_the_spikes() -> None:
    found = []
    x, _ = data()
    for of_spikes in (1.0, 0.25):
        network = small()
        with LFPSNNEpsilonComposite().context(network):
            inputs = x.clone().requires_grad_()
            spikes, membrane = network(inputs)
            rewards = (torch.full_like(spikes, of_spikes), torch.full_like(spikes, 1 - of_spikes))
            found.append(torch.autograd.grad((spikes, membrane), (inputs,), rewards)[0])
    assert relative(found[0], found[1]) < RELATIVE and found[0].abs().max() > 0


def test_noise() -> None:
    """The weight sees the noisy input, the neurons below the clean one; eval is without noise."""
    layer = SpikingLayer(
        NoisyWrapper(nn.Linear(8, 3, bias=False), 0.5, True),
        Leaky(0.9, init_hidden=True, output=True),
    ).double()  # fmt: skip
    x, r = torch.randn(4, 8).double().requires_grad_(), torch.randn(4, 3).double()
    x.data[:, 0] = 0
    torch.manual_seed(3)
    with LFPSNNEpsilonComposite(epsilon=1e-6).context(layer):
        spikes, _ = layer(x)
        (of_x,) = torch.autograd.grad((spikes,), (x,), grad_outputs=(r,))
    torch.manual_seed(3)
    noisy = x.detach() + torch.randn_like(x) * 0.5
    weight = layer.parameterized_layer.module.weight
    n = r / ((noisy @ weight.T).abs() + 1e-6)
    assert relative(of_x, (x * (n @ weight)).detach()) < RELATIVE
    assert relative(weight.feedback, (weight.abs() * (n.T @ noisy)).detach()) < RELATIVE
    assert layer.parameterized_layer.zeros_ratio == 0.125
    layer.eval()
    rest(layer)
    first = layer(x)[1]
    assert torch.equal(first, x @ weight.T)


def test_rule_errors() -> None:
    with pytest.raises(TypeError, match="module: expected a SpikingLayer, got Linear"):
        LFPEpsilonSNN(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="spike_mechanism: expected snntorch.Leaky, got ReLU"):
        with LFPSNNEpsilonComposite().context(SpikingLayer(nn.Linear(2, 2), nn.ReLU())):
            pass
    for beta in (torch.rand(5), torch.rand(6, 2, 2)):
        network = small(beta=(beta, 0.9)).double()
        with LFPSNNEpsilonComposite().context(network):
            with pytest.raises(ValueError, match="beta: expected one value, or one per channel"):
                network(torch.rand(2, 2, 4, 4).double())
    for name, value in (
        ("inhibition", True), ("state_quant", abs), ("graded_spikes_factor", 2.0),
        ("learn_graded_spikes_factor", True), ("reset_mechanism", "half"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"Leaky: {name}: expected"):
            Leaky(0.9, **{name: value})
    with pytest.raises(TypeError, match="mem: expected None"):
        Leaky(0.9, init_hidden=True)(torch.rand(2, 3), torch.rand(2, 3))


def test_leaky_with_a_membrane_of_the_callers() -> None:
    neurons = Leaky(0.5, 1.0)
    spikes, membrane = neurons(torch.tensor([[0.4, 0.4]]), torch.tensor([[0.8, 1.6]]))
    assert torch.allclose(membrane, torch.tensor([[0.8, 0.2]])) and spikes.sum() == 0
    assert list(neurons.state_dict()) == [
        "threshold", "graded_spikes_factor", "reset_mechanism_val", "beta"
    ]  # fmt: skip


SIZES = {"lifmlp": (20, 1032010), "smalllifmlp": (20, 31010), "lifcnn": (1, 29826),
         "deepersnn": (3, 1033810), "lifresnetlike": (3, 1235750)}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_models(name: str) -> None:
    channels, parameters = SIZES[name]
    model = models.get_model(name, "cpu", n_channels=channels, n_outputs=10)
    assert sum(p.numel() for p in model.parameters()) == parameters
    side = {1: 28, 3: 32, 20: 1}[channels]
    batch = torch.rand(2, channels, side, side), [0, 1]
    model.reset()
    with torch.no_grad():
        x, labels, spikes = model.forward_fn(batch, model, "cpu", n_steps=3)
        named = {"pixel_values": batch[0], "labels": torch.tensor([0, 1])}
        model.reset()
        again = model.forward_fn(named, model, "cpu", False, 3, is_huggingface_data=True)
    assert x.requires_grad and not again[0].requires_grad and labels.tolist() == [0, 1]
    assert spikes.shape == (3, 2, 10) and torch.equal(spikes, again[2])


def test_seed_and_options() -> None:
    torch.manual_seed(7)
    model = LifCNN(1, 10, 0.9, reset_mechanism="zero", threshold=0.5)
    torch.manual_seed(7)
    mlp = [nn.Linear(1, 1000), nn.Linear(1000, 1000), nn.Linear(1000, 10)]  # the parent's
    own = [nn.Conv2d(1, 12, 5), nn.Conv2d(12, 64, 5), nn.Linear(1024, 10)]
    weights = [p for layer in own for p in layer.parameters()]
    assert mlp and all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))
    neurons = [m for m in model.modules() if isinstance(m, Leaky)]
    assert [m.reset_mechanism for m in neurons] == ["zero", "zero", "subtract"]
    assert [float(m.threshold) for m in neurons] == [0.5, 0.5, 1.0]
    assert [m.output for m in neurons] == [False, False, True]
    with pytest.raises(ValueError, match="SmallLifMLP: spike_grad: expected one of step, atan"):
        SmallLifMLP(4, 2, 0.9, spike_grad="relu")
    with pytest.raises(ValueError, match="expected one of lenet, .*lifresnetlike, got 'snn'"):
        models.get_model("snn", "cpu")
    assert ResNet(3, 2, 0.9, n_linear_inputs=7).fc.parameterized_layer.module.in_features == 7


def test_a_layer_inside_a_layer() -> None:
    """Whatever a SpikingLayer holds takes part: here the resized skip of lfprop's ResNet."""
    inner = nn.Sequential(NoisyWrapper(nn.Conv2d(2, 3, 1), 0.0, False), Interpolate((2, 2), "area"))
    network = nn.Sequential(SpikingLayer(inner, Leaky(0.9, output=True))).double()
    x = torch.rand(4, 2, 4, 4).double().requires_grad_()
    with LFPSNNEpsilonComposite().context(network):
        spikes, _ = network(x)
        (found,) = torch.autograd.grad((spikes,), (x,), grad_outputs=(torch.ones_like(spikes),))
    weight = inner[0].module.weight
    z = inner(x).detach()
    slope, of_x = torch.autograd.grad(inner(x), (weight, x), 1 / (z.abs() + 1e-6))
    assert relative(found, of_x * x.detach()) < RELATIVE
    assert relative(weight.feedback, slope * weight.detach().abs()) < RELATIVE


def test_to_spiking_trains_the_network_itself() -> None:
    torch.manual_seed(0)
    model = SmallLifMLP(12, 4, 0.9, spike_grad="step", noise_size=0.25).double()
    spiking = model.to_spiking(STEPS, chunk=2)
    assert spiking.noise == 0.25 and spiking.chunk == 2
    assert {id(p) for p in spiking.parameters()} == {id(p) for p in model.parameters()}
    spiking.eval()
    x, y = torch.rand(5, 1, 3, 4).double() * 3, torch.randint(4, (5,))
    twin = copy.deepcopy(model).eval()
    spikes, _ = propagate(twin, x, y)
    step = lfp_kernels.fuse(
        spiking, lfp_kernels.composites.Epsilon(), reward=lfp_kernels.rewards.snn_rate,
        optimizer=lfp_kernels.optim.SGD(lr=0.1),
    )  # fmt: skip
    assert torch.equal(step(x, y).out, spikes)
    for parameter, other in zip(model.parameters(), twin.parameters()):
        expected = other.detach() + 0.1 * other.feedback  # type: ignore[attr-defined]
        assert relative(parameter.detach(), expected) < RELATIVE
        assert not torch.equal(parameter, other)


def test_the_loop_of_lfprop_trains() -> None:
    torch.manual_seed(0)
    model = SmallLifMLP(2, 2, 0.9, spike_grad="step", apply_noise=False)
    x = torch.rand(64, 2) * 2 - 1
    y = (x[:, 0] > x[:, 1]).long()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(25):
        model.reset()
        spikes, _ = propagate(model, x * 4, y)
        for parameter in model.parameters():
            parameter.grad = -parameter.feedback / STEPS  # type: ignore[attr-defined]
        nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()
    rates = get_reward("snnratecodedreward", "cpu").get_predictions(spikes)
    assert (rates == y).double().mean() > 0.9


def test_surrogates() -> None:
    x = torch.linspace(-1, 1, 5).double().requires_grad_()
    for name in ("atan", "fast_sigmoid"):
        spikes = SPIKE_GRAD_MAP[name]()(x)
        (found,) = torch.autograd.grad(spikes.sum(), x)
        assert spikes.tolist() == [0, 0, 0, 1, 1] and (found > 0).all() and found[2] == 1
    disabled = Leaky(0.9, surrogate_disable=True)(x[None])[0]
    assert torch.autograd.grad(disabled.sum(), x)[0].abs().max() == 0
