"""nn.from_snntorch without snntorch: a stand-in whose class has the name that is looked for.

Beside the real one: tests/peers/test_snn_against_snntorch_lfprop.py.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lfp_kernels
from lfp_kernels.compat.lfprop.model import spiking_networks
from lfp_kernels.nn import LIF, Spiking, from_snntorch

STEPS = 7
RESETS = [(reset, delay) for reset in ("subtract", "zero", "none") for delay in (True, False)]


class Leaky(nn.Module):
    """Written from the equations of docs/math.md, one neuron and one step at a time in spirit."""

    def __init__(self, beta: Any, threshold: Any = 1.0, **options: Any) -> None:
        super().__init__()
        self.reset_mechanism = options.pop("reset", "subtract")
        self.reset_delay = options.pop("delay", True)
        self.spike_grad: Any = options.pop("spike_grad", None)
        for name, value in (("beta", beta), ("threshold", threshold)):
            tensor = torch.as_tensor(value).clone()
            if options.pop(f"learn_{name}", False):
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        self.inhibition = options.pop("inhibition", False)
        self.state_quant = options.pop("state_quant", False)
        self.graded_spikes_factor = torch.as_tensor(options.pop("graded_spikes_factor", 1.0))
        assert not options
        self.mem: Any = 0.0

    def forward(self, current: Tensor) -> Tensor:
        fired = torch.as_tensor(self.mem > self.threshold)
        charged = self.beta.clamp(0, 1) * self.mem + current
        if self.reset_mechanism == "zero":
            charged = torch.where(fired, current, charged)
        if self.reset_mechanism == "subtract":
            charged = torch.where(fired, charged - self.threshold, charged)
        spikes = charged > self.threshold
        self.mem = charged
        if self.reset_mechanism == "subtract" and not self.reset_delay:
            # What this step's spike takes now, the next one must not take again.
            free = torch.where(fired, charged + self.threshold, charged)
            self.mem = torch.where(spikes, free - self.threshold, free)
        return spikes.to(current.dtype)


Leaky.__module__ = "snntorch._neurons.leaky"


class Synaptic(Leaky):
    def forward(self, current: Tensor) -> Tensor:
        return super().forward(current)


Synaptic.__module__ = "snntorch._neurons.synaptic"


def step(network: nn.Module, x: Tensor, sequence: bool = False) -> Tensor:
    for module in network.modules():
        if hasattr(module, "mem"):
            module.mem = torch.zeros(())
    with torch.no_grad():
        return torch.stack([network(x[t] if sequence else x) for t in range(STEPS)])


def dense(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 20), Leaky(torch.rand(20).double(), **options),
        nn.Sequential(nn.Linear(20, 10), nn.Identity(), Leaky(1.0, 0.5, **options)),
        nn.Linear(10, 4), Leaky(0.9, **options),
    ).double()  # fmt: skip


def conv(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    pool = nn.MaxPool2d(2)  # used twice
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), Leaky(torch.rand(4, 1, 1).double(), **options), pool,
        nn.Conv2d(4, 5, 2), Leaky(torch.rand(1, 5, 1, 1).double(), **options), pool,
        nn.Flatten(), nn.Linear(5, 4), Leaky(0.8, 0.3, **options),
    ).double()  # fmt: skip


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize(("reset", "delay"), RESETS)
@pytest.mark.parametrize(("make", "shape"), [(dense, (5, 6)), (conv, (3, 1, 8, 8))])
def test_same_spikes(make: Any, shape: Any, reset: str, delay: bool, sequence: bool) -> None:
    network = make(reset=reset, delay=delay)
    x = torch.randn(STEPS, *shape).double() * 4
    x = x if sequence else x[0]
    expected = step(network, x, sequence)
    assert 0.02 < expected.mean() < 0.98
    spiking = from_snntorch(network, STEPS)
    assert torch.equal(spiking(x).detach(), expected)
    with torch.no_grad():
        assert torch.equal(spiking(x), expected)
    with lfp_kernels.composites.Epsilon().context(spiking):
        assert torch.equal(spiking(x).detach(), expected)


def test_training_one_trains_the_other() -> None:
    network = dense(learn_beta=True, learn_threshold=True)
    spiking = from_snntorch(network, STEPS, chunk=3)
    assert spiking.chunk == 3
    own = dict(network.named_parameters())
    assert {f"module.{name}" for name in own} == {name for name, _ in spiking.named_parameters()}
    for name, parameter in spiking.named_parameters():
        assert parameter is own[name.removeprefix("module.")]
    before = {name: p.detach().clone() for name, p in own.items()}
    x, y = torch.randn(5, 6).double() * 4, torch.randint(4, (5,))
    lfp_kernels.fuse(
        spiking, lfp_kernels.composites.Epsilon(), reward=lfp_kernels.rewards.snn_rate,
        optimizer=lfp_kernels.optim.SGD(lr=0.1),
    )(x, y)  # fmt: skip
    assert all(not torch.equal(p, before[name]) for name, p in own.items())
    assert torch.equal(spiking(x).detach(), step(network, x))


def test_settings() -> None:
    network = nn.Sequential(nn.Linear(3, 2), Leaky(1.4, 2)).eval()
    network[0].train()
    spiking = from_snntorch(network, None, input="sequence")
    neurons = spiking.module[1]
    assert isinstance(neurons, LIF) and float(neurons.beta) == 1 and float(neurons.threshold) == 2
    assert neurons.threshold.is_floating_point() and neurons.surrogate is None
    assert (spiking.training, spiking.module.training, neurons.training) == (False,) * 3
    assert spiking.module[0] is network[0] and network[0].training
    assert isinstance(from_snntorch(Leaky(0.9), 2).module[0], LIF)
    for name in ("atan", "fast_sigmoid", "step"):
        grad = spiking_networks.SPIKE_GRAD_MAP[name]()
        found = from_snntorch(nn.Sequential(Leaky(0.9, spike_grad=grad)), 2).module[0]
        assert found.surrogate == (None if name == "step" else name)


def test_surrogates_of_snntorch() -> None:
    def like_snntorch(name: str, slope: float) -> Any:
        def inner(x: Tensor) -> Any:
            return x > slope

        inner.__module__, inner.__qualname__ = "snntorch.surrogate", f"{name}.<locals>.inner"
        return inner

    for name, slope, expected in (
        ("atan", 2.0, "atan"), ("atan", 3.0, None), ("fast_sigmoid", 25, "fast_sigmoid"),
        ("fast_sigmoid", 10, None), ("sigmoid", 25, None),
    ):  # fmt: skip
        neurons = Leaky(0.9, spike_grad=like_snntorch(name, slope))
        assert from_snntorch(nn.Sequential(neurons), 2).module[0].surrogate == expected


class Net(nn.Module):
    """A forward of its own around neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.lif = nn.Linear(3, 2), Leaky(0.9)

    def forward(self, x: Tensor) -> Tensor:
        return self.lif(self.fc(x))


