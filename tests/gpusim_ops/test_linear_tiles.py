"""The linear kernels where their tiles end: batches around each limit, ragged and aligned rows,
sums split over blocks, every product type. Runs under ``pytest --simulate cuda|triton``."""

from __future__ import annotations

import pytest
import torch
from linear_cases import SPECS, case, check_all, oracle, run, updates

from lfp_kernels import backends, rules, use_backend
from lfp_kernels import functional as F
from lfp_kernels.testing import assert_within_budget

pytestmark = pytest.mark.gpusim

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# One more than a tile of 64 or 128, a full tile, one less; rows that are 16-byte packs or not.
SHAPES = ((1, 8, 8), (31, 72, 64), (33, 65, 40), (64, 64, 128), (65, 129, 7), (129, 40, 72))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_redistribute(shape, dtype) -> None:
    n, n_in, n_out = shape
    args = case((n,), n_in, n_out, dtype)
    check_all(run("native", *args), run("reference", *args), oracle(*args))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=repr)
@pytest.mark.parametrize("n", [5, 50, 100, 130])
def test_update_in_place(n, spec, dtype) -> None:
    """Both routes, one pass and two products, with every optimizer and states that are in use.

    5, 50 and 100 rows take one pass by the kernels of 32, 64 and 128 rows in float32; 100 rows of
    the others are one sum, which tiles of several columns share; 130 may be split.
    """
    args = case((n,), 72, 65, dtype)
    results = []
    for backend, kind in (("native", dtype), ("reference", dtype), ("reference", torch.float64)):
        x, w, b, z, reward = (t.to(kind, copy=True) for t in args)
        _, to_w, to_b = updates(spec, w, b)
        g = torch.Generator().manual_seed(1)
        for state in (*to_w.states, *to_b.states):
            values = torch.rand(state.shape, generator=g, dtype=torch.float64) + 0.5
            state.copy_(values.to(dtype))
        with use_backend(backend):
            input_reward = F.linear_redistribute_update(x, w, b, z, reward, to_w, to_b)
        results.append((input_reward, w, b, *to_w.states, *to_b.states))
    for k, (got, same, truth) in enumerate(zip(*results)):
        if dtype == torch.float64:  # the reference is the oracle
            torch.testing.assert_close(
                got, truth, rtol=1e-11, atol=1e-11 * float(truth.abs().max())
            )
        else:
            assert_within_budget(got, same, truth, f"result {k}")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_sums_split_over_blocks(dtype) -> None:
    """A long sum and few tiles: several blocks share each sum and a second launch adds them."""
    args = case((300,), 24, 20, dtype)  # weight feedback: 20 x 24 sums over 300
    check_all(run("native", *args), run("reference", *args), oracle(*args))
    args = case((3,), 20, 700, dtype)  # input reward: 3 x 20 sums over 700
    check_all(run("native", *args), run("reference", *args), oracle(*args))
    odd = case((300,), 23, 21, dtype)  # rows that end inside a pack
    check_all(run("native", *odd), run("reference", *odd), oracle(*odd))
    again = run("native", *args)
    for a, b in zip(run("native", *args), again):
        assert torch.equal(a, b), "not the same bits twice"


@pytest.mark.parametrize("n", [20, 200])
def test_tf32(n) -> None:
    """float16 as the product type of float32 tensors asks for TF32 (10 bits of mantissa)."""
    x, weight, bias, z, reward = case((n,), 72, 68, torch.float32)
    call = rules.RuleCall(rules.Epsilon(), product_dtype=torch.float16)
    with use_backend("native"):
        backend = backends.select("linear", x)
    got = backend.redistribute(x, weight, bias, z, reward, call, (True, True, True))
    for name, result, truth in zip(("input", "weight"), got, oracle(x, weight, bias, z, reward)):
        error = float((result - truth).norm() / truth.norm())
        assert 2e-5 < error < 1e-3, f"{name}: relative error {error}, TF32 has 2^-11 = 5e-4"


@pytest.mark.parametrize("n", [7, 140])
@pytest.mark.parametrize("signal_in", [False, True])
def test_chained_and_masked(n, signal_in) -> None:
    args = case((n,), 66, 70, torch.float32)
    options = {"below": rules.Epsilon(1e-3), "signal_in": signal_in}
    truth = run("reference", *(t.double() for t in args), **options)
    full = run("native", *args, **options)
    check_all(full, run("reference", *args, **options), truth)
    for need in ((True, False, False), (False, True, False), (False, False, True)):
        part = run("native", *args, need=need, **options)
        for a, b, wanted in zip(part, full, need):
            assert (a is not None) == wanted
            if wanted:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-3)


def shifted(t: torch.Tensor) -> torch.Tensor:
    """A dense copy that starts one element behind what 16-byte accesses need."""
    store = torch.empty(t.numel() + 1, dtype=t.dtype)
    return store[1:].view(t.shape).copy_(t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [6, 140])
def test_unaligned_tensors(n, dtype) -> None:
    """Each tensor in turn lies where wide accesses are not allowed."""
    args = case((n,), 72, 64, dtype)
    same, truth = run("reference", *args), oracle(*args)
    for k in range(len(args)):
        moved = [shifted(t) if k == i else t for i, t in enumerate(args)]
        check_all(run("native", *moved), same, truth)
    x, weight, bias, z, reward = args
    results = []
    for move in range(4):  # nothing, the weight, either of its states
        w, b = shifted(weight) if move == 1 else weight.clone(), bias.clone()
        _, to_w, to_b = updates(SPECS[-1], w, b)
        states = [shifted(s) if move == k + 2 else s for k, s in enumerate(to_w.states)]
        to_w = to_w._replace(states=states)
        with use_backend("native"):
            F.linear_redistribute_update(x, w, b, z, reward, to_w, to_b)
        results.append((w, b, *to_w.states))
    for other in results[1:]:
        for a, b in zip(other, results[0]):
            scale = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(a, b, rtol=scale, atol=scale * float(b.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 40, 33), (130, 72, 68), (4, 700, 20)], ids=str)
def test_forward_and_gradient(shape, dtype) -> None:
    """The other epilogues: z with its bias, ReLU (a NaN stays one), and the identity rule."""
    x, weight, bias, z, _ = case((shape[0],), *shape[1:], dtype)
    truth = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    with use_backend("native"):
        assert_within_budget(F.linear(x, weight, bias), z, truth)
        assert_within_budget(F.linear(x, weight.t().contiguous().t(), bias), z, truth)
        assert_within_budget(F.linear(x, weight, bias, relu=True), z.relu(), truth.relu())
        x[1] = float("nan")
        assert F.linear(x, weight, bias, relu=True)[1].isnan().all()
    args = case((shape[0],), *shape[1:], dtype, seed=2)
    truth = run("reference", *(t.double() for t in args), rules.Gradient())
    check_all(
        run("native", *args, rules.Gradient()), run("reference", *args, rules.Gradient()), truth
    )
