"""Scans of spiking neurons, packed spikes and noise on the simulated GPU against the reference.

Kernels round like the reference, operation by operation, so all but noise has the same bits.
Runs under ``pytest --simulate cuda|triton``.
"""

from __future__ import annotations

import pytest
import torch
from gpusim import counting
from torch import Tensor

from lfp_kernels import use_backend
from lfp_kernels.backends import select
from lfp_kernels.ops.spiking.codes import PLANE, Reset, planes
from lfp_kernels.testing import assert_within_budget

pytestmark = pytest.mark.gpusim

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# steps, neurons: one step, whole and ragged planes, rows that allow 16 bytes and such that do not,
# several blocks of wide (1040) and of single (131) neurons
SHAPES = ((1, 5), (1, 16), (3, 64), (8, 24), (9, 37), (16, 131), (17, 1040), (5, 6), (27, 8))
EPS = 1e-3
# A few sets of options, since each is a kernel of its own for Triton, one per entry of channels_of.
# of forward: a state is given, the membrane is kept, the current is the same at all steps
FORWARD = ((True, True, False), (False, False, False), (True, True, False), (False, True, True))
# of feedback: static, as_reward, need_parameters, a state is given, a carry is given
FEEDBACK = (
    (False, False, True, True, False), (True, False, False, False, True),
    (False, True, True, True, True), (True, True, False, False, False),
)  # fmt: skip


def by_dtype_and_reset(test):
    test = pytest.mark.parametrize("reset", list(Reset), ids=lambda r: r.name.lower())(test)
    return pytest.mark.parametrize("dtype", DTYPES, ids=str)(test)


def spiking(backend: str, like: Tensor):
    with use_backend(backend):
        return select("spiking", like)


