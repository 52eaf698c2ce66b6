"""The models of the command line: LeNet, an MLP, a VGG and ResNet-18 in plain torch.nn, and two
spiking networks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lfp_kernels.nn import LIF, Spiking

from . import AppError


class LeNet(nn.Module):
    """LeNet with ReLU, max pooling and 16 and 32 maps."""

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        side = ((size - 4) // 2 - 4) // 2  # a convolution takes 4 pixels, a pool halves
        self.conv1 = nn.Conv2d(channels, 16, 5)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(16, 32, 5)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(32 * side * side, 120)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(120, 84)
        self.relu4 = nn.ReLU()
        self.fc3 = nn.Linear(84, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        x = torch.flatten(x, 1)
        return self.fc3(self.relu4(self.fc2(self.relu3(self.fc1(x)))))


class MLP(nn.Module):
    """Two hidden layers of 1000."""

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels * size * size, 1000)
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Linear(1000, 1000)
        self.relu2 = nn.ReLU()
        self.fc3 = nn.Linear(1000, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(x, 1)
        return self.fc3(self.relu2(self.fc2(self.relu1(self.fc1(x)))))


class VGG(nn.Module):
    """Three stages of two 3x3 convolutions with batch norm, then a dense classifier."""

    WIDTHS = (64, 128, 256)

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        before = channels
        for stage, width in enumerate(self.WIDTHS, 1):
            for layer in (1, 2):
                name = f"{stage}_{layer}"
                layers[f"conv{name}"] = nn.Conv2d(before, width, 3, padding=1, bias=False)
                layers[f"norm{name}"] = nn.BatchNorm2d(width)
                layers[f"relu{name}"] = nn.ReLU()
                before = width
            layers[f"pool{stage}"] = nn.MaxPool2d(2)
        self.features = nn.Sequential(layers)
        side = size // 2 ** len(self.WIDTHS)
        self.classifier = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(before * side * side, 256),
                relu=nn.ReLU(),
                fc2=nn.Linear(256, classes),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around an identity, with the in-place operations usual for it."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample: nn.Module | None = None
        if stride != 1 or before != width:
            self.downsample = nn.Sequential(
                nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """ResNet-18 for small images: a 3x3 stem without pooling."""

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._stage(64, 64, stride=1)
        self.layer2 = self._stage(64, 128, stride=2)
        self.layer3 = self._stage(128, 256, stride=2)
        self.layer4 = self._stage(256, 512, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512, classes)

    @staticmethod
    def _stage(before: int, width: int, stride: int) -> nn.Sequential:
        return nn.Sequential(BasicBlock(before, width, stride), BasicBlock(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


MODELS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "lenet": LeNet,
    "mlp": MLP,
    "vgg": VGG,
    "resnet": ResNet,
}


class Neurons(NamedTuple):
    """How spiking neurons run: time steps (0: the model's), steps processed at once in training
    (0: all), standard deviation of the noise on layer inputs, surrogate derivative for autograd."""

    steps: int = 0
    chunk: int = 0
    noise: float = 0.0
    surrogate: str = "atan"

    def lif(self) -> LIF:
        return LIF(0.9, surrogate=None if self.surrogate == "none" else self.surrogate)

    def over_time(self, *layers: nn.Module, steps: int) -> Spiking:
        return Spiking(
            nn.Sequential(*layers),
            steps=self.steps or steps,
            input="static",
            chunk=self.chunk or None,
            noise=self.noise,
        )


def snn_mlp(channels: int, size: int, classes: int, neurons: Neurons) -> Spiking:
    """A hidden layer of 1000 leaky integrate-and-fire neurons, 15 time steps."""
    return neurons.over_time(
        nn.Flatten(),
        nn.Linear(channels * size * size, 1000),
        neurons.lif(),
        nn.Linear(1000, classes),
        neurons.lif(),
        steps=15,
    )


def snn_cnn(channels: int, size: int, classes: int, neurons: Neurons) -> Spiking:
    """Two 5x5 convolutions with 12 and 64 maps, 25 time steps."""
    side = ((size - 4) // 2 - 4) // 2
    return neurons.over_time(
        nn.Conv2d(channels, 12, 5),
        neurons.lif(),
        nn.MaxPool2d(2),
        nn.Conv2d(12, 64, 5),
        neurons.lif(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * side * side, classes),
        neurons.lif(),
        steps=25,
    )


SPIKING_LR = 0.03  # of spiking models by default; too high a rate silences neurons for good
SURROGATES = ("atan", "fast_sigmoid", "none")
SPIKING: dict[str, Callable[[int, int, int, Neurons], Spiking]] = {
    "snn-mlp": snn_mlp,
    "snn-cnn": snn_cnn,
}
SMALLEST = {"lenet": 16, "mlp": 1, "vgg": 8, "resnet": 1, "snn-mlp": 1, "snn-cnn": 16}


def build(
    name: str,
    channels: int = 1,
    size: int = 28,
    classes: int = 10,
    neurons: Neurons = Neurons(),  # noqa: B008 (immutable)
) -> nn.Module:
    """Model ``name`` of MODELS or SPIKING for square images of ``size`` pixels, torch's default
    weights; ``neurons`` are those of a spiking one."""
    if size < SMALLEST[name]:
        raise AppError(
            f"model: {name} needs images of at least {SMALLEST[name]} pixels, got {size}"
        )
    if name in SPIKING:
        return SPIKING[name](channels, size, classes, neurons)
    return MODELS[name](channels, size, classes)
