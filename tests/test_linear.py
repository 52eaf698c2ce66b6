"""The linear layer: native and reference against an oracle that adds up single messages."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import (
    BACKENDS,
    DTYPES,
    SPECS,
    case,
    check_all,
    options_of,
    oracle,
    run,
    updates,
)  # fmt: skip

from lfp_kernels import functional as F
from lfp_kernels import optim, rules, use_backend
from lfp_kernels.rules import run_params, stabilize
from lfp_kernels.testing import absorbed, assert_conserved, assert_within_budget, poisoned_empty

OPS = torch.ops.lfp_kernels


# ---- values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [(), (1,), (7,), (2, 3), (0,), (3, 0)])
@pytest.mark.parametrize("bias", [True, False])
def test_native_is_within_the_error_budget(dtype, batch, bias):
    args = case(batch, 13, 9, dtype, bias)
    check_all(run("native", *args), run("reference", *args), oracle(*args))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [(), (7,), (2, 3)])
def test_float64_matches_the_oracle(backend, batch):
    args = case(batch, 13, 9, seed=1)
    for got, want in zip(run(backend, *args), oracle(*args)):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-9 * float(want.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("n, n_in, n_out", [(5, 1100, 40), (3, 40000, 60), (70, 5, 300)])
def test_tiles_and_column_blocks(dtype, n, n_in, n_out):
    """Shapes that need several tiles of W, several blocks of converted columns, many rows."""
    args = case((n,), n_in, n_out, dtype)
    oracle_args = [t.double() for t in args]
    truth = run("reference", *oracle_args)  # checked against the message oracle above
    check_all(run("native", *args), run("reference", *args), truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_special_z_values(backend, dtype):
    """s = r / stab(z) for z where only one thing can be right; one weight row per value."""
    tiny, eps = torch.finfo(dtype).tiny, 0.25
    values = [0.0, -0.0, tiny, -tiny, math.inf, -math.inf, math.nan, 1.0, -1.0]
    z = torch.tensor([values], dtype=dtype)
    count = z.shape[1]
    reward = torch.full((1, count), 3.0, dtype=dtype)
    x, weight = torch.full((1, 1), 2.0, dtype=dtype), torch.full((count, 1), -1.0, dtype=dtype)
    bias = torch.ones(count, dtype=dtype)
    s = torch.tensor([12, 12, 12, -12, 0.0, -0.0, math.nan, 3 / 1.25, -3 / 1.25], dtype=dtype)
    got = run(backend, x, weight, bias, z, reward, rules.Epsilon(eps))
    torch.testing.assert_close(got.weight[:, 0], 2 * s, rtol=1e-7, atol=0, equal_nan=True)
    torch.testing.assert_close(got.bias, s, rtol=1e-7, atol=0, equal_nan=True)
    assert got.input.isnan().all()  # the NaN reaches every input it is connected to
    finite = ~z[0].isnan()
    alone = run(
        backend, x, weight[finite], bias[finite], z[:, finite], reward[:, finite],
        rules.Epsilon(eps),
    )  # fmt: skip
    torch.testing.assert_close(alone.input[0, 0], -2 * s[finite].sum(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_weights_get_no_feedback(backend):
    x, weight, bias, z, reward = case((4,), 5, 3)
    weight[1, 2], bias[0] = 0.0, -0.0
    got = run(backend, x, weight, bias, z, reward)
    assert got.weight[1, 2] == 0 and got.bias[0] == 0
    assert (got.weight != 0).sum() == weight.numel() - 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(backend, relu, dtype):
    for batch in ((), (6,), (2, 3), (0,)):
        x, weight, bias, z, _ = case(batch, 11, 5, dtype)
        want = z.relu() if relu else z
        truth = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
        with use_backend(backend):
            got = F.linear(x, weight, bias, relu=relu)
        assert_within_budget(got, want, truth.relu() if relu else truth)


@pytest.mark.parametrize("rule", [cls() for cls in rules.REGISTRY.values()], ids=lambda r: r.name)
def test_every_rule_is_the_same_on_both_backends(rule):
    args = case((6,), 8, 5, torch.float64)
    args = (args[0].sigmoid(), *args[1:])  # what every rule takes: z-box wants values within [0, 1]
    options = options_of(rule, args[1])
    both = run("native", *args, rule, **options), run("reference", *args, rule, **options)
    for got, want in zip(*both):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


# ---- options


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("need", list(itertools.product([True, False], repeat=3)))
def test_masks(backend, need):
    args = case((6,), 8, 5)
    full, got = run(backend, *args), run(backend, *args, need=need)
    for want, have, wanted in zip(full, got, need):
        assert (have is not None) == wanted
        if wanted:
            assert torch.equal(have, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_chain_forms(backend, dtype):
    """below= gives r_in / stab(x); signal_in= takes such a signal and does not look at z."""
    x, weight, bias, z, reward = args = case((6,), 8, 5, dtype, seed=3)
    truth = oracle(*args)[0] / stabilize(x.double(), 1e-3)
    below = rules.Epsilon(1e-3)
    assert_within_budget(
        run(backend, *args, below=below).input, run("reference", *args, below=below).input, truth
    )
    # Take z = 0, so that the signal r / eps is exact and tells what signal_in must do with it.
    zero, eps = torch.zeros_like(z), 2.0**-10
    plain = run(backend, x, weight, bias, zero, reward, rules.Epsilon(eps))
    chained = run(
        backend, x, weight, bias, z.fill_(math.nan), reward * 2**10, rules.Epsilon(eps),
        signal_in=True,
    )  # fmt: skip
    for got, want in zip(chained, plain):
        assert torch.equal(got, want)


def test_product_dtype_runs_the_products_in_bfloat16():
    args = case((40,), 300, 70, torch.float32)
    single = run("native", *args)
    half = run("native", *args, product_dtype=torch.bfloat16)
    truth = oracle(*args)
    for name, got, exact, want in zip(("input", "weight"), half, single, truth):
        error = float((got - want).norm() / want.norm())
        assert 1e-4 < error < 6e-3, f"{name}: relative error {error}, bfloat16 has 2^-9 = 2e-3"
        assert float((exact - want).norm() / want.norm()) < 1e-5
    reference = run("reference", *args, product_dtype=torch.bfloat16)
    for got, same, want in zip(half, reference, truth):
        budget = 2 * ((same - want).abs().max() + 2**-7 * want.abs().max())
        assert float((got - want).abs().max()) <= float(budget)
        assert got.dtype == torch.float32


# ---- memory


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_arguments(backend):
    x, weight, bias, z, reward = args = case((6,), 8, 5)
    spread = [torch.stack([t, t.flip(-1)], -1)[..., 0] for t in (x, weight, bias, z, reward)]
    assert not any(t.is_contiguous() for t in spread)
    for got, want in zip(run(backend, *spread), run(backend, *args)):
        assert torch.equal(got, want)
    same = x[:1].expand(6, 8), weight, bias, z[:1].expand(6, 5), reward[:1].expand(6, 5)
    for got, want in zip(run(backend, *same), run(backend, *[t.contiguous() for t in same])):
        assert torch.equal(got, want)
    for w, b in ((weight.clone(), bias.clone()), (spread[1], spread[2])):
        _, steps_w, steps_b = updates(SPECS[1], w, b)
        with use_backend(backend):
            F.linear_redistribute_update(x, w, b, z, reward, steps_w, steps_b)
        truth = oracle(*args)
        torch.testing.assert_close(w, weight - 0.1 * (0.01 * weight - truth[1]))
        torch.testing.assert_close(b, bias - 0.1 * (0.01 * bias - truth[2]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n, n_in, n_out", [(0, 4, 3), (5, 0, 3), (5, 4, 0), (0, 0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_empty(backend, n, n_in, n_out, dtype):
    x, weight, bias, z, reward = args = case((n,), n_in, n_out, dtype)
    with poisoned_empty():
        got = run(backend, *args)
    assert got.input.shape == x.shape and (got.input == 0).all()
    assert got.weight.shape == weight.shape
    assert n > 0 or (got.weight == 0).all()
    assert n > 0 or (got.bias == 0).all()
    _, step_w, step_b = updates(optim.SGD(0.5, weight_decay=0.5), weight, bias)
    before = weight.clone()
    with use_backend(backend):
        F.linear_redistribute_update(x, weight, bias, z, reward, step_w, step_b)
    if n == 0:  # nothing arrived; the decay acts all the same
        assert torch.equal(weight, before * 0.75)


def test_offsets_beyond_32_bits():
    """Rows 2^31 elements apart (untouched pages of one allocation): offsets must not wrap."""
    stride = 2**31 + 64
    x, weight, bias, z, reward = args = case((2,), 6, 5, torch.bfloat16)

    def far(t):
        wide = torch.empty(stride + t.shape[1], dtype=t.dtype).as_strided(t.shape, (stride, 1))
        return wide.copy_(t)

    for got, want in zip(run("native", far(x), weight, bias, far(z), reward), run("native", *args)):
        assert torch.equal(got, want)
    w = far(weight[:2])
    args = (x, w, bias[:2], z[:, :2].contiguous(), reward[:, :2].contiguous())
    near = weight[:2].clone()
    for each in (w, near):
        _, step, _ = updates(SPECS[0], each, None)
        F.linear_redistribute_update(args[0], each, *args[2:], step)
    assert torch.equal(w, near) and not torch.equal(near, weight[:2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_output_element_is_written(dtype):
    args = case((5,), 700, 23, dtype)
    clean = run("native", *args)
    with poisoned_empty():
        assert torch.empty(3).isnan().all(), "the poison itself"
        poisoned = run("native", *args)
        forward = F.linear(*args[:3])
    assert not forward.isnan().any()
    for got, want in zip(poisoned, clean):
        assert torch.equal(got, want)


def test_same_bits_on_two_runs():
    for dtype in DTYPES:
        args = case((33,), 700, 129, dtype)
        for first, second in zip(run("native", *args), run("native", *args)):
            assert torch.equal(first, second)


# ---- torch machinery


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.operators
def test_opcheck(dtype):
    x, weight, bias, z, reward = case((4,), 6, 3, dtype)
    spec = updates(SPECS[1], weight, bias)
    params = run_params(rules.Epsilon())
    call = (x, weight, bias, z, reward, None, 0, params, True, True, True, 0, dtype)
    torch.library.opcheck(OPS.linear_redistribute.default, call)
    partial = (*call[:8], False, True, False, 2, dtype)
    torch.library.opcheck(OPS.linear_redistribute.default, partial)
    for rule in (rules.AlphaBeta(), rules.NoisyFeedback()):
        own = (*call[:5], weight.flip(0), rule.code, run_params(rule), True, True, True, 0, dtype)
        torch.library.opcheck(OPS.linear_redistribute.default, own)
    torch.library.opcheck(OPS.linear_forward.default, (x, weight, bias, True))
    torch.library.opcheck(
        OPS.linear_redistribute_update.default,
        (
            x, weight, bias, z, reward, None, spec[1].states, spec[2].states, 0, params,
            spec[1].code, spec[1].hyper, spec[2].code, spec[2].hyper, True, 0, dtype,
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    "backend, around",
    [
        ("aot_eager", True),
        ("inductor", False),  # nothing for its C++ compiler to do: seconds
        pytest.param("inductor", True, marks=pytest.mark.slow),
    ],
)
def test_compiles_without_graph_breaks(backend, around):
    args = case((2, 4), 6, 3, torch.float32)

    def layer(x, weight, bias, z, reward):
        if not around:
            return F.linear_redistribute(x, weight, bias, z, reward)
        r_in, w_fb, b_fb = F.linear_redistribute(x, weight, bias, z, reward * 2)
        return r_in + 1, w_fb.t(), b_fb.exp()

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for got, want in zip(compiled(*args), layer(*args)):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_the_first_call_of_a_process_may_be_compiled():
    """Nothing is loaded or looked up lazily that the compiler could not trace."""
    code = """if True:
        import torch, lfp_kernels
        x, w, r = torch.ones(2, 3), torch.ones(4, 3), torch.ones(2, 4)
        f = torch.compile(
            lambda: lfp_kernels.functional.linear_redistribute(x, w, None, r, r),
            fullgraph=True, backend="eager",
        )
        assert f().input.shape == (2, 3)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_graph_is_built():
    args = [t.requires_grad_() for t in case((4,), 6, 3)]
    assert not any(t.requires_grad for t in run("native", *args))
    assert not F.linear(*args[:3]).requires_grad