def values(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def moved(t: Tensor) -> Tensor:
    """The same tensor, contiguous, one element behind where a 16-byte access may begin."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def parameters(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    beta = torch.linspace(0.55, 0.95, channels).to(dtype)
    return beta, torch.linspace(0.3, 0.7, channels).to(dtype)


def channels_of(neurons: int) -> list[tuple[int, int]]:
    """(channels, inner) of a layer of so many neurons."""
    rest = next(k for k in (4, 3, 2, 5, 37, 131, 1) if neurons % k == 0)
    return [(1, 1), (rest, 1), (rest, neurons // rest), (neurons, 1)]


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], what: object) -> None:
    for k, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape, (what, k)
        assert torch.equal(a, b), f"{what}: result {k}: {(a != b).sum()} of {a.numel()} differ"


def both(name: str, like: Tensor, *args) -> tuple[Tensor, ...]:
    """The result of the native function, which is that of the reference and repeats its bits."""
    results = [getattr(spiking(b, like), name)(*args) for b in ("native", "reference", "native")]
    results = [r if isinstance(r, tuple) else (r,) for r in results]
    what = (name, tuple(like.shape), like.dtype, args[3:])
    assert_same(results[0], results[1], what)
    assert_same(results[0], results[2], what)
    return results[0]


# ---- forward


@by_dtype_and_reset
def test_forward(dtype, reset) -> None:
    fired = 0
    for k, (steps, neurons) in enumerate(SHAPES):
        for j, (channels, inner) in enumerate(channels_of(neurons)):
            given, keep, constant = FORWARD[j]
            current = values(1 if constant else steps, neurons, dtype=dtype, seed=k)
            state = values(neurons, dtype=dtype, seed=9) if given else None
            beta, threshold = parameters(channels, dtype)
            if j == 2:
                threshold = threshold[:1].clone()  # one of them per channel
                current = moved(current)
            bits, *_ = both(
                "forward", current, current, state, beta, threshold, inner, steps, reset, keep
            )
            fired += int(bits.count_nonzero())
    assert fired > 500


@by_dtype_and_reset
def test_many_steps(dtype, reset) -> None:
    beta, threshold = parameters(1, dtype)
    for neurons in (16, 3):
        current, reward = (values(1000, neurons, dtype=dtype, seed=k) for k in (0, 1))
        state = values(neurons, dtype=dtype, seed=9)
        bits, membrane, _ = both(
            "forward", current, current, state, beta, threshold, 1, 1000, reset, True
        )
        arguments = (state, None, beta, threshold, 1, EPS, reset)
        both("feedback", reward, reward, membrane, bits, *arguments, False, False, True)


@pytest.mark.parametrize("reset", list(Reset), ids=lambda r: r.name.lower())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("neurons", [256, 255])
def test_at_the_threshold(neurons, dtype, reset) -> None:
    """Every membrane lands on the threshold, where the rounded product counts: the sum of the exact
    product, as a fused multiply-add forms it, lies above for half of the neurons."""
    beta, threshold = torch.tensor([0.9], dtype=dtype), torch.tensor([2.0**-6], dtype=dtype)
    draws = torch.rand(neurons, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    state = (-0.6 - 0.4 * draws).to(dtype)
    product = beta * state
    current = torch.stack([threshold - product, *values(8, neurons, dtype=dtype)])
    assert torch.equal(product + current[0], threshold.expand(neurons))  # exact
    if dtype == torch.float32:
        fused = beta.double() * state.double() + current[0].double()
        assert (fused.float() > threshold).sum() > neurons // 4
    arguments = (state, beta, threshold, 1, 9, reset, True)
    bits, membrane, _ = both("forward", current, current, *arguments)
    assert not (bits[0] & 1).any() and torch.equal(membrane[0], threshold.expand(neurons))


def test_one_step_is_not_a_constant_current() -> None:
    beta, threshold = parameters(1, torch.float32)
    current = values(1, 12, dtype=torch.float32)
    both("forward", current, current, None, beta, threshold, 1, 1, Reset.SUBTRACT, True)
    both("forward", current, current, None, beta, threshold, 1, 20, Reset.SUBTRACT, True)


def test_pieces_of_time_add_up() -> None:
    """The state after some steps is all that the next ones need."""
    beta, threshold = parameters(4, torch.float32)
    current = values(24, 40, dtype=torch.float32)
    op = spiking("native", current)
    rest = (beta, threshold, 10, Reset.SUBTRACT)
    whole = op.forward(current, None, *rest[:3], 24, rest[3], True)
    first = op.forward(current[:16], None, *rest[:3], 16, rest[3], True)
    second = op.forward(current[16:], first[2], *rest[:3], 8, rest[3], True)
    pieces = tuple(torch.cat([a, b]) for a, b in zip(first[:2], second[:2]))
    assert_same((*pieces, second[2]), whole, "pieces")


# ---- feedback


@by_dtype_and_reset
def test_feedback(dtype, reset) -> None:
    for k, (steps, neurons) in enumerate(SHAPES):
        for j, (channels, inner) in enumerate(channels_of(neurons)):
            static, as_reward, need, given, carried = FEEDBACK[j]
            current = values(steps, neurons, dtype=dtype, seed=k)
            state = values(neurons, dtype=dtype, seed=9) if given else None
            carry = values(neurons, dtype=dtype, seed=8) if carried else None
            beta, threshold = parameters(channels, dtype)
            neuron = (beta, threshold, inner)
            bits, membrane, _ = spiking("reference", current).forward(
                current, state, *neuron, steps, reset, True
            )
            reward = values(steps, neurons, dtype=dtype, seed=k + 1)
            if j == 2:
                reward, membrane = moved(reward), moved(membrane)
            both(
                "feedback", reward, reward, membrane, bits, state, carry, *neuron, EPS, reset,
                static, as_reward, need,
            )  # fmt: skip


def test_tensors_that_are_not_dense() -> None:
    dtype, reset = torch.float32, Reset.SUBTRACT_AT_ONCE
    beta, threshold = (t.repeat_interleave(2)[::2] for t in parameters(4, dtype))
    current, reward = (values(24, 10, dtype=dtype, seed=k).t() for k in (0, 1))
    state = values(48, dtype=dtype, seed=2)[::2]
    neuron = (beta, threshold, 6)
    results = both("forward", current, current, state, *neuron, 10, reset, True)
    bits, membrane = (t.repeat_interleave(2, 1)[:, ::2] for t in results[:2])
    both(
        "feedback", reward, reward, membrane, bits, state, state, *neuron, EPS, reset, False, True,
        True,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_neurons(dtype) -> None:
    for steps in (1, 9):
        empty = torch.empty(steps, 0, dtype=dtype)
        neuron = (*parameters(1, dtype), 1)
        bits, membrane, _ = both(
            "forward", empty, empty, None, *neuron, steps, Reset.SUBTRACT, True
        )
        arguments = (None, None, *neuron, EPS, Reset.SUBTRACT, True, False, True)
        both("feedback", empty, empty, membrane, bits, *arguments)
        for noise in (0.0, 0.5):
            both("unpack", empty, bits, steps, dtype, noise, 3, 0)
            both("add_noise", empty, empty, steps, noise, 3, 0)


# ---- packed spikes and noise


def packed(steps: int, neurons: int) -> Tensor:
    """Random spikes; the bits after the last step are 0."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 256, (planes(steps), neurons), generator=generator, dtype=torch.uint8)
    if steps % PLANE:
        bits[-1] &= (1 << steps % PLANE) - 1
    return bits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unpack(dtype) -> None:
    for steps, neurons in SHAPES:
        bits = packed(steps, neurons)
        like = torch.empty(0, dtype=dtype)
        (spikes,) = both("unpack", like, bits, steps, dtype, 0.0, 0, 0)
        assert spikes.double().sum() == sum(int((bits >> k & 1).sum()) for k in range(PLANE))
        both("unpack", like, bits.t().contiguous().t(), steps, dtype, 0.0, 0, 0)
        both("unpack", like, moved(bits), steps, dtype, 0.0, 0, 0)


def assert_noisy(dtype: torch.dtype, x: Tensor, seed: int, first: int, run) -> None:
    """x plus noise; ``run(op, dtype)`` is the call."""
    noise = 0.7
    op = {b: spiking(b, x.to(dtype)) for b in ("native", "reference")}
    got = [run(op["native"], dtype, noise) for _ in range(2)]
    assert torch.equal(*got)
    truth = run(op["reference"], torch.float64, noise)
    assert_within_budget(got[0], run(op["reference"], dtype, noise), truth)
    for element in range(0, truth.numel(), 97):
        # one element that lies on its own tells a wrong index from a wrong rounding
        a, b = got[0].flatten()[element].double(), truth.flatten()[element]
        assert abs(a - b) < 8 * torch.finfo(dtype).eps * (1 + abs(b)), element


# Philox counts elements in blocks of four: seeds and first steps of more than 32 bits, and odd ones
NOISES = ((3, 0), (2**40 + 5, 1), (7, 5), (2**53 - 1, 2**34 + 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_on_spikes(dtype) -> None:
    for k, (steps, neurons) in enumerate(SHAPES):
        bits, (seed, first) = packed(steps, neurons), NOISES[k % 4]

        def run(op, kind, noise, bits=bits, steps=steps, seed=seed, first=first):
            return op.unpack(bits, steps, kind, noise, seed, first)

        assert_noisy(dtype, bits, seed, first, run)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("constant", [False, True], ids=["moves", "constant"])
def test_noise(dtype, constant) -> None:
    for k, (steps, neurons) in enumerate(SHAPES):
        x = values(1 if constant else steps, neurons, dtype=dtype)
        both("add_noise", x, x, steps, 0.0, 0, 0)
        seed, first = NOISES[k % 4]
        for placed in (x, moved(x)):

            def run(op, kind, noise, x=placed, steps=steps, seed=seed, first=first):
                return op.add_noise(x.to(kind), steps, noise, seed, first)

            assert_noisy(dtype, x, seed, first, run)


def test_noise_of_pieces_of_time_is_that_of_the_whole() -> None:
    x = values(11, 30, dtype=torch.float32)
    op = spiking("native", x)
    pieces = [op.add_noise(x[:4], 4, 0.5, 3, 0), op.add_noise(x[4:], 7, 0.5, 3, 4)]
    assert torch.equal(torch.cat(pieces), op.add_noise(x, 11, 0.5, 3, 0))


# ---- traffic


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "op",
    ["forward", "forward, constant", "feedback", "unpack", "add_noise", "add_noise, constant"],
)
def test_every_byte_moves_once(op, dtype) -> None:
    """At most 5 % over the least, the parameters that all threads read included."""
    steps, neurons = 25, 2048
    x, reward = (values(steps, neurons, dtype=dtype, seed=k) for k in (0, 1))
    beta, threshold = parameters(1, dtype)
    native = spiking("native", x)
    neuron = (beta, threshold, 1)
    bits, membrane, _ = native.forward(x, None, *neuron, steps, Reset.SUBTRACT_AT_ONCE, True)
    if op.startswith("forward"):
        current = x[:1].clone() if op.endswith("constant") else x
        reads = [current]
        call = (native.forward, current, None, *neuron, steps, Reset.SUBTRACT_AT_ONCE, True)
    elif op == "feedback":
        reads = [reward, membrane, bits]
        rest = (*neuron, EPS, Reset.SUBTRACT_AT_ONCE, False, True, True)
        call = (native.feedback, reward, membrane, bits, None, None, *rest)
    else:
        reads = [bits if op == "unpack" else x[:1].clone() if op.endswith("constant") else x]
        rest = (dtype,) if op == "unpack" else ()
        call = (getattr(native, op.split(",")[0]), reads[0], steps, *rest, 0.0, 0, 0)
    with counting() as counts:
        results = call[0](*call[1:])
    results = [results] if isinstance(results, Tensor) else list(results)
    least = sum(t.nbytes for t in [*reads, *results])
    # Few neurons are cut into chunks of steps, and each chunk reads a constant input again.
    kind = "unique_bytes" if op == "add_noise, constant" else "bytes"
    counted = sum(getattr(launch, kind) for launch in counts.launches)
    print(f"{op} {dtype}: {counted / least:.3f}")
    assert 0.99 < counted / least <= 1.05
