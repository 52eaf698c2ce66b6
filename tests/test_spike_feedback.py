"""The neurons' feedback in event-driven networks: membranes computed again, rewards from behind a
max pool, signals in the membranes' place."""

from __future__ import annotations

import pytest
import torch
from spiking_cases import RESET_IDS, RESETS, currents

from lfp_kernels import functional as F
from lfp_kernels import use_backend

BACKENDS = ("native", "reference")
SHAPE = (3, 5, 7, 6)  # neurons [N, C, H, W]


def channels_last(t):
    return t.movedim(2, -1).contiguous().movedim(-1, 2)


def case(steps, dtype, constant, kind):
    current = channels_last(currents(1 if constant else steps, *SHAPE, dtype=dtype))
    reset, delay = kind
    options = {"reset": reset, "reset_delay": delay, "state": torch.randn(SHAPE, dtype=dtype)}
    beta, threshold = torch.rand(5).to(dtype), torch.rand(5).to(dtype) + 0.3
    if constant:
        found = F.lif_forward(current[0], beta, threshold, steps=steps, **options)
    else:
        found = F.lif_forward(current, beta, threshold, **options)
    return current[0] if constant else None, found, (beta, threshold), options


def unpooled(spikes, reward, pool):
    """What torch's max pool does with a gradient, where the window has a spike."""
    x = spikes.unpack(reward.dtype).flatten(0, 1).requires_grad_()
    y = torch.nn.functional.max_pool2d(x, pool)
    (back,) = torch.autograd.grad(y, x, reward.flatten(0, 1) * y)
    return back.unflatten(0, spikes.shape[:2])


@pytest.mark.parametrize("pool", [None, (2, 2), (3, 2), (1, 1), (7, 6)], ids=str)
@pytest.mark.parametrize("constant", [False, True], ids=["moving", "constant"])
@pytest.mark.parametrize("kind", RESETS, ids=RESET_IDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("steps", [1, 9, 17])
def test_is_lif_feedback(steps, dtype, kind, constant, pool):
    current, found, values, options = case(steps, dtype, constant, kind)
    size = SHAPE[2:] if pool is None else (SHAPE[2] // pool[0], SHAPE[3] // pool[1])
    reward = torch.randn(steps, *SHAPE[:2], *size, dtype=dtype)
    carry = torch.randn(SHAPE, dtype=dtype)
    plain = reward if pool is None else unpooled(found.spikes, reward, pool)
    for asked in (
        {"need_parameters": True},
        {"sum_steps": True, "as_reward": True},
        {"as_reward": True},
    ):
        options |= {"carry": carry, "need_parameters": False, "sum_steps": False} | asked
        expected = F.lif_feedback(plain, found.membrane, found.spikes, *values, **options)
        for backend in BACKENDS:
            with use_backend(backend):
                got = F.spike_lif_feedback(
                    reward, found.spikes, *values, current=current, pool=pool,
                    membrane=None if constant else found.membrane, **options,
                )  # fmt: skip
            for a, b in zip(got, expected):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", RESETS, ids=RESET_IDS)
def test_the_signal_takes_the_membranes_place(kind, backend):
    _, found, values, options = case(20, torch.float32, False, kind)
    reward = torch.randn(20, *SHAPE)
    expected = F.lif_feedback(reward, found.membrane, found.spikes, *values, **options)
    with use_backend(backend):
        got = F.spike_lif_feedback(
            reward, found.spikes, *values, membrane=found.membrane, overwrite=True, **options
        )
    assert got.signal.data_ptr() == found.membrane.data_ptr()
    torch.testing.assert_close(got.signal, expected.signal)
    torch.testing.assert_close(got.carry, expected.carry)


def test_errors():
    _, found, values, _ = case(4, torch.float32, False, RESETS[0])
    reward = torch.randn(4, *SHAPE)
    with pytest.raises(ValueError, match="membrane, current: expected one of the two"):
        F.spike_lif_feedback(reward, found.spikes, *values)
    with pytest.raises(ValueError, match=r"reward: expected shape \(4, 3, 5, 3, 3\)"):
        F.spike_lif_feedback(reward, found.spikes, *values, membrane=found.membrane, pool=(2, 2))
    with pytest.raises(ValueError, match="overwrite: expected a membrane, and sum_steps=False"):
        F.spike_lif_feedback(
            reward, found.spikes, *values, membrane=found.membrane, overwrite=True, sum_steps=True
        )
    rows = F.PackedSpikes(found.spikes.bits.contiguous(), 4)
    with pytest.raises(ValueError, match="pool: expected spikes that are channels last"):
        F.spike_lif_feedback(
            reward[..., :3, :3], rows, *values, membrane=found.membrane, pool=(2, 2)
        )


def test_operator_is_registered_well():
    current, one = torch.rand(9, 24), torch.ones(1)
    ops = torch.ops.lfp_kernels
    bits, membrane, _ = ops.lif_forward(current, None, one, one, 1, 9, 0, True)
    shared = (bits, None, None, one, one, 1, [], 9, 1e-6, 0, False, False, True)
    torch.library.opcheck(ops.spike_lif_feedback, (current, membrane, False, *shared, False))
    torch.library.opcheck(
        ops.spike_lif_feedback,
        (current, membrane, False, *shared, True),
        test_utils=("test_schema", "test_faketensor"),
    )