class Twice(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


SHARED = Leaky(0.9)
WRONG: dict[str, tuple[Any, type[Exception]]] = {
    r"network: expected an nn.Sequential.*got Net, whose forward": (Net(), TypeError),
    r"network\.1: expected .*got Net.*or build lfp_kernels.nn.Spiking": (
        nn.Sequential(nn.Linear(3, 3), Net()), TypeError),
    r"network: .*got Twice": (Twice(nn.Linear(3, 3), Leaky(0.9)), TypeError),
    r"network: expected an nn.Sequential.*got Linear": (nn.Linear(3, 3), TypeError),
    r"network: expected an nn.Sequential, got list": ([nn.Linear(3, 3)], TypeError),
    r"network\.1\.0: expected snntorch.Leaky, got Synaptic.*use Leaky": (
        nn.Sequential(nn.Linear(3, 3), nn.Sequential(Synaptic(0.9))), ValueError),
    r"network\.0 \(Leaky\): inhibition: expected False": (
        nn.Sequential(Leaky(0.9, inhibition=True)), ValueError),
    r"network\.0 \(Leaky\): state_quant: expected False": (
        nn.Sequential(Leaky(0.9, state_quant=abs)), ValueError),
    r"network\.0 \(Leaky\): graded_spikes_factor: expected 1.*got tensor\(2": (
        nn.Sequential(Leaky(0.9, graded_spikes_factor=2.0)), ValueError),
    r"network\.0 \(Leaky\): LIF: threshold: expected positive": (
        nn.Sequential(Leaky(0.9, 0.0)), ValueError),
    r"network\.1: expected snntorch.Leaky at the end.*got Linear": (
        nn.Sequential(Leaky(0.9), nn.Linear(3, 3)), ValueError),
    r"network: expected snntorch.Leaky at the end": (nn.Sequential(), ValueError),
    r"network\.3 \(Leaky\): expected neurons of its own, got those of network\.1": (
        nn.Sequential(nn.Linear(3, 3), SHARED, nn.Linear(3, 3), SHARED), ValueError),
    r"network\.1 \(Leaky\): beta: .*shape \(C, 1, 1\), got shape \(4,\)": (
        nn.Sequential(nn.Conv2d(1, 4, 3), Leaky(torch.rand(4))), ValueError),
    r"network\.2 \(Leaky\): threshold: .*shape \(C,\), got shape \(4, 1, 1\)": (
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), Leaky(0.9, torch.ones(4, 1, 1))),
        ValueError),
    r"beta: expected a learned parameter of shape \(C,\).*learn_beta=True": (
        nn.Sequential(nn.Conv2d(1, 4, 3), Leaky(torch.rand(4, 1, 1), learn_beta=True)),
        ValueError),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_what_has_no_counterpart(message: str) -> None:
    network, error = WRONG[message]
    with pytest.raises(error, match=message):
        from_snntorch(network, 3)


def test_the_parts_of_lfprop() -> None:
    model = spiking_networks
    layer = model.SpikingLayer(
        model.NoisyWrapper(nn.Linear(6, 4), 0.2, True), model.Leaky(0.9, init_hidden=True)
    )
    spiking = from_snntorch(nn.Sequential(layer), 3)
    assert isinstance(spiking, Spiking) and spiking.noise == 0.2
    keys = [k for k in spiking.state_dict() if k.endswith("weight")]
    assert keys == ["module.0.parameterized_layer.module.weight"]
    assert from_snntorch(nn.Sequential(layer), 3, noise=0.0).noise == 0
    layer.parameterized_layer.apply_noise = False
    assert from_snntorch(layer, 3).noise == 0
    layer.parameterized_layer.apply_noise = True
    other = nn.Sequential(layer, nn.Linear(4, 2), Leaky(0.9))
    with pytest.raises(ValueError, match=r"same noise.*got network\.0\..* 0\.2, network\.1 0;"):
        from_snntorch(other, 3)
    assert from_snntorch(other, 3, noise=0.1).noise == 0.1
    layer.parameterized_layer.module = nn.Flatten()
    with pytest.raises(ValueError, match=r"noise around a layer with a weight .*got Flatten"):
        from_snntorch(layer, 3)
    with pytest.raises(TypeError, match="got ResNet, whose forward"):
        from_snntorch(model.ResNet(3, 2, 0.9), 3)


def test_snntorch_is_not_imported() -> None:
    code = (
        "import sys, lfp_kernels.nn, lfp_kernels.compat.lfprop.propagation.propagator_snn; "
        "assert not {'snntorch', 'lfprop'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