# ---- properties

shapes = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(0, 999))
quick = settings(max_examples=25, deadline=None, derandomize=True)


@quick
@given(shapes, st.floats(-4, 4))
def test_linear_in_the_reward(shape, factor):
    n, i, o, seed = shape
    x, weight, bias, z, first = case((n,), i, o, seed=seed)
    second = case((n,), i, o, seed=seed + 1000)[4]
    parts = [run("native", x, weight, bias, z, r) for r in (first, second)]
    both = run("native", x, weight, bias, z, first + factor * second)
    for a, b, got in zip(*parts, both):
        scale = float((a.abs() + abs(factor) * b.abs()).max()) + 1
        torch.testing.assert_close(got, a + factor * b, rtol=1e-9, atol=1e-10 * scale)


@quick
@given(shapes)
def test_batch_order_does_not_matter(shape):
    n, i, o, seed = shape
    x, weight, bias, z, reward = args = case((n,), i, o, seed=seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    plain = run("native", *args)
    mixed = run("native", x[order], weight, bias, z[order], reward[order])
    scale = float(plain.weight.abs().max()) + 1
    torch.testing.assert_close(mixed.input, plain.input[order], rtol=1e-9, atol=1e-9 * scale)
    torch.testing.assert_close(mixed.weight, plain.weight, rtol=1e-9, atol=1e-9 * scale)
    torch.testing.assert_close(mixed.bias, plain.bias, rtol=1e-9, atol=1e-9 * scale)


@quick
@given(shapes, st.sampled_from(DTYPES))
def test_zero_reward_gives_zero_feedback(shape, dtype):
    n, i, o, seed = shape
    x, weight, bias, z, reward = case((n,), i, o, dtype, seed=seed)
    for got in run("native", x, weight, bias, z, torch.zeros_like(reward)):
        assert (got == 0).all()


@quick
@given(shapes, st.booleans(), st.sampled_from([1e-12, 1e-6, 1e-2]))
def test_reward_is_conserved(shape, bias, eps):
    n, i, o, seed = shape
    x, weight, b, z, reward = case((n,), i, o, bias=bias, seed=seed)
    got = run("native", x, weight, b, z, reward, rules.Epsilon(eps))
    signal = (reward / stabilize(z, eps)).abs()
    flow = (x.abs()[:, None, :] * weight.abs() * signal[..., None]).sum() + reward.abs().sum()
    assert_conserved(reward, got.input, absorbed(z, reward, b, eps), flow=flow)
