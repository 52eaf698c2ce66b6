"""lfprop's networks: the same modules in the same order, so the same state_dict and initial law."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Activation = Callable[..., nn.Module]


class LeNet(nn.Module):
    """Two 5x5 convolutions and three dense layers with dropout.

    Args:
        n_channels: of the input; 1 expects 28x28 images, any other number 32x32.
        n_outputs: classes. activation: class of the activations.
    """

    def __init__(self, n_channels: int, n_outputs: int, activation: Activation = nn.ReLU) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(n_channels, 16, 5), activation(), nn.MaxPool2d(2, 2),
            nn.Conv2d(16, 16, 5), activation(), nn.MaxPool2d(2, 2),
        )  # fmt: skip
        size = 256 if n_channels == 1 else 400
        self.classifier = _dense((size, 120, 84, n_outputs), activation, dropout=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class CifarVGGLike(nn.Module):
    """Three stages of two 3x3 convolutions and three dense layers with dropout.

    Args:
        n_channels: of the input; 3 expects 32x32 images, any other number 28x28.
        n_outputs: classes. activation: class of the activations.
    """

    def __init__(self, n_channels: int, n_outputs: int, activation: Activation = nn.ReLU) -> None:
        super().__init__()
        self.features = _stages(n_channels, activation, norm=False)
        side = 4 if n_channels == 3 else 3
        self.classifier = _dense((256 * side * side, 1024, 512, n_outputs), activation, True)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class CifarVGGLikeBN(nn.Module):
    """:class:`CifarVGGLike` with batch norm, for 32x32 images of any number of channels."""

    def __init__(self, n_channels: int, n_outputs: int, activation: Activation = nn.ReLU) -> None:
        super().__init__()
        self.features = _stages(n_channels, activation, norm=True)
        self.classifier = _dense((256 * 4 * 4, 1024, 512, n_outputs), activation, True)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class DenseOnly(nn.Module):
    """Four dense layers with dropout.

    Args:
        n_channels: inputs. n_outputs: classes.
        activation: class of the activations. activation_kwargs: its arguments.
    """

    def __init__(
        self,
        n_channels: int,
        n_outputs: int,
        activation: Activation = nn.LeakyReLU,
        activation_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        widths = (n_channels, 512, 256, 128, n_outputs)
        self.classifier = _dense(widths, activation, True, **(activation_kwargs or {}))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(x, 1))


class ToyDataDense(nn.Module):
    """Three small dense layers; arguments as in :class:`DenseOnly`."""

    def __init__(
        self,
        n_channels: int,
        n_outputs: int,
        activation: Activation = nn.ReLU,
        activation_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        widths = (n_channels, 32, 16, n_outputs)
        self.classifier = _dense(widths, activation, False, **(activation_kwargs or {}))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(x, 1))


def _dense(
    widths: Sequence[int], activation: Activation, dropout: bool, **options: Any
) -> nn.Sequential:
    """Linear, activation, dropout, ..., Linear."""
    layers: list[nn.Module] = []
    for before, width in zip(widths[:-2], widths[1:-1]):
        layers += [nn.Linear(before, width), activation(**options)]
        if dropout:
            layers.append(nn.Dropout())
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def _stages(n_channels: int, activation: Activation, norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    before = n_channels
    for stage in ((32, 64), (128, 128), (256, 256)):
        for width in stage:
            layers.append(nn.Conv2d(before, width, 3, padding=1))
            if norm:
                layers.append(nn.BatchNorm2d(width))
            layers.append(activation())
            before = width
        layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers)
