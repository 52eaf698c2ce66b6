"""lfprop's spiking networks: one call is one time step, ``spk, mem = network(x)``.

The same modules in the same order, so the same state_dict, and the same weights by the same seed.
For speed turn them into one call over all time steps: ``network.to_spiking(steps)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....nn import Spiking, from_snntorch
from .leaky import SPIKE_GRAD_MAP, Leaky

__all__ = [
    "SPIKE_GRAD_MAP", "DeeperSNN", "Interpolate", "Leaky", "LifCNN", "LifMLP", "NoisyWrapper",
    "ResNet", "SmallLifMLP", "SpikingLayer",
]  # fmt: skip


class NoisyWrapper(nn.Module):
    """``module`` on its input plus Gaussian noise, while training.

    Args:
        module: the layer. noise_size: standard deviation. apply_noise: False switches it off.
    """

    def __init__(
        self, module: nn.Module, noise_size: float, apply_noise: bool, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__()
        self.noise_size = noise_size
        self.apply_noise = apply_noise
        self.module = module
        self._zeros: Tensor | None = None

    @property
    def zeros_ratio(self) -> float:
        """Share of zeros in the last input."""
        return 0.0 if self._zeros is None else float(self._zeros)

    def forward(self, x: Tensor) -> Tensor:
        self._zeros = (x.detach() == 0).sum() / x.numel()  # read only by who asks: no device sync
        if self.training and self.apply_noise:
            x = x + torch.randn_like(x) * self.noise_size
        return self.module(x)


class Interpolate(nn.Module):
    """Resizes to ``size``; ``mode`` as in ``torch.nn.functional.interpolate``."""

    def __init__(self, size: Any, mode: str = "bilinear", *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.size = size
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, size=self.size, mode=self.mode)


class SpikingLayer(nn.Module):
    """A layer with weights and the neurons that it drives.

    Args:
        parameterized_layer: the layer.
        spike_mechanism: :class:`Leaky`, or one of snntorch's.
    """

    def __init__(self, parameterized_layer: nn.Module, spike_mechanism: nn.Module) -> None:
        super().__init__()
        self.parameterized_layer = parameterized_layer
        self.spike_mechanism = spike_mechanism

    def forward(self, x: Tensor) -> Any:
        return self.spike_mechanism(self.parameterized_layer(x))


class _Neurons:
    """Makes the spiking layers of one network."""

    def __init__(self, network: LifMLP, spike_grad: Any, settings: Any, options: Any) -> None:
        self.network, self.spike_grad = network, spike_grad
        self.settings, self.options = settings, options

    def noisy(self, layer: nn.Module) -> NoisyWrapper:
        return NoisyWrapper(layer, self.network.noise_size, self.network.apply_noise)

    def over(self, layer: nn.Module, **options: Any) -> SpikingLayer:
        neurons = Leaky(init_hidden=True, spike_grad=self.spike_grad(), **self.settings, **options)
        return SpikingLayer(layer, neurons)

    def __call__(self, layer: nn.Module) -> SpikingLayer:
        return self.over(self.noisy(layer), **self.options)

    def last(self, layer: nn.Module) -> SpikingLayer:
        """Returns its membrane too. As in lfprop, further options of the neurons skip this one."""
        return self.over(self.noisy(layer), output=True)


class LifMLP(nn.Module):
    """Three dense layers of neurons, 1000 wide.

    Args:
        n_channels: inputs. n_outputs: classes. beta: decay per step.
        surrogate_disable, reset_delay: of :class:`Leaky`.
        spike_grad: a key of SPIKE_GRAD_MAP, or what makes the function that fires.
        noise_size, apply_noise: of :class:`NoisyWrapper`, around every layer with weights.
        n_linear_inputs: of the last layer of DeeperSNN and ResNet; others have no use for it.
        kwargs: further options of the neurons, but for those of the last layer.
    """

    def __init__(
        self,
        n_channels: int,
        n_outputs: int,
        beta: float | Tensor,
        surrogate_disable: bool = False,
        spike_grad: str | Callable[[], Any] = "atan",
        noise_size: float = 1e-6,
        apply_noise: bool = True,
        reset_delay: bool = True,
        n_linear_inputs: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.apply_noise = apply_noise
        self.noise_size = noise_size
        if n_linear_inputs is not None:
            self.n_linear_inputs = n_linear_inputs
        if isinstance(spike_grad, str):
            if spike_grad not in SPIKE_GRAD_MAP:
                raise ValueError(
                    f"{type(self).__name__}: spike_grad: expected one of "
                    f"{', '.join(SPIKE_GRAD_MAP)}, got {spike_grad!r}"
                )
            spike_grad = SPIKE_GRAD_MAP[spike_grad]
        settings = {"beta": beta, "surrogate_disable": surrogate_disable}
        settings["reset_delay"] = reset_delay
        neurons = _Neurons(self, spike_grad, settings, kwargs)
        # lfprop's classes build their parents' layers first and drop them; without doing the same,
        # the same seed would give other weights.
        for cls in reversed(type(self).__mro__):
            if "_build" in vars(cls):
                cls._build(self, neurons, n_channels, n_outputs)  # type: ignore[attr-defined]

    def _build(self, neurons: _Neurons, inputs: int, outputs: int) -> None:
        self.classifier = nn.Sequential(
            neurons(nn.Linear(inputs, 1000)),
            neurons(nn.Linear(1000, 1000)),
            neurons.last(nn.Linear(1000, outputs)),
        )

    def reset(self) -> None:
        """Put this network's neurons to rest."""
        for module in self.modules():
            rest = getattr(module, "reset_mem", None)
            if callable(rest):
                rest()

    def to_spiking(self, steps: int | None, **options: Any) -> Spiking:
        """This network over all time steps in one call, with the same parameters and its noise:
        :func:`lfp_kernels.nn.from_snntorch`."""
        return from_snntorch(self, steps, **options)

    def forward(self, x: Tensor) -> Any:
        return self.classifier(torch.flatten(x, 1))


