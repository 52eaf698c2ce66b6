"""Products of packed spikes against unpacking and dense products in float64; pools; counts."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor

from lfp_kernels import ops, use_backend
from lfp_kernels.backends import select
from lfp_kernels.ops.spike_events import reference
from lfp_kernels.testing import poisoned_empty

_ = ops
BACKENDS = ("native", "reference")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
NATIVE = (torch.float64, torch.float32)


def ops_of(backend: str, dtype: torch.dtype = torch.float32):
    with use_backend(backend):
        return select("spike_events", torch.empty(0, dtype=dtype))


def spikes(steps: int, *shape: int, rate: float = 0.2, seed: int = 0) -> Tensor:
    """Bits [P, *shape]; ones above the last step would be a caller's error, so there are none."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand((steps, *shape), generator=generator) < rate
    padded = torch.zeros((-(-steps // 8) * 8, *shape), dtype=torch.uint8)
    padded[:steps] = x
    shift = torch.arange(8, dtype=torch.uint8).view(1, 8, *[1] * len(shape))
    return (padded.unflatten(0, (-1, 8)) << shift).sum(1, dtype=torch.uint8)


def unpacked(bits: Tensor, steps: int) -> Tensor:
    """Spikes [steps, ...] in float64, bit by bit."""
    return torch.stack([(bits[t // 8] >> (t % 8)) & 1 for t in range(steps)]).double()


def values(*shape: int, dtype=torch.float64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def close(got: Tensor, truth: Tensor) -> None:
    assert got.shape == truth.shape
    if truth.numel():
        error = (got.double() - truth).abs().max()
        assert error <= TOLERANCE[got.dtype] * max(1.0, truth.abs().max()), error


def last(x: Tensor) -> Tensor:
    """x [T, N, C, H, W], channels last in memory."""
    return x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def is_last(x: Tensor) -> bool:
    return x.permute(0, 1, 3, 4, 2).is_contiguous()


def conv_truth(x, weight, bias, signal, padding, magnitude):
    """Autograd in float64."""
    weight, signal = weight.double().requires_grad_(), signal.double()
    x = x.clone().requires_grad_()
    z = TF.conv2d(x.flatten(0, 1), weight, None if bias is None else bias.double(), 1, padding)
    dx, dw = torch.autograd.grad(z, (x, weight), signal.flatten(0, 1))
    db = signal.sum((0, 1, 3, 4))
    if magnitude:
        dw = dw * weight.abs()
        db = db if bias is None else db * bias.double().abs()
    return z.detach().unflatten(0, x.shape[:2]), (x * dx).detach(), dw.detach(), db


def check_conv(backend, dtype, steps, x_shape, w_shape, padding, rate=0.2, layouts=True):
    n, c, h, w = x_shape
    bits = spikes(steps, n, c, h, w, rate=rate)
    weight, bias = values(*w_shape, dtype=dtype), values(w_shape[0], dtype=dtype, seed=2)
    out = [h + 2 * padding[0] - w_shape[2] + 1, w + 2 * padding[1] - w_shape[3] + 1]
    signal = values(steps, n, w_shape[0], *out, dtype=dtype, seed=3)
    truth = conv_truth(unpacked(bits, steps), weight, bias, signal, padding, True)
    run = ops_of(backend, dtype)
    for b, s in ((bits, signal), (last(bits), last(signal)))[: 2 if layouts else 1]:
        z = run.spike_conv2d_forward(b, steps, weight, bias, padding)
        assert is_last(z)
        close(z, truth[0])
        got = run.spike_conv2d_redistribute(b, steps, weight, bias, s, padding, *[True] * 4)
        assert is_last(got[0]) and got[1].is_contiguous()
        for g, t in zip(got, truth[1:]):
            close(g, t)


# (N, C, H, W), (O, C, kh, kw), padding
CONVS = [
    ((2, 3, 7, 6), (10, 3, 3, 3), (1, 1)),
    ((2, 3, 7, 6), (17, 3, 1, 1), (0, 0)),
    ((1, 2, 9, 8), (16, 2, 5, 5), (0, 0)),
    ((1, 2, 5, 4), (1, 2, 3, 3), (2, 2)),
    ((1, 2, 4, 5), (5, 2, 2, 3), (4, 5)),  # further than the kernel reaches
    ((2, 2, 3, 3), (3, 2, 1, 1), (2, 1)),
    ((2, 2, 40, 9), (3, 2, 1, 3), (1, 0)),  # several blocks of rows
    ((1, 4, 17, 17), (150, 4, 3, 3), (1, 1)),
    ((1, 1, 1, 1), (2, 1, 1, 1), (0, 0)),
    ((1, 2, 6, 6), (33, 2, 4, 4), (1, 2)),
    ((1, 1, 9, 9), (3, 1, 7, 7), (3, 3)),
]


@pytest.mark.parametrize("dtype", NATIVE, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CONVS, ids=str)
def test_conv(case, backend, dtype):
    check_conv(backend, dtype, 11, *case)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 8, 9, 25, 70])
def test_conv_steps_and_rates(steps, rate, backend):
    check_conv(backend, torch.float32, steps, (2, 3, 4, 4), (5, 3, 3, 3), (1, 1), rate)


@pytest.mark.parametrize("dtype", NATIVE, ids=str)
def test_conv_on_several_threads(dtype):
    for steps in (1, 25):
        check_conv("native", dtype, steps, (3, 20, 17, 17), (40, 20, 3, 3), (1, 1), 0.1, False)


def linear_truth(x, weight, bias, signal, magnitude):
    weight, signal = weight.double(), signal.double()
    dw, db = torch.einsum("tno,tni->oi", signal, x), signal.sum((0, 1))
    if magnitude:
        dw, db = dw * weight.abs(), db * bias.double().abs()
    return x @ weight.t() + bias.double(), x * (signal @ weight), dw, db


@pytest.mark.parametrize("dtype", NATIVE, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "sizes", list(itertools.product([1, 70, 300], [1, 45], [1, 10, 16, 17, 150]))
)
def test_linear(sizes, backend, dtype):
    n, inputs, outputs = sizes
    run = ops_of(backend, dtype)
    for steps, rate in ((1, 0.5), (8, 1.0), (9, 0.0), (25, 0.1)):
        bits = spikes(steps, n, inputs, rate=rate)
        weight, bias = values(outputs, inputs, dtype=dtype), values(outputs, dtype=dtype, seed=2)
        signal = values(steps, n, outputs, dtype=dtype, seed=3)
        truth = linear_truth(unpacked(bits, steps), weight, bias, signal, True)
        z = run.spike_linear_forward(bits, steps, weight, bias)
        assert z.is_contiguous()
        close(z, truth[0])
        got = run.spike_linear_redistribute(bits, steps, weight, bias, signal, *[True] * 4)
        for g, t in zip(got, truth[1:]):
            assert g.is_contiguous()
            close(g, t)


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_large(backend):
    """Several blocks of rows and of outputs, on several threads."""
    steps, n, inputs, outputs = 9, 150, 200, 400
    bits, signal = spikes(steps, n, inputs, rate=0.1), values(steps, n, outputs)
    weight, bias = values(outputs, inputs), values(outputs)
    truth = linear_truth(unpacked(bits, steps), weight, bias, signal, False)
    run = ops_of(backend, torch.float64)
    close(run.spike_linear_forward(bits, steps, weight, bias), truth[0])
    got = run.spike_linear_redistribute(bits, steps, weight, bias, signal, False, *[True] * 3)
    for g, t in zip(got, truth[1:]):
        close(g, t)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_runs_on_the_reference(dtype):
    """The compiled kernels have no 16-bit loops; the automatic choice takes the oracle."""
    assert select("spike_events", torch.empty(0, dtype=dtype)) is reference
    with pytest.raises(RuntimeError, match=r"spike_events.*float32"):
        ops_of("native", dtype)
    check_conv("reference", dtype, 9, *CONVS[0])


# ---- contract


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_switched_off_is_empty(backend):
    steps, padding = 9, (1, 1)
    run = ops_of(backend)
    bits, weight = spikes(steps, 2, 3, 5, 5), values(4, 3, 3, 3, dtype=torch.float32)
    bias, signal = values(4, dtype=torch.float32), values(steps, 2, 4, 5, 5, dtype=torch.float32)
    flat, matrix = spikes(steps, 6, 7), values(4, 7, dtype=torch.float32)
    flat_signal = values(steps, 6, 4, dtype=torch.float32)
    for magnitude in (False, True):
        conv = bits, steps, weight, bias, signal, padding, magnitude
        linear = flat, steps, matrix, bias, flat_signal, magnitude
        all_conv = run.spike_conv2d_redistribute(*conv, True, True, True)
        all_linear = run.spike_linear_redistribute(*linear, True, True, True)
        for need in itertools.product((False, True), repeat=3):
            for got, full in (
                (run.spike_conv2d_redistribute(*conv, *need), all_conv),
                (run.spike_linear_redistribute(*linear, *need), all_linear),
            ):
                for g, f, wanted in zip(got, full, need):
                    assert torch.equal(g, f if wanted else f.new_empty(0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_bias(backend):
    steps = 5
    run = ops_of(backend, torch.float64)
    bits, weight, signal = spikes(steps, 3, 6), values(4, 6), values(steps, 3, 4)
    x = unpacked(bits, steps)
    close(run.spike_linear_forward(bits, steps, weight, None), x @ weight.t())
    need = False, False, True, False
    dw = run.spike_linear_redistribute(bits, steps, weight, None, signal, *need)[1]
    close(dw, torch.einsum("tno,tni->oi", signal, x))
    images, kernel = spikes(steps, 2, 3, 4, 4), values(2, 3, 3, 3)
    truth = TF.conv2d(unpacked(images, steps).flatten(0, 1), kernel, None, 1, 4)
    got = run.spike_conv2d_forward(images, steps, kernel, None, (4, 4))
    close(got.flatten(0, 1), truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    run = ops_of(backend)
    weight, bias = values(4, 3, 3, 3, dtype=torch.float32), values(4, dtype=torch.float32)
    bits, signal = spikes(9, 0, 3, 5, 5), torch.empty(9, 0, 4, 5, 5)
    assert run.spike_conv2d_forward(bits, 9, weight, bias, (1, 1)).shape == signal.shape
    got = run.spike_conv2d_redistribute(bits, 9, weight, bias, signal, (1, 1), *[True] * 4)
    assert got[0].shape == (9, 0, 3, 5, 5)
    assert torch.equal(got[1], torch.zeros_like(weight)) and torch.equal(got[2], torch.zeros(4))
    matrix, bits, signal = values(4, 6, dtype=torch.float32), spikes(9, 0, 6), torch.empty(9, 0, 4)
    assert run.spike_linear_forward(bits, 9, matrix, bias).shape == signal.shape
    got = run.spike_linear_redistribute(bits, 9, matrix, bias, signal, *[True] * 4)
    assert got[0].shape == (9, 0, 6)
    assert torch.equal(got[1], torch.zeros_like(matrix)) and torch.equal(got[2], torch.zeros(4))
    bits, reward = spikes(9, 0, 3, 4, 4), torch.empty(9, 0, 3, 2, 2)
    assert run.spike_max_pool2d(bits, *WINDOWS[0]).shape == (2, 0, 3, 2, 2)
    assert run.spike_max_pool2d_redistribute(bits, reward, *WINDOWS[0]).shape == (9, 0, 3, 4, 4)


def strided(x: Tensor) -> Tensor:
    """The same values with gaps in memory and the axes in another order."""
    wide = torch.full([n + 1 for n in reversed(x.shape)], 7, dtype=x.dtype)
    view = wide[tuple(slice(0, n) for n in reversed(x.shape))].permute(*reversed(range(x.dim())))
    return view.copy_(x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", NATIVE, ids=str)
def test_any_strides(dtype, backend):
    run, steps = ops_of(backend, dtype), 9
    bits, weight = spikes(steps, 2, 3, 6, 5), values(20, 3, 3, 2, dtype=dtype)
    bias, signal = values(20, dtype=dtype), values(steps, 2, 20, 6, 6, dtype=dtype)
    plain = run.spike_conv2d_forward(bits, steps, weight, bias, (1, 1))
    inputs = [strided(t) for t in (bits, weight, bias, signal)]
    got = run.spike_conv2d_forward(inputs[0], steps, inputs[1], inputs[2], (1, 1))
    close(got, plain.double())
    want = [True] * 4
    got = run.spike_conv2d_redistribute(inputs[0], steps, *inputs[1:], (1, 1), *want)
    plain = run.spike_conv2d_redistribute(bits, steps, weight, bias, signal, (1, 1), *want)
    for g, p in zip(got, plain):
        close(g, p.double())
    bits, weight, signal = spikes(steps, 8, 30), values(20, 30, dtype=dtype), signal[:, 0, :, 0]
    signal = signal.transpose(1, 2).repeat(1, 2, 1)[:, :8]
    plain = run.spike_linear_forward(bits, steps, weight, bias)
    matrices = strided(bits), steps, strided(weight), strided(bias)
    close(run.spike_linear_forward(*matrices), plain.double())
    plain = run.spike_linear_redistribute(bits, steps, weight, bias, signal, *want)
    got = run.spike_linear_redistribute(*matrices, strided(signal), *want)
    for g, p in zip(got, plain):
        close(g, p.double())


def test_same_bits_on_two_runs_and_no_reads_of_fresh_memory():
    run, steps = ops_of("native"), 25
    bits, weight = spikes(steps, 4, 8, 9, 9), values(40, 8, 3, 3, dtype=torch.float32)
    bias, signal = values(40, dtype=torch.float32), values(steps, 4, 40, 9, 9, dtype=torch.float32)
    flat, matrix = bits.flatten(2), values(40, 648, dtype=torch.float32)
    rows, want = signal[..., 0, 0].contiguous(), [True] * 4

    def all_results():
        return [
            run.spike_conv2d_forward(bits, steps, weight, bias, (1, 1)),
            *run.spike_conv2d_redistribute(bits, steps, weight, bias, signal, (1, 1), *want),
            run.spike_linear_forward(flat, steps, matrix, bias),
            *run.spike_linear_redistribute(flat, steps, matrix, bias, rows, *want),
        ]

    first = all_results()
    with poisoned_empty():
        second = all_results()
    for a, b in zip(first, second):
        assert torch.equal(a, b)


def test_one_result_for_each_thread_count():
    """The same sums in another order: equal bits per thread count, close between them."""
    run, steps, threads = ops_of("native"), 9, torch.get_num_threads()
    bits, weight = spikes(steps, 3, 16, 12, 12), values(32, 16, 3, 3, dtype=torch.float32)
    signal = values(steps, 3, 32, 12, 12, dtype=torch.float32)
    results = {}
    try:
        for count in (1, 2, 5, 1, 2, 5):
            torch.set_num_threads(count)
            got = run.spike_conv2d_redistribute(
                bits, steps, weight, None, signal, (1, 1), False, True, True, True
            )
            for a, b in zip(results.setdefault(count, got), got):
                assert torch.equal(a, b)
            for a, b in zip(results[1], got):
                close(b, a.double())
    finally:
        torch.set_num_threads(threads)


@pytest.mark.host
def test_operators():
    """Schemas and fakes: torch's own check."""
    steps, bits, weight = 9, spikes(9, 2, 3, 5, 4), values(4, 3, 3, 3)
    bias, signal = values(4), values(9, 2, 4, 5, 4)
    flat, matrix, rows = spikes(9, 2, 6), values(4, 6), values(9, 2, 4)
    window = [2, 2], [2, 1], [1, 0], True
    lfp = torch.ops.lfp_kernels
    pooled = lfp.spike_max_pool2d(bits, *window).permute(0, 1, 4, 2, 3)
    reward = values(9, *pooled.shape[1:])
    tests = "test_schema", "test_faketensor"
    for op, args in (
        (lfp.spike_linear_forward, (flat, steps, matrix, bias)),
        (lfp.spike_linear_redistribute, (flat, steps, matrix, bias, rows, *[True] * 4)),
        (lfp.spike_linear_redistribute, (flat, steps, matrix, bias, rows, *[False] * 4)),
        (lfp.spike_conv2d_forward, (bits, steps, weight, bias, [1, 1])),
        (lfp.spike_conv2d_redistribute, (bits, steps, weight, bias, signal, [1, 1], *[True] * 4)),
        (lfp.spike_max_pool2d, (bits, *window)),
        (lfp.spike_max_pool2d_redistribute, (bits, reward, *window)),
        (lfp.spike_count, (bits,)),
    ):
        torch.library.opcheck(op.default, args, test_utils=tests)


# ---- pools and counts

WINDOWS = [
    ((2, 2), (2, 2), (0, 0), False),
    ((3, 3), (2, 2), (1, 1), False),
    ((3, 2), (1, 2), (1, 0), True),
    ((2, 2), (3, 3), (0, 0), True),  # gaps
    ((1, 1), (1, 1), (0, 0), False),
    ((5, 4), (4, 5), (2, 2), True),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.6, 1.0])
def test_max_pool(window, rate, backend):
    steps = 11
    bits = spikes(steps, 2, 5, 9, 8, rate=rate)
    x = unpacked(bits, steps)
    *sizes, ceil_mode = window
    truth, index = TF.max_pool2d(x.flatten(0, 1), *sizes, ceil_mode=ceil_mode, return_indices=True)
    fired = truth.unflatten(0, x.shape[:2])
    run = ops_of(backend)
    for dtype in NATIVE:
        reward = values(*fired.shape, dtype=dtype)
        silent = (reward.double() * fired).flatten(0, 1).flatten(2)
        expected = torch.zeros_like(x).flatten(0, 1).flatten(2)
        expected = expected.scatter_add_(2, index.flatten(2), silent).view(x.shape)
        for b, r in ((bits, reward), (last(bits), last(reward)), (strided(bits), strided(reward))):
            pooled = run.spike_max_pool2d(b, *window)
            assert is_last(pooled) and pooled.dtype == torch.uint8
            assert torch.equal(unpacked(pooled, steps), fired)
            assert torch.equal(pooled[-1] >> (steps % 8), torch.zeros_like(pooled[-1]))
            got = run.spike_max_pool2d_redistribute(b, r, *window)
            assert is_last(got)
            close(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_rewards_stay_where_they_are(backend):
    """A winner takes its reward by choice, not by multiplication with 0."""
    bits = torch.tensor([0, 1, 0, 0, 1, 1, 0, 0], dtype=torch.uint8).view(1, 1, 2, 2, 2)
    reward = torch.tensor([float("inf"), float("nan")]).view(1, 1, 2, 1, 1)
    got = ops_of(backend).spike_max_pool2d_redistribute(bits, reward, *WINDOWS[0])
    expected = torch.zeros(8)
    expected[1], expected[4] = float("inf"), float("nan")
    torch.testing.assert_close(got.flatten(), expected, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (3, 7, 11), (2, 200, 1000)], ids=str)
def test_count(shape, backend):
    bits = torch.randint(0, 256, shape, dtype=torch.uint8)
    expected = sum(bin(byte).count("1") for byte in bits.flatten().tolist())
    for each in (bits, bits.transpose(0, 1), strided(bits)):
        count = ops_of(backend).spike_count(each)
        assert count.dtype == torch.int64 and count.dim() == 0
        assert count.item() == expected
