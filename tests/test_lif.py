"""The two scans of spiking neurons, packed spikes and noise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spiking_cases import RESET_IDS, RESETS, currents, one_feedback, one_neuron

from lfp_kernels import functional as F
from lfp_kernels import use_backend

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("reference", "native")
STEPS = (1, 7, 8, 9, 25)


def scan(current, beta, threshold, kind, **options):
    reset, delay = kind
    return F.lif_forward(current, beta, threshold, reset=reset, reset_delay=delay, **options)


def feedback(reward, result, beta, threshold, kind, **options):
    reset, delay = kind
    return F.lif_feedback(
        reward, result.membrane, result.spikes, beta, threshold, reset=reset, reset_delay=delay,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("kind", RESETS, ids=RESET_IDS)
@pytest.mark.parametrize("steps", [1, 9, 20])
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_a_loop_over_one_neuron(backend, steps, kind):
    current = currents(steps, 3, 4)
    reward = torch.randn(steps, 3, 4, dtype=torch.float64)
    state, carry = torch.randn(2, 3, 4, dtype=torch.float64)
    beta = torch.tensor([0.3, 0.9, 1.0, 0.0], dtype=torch.float64)
    threshold = torch.tensor([1.0, 0.3, 0.8, 0.5], dtype=torch.float64)
    with use_backend(backend):
        found = scan(current, beta, threshold, kind, state=state)
        back = feedback(
            reward, found, beta, threshold, kind, state=state, carry=carry, need_parameters=True
        )
        rewards = feedback(reward, found, beta, threshold, kind, state=state, as_reward=True)
        plain = feedback(reward, found, beta, threshold, kind, state=state)
    spikes = found.spikes.unpack(torch.float64)
    sums = torch.zeros(2, 4, dtype=torch.float64)
    for n in range(3):
        for c in range(4):
            b, limit = float(beta[c]), float(threshold[c])
            trace = one_neuron(current[:, n, c].tolist(), b, limit, kind, float(state[n, c]))
            assert spikes[:, n, c].tolist() == [float(f) for f in trace.fires]
            if kind[0] != "zero":
                assert float(found.state[n, c]) == pytest.approx(trace.state, rel=1e-12)
            signal, m, of_beta, of_threshold = one_feedback(
                trace, reward[:, n, c].tolist(), b, 1e-6, float(carry[n, c])
            )
            torch.testing.assert_close(back.signal[:, n, c], torch.tensor(signal).double())
            assert float(back.carry[n, c]) == pytest.approx(m, rel=1e-9)
            sums[:, c] += torch.tensor([b * of_beta, limit * of_threshold], dtype=torch.float64)
    torch.testing.assert_close(torch.stack([back.beta, back.threshold]), sums)
    torch.testing.assert_close(rewards.signal, plain.signal * current)


@pytest.mark.parametrize("kind", RESETS, ids=RESET_IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 43), (2, 6, 5, 4), (0, 3)], ids=str)
def test_backends_make_the_same_spikes(shape, dtype, kind):
    for steps in STEPS:
        current = currents(steps, *shape, dtype=dtype)
        beta = torch.rand(shape[1]).to(dtype)
        found = {}
        for backend in BACKENDS:
            with use_backend(backend):
                found[backend] = scan(current, beta, 0.75, kind)
        a, b = found["native"], found["reference"]
        assert torch.equal(a.spikes.bits, b.spikes.bits)
        assert torch.equal(a.membrane, b.membrane) and torch.equal(a.state, b.state)


@pytest.mark.parametrize("kind", RESETS, ids=RESET_IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_feedback_of_the_backends(dtype, kind):
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype.itemsize == 2 else {}
    for steps in STEPS:
        current = currents(steps, 2, 5, 4, 4, dtype=dtype)
        reward = torch.randn(current.shape).to(dtype)
        beta = torch.rand(5).to(dtype)
        for options in ({}, {"sum_steps": True}, {"as_reward": True, "need_parameters": True}):
            found = []
            for backend in BACKENDS:
                with use_backend(backend):
                    result = scan(current, beta, 0.75, kind)
                    found.append(feedback(reward, result, beta, 0.75, kind, **options))
            for a, b in zip(*found):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_order_does_not_matter(backend):
    """Channels-last currents keep their order, and per-channel values their channels."""
    current = currents(9, 2, 3, 4, 5, dtype=torch.float32)
    last = current.movedim(2, -1).contiguous().movedim(-1, 2)
    reward = torch.randn(current.shape)
    beta, threshold = torch.rand(3), torch.rand(3) + 0.2
    state = torch.randn(2, 3, 4, 5)
    with use_backend(backend):
        a = F.lif_forward(current, beta, threshold, state=state)
        b = F.lif_forward(last, beta, threshold, state=state)
        x = F.lif_feedback(
            reward, a.membrane, a.spikes, beta, threshold, state=state, need_parameters=True
        )
        y = F.lif_feedback(
            reward, b.membrane, b.spikes, beta, threshold, state=state, need_parameters=True
        )
    assert b.membrane.stride() == last.stride()
    assert torch.equal(a.spikes.bits, b.spikes.bits) and torch.equal(a.membrane, b.membrane)
    for one, two in zip(x, y):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", RESETS, ids=RESET_IDS)
def test_a_constant_current_is_a_repeated_one(kind, backend):
    current = currents(1, 4, 6)[0]
    with use_backend(backend):
        a = scan(current, 0.9, 1.0, kind, steps=11)
        b = scan(current.expand(11, 4, 6), 0.9, 1.0, kind)
        assert torch.equal(a.spikes.bits, b.spikes.bits) and torch.equal(a.membrane, b.membrane)
        reward = torch.randn(11, 4, 6, dtype=torch.float64)
        each = feedback(reward, b, 0.9, 1.0, kind).signal
        total = feedback(reward, b, 0.9, 1.0, kind, sum_steps=True).signal
    torch.testing.assert_close(total, each.sum(0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", RESETS, ids=RESET_IDS)
def test_two_halves_are_the_whole(kind, backend):
    current = currents(20, 3, 7)
    reward = torch.randn(current.shape, dtype=torch.float64)
    with use_backend(backend):
        whole = scan(current, 0.8, 0.6, kind)
        first = scan(current[:13], 0.8, 0.6, kind)
        second = scan(current[13:], 0.8, 0.6, kind, state=first.state)
        back = feedback(reward, whole, 0.8, 0.6, kind)
        late = feedback(reward[13:], second, 0.8, 0.6, kind, state=first.state)
        early = feedback(reward[:13], first, 0.8, 0.6, kind, carry=late.carry)
    assert torch.equal(torch.cat([first.membrane, second.membrane]), whole.membrane)
    assert torch.equal(torch.cat([early.signal, late.signal]), back.signal)
    assert torch.equal(early.carry, back.carry)


@pytest.mark.parametrize("backend", BACKENDS)
def test_silent_and_saturated_neurons(backend):
    with use_backend(backend):
        silent = F.lif_forward(torch.zeros(30, 2, 3), 0.9)
        loud = F.lif_forward(torch.full((30, 2, 3), 50.0), 0.9)
        assert not silent.spikes.bits.any() and loud.spikes.unpack().all()
        for result in (silent, loud):
            back = F.lif_feedback(torch.ones(30, 2, 3), result.membrane, result.spikes, 0.9)
            assert back.signal.isfinite().all() and (back.signal >= 0).all()


def test_many_steps():
    current = currents(1000, 2, 3)
    found = F.lif_forward(current, 0.95)
    trace = one_neuron(current[:, 1, 2].tolist(), 0.95, 1.0, ("subtract", True), 0.0)
    assert found.spikes.unpack()[:, 1, 2].tolist() == [float(f) for f in trace.fires]
    assert found.spikes.bits.shape == (125, 2, 3) and found.spikes.bits.element_size() == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("steps", STEPS)
def test_packed_spikes(steps, backend):
    current = currents(steps, 2, 37)
    with use_backend(backend):
        found = F.lif_forward(current, 0.9)
        spikes = found.spikes.unpack(torch.float32)
        assert torch.equal(spikes, (found.membrane > 1).float())
        assert found.spikes.shape == (steps, 2, 37)
        assert found.spikes.density() == pytest.approx(float(spikes.mean()))
        flat = F.PackedSpikes(found.spikes.bits.unflatten(2, (37, 1)), steps).flatten()
    assert torch.equal(flat.bits, found.spikes.bits)


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_is_normal_and_counted(backend):
    x = torch.zeros(1, 500, 40)
    with use_backend(backend):
        draws = F.add_noise(x, 2.0, 7, steps=4)
        assert torch.equal(draws, F.add_noise(x, 2.0, 7, steps=4))
        assert not torch.equal(draws, F.add_noise(x, 2.0, 8, steps=4))
        assert torch.equal(draws[2:], F.add_noise(x, 2.0, 7, steps=2, first=2))
        spikes = F.PackedSpikes(torch.full((1, 500, 40), 5, dtype=torch.uint8), 4)
        noisy = spikes.unpack(noise=2.0, seed=7)
    torch.testing.assert_close(noisy, draws + spikes.unpack())
    z = draws / 2
    assert abs(float(z.mean())) < 0.01 and abs(float(z.std()) - 1) < 0.01
    assert abs(float((z**3).mean())) < 0.05 and abs(float((z**4).mean()) - 3) < 0.1
    # neighbours in the stream share a Philox block, not a value
    pairs = z.flatten().view(-1, 4)
    assert float(torch.corrcoef(pairs.t()).fill_diagonal_(0).abs().max()) < 0.03


def test_noise_of_the_backends():
    x = torch.randn(3, 2, 50, dtype=torch.float64)
    found = []
    for backend in BACKENDS:
        with use_backend(backend):
            found.append(F.add_noise(x, 0.5, 2**40 + 3, steps=3, first=2**20))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-3, 3), min_size=1, max_size=30), st.floats(0, 1), st.floats(0.1, 2),
    st.sampled_from(RESETS),
)  # fmt: skip
def test_any_neuron(current, beta, threshold, kind):
    found = scan(torch.tensor(current, dtype=torch.float64)[:, None, None], beta, threshold, kind)
    trace = one_neuron(current, beta, threshold, kind, 0.0)
    assert found.spikes.unpack().flatten().tolist() == [float(f) for f in trace.fires]


ERRORS = {
    "reset": (lambda: F.lif_forward(torch.ones(2, 3), 0.9, reset="hard"), "reset: expected one of"),
    "steps": (lambda: F.lif_forward(torch.ones(2, 3), 0.9, steps=0), "steps: expected at least"),
    "no steps": (lambda: F.lif_forward(torch.ones(0, 2, 3), 0.9), "steps: expected at least"),
    "integer": (lambda: F.lif_forward(torch.ones(2, 3).long(), 0.9), "current: expected float64"),
    "beta": (lambda: F.lif_forward(torch.ones(2, 3, 4), torch.ones(3)), r"beta: .*shape \(4,\)"),
    "state": (lambda: F.lif_forward(torch.ones(2, 3), 0.9, state=torch.ones(2)), "state: expected"),
    "reward": (
        lambda: feedback(torch.ones(3, 2), F.lif_forward(torch.ones(2, 3), 0.9), 0.9, 1.0,
                         ("none", True)), r"reward: expected shape \(2, 3\)",
    ),
    "eps": (
        lambda: feedback(torch.ones(2, 3), F.lif_forward(torch.ones(2, 3), 0.9), 0.9, 1.0,
                         ("none", True), eps=0.0), "eps: expected a positive",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, message = ERRORS[name]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_are_registered_well(backend):
    ops, current = torch.ops.lfp_kernels, torch.rand(9, 12)
    one = torch.ones(1)
    forward = (current, None, one, one, 1, 9, 0, True)
    torch.library.opcheck(ops.lif_forward, forward)
    bits, membrane, state = ops.lif_forward(*forward)
    args = (current, membrane, bits, state, state, one, one, 1, 1e-6, 0, False, False, True)
    torch.library.opcheck(ops.lif_feedback, args)
    torch.library.opcheck(ops.spikes_unpack, (bits, 9, torch.float32, 0.1, 3, 0))
    torch.library.opcheck(ops.add_noise, (current, 9, 0.1, 3, 0))