class SmallLifMLP(LifMLP):
    """:class:`LifMLP` with two layers."""

    def _build(self, neurons: _Neurons, inputs: int, outputs: int) -> None:
        self.classifier = nn.Sequential(
            neurons(nn.Linear(inputs, 1000)), neurons.last(nn.Linear(1000, outputs))
        )


class LifCNN(LifMLP):
    """Two 5x5 convolutions and a dense layer; 3 channels expect 32x32 images, others 28x28."""

    def _build(self, neurons: _Neurons, inputs: int, outputs: int) -> None:
        self.classifier = nn.Sequential(
            neurons(nn.Conv2d(inputs, 12, 5)),
            nn.MaxPool2d(2),
            neurons(nn.Conv2d(12, 64, 5)),
            nn.MaxPool2d(2),
            nn.Flatten(),
            neurons.last(nn.Linear(1600 if inputs == 3 else 1024, outputs)),
        )

    def forward(self, x: Tensor) -> Any:
        return self.classifier(x)


class DeeperSNN(LifCNN):
    """Five 3x3 convolutions and a dense layer, without biases."""

    n_linear_inputs = 2500

    def _build(self, neurons: _Neurons, inputs: int, outputs: int) -> None:
        layers: list[nn.Module] = []
        for width, padding, pool in (
            (30, 2, True), (150, 1, True), (250, 1, True), (200, 2, True), (100, 2, False),
        ):  # fmt: skip
            layers.append(neurons(nn.Conv2d(inputs, width, 3, padding=padding, bias=False)))
            if pool:
                layers.append(nn.MaxPool2d(2, 2))
            inputs = width
        last = nn.Linear(self.n_linear_inputs, outputs, bias=False)
        self.classifier = nn.Sequential(*layers, nn.Flatten(), neurons.last(last))


class ResNet(LifCNN):
    """Four convolutions with one residual block, joined by the maximum, and a dense layer."""

    n_linear_inputs = 1800

    def _build(self, neurons: _Neurons, inputs: int, outputs: int) -> None:
        del self.classifier
        self.block1 = neurons(nn.Conv2d(inputs, 30, 5, padding=2, bias=False))
        self.pool1 = nn.MaxPool2d(2, 2)
        self.block2 = neurons(nn.Conv2d(30, 150, 3, padding=1, bias=False))
        self.pool2 = nn.MaxPool2d(2, 2)
        self.block3 = neurons(nn.Conv2d(150, 250, 3, padding=1, bias=False))
        self.pool3 = nn.MaxPool2d(3, 3)
        self.block4 = neurons(nn.Conv2d(250, 200, 4, padding=2, bias=False))
        skip = neurons.noisy(nn.Conv2d(150, 250, 1, bias=False))
        self.skip_connection = neurons.over(
            nn.Sequential(skip, Interpolate((8, 8), "nearest")), **neurons.options
        )
        self.flatten = nn.Flatten()
        self.fc = neurons.last(nn.Linear(self.n_linear_inputs, outputs, bias=False))

    def forward(self, x: Tensor) -> Any:
        x = self.pool2(self.block2(self.pool1(self.block1(x))))
        x = torch.max(self.block3(x), self.skip_connection(x))
        return self.fc(self.flatten(self.block4(self.pool3(x))))
