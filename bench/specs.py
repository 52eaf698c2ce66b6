"""Training-step workloads and the figures that they are meant to reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

CLASSES = 10


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for i, o in pairwise(widths):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def lenet(maps: int = 16, hidden: tuple[int, int] = (120, 84)) -> nn.Sequential:
    """LeNet on 28x28: conv5(1, 16) pool conv5(16, 16) pool, dense 256-120-84-10, ReLU, max pools;
    48,686 parameters, the sizes that the LFP authors use, without their dropout."""
    return nn.Sequential(
        *(nn.Conv2d(1, maps, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(maps, maps, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(maps * 16, hidden[0]), nn.ReLU()),
        *(nn.Linear(hidden[0], hidden[1]), nn.ReLU()),
        nn.Linear(hidden[1], CLASSES),
    )


def vgg_bn(
    size: int = 32,
    widths: tuple[int, ...] = (64, 128, 256),
    hidden: tuple[int, int] = (1024, 512),
) -> nn.Sequential:
    """VGG-like on 3x32x32: for each width two 3x3 convolutions with batch norm and ReLU, then a
    2x2 max pool; dense 4096-1024-512-10 with dropout 0.5; 5,872,458 parameters."""
    layers: list[nn.Module] = []
    maps = 3
    for width in widths:
        for _ in range(2):
            layers += [nn.Conv2d(maps, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            maps = width
        layers.append(nn.MaxPool2d(2))
    flat = maps * (size >> len(widths)) ** 2
    layers.append(nn.Flatten())
    for width in hidden:
        layers += [nn.Linear(flat, width), nn.ReLU(), nn.Dropout(0.5)]
        flat = width
    return nn.Sequential(*layers, nn.Linear(flat, CLASSES))


# What a workload compares. "floor" and "floor_aten" are the bare products (bench/floor.py);
# "reference" is the nested-autograd algorithm of the official package (lfp_kernels/nested.py).
STEP_VARIANTS = (
    "fused",
    "dropin",
    "sgd",
    "sgd_fused_optimizer",
    "reference",
    "floor",
    "floor_aten",
)
COMPILED_VARIANTS = ("sgd_compiled", "reference_compiled")
LOW_PRECISION_VARIANTS = ("fused", "sgd", "reference", "floor", "floor_aten", "fused_fp32")


@dataclass(frozen=True)
class Workload:
    """One training step: model, batch, dtypes, variants."""

    name: str
    build: Callable[[], nn.Module]
    sample: tuple[int, ...]  # shape of one input
    batch: int
    dtype: torch.dtype = torch.float32
    feedback_dtype: torch.dtype | None = None
    variants: tuple[str, ...] = STEP_VARIANTS
    # (variant, column of report.Row) -> figure to reach, as "<= x" or ">= x"
    targets: dict[tuple[str, str], str] = field(default_factory=dict)

    def model(self, device: str) -> nn.Module:
        """The model from a fixed seed, in training mode."""
        torch.manual_seed(0)
        return self.build().to(device=device, dtype=self.dtype).train()

    def data(self, device: str) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        x = torch.rand(self.batch, *self.sample, generator=generator)
        y = torch.randint(CLASSES, (self.batch,), generator=generator)
        return x.to(device=device, dtype=self.dtype), y.to(device)


def _targets(floor: float, sgd: float, dropin: float, reference: float, memory: float):
    return {
        ("fused", "to_floor"): f"<= {floor}",
        ("fused", "to_sgd"): f"<= {sgd}",
        ("dropin", "to_sgd"): f"<= {dropin}",
        ("fused", "speedup_on_reference"): f">= {reference}",
        ("fused", "peak_to_sgd"): f"<= {memory}",
    }


def _small_mlp() -> nn.Module:
    return mlp(784, 1000, 1000, CLASSES)


def _large_mlp() -> nn.Module:
    return mlp(4096, 4096, 4096, CLASSES)


BF16 = torch.bfloat16
WORKLOADS: tuple[Workload, ...] = (
    Workload(
        "mlp784-b128", _small_mlp, (784,), 128, targets=_targets(1.2, 0.80, 1.1, 2, 0.75)
    ),
    Workload("mlp4096-b32", _large_mlp, (4096,), 32, targets=_targets(1.2, 0.5, 1.0, 4, 0.75)),
    Workload("mlp4096-b128", _large_mlp, (4096,), 128, targets=_targets(1.15, 0.8, 1.05, 2, 0.75)),
    Workload("mlp4096-b512", _large_mlp, (4096,), 512, targets=_targets(1.15, 1.0, 1.1, 1.5, 0.75)),
    Workload("lenet-b128", lenet, (1, 28, 28), 128, targets=_targets(2, 0.75, 1.3, 2.5, 1.0)),
    Workload(
        "vgg_bn-b64", vgg_bn, (3, 32, 32), 64, targets=_targets(1.3, 0.95, 1.25, 1.6, 1.0)
    ),
    Workload(
        "mlp4096-b128-bf16",
        _large_mlp,
        (4096,),
        128,
        dtype=BF16,
        variants=LOW_PRECISION_VARIANTS,
        targets={("fused", "to_fp32"): "<= 0.35"},
    ),
    Workload(
        "mlp4096-b128-bf16feedback",
        _large_mlp,
        (4096,),
        128,
        feedback_dtype=BF16,
        variants=LOW_PRECISION_VARIANTS,
        targets={("fused", "to_fp32"): "<= 0.65"},
    ),
)  # fmt: skip

# The same routes at sizes that take milliseconds, for tests.
QUICK_WORKLOADS: tuple[Workload, ...] = (
    Workload("quick-mlp", lambda: mlp(24, 32, CLASSES), (24,), 8, targets=_targets(9, 9, 9, 0, 9)),
    Workload("quick-lenet", lambda: lenet(2, (12, 12)), (1, 28, 28), 4),
    Workload("quick-vgg_bn", lambda: vgg_bn(8, (4, 8), (16, 16)), (3, 8, 8), 4),
    Workload(
        "quick-mlp-bf16",
        lambda: mlp(24, 32, CLASSES),
        (24,),
        8,
        dtype=BF16,
        variants=LOW_PRECISION_VARIANTS,
    ),
    Workload(
        "quick-mlp-bf16feedback",
        lambda: mlp(24, 32, CLASSES),
        (24,),
        8,
        feedback_dtype=BF16,
        variants=LOW_PRECISION_VARIANTS,
    ),
)  # fmt: skip


def workload_named(name: str) -> Workload:
    for workload in WORKLOADS + QUICK_WORKLOADS:
        if workload.name == name:
            return workload
    known = ", ".join(w.name for w in WORKLOADS + QUICK_WORKLOADS)
    raise ValueError(f"bench: workload: expected one of {known}, got {name!r}")
