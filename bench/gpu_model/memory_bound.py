"""Elementwise passes, rewards, optimizer updates and the global norm (csrc/cuda/*.cu of the same
names): every operand is read once and every result written once, apart from what is said below.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lfp_kernels.ops.reward.codes import VALUE_TARGET, Kind

from .devices import Gpu
from .launch import STATES, Launch, accumulator, ceil_div, type_name, wide

STAGE = 48 * 1024  # bytes of shared memory that rewards keep what they read twice in


def elementwise(
    name: str, loads: dict[str, Tensor], stores: dict[str, int], count: int, element: int
) -> list[Launch]:
    """elementwise.cuh: a thread handles two accesses of 16 bytes of each operand."""
    if count == 0:
        return []
    blocks = max(1, ceil_div(count // wide(element), 512))
    launch = Launch(
        "elementwise_kernel", (f"<{wide(element)}, {name}<{type_name(element)}",), blocks
    )
    for what, t in loads.items():
        launch.load(what, t.nbytes)
    for what, size in stores.items():
        launch.store(what, size)
    return [launch]


def step(a: dict[str, Any], gpu: Gpu) -> list[Launch]:
    x = a["x"]
    return elementwise("Step", {"x": x}, {"y": x.nbytes}, x.numel(), x.element_size())


def sum_redistribute(a: dict[str, Any], gpu: Gpu) -> list[Launch]:
    loads = {name: a[name] for name in ("a", "b", "reward")}
    size, r = a["reward"].nbytes, a["reward"]
    stores = {"reward of a": size, "reward of b": size}
    return elementwise("SumRedistribute", loads, stores, r.numel(), r.element_size())


def dropout_redistribute(a: dict[str, Any], gpu: Gpu) -> list[Launch]:
    r = a["reward"]
    loads, stores = {"reward": r, "mask": a["mask"]}, {"input reward": r.nbytes}
    return elementwise("DropoutRedistribute", loads, stores, r.numel(), r.element_size())


# ---- updates

SEGMENTS, HYPERS, NORM_SEGMENTS, NORM_CHUNK = 64, 8, 160, 8192
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


OPTIMIZERS = {0: "Sgd", 1: "SgdMomentum", 2: "AdamW"}


def _update_launch(dtype: torch.dtype, code: int) -> Launch:
    return Launch("update_kernel", (f"<{type_name(dtype.itemsize)}, {OPTIMIZERS[code]}<",))


def optimizer_update(a: dict[str, Any], gpu: Gpu) -> list[Launch]:
    """One launch per 64 tensors (float64: 56) or 8 rows of hyper-parameters of one dtype and
    optimizer; with learning rates on the device, per rate, too."""
    lr, steps = a.get("lr", ()), a.get("steps", ())
    rows = len(a["hyper"]) // max(len(a["params"]), 1)
    items = [
        (p, f, code, tuple(a["hyper"][k * rows : (k + 1) * rows]), lr[k] if lr else None)
        for k, (p, f, code) in enumerate(zip(a["params"], a["feedback"], a["codes"]))
    ]
    found = []
    for dtype in DTYPES:
        for code, states in STATES.items():
            hypers: set[tuple] = set()
            rate_now: Tensor | None = None
            segments = SEGMENTS - 8 * (dtype == torch.float64)
            launch, count, blocks = _update_launch(dtype, code), 0, 0
            for p, f, own, hyper, rate in items:
                if p.dtype != dtype or own != code or p.numel() == 0:
                    continue
                full = count == segments or (hyper not in hypers and len(hypers) == HYPERS)
                if count and (full or rate is not rate_now):
                    found.append(launch)
                    launch, count, blocks = _update_launch(dtype, code), 0, 0
                    hypers = set()
                count += 1
                rate_now = rate
                hypers.add(hyper)
                added = ceil_div(p.numel(), 256 * wide(p.element_size()) * 2)
                blocks += added
                if rate is not None:  # every thread reads it
                    launch.load("lr", 256 * added * rate.element_size(), rate.element_size())
                if steps and states == 2:
                    launch.load(f"step {count}", 256 * added * 4, 4)
                launch.blocks = blocks
                launch.load(f"feedback {count}", f.nbytes)
                launch.load(f"param {count}", p.nbytes)
                launch.store(f"param {count}", p.nbytes)
                launch.load(f"states {count}", states * p.nbytes)
                launch.store(f"states {count}", states * p.nbytes)
            if count:
                found.append(launch)
    return found


def optimizer_update_live(a: dict[str, Any], gpu: Gpu) -> list[Launch]:
    return optimizer_update(a, gpu)


def global_norm(a: dict[str, Any], gpu: Gpu) -> list[Launch]:
    """Sums of squares of chunks of 8192 elements, then their sum."""
    found, chunks = [], 0
    for dtype in DTYPES:
        tensors = [t for t in a["tensors"] if t.dtype == dtype and t.numel()]
        for first in range(0, len(tensors), NORM_SEGMENTS):
            batch = tensors[first : first + NORM_SEGMENTS]
            blocks = sum(ceil_div(t.numel(), NORM_CHUNK) for t in batch)
            launch = Launch("squares_kernel", (f"<{type_name(dtype.itemsize)}>",), blocks)
            for k, t in enumerate(batch):
                launch.load(f"tensor {k}", t.nbytes)
            launch.store("chunk sums", 8 * blocks)
            chunks += blocks
            found.append(launch)
    root = Launch("root_kernel", (), 1, 256)
    root.load("chunk sums", 8 * chunks)
    is_double = any(t.dtype == torch.float64 for t in a["tensors"])
    root.store("norm", 8 if is_double else 4)
    return [*found, root]


# ---- rewards

WIDE_ROW = 256  # from so many classes on a block works on a row, else a warp


def reward(a: dict[str, Any], gpu: Gpu) -> list[Launch]:
    """Rows too long for shared memory are read again: twice by the softmax, once by arg-max. Each
    warp reads its row's label; the misclassification reward has every lane read the label's logit.
    """
    out, kind = a["out"], Kind(a["kind"])
    element = out.element_size()
    if out.numel() == 0:
        return []
    if kind in VALUE_TARGET:
        loads = {"out": out, "target": a["target"]}
        return elementwise("ValueReward", loads, {"reward": out.nbytes}, out.numel(), element)
    classes = out.shape[-1]
    rows, block_row = out.numel() // classes, classes >= WIDE_ROW
    per_block, lanes = (1, 256) if block_row else (8, 32)
    stage = per_block * classes * accumulator(element)
    rereads = {
        Kind.SOFTMAX: 2, Kind.BOUNDED_SOFTMAX: 2, Kind.CORRECT_CLASSIFICATION: 1
    }.get(kind, 0)  # fmt: skip
    name = kind.name.title().replace("_", "")
    launch = Launch(
        "rows_kernel", (f"<{type_name(element)}, {name}Reward<",), ceil_div(rows, per_block), 256,
        stage if stage <= STAGE else 0,
    )  # fmt: skip
    launch.load("out", out.nbytes * (1 if stage <= STAGE else 1 + rereads), out.nbytes)
    if kind == Kind.MISCLASSIFICATION:
        launch.load("out", rows * lanes * element, out.nbytes)
    if a["target"] is not None:
        launch.load("labels", 8 * rows * (8 if block_row else 1), 8 * rows)
    launch.store("reward", out.nbytes)
    return [launch]


def reward_spike_rate(a: dict[str, Any], gpu: Gpu) -> list[Launch]:
    """A thread owns a neuron; one thread per warp and row reads the label."""
    spikes = a["spikes"]
    if spikes.numel() == 0:
        return []
    steps, classes, element = spikes.shape[0], spikes.shape[-1], spikes.element_size()
    neurons = spikes.numel() // steps
    threads = 256
    while threads > 32 and threads * steps * element > STAGE:
        threads //= 2
    staged = threads * steps * element <= STAGE
    threads = threads if staged else 256
    readers = sum(ceil_div(neurons, n) for n in (32, classes))
    readers -= ceil_div(neurons, math.lcm(32, classes))
    launch = Launch(
        "spike_rate_kernel", (f"<{type_name(element)}>",), ceil_div(neurons, threads), threads,
        threads * steps * element * staged,
    )  # fmt: skip
    launch.load("spikes", spikes.nbytes * (1 if staged else 2), spikes.nbytes)
    launch.load("labels", 8 * readers, 8 * neurons // classes)
    launch.store("reward", spikes.nbytes)
    return [launch]
