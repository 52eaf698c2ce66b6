"""Spiking networks beside snntorch and lfprop 1.0.0 themselves: ``pytest -m peers``."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest
import torch
from mirrored import PACKAGES, not_mirrored
from torch import Tensor, nn

import lfp_kernels
from lfp_kernels.compat.lfprop.propagation.propagator_snn import LFPSNNEpsilonComposite
from lfp_kernels.compat.lfprop.propagation.propagator_snn import SpikingLayer as OurLayer
from lfp_kernels.nn import from_snntorch

pytestmark = pytest.mark.peers

RELATIVE = 1e-5
STEPS = 6
RESETS = [(reset, delay) for reset in ("subtract", "zero", "none") for delay in (True, False)]


def part(package: str, path: str) -> Any:
    """A module of the package. An ImportError fails the test: there is nothing to compare with."""
    return importlib.import_module(f"{package}.{path}")


def snn() -> Any:
    return importlib.import_module("snntorch")


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This functionality is not yet fully tested")
        warnings.filterwarnings("ignore", message="Inhibition is an unstable feature")
        yield


def fire(x: Tensor) -> Tensor:
    """snntorch's own surrogates return float32 whatever comes in."""
    return (x > 0).to(x.dtype)


def relative(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    error, scale = float((actual - expected).abs().max()), float(expected.abs().max())
    return error / scale if scale else error


def stepped(network: nn.Module, x: Tensor, steps: int, sequence: bool = False) -> Tensor:
    """Spikes [T, N, ...] of ``steps`` calls from rest."""
    for module in network.modules():
        if hasattr(module, "reset_mem"):
            module.reset_mem()
    outs = [network(x[t] if sequence else x) for t in range(steps)]
    return torch.stack([o[0] if isinstance(o, tuple) else o for o in outs]).detach()


def dense(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    leaky = snn().Leaky
    options = {"spike_grad": fire, "init_hidden": True, **options}
    return nn.Sequential(
        nn.Linear(12, 40), leaky(0.9, **options),
        nn.Sequential(nn.Linear(40, 30), leaky(torch.rand(30), **options), nn.Identity()),
        nn.Linear(30, 5), leaky(1.0, 0.7, output=True, **options),
    ).double()  # fmt: skip


def conv(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    leaky = snn().Leaky
    options = {"spike_grad": fire, "init_hidden": True, **options}
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), leaky(torch.rand(6, 1, 1), 0.5, **options), nn.MaxPool2d(2),
        nn.BatchNorm2d(6).eval(), nn.Flatten(),
        nn.Linear(96, 5), leaky(0.8, torch.rand(5) + 0.1, **options),
    ).double()  # fmt: skip


@pytest.mark.parametrize(("reset", "delay"), RESETS)
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("make", [dense, conv])
def test_same_spikes(make: Any, sequence: bool, reset: str, delay: bool) -> None:
    network = make(reset_mechanism=reset, reset_delay=delay)
    shape = (7, 12) if make is dense else (3, 2, 10, 10)
    x = torch.randn(STEPS, *shape).double() * 4
    x = x if sequence else x[0]
    expected = stepped(network, x, STEPS, sequence)
    spiking = from_snntorch(network, STEPS)
    assert [id(p) for p in spiking.parameters()] == [id(p) for p in network.parameters()]
    assert 0.02 < expected.mean() < 0.98
    with torch.no_grad():
        assert torch.equal(spiking(x), expected)
    with lfp_kernels.composites.Epsilon().context(spiking):
        assert torch.equal(spiking(x).detach(), expected)
    assert torch.equal(spiking(x).detach(), expected)  # step by step, with a graph


@pytest.mark.parametrize(("reset", "delay"), RESETS)
def test_learned_parameters_are_shared(reset: str, delay: bool) -> None:
    network = dense(reset_mechanism=reset, reset_delay=delay, learn_beta=True, learn_threshold=True)
    with torch.no_grad():
        network[1].beta.fill_(1.3)  # acts as 1
    x = torch.randn(7, 12).double()
    spiking = from_snntorch(network, STEPS, chunk=4)
    assert {id(p) for p in spiking.parameters()} == {id(p) for p in network.parameters()}
    assert torch.equal(spiking(x).detach(), stepped(network, x, STEPS))
    step = lfp_kernels.fuse(
        spiking, lfp_kernels.composites.Epsilon(), reward=lfp_kernels.rewards.snn_rate,
        optimizer=lfp_kernels.optim.SGD(lr=0.1),
    )  # fmt: skip
    before = [p.detach().clone() for p in network.parameters()]
    step(x, torch.randint(5, (7,)))
    moved = [not torch.equal(p, b) for p, b in zip(network.parameters(), before)]
    assert moved == [name != "1.beta" or moved[0] for name, _ in network.named_parameters()]
    assert torch.equal(spiking(x).detach(), stepped(network, x, STEPS))


def test_surrogates_give_the_same_gradients() -> None:
    for make in (snn().surrogate.atan, snn().surrogate.fast_sigmoid):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Linear(12, 40), snn().Leaky(0.9, spike_grad=make(), init_hidden=True),
            nn.Linear(40, 5), snn().Leaky(0.9, spike_grad=make(), init_hidden=True),
        )  # fmt: skip
        x, probe = torch.randn(7, 12), torch.randn(STEPS, 7, 5)
        for module in network.modules():
            if hasattr(module, "reset_mem"):
                module.reset_mem()
        out = torch.stack([network(x) for _ in range(STEPS)])
        expected = torch.autograd.grad(out, [*network.parameters()], probe)
        found = from_snntorch(network, STEPS)(x)
        assert torch.equal(found, out)
        for a, b in zip(torch.autograd.grad(found, [*network.parameters()], probe), expected):
            assert relative(a, b) < RELATIVE and b.abs().max() > 0
    other = nn.Sequential(nn.Linear(3, 2), snn().Leaky(0.9, spike_grad=snn().surrogate.atan(3.0)))
    assert from_snntorch(other, 2).module[1].surrogate is None


