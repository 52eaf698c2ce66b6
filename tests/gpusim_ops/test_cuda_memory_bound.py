"""The memory-bound CUDA kernels at the shapes where their tiles, stages and launches have edges.

The op tests use small shapes, which fit into one tile. Here planes are cut into tiles, several
planes share a block, what a tile needs does not fit into shared memory, tensors fill several
launches. The reference backend is the oracle.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor

from lfp_kernels import functional as F
from lfp_kernels import optim, rewards, use_backend
from lfp_kernels.ops.reward import native, reference
from lfp_kernels.ops.reward.codes import Kind
from lfp_kernels.optim import BoundOptimizer
from lfp_kernels.testing import assert_within_budget

pytestmark = pytest.mark.gpusim


def values(shape, dtype=torch.float32, last=False, seed=0) -> Tensor:
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if not last:
        return t
    memory = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.contiguous(memory_format=memory[t.dim()])


def both(call) -> tuple:
    with use_backend("native"):
        got = call()
    with use_backend("reference"):
        return got, call()


# shape; kernel, stride, padding; channels last
WINDOWS = {
    "parts of planes": ((1, 2, 120, 100), (3, 2, 1), False),
    "parts of planes, odd rows": ((2, 1, 131, 97), (3, 2, 1), False),
    "parts of planes, tiling windows": ((1, 2, 128, 130), (2, 2, 0), False),
    "slabs and parts": ((1, 12, 56, 60), (3, 2, 1), True),
    "slabs, last one narrow": ((2, 20, 30, 30), (3, 1, 1), True),
    "odd channels": ((1, 11, 40, 40), (3, 2, 1), True),
    "slabs, tiling windows": ((1, 24, 40, 44), (2, 2, 0), True),
    "several planes in a block": ((64, 20, 3, 5), (2, 1, 0), False),
    "several planes, tiling windows": ((96, 16, 4, 4), (2, 2, 0), False),
    "several planes, last block short": ((65, 19, 3, 5), (2, 1, 0), False),
    "more places than 16 bits": ((1, 1, 300, 260), (5, 4, 0), False),
    "one long axis": ((1, 2, 20001), (5, 3, 2), False),
    "volumes in parts": ((1, 1, 15, 42, 56), (3, 2, 1), False),  # of five steps: they share windows
    "a stage beyond 48 KB": ((1, 1, 5, 4500), (3, 1, 1), False),
    "volumes, channels last": ((1, 9, 12, 20, 20), (2, 2, 0), True),
    "the plane does not fit": ((1, 1, 130, 132), (3, 1, 1), False),
    "the window does not fit": ((1, 1, 60, 512), ((60, 2), (1, 2), (0, 1)), False),
    "the windows of a row do not fit": ((1, 8, 32, 260), ((17, 2), 1, (8, 1)), True),
}
each_window = pytest.mark.parametrize("name", WINDOWS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@each_window
@each_dtype
def test_max_pool(name, dtype):
    shape, window, last = WINDOWS[name]
    x = values(shape, dtype, last)
    (out, indices), (same, _) = both(lambda: F.max_pool(x, *window))
    assert torch.equal(out, same)
    r = values(out.shape, dtype, seed=3)
    got, want = both(lambda: F.max_pool_redistribute(r, indices, x.shape))
    with use_backend("reference"):
        truth = F.max_pool_redistribute(r.double(), indices, x.shape)
    assert_within_budget(got, want, truth)


@each_window
@each_dtype
def test_avg_pool(name, dtype):
    shape, window, last = WINDOWS[name]
    x = values(shape, dtype, last)
    z = F.avg_pool(x.float(), *window).to(dtype)
    z = torch.where(z.abs() < 0.1, 0.1, z)  # 1/eps at a zero would drown everything else
    r = values(z.shape, dtype, seed=5)
    got, want = both(lambda: F.avg_pool_redistribute(x, z, r, *window))
    with use_backend("reference"):
        truth = F.avg_pool_redistribute(x.double(), z.double(), r.double(), *window)
    assert_within_budget(got, want, truth)


@pytest.mark.parametrize(
    "shape, size, last",
    [
        ((600, 2, 7, 7), (1, 1), False),  # several planes in a block
        ((1, 40, 30, 33), (7, 5), True),
        ((1, 1, 150, 130), (70, 64), False),
        ((1, 1, 70001), (65537,), False),  # products beyond 32 bits
    ],
    ids=str,
)
def test_adaptive_avg_pool(shape, size, last):
    x = values(shape, torch.float64, last)
    pool = TF.adaptive_avg_pool1d if x.dim() == 3 else TF.adaptive_avg_pool2d
    z = pool(x, size)
    r = values(z.shape, torch.float64, seed=5)
    got, want = both(lambda: F.adaptive_avg_pool_redistribute(x, z, r))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11 * float(want.abs().max()))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(2, 3, 9, 9), (1, 2, 40, 36)], ids=str)
def test_any_winners_inside_the_input(shape, dtype):
    """Winners that no pool has made: all outputs point anywhere, the same place included."""
    size = (*shape[:2], *(s // 2 for s in shape[2:]))
    g = torch.Generator().manual_seed(0)
    places = torch.randint(0, 40, size, generator=g) * (shape[2] * shape[3] // 40)
    r = values(size, torch.float64)
    got, want = both(lambda: F.max_pool_redistribute(r, places.to(dtype), shape))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_winners_outside_the_input_show_as_nan():
    r, places = values((1, 2, 4, 4)), torch.zeros(1, 2, 4, 4, dtype=torch.int32)
    for wrong in (64, -1, 2**31 - 1):
        places[0, 1, 2, 2] = wrong
        assert F.max_pool_redistribute(r, places, (1, 2, 8, 8))[0, 1].isnan().all()


@pytest.mark.parametrize("classes", [255, 256, 5000, 13001])
@pytest.mark.parametrize(
    "kind", [Kind.SOFTMAX, Kind.CORRECT_CLASSIFICATION, Kind.MISCLASSIFICATION]
)
def test_wide_rows_of_logits(classes, kind):
    out = 3 * values((7, classes))
    out[1, classes - 1] = math.nan
    out[2, 3] = out[2, classes - 2] = 50.0  # a tie: the first wins
    out[6, 1], out[6, classes // 2] = 50.0, math.nan  # the label loses to a NaN behind it
    y = torch.tensor([0, 1, 3, classes - 1, classes, -1, 1])
    params = [0.0, 1.0, 0.0, -1.0]
    got, want = (module.reward(out, y, kind, params) for module in (native, reference))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("steps", [40, 90, 180, 300, 400])
def test_many_steps_of_spikes(steps):
    spikes, y = (values((steps, 7, 45)) > 1).float(), torch.arange(7)
    got, want = both(lambda: rewards.snn_rate(spikes, y))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-30)


def test_updates_of_many_tensors():
    """More tensors and more learning rates than a launch takes; tensors that are not aligned.

    56 tensors of float64 with one rate fill a launch; two of each further rate fill the next.
    """
    base = values((40000,), torch.float64)
    runs = []
    for backend in ("native", "reference"):
        store = base.clone()
        params = [torch.nn.Parameter(store[k * 301 + k % 3 :][: 100 + k]) for k in range(130)]
        groups = [{"params": params[:80], "lr": 0.01}]
        groups += [{"params": params[80 + k :: 25], "lr": 0.01 * (k + 2)} for k in range(25)]
        bound = BoundOptimizer(optim.SGD(0.1, momentum=0.9), groups)
        for _ in range(2):
            for param in params:
                param.grad = torch.cos(param.detach())
            with use_backend(backend):
                bound.step()
        runs.append(store)
    torch.testing.assert_close(*runs, rtol=1e-14, atol=1e-14)


def test_norm_of_many_tensors():
    tensors = [values((k * 37 % 9001,), seed=k) for k in range(350)]
    tensors += [values((20000,), torch.float64)[1:], values((9000,), torch.bfloat16)[3:]]
    got, want = both(lambda: F.global_norm(tensors))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def shifted(t: Tensor) -> Tensor:
    """A dense copy that starts one element behind what 16-byte accesses need."""
    return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)


def assert_same_bits_wherever_they_lie(call, *tensors) -> None:
    """Each tensor in turn lies where wide accesses are not allowed."""
    want = call(*tensors)
    for k, moved in enumerate(tensors):
        for got, same in zip(call(*tensors[:k], shifted(moved), *tensors[k + 1 :]), want):
            assert torch.equal(got, same), f"argument {k}"


@each_dtype
def test_unaligned_elementwise(dtype):
    a, b, r = (values((33, 70), dtype, seed=k) for k in range(3))
    assert_same_bits_wherever_they_lie(F.sum_redistribute, a, b, r)
    assert_same_bits_wherever_they_lie(lambda x: [F.step(x)], a)
    drop = F.dropout_redistribute
    assert_same_bits_wherever_they_lie(lambda r, m: [drop(r, m, 0.5)], r, a > 0)


@each_dtype
def test_unaligned_pools(dtype):
    x = values((2, 3, 16, 24), dtype)
    for window in ((2, 2, 0), (3, 2, 1)):
        pool = partial(F.max_pool, kernel_size=window[0], stride=window[1], padding=window[2])
        assert_same_bits_wherever_they_lie(pool, x)
        out, winners = pool(x)
        give = partial(F.max_pool_redistribute, input_shape=x.shape)
        assert_same_bits_wherever_they_lie(lambda *args, give=give: [give(*args)], out, winners)
        fed = partial(F.avg_pool_redistribute, **pool.keywords)
        assert_same_bits_wherever_they_lie(lambda *args, fed=fed: [fed(*args)], x, out + 9, out)


# inner a multiple of a pack and a part of a plane not; several blocks of a channel; rows of columns
NORMS = [(2, 2, 8194), (1, 2, 4, 4097), (3, 5, 41, 40), (1300, 3), (700, 70), (90, 9, 5, 5)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", NORMS, ids=str)
def test_batch_norm_edges(shape, training):
    x = values(shape) + 1
    weight, bias = values(shape[1:2], seed=1), values(shape[1:2], seed=2)
    mean, var = values(shape[1:2], seed=3), values(shape[1:2], seed=4).abs() + 0.5
    r, z = values(shape, seed=5), values(shape, seed=6)
    z += z.sign()  # 1/eps at a zero would drown everything else

    def call(kind):
        stats = [t.to(kind, copy=True) for t in (mean, var)]
        args = [t.to(kind) for t in (x, weight, bias)]
        out, m, i = F.batch_norm(*args, *stats, training, 0.1, 1e-5)
        fed = F.batch_norm_redistribute(*args, z.to(kind), r.to(kind), m, i, training)
        return out, *stats, *fed

    got, same = both(lambda: call(torch.float32))
    with use_backend("reference"):
        truth = call(torch.float64)
    for a, b, c in zip(got, same, truth):
        assert_within_budget(a, b, c)
