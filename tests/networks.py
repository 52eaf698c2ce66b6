"""Small networks that several test files train, written as torchvision writes them."""

from __future__ import annotations

import torch
import torch.nn.functional as TF
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """The residual block of torchvision: in-place ReLU, in-place +=, downsampled identity."""

    def __init__(self, channels: int, out: int, stride: int, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=inplace)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        if self.inplace:
            out += identity
        else:
            out = out + identity
        return self.relu(out)


class SmallResNet(nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=inplace)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BasicBlock(4, 4, 1, inplace), BasicBlock(4, 6, 2, inplace))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.layer1(x))
        return self.fc(torch.flatten(x, 1))


def small_resnet(inplace: bool = True) -> nn.Module:
    return SmallResNet(inplace).double()


def small_vgg(dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32, 16), nn.ReLU(inplace=True), nn.Dropout(0.0), nn.Linear(16, 4),
    ).to(dtype)  # fmt: skip


def lenet(dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 4),
    ).to(dtype)  # fmt: skip


class FunctionalNet(nn.Module):
    """Every layer as a call of torch.nn.functional; :meth:`as_modules` is the same network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding="same")
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = TF.conv2d(x, self.conv.weight, self.conv.bias, padding=1)
        x = TF.relu(x)
        x = TF.max_pool2d(x, 2)
        x = TF.avg_pool2d(x, 2, stride=3)
        x = torch.tanh(x.view(x.size(0), -1))
        return TF.linear(x, self.fc.weight, self.fc.bias)

    def as_modules(self) -> nn.Module:
        twin = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2, 3),
            nn.Flatten(), nn.Tanh(), nn.Linear(12, 4),
        ).to(self.fc.weight.dtype)  # fmt: skip
        twin.load_state_dict(dict(zip(twin.state_dict(), self.state_dict().values())))
        return twin


def batches(shape: tuple[int, ...], classes: int, count: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.randn(6, *shape).double(), torch.randint(0, classes, (6,))) for _ in range(count)
    ]