def test_what_has_no_counterpart() -> None:
    package = snn()
    wrong = {
        "inhibition": package.Leaky(0.9, inhibition=True),
        "state_quant": package.Leaky(0.9, state_quant=lambda x: x),
        "graded_spikes_factor: expected 1": package.Leaky(0.9, graded_spikes_factor=2.0),
        "graded_spikes_factor: .*learned": package.Leaky(0.9, learn_graded_spikes_factor=True),
        "got Synaptic": package.Synaptic(0.9, 0.8),
        "got RLeaky": package.RLeaky(0.9, linear_features=4),
        "got Lapicque": package.Lapicque(R=1, C=5),
        "got Alpha": package.Alpha(0.9, 0.8),
        "got LeakyParallel": package.LeakyParallel(4, 4, weight_hh_enable=True),
    }
    for message, neuron in wrong.items():
        network = nn.Sequential(nn.Linear(3, 4), nn.Sequential(neuron))
        with pytest.raises(ValueError, match=rf"network\.1\.0.*{message}"):
            from_snntorch(network, 3)


# lfprop's own networks, and small ones from its parts


def small(package: str, **options: Any) -> nn.Module:
    model = part(package, "model.spiking_networks")
    leaky = model.Leaky if package == PACKAGES[1] else snn().Leaky
    torch.manual_seed(0)

    def layer(inner: nn.Module, **more: Any) -> nn.Module:
        wrapped = model.NoisyWrapper(inner, 0.3, True)
        own = model.SPIKE_GRAD_MAP["step"]()
        neurons = leaky(**{"beta": 0.9, "spike_grad": own, **options, **more}, init_hidden=True)
        return model.SpikingLayer(wrapped, neurons)

    return nn.Sequential(
        layer(nn.Conv2d(2, 6, 3)), nn.MaxPool2d(2), layer(nn.Conv2d(6, 8, 2, bias=False)),
        nn.Flatten(), layer(nn.Linear(72, 5), output=True),
    )  # fmt: skip


def named(name: str, channels: int, **options: Any) -> Any:
    def make(package: str) -> nn.Module:
        torch.manual_seed(0)
        models = part(package, "model.models")
        return models.get_model(name, "cpu", n_channels=channels, n_outputs=10, **options)

    return make


NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "small": (small, (4, 2, 10, 10)),
    "small, a batch of one": (small, (1, 2, 10, 10)),
    "lifmlp": (named("lifmlp", 50), (8, 1, 5, 10)),
    "smalllifmlp": (named("smalllifmlp", 50, apply_noise=True, noise_size=0.2), (8, 50)),
    "smalllifmlp, atan": (named("smalllifmlp", 50, spike_grad="atan"), (8, 50)),
    "lifcnn": (named("lifcnn", 1), (3, 1, 28, 28)),
    "lifcnn, three channels": (named("lifcnn", 3, spike_grad="fast_sigmoid"), (2, 3, 32, 32)),
    "deepersnn": (named("deepersnn", 3, n_linear_inputs=2500), (1, 3, 32, 32)),
    "lifresnetlike": (named("lifresnetlike", 3, n_linear_inputs=1800), (1, 3, 32, 32)),
}


def composite(package: str) -> Any:
    return part(package, "propagation.propagator_snn").LFPSNNEpsilonComposite(epsilon=1e-6)


def rest(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "reset_mem"):
            module.reset_mem()


def propagate(package: str, model: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """lfprop's loop, and what it made."""
    reward_func = part(package, "rewards.rewards").get_reward("snnratecodedreward", "cpu")
    rest(model)
    with composite(package).context(model) as modified:
        inputs = x.detach().requires_grad_(True)
        pairs = [modified(inputs) for _ in range(STEPS)]
        spikes, membranes = (torch.stack(parts) for parts in zip(*pairs))
        reward = reward_func(spikes, y).detach()
        (found,) = torch.autograd.grad((spikes,), (inputs,), grad_outputs=(reward,))
    results = {"spikes": spikes.detach(), "membrane": membranes.detach(), "reward": reward}
    results["input reward"] = found
    for name, parameter in model.named_parameters():
        results[f"feedback of {name}"] = parameter.feedback.clone()  # type: ignore[attr-defined]
    return results


@pytest.mark.parametrize("name", NETWORKS)
def test_training(name: str) -> None:
    make, shape = NETWORKS[name]
    torch.manual_seed(1)
    x, y = torch.rand(shape) * 3, torch.randint(5, (shape[0],))
    models = [make(package) for package in PACKAGES]
    with torch.no_grad():
        for parameter in (p for model in models for p in model.parameters()):
            parameter.mul_(1 if "mlp" in name else 2.5)  # or nothing fires in deep networks
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.9) for m in models]
    for number in range(2):
        runs = []
        for package, model, optimizer in zip(PACKAGES, models, optimizers):
            torch.manual_seed(number)  # noise
            runs.append(propagate(package, model, x, y))
            for parameter in model.parameters():
                parameter.grad = -parameter.feedback
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        theirs, ours = runs
        assert list(ours) == list(theirs)
        assert torch.equal(ours["spikes"], theirs["spikes"])
        # lfprop's step starts from equal weights as long as spikes are equal.
        for key, value in ours.items():
            assert relative(value, theirs[key]) < RELATIVE, (number, key)
        states = [model.state_dict() for model in models]
        assert list(states[0]) == list(states[1])
        for key, value in states[1].items():
            assert relative(value.double(), states[0][key].double()) < RELATIVE, (number, key)
    assert all(v.abs().max() > 0 for k, v in theirs.items() if k.startswith("feedback"))


def test_a_real_leaky_in_our_layer_and_lfprops_networks_in_spiking() -> None:
    """The network of lfprop as it is, over all time steps, and its feedback."""
    theirs = small(PACKAGES[0]).eval().double()  # without noise
    torch.manual_seed(1)
    x, y = torch.rand(4, 2, 10, 10).double() * 3, torch.randint(5, (4,))
    expected = propagate(PACKAGES[0], theirs, x, y)
    spiking = from_snntorch(theirs, STEPS)
    assert spiking.noise == pytest.approx(0.3) and not spiking.training
    with lfp_kernels.composites.Epsilon(1e-6).context(spiking):
        inputs = x.clone().requires_grad_()
        out = spiking(inputs)
        lfp_kernels.backward(out, lfp_kernels.rewards.snn_rate(out, y))
    assert torch.equal(out.detach(), expected["spikes"])
    assert inputs.grad is not None
    assert relative(-inputs.grad, expected["input reward"]) < RELATIVE
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None
        assert relative(-parameter.grad, expected[f"feedback of {name}"]) < RELATIVE, name

    layers = [
        OurLayer(m.parameterized_layer, m.spike_mechanism)
        if type(m).__name__ == "SpikingLayer" else m
        for m in theirs
    ]  # fmt: skip
    rest(theirs)
    with LFPSNNEpsilonComposite().context(nn.Sequential(*layers)) as modified:
        inputs = x.clone().requires_grad_()
        spikes = torch.stack([modified(inputs)[0] for _ in range(STEPS)])
        torch.autograd.grad((spikes,), (inputs,), grad_outputs=(expected["reward"],))
    for name, parameter in theirs.named_parameters():
        assert relative(parameter.feedback, expected[f"feedback of {name}"]) < RELATIVE, name


