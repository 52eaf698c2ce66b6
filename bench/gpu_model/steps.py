"""Launches and bytes of whole training steps: the fused step beside the nested reference.

Both run on the meta device, under one dispatch mode, at the same model, batch and optimizer (SGD
with momentum, as torch picks it for CUDA: foreach).

* An ATen operator that computes counts as one launch, and as the bytes of its tensor operands and
  results, each once. Views, `detach` and allocations count as nothing. These are the calls that
  torch.profiler sees (a test compares the two). It favours the reference: a convolution's backward,
  a batch norm or a foreach update is more than one kernel in truth.
* Our operators count twice: "by operator" by that same rule; "by kernel" with every launch of the
  model in traffic.py, partial sums, second passes and layout copies included, each launch with its
  distinct bytes. The targets are held against the latter, which is the stricter.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lfp_kernels
from lfp_kernels import nn as lfp_nn
from lfp_kernels.nested import NestedReference

from .. import specs
from . import LABEL
from .devices import A100, Gpu
from .traffic import as_on_cuda, bound, call_of, tensors_of, written_in_place

LAUNCHES, BYTES = 1 / 3, 1 / 2  # to reach: ours over the reference's
# Allocate or give another name to memory; a scalar's way to the host is a copy, not a kernel.
NO_KERNEL = frozenset({
    "detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
    "lift_fresh", "_local_scalar_dense", "set_", "resize_", "_unsafe_view", "_reshape_alias",
    "as_strided_",
})  # fmt: skip
WRITES_ONLY = frozenset({"copy_", "fill_", "zero_", "bernoulli_", "normal_", "uniform_"})


@dataclass
class Count:
    """``by_name``: how often each operator or kernel ran."""

    launches: int
    bytes: int
    by_name: Counter[str]


def is_view(func: Any) -> bool:
    """The result shares memory with an operand that it does not write."""
    return any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)


def operator_bytes(func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> int:
    """Tensor operands read once, results and what changes in place written once."""
    a = bound(func, args, kwargs)
    written = written_in_place(func, a)
    blank = {id(t) for t in written} if func._schema.name.split("::")[1] in WRITES_ONLY else set()
    read = {id(t): t for v in a.values() for t in tensors_of(v) if id(t) not in blank}
    mutated = {id(t) for t in written}
    made = [t for t in tensors_of(result) if id(t) not in mutated]
    return sum(t.nbytes for t in [*read.values(), *written, *made])


class StepCounter(TorchDispatchMode):
    """``operators``: every operator by one rule. ``kernels``: ours as the launches they make."""

    def __init__(self, gpu: Gpu = A100) -> None:
        super().__init__()
        self.gpu = gpu
        self.operators, self.kernels = Count(0, 0, Counter()), Count(0, 0, Counter())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        space, name = func._schema.name.split("::")
        if space == "lfp_kernels":
            call = call_of(func, args, kwargs, result, self.gpu)
            self._add(self.operators, name, call.once)
            for launch in call.launches:
                kernel = "layout copy" if launch.kernel == "aten" else launch.kernel
                self._add(self.kernels, kernel, launch.distinct)
        elif space == "aten" and name not in NO_KERNEL and not is_view(func):
            size = operator_bytes(func, args, kwargs, result)
            self._add(self.operators, name, size)
            self._add(self.kernels, f"aten::{name}", size)
        return result

    @staticmethod
    def _add(count: Count, name: str, size: int) -> None:
        count.launches += 1
        count.bytes += size
        count.by_name[name] += 1


def counted(run: Callable[[], Any], gpu: Gpu = A100) -> StepCounter:
    """The second of two runs: the first one makes optimizer states and the like."""
    run()
    with StepCounter(gpu) as counter:
        run()
    return counter


# ---- networks


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a sum with the block's input (a module, for the reference)."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or before != width:
            self.skip = nn.Sequential(
                nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )
        self.sum, self.relu = lfp_nn.Sum(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.sum(self.body(x), self.skip(x)))


def resnet18(widths: tuple[int, ...] = (64, 128, 256, 512)) -> nn.Sequential:
    """ResNet-18 for 3x32x32: a 3x3 stem without pooling, ten classes."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(),
    ]  # fmt: skip
    before = widths[0]
    for stage, width in enumerate(widths):
        layers += [BasicBlock(before, width, 1 + (stage > 0)), BasicBlock(width, width, 1)]
        before = width
    tail = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, specs.CLASSES))
    return nn.Sequential(*layers, *tail)


