"""Counted memory traffic of the memory-bound CUDA operators: at most 5 % over the minimum.

The minimum is every operand once and every result once, and for batch norm with batch statistics
the operands twice: each result depends on sums over all of its channel. The counter sees the bytes
that threads ask for, so a value that two threads load counts twice, even where a cache serves it.

Runs under ``--simulate cuda`` (conftest.py), where the ops on CPU tensors are the CUDA kernels: the
library is built and loaded already, so no process of its own is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as TF
from gpusim import counting
from torch import Tensor

from lfp_kernels import functional as F
from lfp_kernels import optim, rewards
from lfp_kernels.rules import Epsilon

LIMIT = 1.05
SHAPE = (4, 32, 56, 56)
LAYOUTS = ("plain", "last")
DTYPES = ("float32", "bfloat16")


def cases() -> list[str]:
    tensors = [
        "batch_norm train", "batch_norm eval", "batch_norm redistribute train",
        "batch_norm redistribute chained", "batch_norm redistribute eval", "max_pool 2",
        "max_pool 2 redistribute", "max_pool 3", "max_pool 3 redistribute", "avg_pool 2",
        "avg_pool 3", "adaptive_avg_pool", "sum",
    ]  # fmt: skip
    names = [f"{op}, {dtype}, {layout}" for op in tensors for dtype in DTYPES for layout in LAYOUTS]
    rest = [
        "reward softmax", "reward classification", "reward wide", "spike rate", "sgd", "adamw",
        "global_norm", "step",
    ]  # fmt: skip
    return names + [f"{op}, {dtype}" for op in rest for dtype in DTYPES]


def tensor_calls(op: str, x, make) -> tuple[Callable[[], object], list]:
    """The call, and the operands that it reads at least (a tensor twice: two reads)."""
    c = x.shape[1]
    if op.startswith("batch_norm"):
        weight, bias, mean, var = (make((c,)).abs() + 1 for _ in range(4))
        norm = (x, weight, bias, mean, var)
        if op == "batch_norm train":
            return lambda: F.batch_norm(*norm, True, 0.1, 1e-5, relu=True), [x, x]
        if op == "batch_norm eval":
            return lambda: F.batch_norm(*norm, False, 0.1, 1e-5, relu=True), [x]
        training = not op.endswith("eval")
        z, *stats = F.batch_norm(*norm, training, 0.1, 1e-5)
        r = make(x.shape)
        args = (x, weight, bias, z, r, *stats, training)
        if op.endswith("chained"):
            chain = {"signal_in": True, "below": Epsilon()}
            return lambda: F.batch_norm_redistribute(*args, **chain), [x, r, x, r]
        reads = [x, z, r] * (2 if training else 1)
        return lambda: F.batch_norm_redistribute(*args), reads
    if op.startswith("max_pool"):
        window = (2, 2, 0) if "2" in op.split()[1] else (3, 2, 1)
        out, indices = F.max_pool(x, *window)
        r = make(out.shape)
        if op.endswith("redistribute"):
            return lambda: F.max_pool_redistribute(r, indices, x.shape), [r, indices]
        return lambda: F.max_pool(x, *window), [x]
    if op == "sum":
        other, r = make(x.shape), make(x.shape)
        return lambda: F.sum_redistribute(x, other, r), [x, other, r]
    if op == "adaptive_avg_pool":
        z = TF.adaptive_avg_pool2d(x, 1)
        r = make(z.shape)
        return lambda: F.adaptive_avg_pool_redistribute(x, z, r), [x, z, r]
    window = (2, 2, 0) if op.endswith("2") else (3, 2, 1)
    z = TF.avg_pool2d(x, *window)
    r = make(z.shape)
    return lambda: F.avg_pool_redistribute(x, z, r, *window), [x, z, r]


def other_calls(op: str, make, dtype) -> tuple[Callable[[], object], list]:
    """The same for the operators without a layout; `[...]` counts what is written in place."""
    if op.startswith("reward"):
        out = make((60, 5000) if op.endswith("wide") else (512, 100))
        y = torch.arange(out.shape[0]) % out.shape[1]
        function = rewards.correct_classification if "class" in op else rewards.softmax
        return lambda: function(out, y), [out, y]
    if op == "spike rate":
        spikes, y = (make((25, 64, 40)) > 0).to(dtype), torch.arange(64) % 40
        return lambda: rewards.snn_rate(spikes, y), [spikes, y]
    if op == "step":
        x = make((1 << 16,))
        return lambda: F.step(x), [x]
    params = [make(shape) for shape in ((64, 300), (300,), (1000, 77), (5,))]
    if op == "global_norm":
        return lambda: F.global_norm(params), params
    feedback = [make(p.shape) for p in params]
    spec = optim.SGD(0.1, momentum=0.9) if op == "sgd" else optim.AdamW(0.1)
    bound = optim.BoundOptimizer(spec, [torch.nn.Parameter(p) for p in params])
    group = bound.param_groups[0]
    updates = [bound.update_of(p, group) for p in group["params"]]
    states = [s for update in updates for s in update.states]
    in_place = [*params, *states]
    return lambda: F.optimizer_update(params, feedback, updates), [*in_place, *in_place, *feedback]


def tensors_of(result) -> Iterator:
    if isinstance(result, torch.Tensor):
        yield result
    elif result is not None:
        for item in result:
            yield from tensors_of(item)


def size(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.gpusim
@pytest.mark.parametrize("case", cases())
def test_traffic(case):
    op, dtype_name, *layout = case.split(", ")
    dtype, generator = getattr(torch, dtype_name), torch.Generator().manual_seed(0)

    def make(shape):
        t = torch.randn(shape, generator=generator).to(dtype)
        is_last = layout == ["last"] and t.dim() == 4
        return t.contiguous(memory_format=torch.channels_last) if is_last else t

    call, operands = tensor_calls(op, make(SHAPE), make) if layout else other_calls(op, make, dtype)
    with counting() as counts:
        result = call()
    counted = sum(launch.bytes for launch in counts.launches)
    ratio = counted / (size(operands) + size(list(tensors_of(result))))
    directions = [
        t for launch in counts.launches for b in launch.buffers for t in (b.load, b.store)
    ]
    sectors = sum(t.sectors for t in directions) / sum(t.ideal_sectors for t in directions)
    print(f"{case}: {ratio:.3f}, sectors {sectors:.3f}, {len(counts.launches)} launches")
    assert 0.99 < ratio <= LIMIT, f"{case}: {ratio:.3f}"
    if op.startswith("batch_norm"):  # a store that the compiler takes apart shows here
        assert sectors < 1.1, f"{case}: sectors {sectors:.3f}"