@pytest.mark.parametrize("name", ["lifmlp", "lifcnn", "deepersnn"])
def test_to_spiking(name: str) -> None:
    make, shape = NETWORKS[name]
    torch.manual_seed(1)
    x = torch.rand(shape).double() * 3
    expected = stepped(make(PACKAGES[0]).double(), x, STEPS)
    with torch.no_grad():
        assert torch.equal(make(PACKAGES[1]).double().to_spiking(STEPS)(x), expected)
        assert torch.equal(from_snntorch(make(PACKAGES[0]).double(), STEPS)(x), expected)


@pytest.mark.parametrize(("reset", "delay"), RESETS)
def test_plain_steps(reset: str, delay: bool) -> None:
    """Outside a composite: spikes, membranes and the gradients of the surrogate."""
    options = {"reset_mechanism": reset, "reset_delay": delay}
    found = []
    for package in PACKAGES:
        spike_grad = part(package, "model.spiking_networks").SPIKE_GRAD_MAP["atan"]()
        model = small(package, spike_grad=spike_grad, **options).eval()
        torch.manual_seed(1)
        x = (torch.rand(4, 2, 10, 10) * 3).requires_grad_()
        spikes, membranes = (torch.stack(s) for s in zip(*(model(x) for _ in range(STEPS))))
        gradient = torch.autograd.grad(
            spikes.sum() + membranes.square().sum(), [x, *model.parameters()]
        )
        found.append((spikes.detach(), membranes.detach(), *gradient))
        assert list(model.state_dict()) == list(small(PACKAGES[0], **options).state_dict())
    for theirs, ours in zip(*found):
        assert relative(ours, theirs) < RELATIVE


def test_immediate_reset_of_lfprop_counts_the_reset_as_a_contribution() -> None:
    """Why reset_delay=False is not compared: should this fail, lfprop was mended; compare it."""
    found = []
    for package in PACKAGES:
        model = part(package, "model.spiking_networks")
        leaky = model.Leaky if package == PACKAGES[1] else snn().Leaky
        neurons = leaky(0.9, spike_grad=fire, init_hidden=True, reset_delay=False, output=True)
        linear = nn.Linear(1, 1, bias=False)
        nn.init.constant_(linear.weight, 3.0)
        network = nn.Sequential(model.SpikingLayer(linear, neurons))
        with composite(package).context(network) as modified:
            x = torch.ones(1, 1, requires_grad=True)
            spikes, _ = modified(x)
            (of_x,) = torch.autograd.grad((spikes,), (x,), grad_outputs=(torch.ones(1, 1),))
        found.append(float(of_x))
    assert found == [pytest.approx(3 / 2), pytest.approx(1)]


@pytest.mark.parametrize(
    ("reset", "error"), [("zero", NotImplementedError), ("none", UnboundLocalError)]
)
def test_other_resets_fail_in_lfprop(reset: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        propagate(PACKAGES[0], small(PACKAGES[0], reset_mechanism=reset), torch.rand(2, 2, 10, 10),
                  torch.zeros(2).long())  # fmt: skip


def test_names() -> None:
    """Every public name of the mirrored modules exists, but for what is left out on purpose."""
    left_out: dict[str, set[str]] = {
        "propagation.propagator_snn": {"epsilon_lfp_snn_fn"},
        "model.spiking_networks": set(),
    }
    for path, missing in left_out.items():
        assert not_mirrored(path) == missing, path