@dataclass(frozen=True)
class Network:
    name: str
    build: Callable[[], nn.Module]
    sample: tuple[int, ...]
    batch: int


NETWORKS = (
    Network("LeNet", specs.lenet, (1, 28, 28), 128),
    Network("VGG-BN", specs.vgg_bn, (3, 32, 32), 64),
    Network("ResNet-18", resnet18, (3, 32, 32), 128),
)
QUICK_NETWORKS = (Network("LeNet", lambda: specs.lenet(2, (12, 12)), (1, 28, 28), 4),)


@dataclass(frozen=True)
class Comparison:
    network: Network
    operators: Count  # ours, by operator
    kernels: Count  # ours, by kernel
    reference: Count

    @property
    def launches(self) -> float:
        return self.kernels.launches / self.reference.launches

    @property
    def bytes(self) -> float:
        return self.kernels.bytes / self.reference.bytes


def compare(network: Network, gpu: Gpu = A100) -> Comparison:
    """One training step of either kind."""
    with torch.device("meta"):
        ours, theirs = network.build().train(), network.build().train()
        x = torch.empty(network.batch, *network.sample)
        y = torch.empty(network.batch, dtype=torch.int64)
    with as_on_cuda():
        step = lfp_kernels.fuse(
            ours,
            lfp_kernels.composites.Epsilon(),
            optimizer=lfp_kernels.optim.SGD(lr=1e-3, momentum=0.9),
        )
        fused = counted(lambda: step(x, y), gpu)
    nested = NestedReference(theirs)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=1e-3, momentum=0.9, foreach=True)
    with nested.context():
        reference = counted(lambda: nested.step(x, y, optimizer), gpu)
    return Comparison(network, fused.operators, fused.kernels, reference.operators)


def text(comparisons: Sequence[Comparison]) -> str:
    """A line per network."""
    lines = [f"a training step: {LABEL}"]
    for c in comparisons:
        lines.append(f"{c.network.name}, batch {c.network.batch}, float32")
        for name, count in (
            ("reference, ATen operators", c.reference), ("fused, operators", c.operators),
            ("fused, kernels", c.kernels),
        ):  # fmt: skip
            launches, size = count.launches / c.reference.launches, count.bytes / c.reference.bytes
            lines.append(
                f"  {name:<26} {count.launches:5d} launches ({launches:6.1%})"
                f"  {count.bytes / 1e6:10.1f} MB ({size:6.1%})"
            )
        most = ", ".join(f"{n} {k}" for k, n in c.kernels.by_name.most_common(12))
        lines.append(f"  kernels: {most}")
    lines += [
        "An ATen operator counts as one launch and the bytes of its operands and results; views as",
        "nothing. Ours by operator: the same rule. Ours by kernel: every launch, with its distinct",
        "bytes, partial sums, second passes and layout copies included (the stricter count).",
    ]
    return "\n".join(lines)


def write(comparisons: Sequence[Comparison], path: Path) -> Path:
    """A row per network and way of counting."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("label", "network", "batch", "counted", "launches", "bytes", "by_name"))
        for c in comparisons:
            for name, count in (
                ("reference by operator", c.reference), ("fused by operator", c.operators),
                ("fused by kernel", c.kernels),
            ):  # fmt: skip
                most = "; ".join(f"{k} {n}" for k, n in count.by_name.most_common())
                head = (LABEL, c.network.name, c.network.batch)
                writer.writerow((*head, name, count.launches, count.bytes, most))
    return path
