"""The sm_90a product (TMA, mbarriers, wgmma) against the oracle, at the ragged ends of its tiles.

Runs under ``pytest --simulate cuda --capability 90 --processors 4``: compiled for sm_90a, on a
pretended device so small that small products fill it. Elsewhere the tests are not collected.
"""

from __future__ import annotations

import pytest
import torch
from gpusim import counting
from linear_cases import SPECS, case, check_all, oracle, run, updates

from lfp_kernels import functional as F
from lfp_kernels import rules, use_backend
from lfp_kernels.testing import assert_within_budget

pytestmark = pytest.mark.gpusim
# rows and columns of 16 bytes; one box and a part, two tiles and a part, a long sum
SHAPES = ((200, 136, 192), (136, 264, 136), (129, 128, 328))


def kernels_of(call) -> list[str]:
    with counting() as counts:
        call()
    return [launch.kernel for launch in counts.launches]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_redistribute(shape) -> None:
    n, n_in, n_out = shape
    args = case((n,), n_in, n_out, torch.bfloat16)
    check_all(run("native", *args), run("reference", *args), oracle(*args))
    again = run("native", *args)
    for a, b in zip(run("native", *args), again):
        assert torch.equal(a, b), "not the same bits twice"


def test_it_is_the_hopper_kernel_that_runs() -> None:
    args = case((200,), 264, 192, torch.bfloat16)
    names = kernels_of(lambda: run("native", *args))
    assert sum("hopper_kernel" in name for name in names) == 2, names
    with use_backend("native"):
        assert any("hopper" in n for n in kernels_of(lambda: F.linear(*args[:3], relu=True)))


@pytest.mark.parametrize("n, n_in, n_out", [(200, 132, 192), (200, 136, 65), (130, 40, 40)])
def test_shapes_that_it_leaves_to_the_other_kernels(n, n_in, n_out) -> None:
    """Rows that are not 16 bytes, and products too small for its tiles."""
    args = case((n,), n_in, n_out, torch.bfloat16)
    check_all(run("native", *args), run("reference", *args), oracle(*args))


@pytest.mark.parametrize("relu", [False, True])
def test_forward(relu) -> None:
    x, weight, bias, z, _ = case((140,), 200, 264, torch.bfloat16)
    truth = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    with use_backend("native"):
        got = F.linear(x, weight, bias, relu=relu)
    assert_within_budget(got, z.relu() if relu else z, truth.relu() if relu else truth)


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_update_in_place(spec) -> None:
    args = case((136,), 136, 264, torch.bfloat16)
    results = []
    for backend, kind in (
        ("native", torch.bfloat16), ("reference", torch.bfloat16), ("reference", torch.float64),
    ):  # fmt: skip
        x, w, b, z, reward = (t.to(kind, copy=True) for t in args)
        _, to_w, to_b = updates(spec, w, b)
        for state in (*to_w.states, *to_b.states):
            state.fill_(0.75)
        with use_backend(backend):
            input_reward = F.linear_redistribute_update(x, w, b, z, reward, to_w, to_b)
        results.append((input_reward, w, b, *to_w.states, *to_b.states))
    for k, (got, same, truth) in enumerate(zip(*results)):
        assert_within_budget(got, same, truth, f"result {k}")


@pytest.mark.parametrize("signal_in", [False, True])
def test_chained(signal_in) -> None:
    args = case((150,), 136, 264, torch.bfloat16)
    options = {"below": rules.Epsilon(1e-3), "signal_in": signal_in}
    truth = run("reference", *(t.double() for t in args), **options)
    check_all(run("native", *args, **options), run("reference", *args, **options), truth)
