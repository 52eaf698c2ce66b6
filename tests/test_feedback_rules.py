"""The feedback-alignment family: the matrices of the input product, and direct feedback."""

from __future__ import annotations

import pytest
import torch
from conv_cases import layer
from linear_cases import BACKENDS, DTYPES, SPECS, case, run, updates

from lfp_kernels import functional as F
from lfp_kernels import rules, use_backend
from lfp_kernels.rules import DERIVATIVES, Matrix
from lfp_kernels.testing import assert_within_budget

RULES = [
    pytest.param(cls(), id=name)
    for name, cls in rules.REGISTRY.items()
    if cls.matrix_code != Matrix.WEIGHT
]
SEEDED = [rules.RandomSignFeedback(bound=0.7, seed=5), rules.NoisyFeedback(amplitude=0.5, seed=9)]
CONVS = ["1d", "2d", "2d-groups", "2d-depthwise", "2d-transposed", "3d"]


def given_for(rule, weight, seed=7):
    if not rule.takes_matrix:
        return None
    g = torch.Generator().manual_seed(seed)
    return torch.randn(weight.shape, generator=g, dtype=torch.float64).to(weight.dtype)


# ---- the generator


def philox_words(block: int, seed: int) -> list[int]:
    """Philox4x32-10 in Python's unbounded integers, after the paper's definition."""
    counter = [block & 0xFFFFFFFF, block >> 32, 0, 0]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (second >> 32) ^ counter[1] ^ key[0], second & 0xFFFFFFFF,
            (first >> 32) ^ counter[3] ^ key[1], first & 0xFFFFFFFF,
        ]  # fmt: skip
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 17, 2**53 - 1])
def test_uniform_is_philox(seed):
    got = rules.uniform(torch.empty(3, 7, dtype=torch.float64), seed).flatten().tolist()
    words = [word for block in range(6) for word in philox_words(block, seed)]
    assert got == [(word >> 8) / 2**24 for word in words[:21]]


def test_philox_known_answer():
    """The vector of zeros that the authors publish with the generator (Random123, kat_vectors)."""
    assert philox_words(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n_in", [1, 3, 4, 31, 33, 70])
def test_kernel_draws_are_those_of_uniform(dtype, n_in):
    """One output signal of 1 at a time reads a row of M out of the kernel, bit for bit."""
    n_out, rule = 5, rules.RandomSignFeedback(bound=1.0, seed=2**40 + 3)
    weight = torch.ones(n_out, n_in, dtype=dtype)
    reward = torch.eye(n_out, dtype=dtype)
    x = torch.ones(n_out, n_in, dtype=dtype)
    got = run("native", x, weight, None, reward, reward, rule, need=(True, False, False)).input
    assert torch.equal(got, rules.uniform(weight, rule.seed))
    assert got.min() >= 0 and got.max() < 1


def test_draws_are_uniform():
    draws = rules.uniform(torch.empty(1000, 100), 3)
    histogram = torch.histc(draws, 20, 0, 1)
    assert float(((histogram - 5000) ** 2 / 5000).sum()) < 50  # chi-squared, 19 degrees: p = 1e-4
    assert abs(float(draws.mean()) - 0.5) < 0.005


# ---- the matrices


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 8, 5), (33, 300, 270), (300, 31, 33)])
def test_linear_is_within_the_error_budget(rule, dtype, shape):
    n, n_in, n_out = shape
    args = case((n,), n_in, n_out, dtype)
    given = given_for(rule, args[1])
    wide = None if given is None else given.double()
    truth = run("reference", *[t.double() for t in args], rule, matrix=wide)
    same = run("reference", *args, rule, matrix=given)
    got = run("native", *args, rule, matrix=given)
    for name, a, b, c in zip(("input", "weight", "bias"), got, same, truth):
        if dtype == torch.float64:  # the truth has no more digits than the kernel
            torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-12 * float(c.abs().max()))
        else:
            assert_within_budget(a, b, c, name)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_input_reward_follows_the_matrix_and_not_the_weight(rule, backend):
    x, weight, _, _, reward = args = case((6,), 8, 5)
    given = given_for(rule, weight)
    got = run(backend, *args, rule, matrix=given)
    assert not torch.allclose(got.input, reward @ weight)
    torch.testing.assert_close(got.input, reward @ rule.matrix(weight, given))
    torch.testing.assert_close(got.weight, reward.t() @ x)
    torch.testing.assert_close(got.bias, reward.sum(0))
    if rule.takes_matrix:
        other = run(backend, *args, rule, matrix=given_for(rule, weight, seed=8))
        assert not torch.allclose(other.input, got.input)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", SEEDED, ids=lambda r: r.name)
def test_every_seed_draws_anew(backend, rule):
    args = case((6,), 8, 5)
    given = given_for(rule, args[1])
    first = run(backend, *args, rule, matrix=given).input
    assert torch.equal(first, run(backend, *args, rule, matrix=given).input)
    other = type(rule)(rule.first, rule.seed + 1)
    assert not torch.allclose(first, run(backend, *args, other, matrix=given).input)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("function", DERIVATIVES)
def test_derivative_of_the_activation_below(rule, function):
    x, weight, bias, z, reward = case((6,), 40, 5)
    x = torch.tanh(x)
    given, below = given_for(rule, weight), DERIVATIVES[function]
    args = (x, weight, bias, z, reward, rule)
    plain = run("native", *args, matrix=given).input
    slope = {"relu": (x > 0).double(), "tanh": 1 - x * x, "sigmoid": x * (1 - x)}[function]
    for backend in BACKENDS:
        got = run(backend, *args, matrix=given, below=below).input
        torch.testing.assert_close(got, plain * slope, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_update_reads_the_weight_before_it_changes(rule):
    x, weight, bias, z, reward = case((6,), 300, 40)
    given = given_for(rule, weight)
    found = []
    for backend in BACKENDS:
        w, b = weight.clone(), bias.clone()
        _, step_w, step_b = updates(SPECS[1], w, b)
        with use_backend(backend):
            r_in = F.linear_redistribute_update(
                x, w, b, z, reward, step_w, step_b, rule, matrix=given
            )
        found.append((r_in, w, b))
    for got, want in zip(*found):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    assert not torch.equal(found[0][1], weight)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_convolution(rule, name, dtype):
    x, weight, bias, z, reward, geometry = layer(name)
    given = given_for(rule, weight)
    tensors = [t.to(dtype) for t in (x, weight, bias, z, reward)]
    narrow = None if given is None else given.to(dtype)

    def redistribute(backend, arguments, matrix):
        with use_backend(backend):
            return F.conv_redistribute(*arguments, geometry, rule, matrix=matrix)

    truth = redistribute("reference", (x, weight, bias, z, reward), given)
    got = redistribute("native", tensors, narrow)
    same = redistribute("reference", tensors, narrow)
    for a, b, c in zip(got, same, truth):
        if dtype == torch.float64:
            torch.testing.assert_close(a, c, rtol=1e-11, atol=1e-11)
        else:
            assert_within_budget(a, b, c)
    with use_backend("reference"):  # M in the place of W
        instead = F.conv_redistribute(
            x, rule.matrix(weight, given), bias, z, reward, geometry, rules.Gradient()
        )
    torch.testing.assert_close(truth.input, instead.input, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rule", [p for p in RULES if p.values[0].takes_matrix])
def test_a_missing_matrix_is_named(rule):
    args = case((6,), 8, 5)
    with pytest.raises(ValueError, match="linear_redistribute: matrix: expected the feedback"):
        F.linear_redistribute(*args, rule)
    with pytest.raises(ValueError, match=r"matrix: expected shape \(5, 8\), got \(8, 5\)"):
        F.linear_redistribute(*args, rule, matrix=args[1].t())
    got = F.linear_redistribute(*args, rule, need=(False, True, True))  # nobody reads it
    assert got.weight is not None


# ---- direct feedback


def direct_case(batch, n_in, n_out, classes, dtype, seed=0):
    x, weight, bias, z, _ = case(batch, n_in, n_out, dtype, seed=seed)
    error = case(batch, classes, 1, dtype, seed=seed + 1)[0]
    matrix = case((classes,), n_out, 1, dtype, seed=seed + 2)[0]
    return x, weight, bias, error, matrix, z


def direct(backend, spec, x, weight, bias, error, matrix, activation, derivative):
    """Weight, bias and states after one update from states that are not zero."""
    w, b = weight.clone(), None if bias is None else bias.clone()
    _, step_w, step_b = updates(spec, w, b)
    states = [*step_w.states, *([] if step_b is None else step_b.states)]
    for state in states:
        state.copy_(torch.linspace(0.1, 1, state.numel(), dtype=torch.float64).view(state.shape))
    with use_backend(backend):
        F.direct_update(x, w, b, error, matrix, activation, step_w, step_b, derivative=derivative)
    return [w, *([] if b is None else [b]), *states]


@pytest.mark.parametrize("function", [None, *DERIVATIVES])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{type(s).__name__}-{s.state_names[0]}")
def test_direct_update(function, dtype, spec):
    derivative = None if function is None else DERIVATIVES[function]
    args = direct_case((9,), 40, 33, 7, dtype)
    args = (*args[:5], torch.sigmoid(args[5]))
    wide = tuple(t.double() for t in args)
    truth = direct("reference", spec, *wide, derivative)
    got = direct("native", spec, *args, derivative)
    for a, b, c in zip(got, direct("reference", spec, *args, derivative), truth):
        assert_within_budget(a, b, c)


@pytest.mark.parametrize("backend", BACKENDS)
def test_direct_update_is_autograd_with_the_matrix_in_the_way(backend):
    """One step of SGD equals autograd's where the layer above is the fixed matrix D."""
    x, weight, bias, error, matrix, _ = direct_case((2, 5), 30, 20, 6, torch.float64)
    w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    activation = torch.tanh(torch.nn.functional.linear(x, w, b))
    (activation @ matrix.t() * -error).sum().backward()  # error points uphill
    _, step_w, step_b = updates(SPECS[0], weight, bias)
    new_w, new_b = weight.clone(), bias.clone()
    with use_backend(backend):
        F.direct_update(
            x, new_w, new_b, error, matrix, activation.detach(), step_w, step_b,
            derivative=DERIVATIVES["tanh"],
        )  # fmt: skip
    torch.testing.assert_close(new_w, weight - 0.1 * (0.01 * weight + w.grad))
    torch.testing.assert_close(new_b, bias - 0.1 * (0.01 * bias + b.grad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_direct_update_of_several_tiles(dtype):
    args = direct_case((70,), 900, 500, 10, dtype)
    wide = tuple(t.double() for t in args)
    relu = DERIVATIVES["relu"]
    got, same, truth = (
        direct(backend, SPECS[1], *a, relu)
        for backend, a in (("native", args), ("reference", args), ("reference", wide))
    )
    for a, b, c in zip(got, same, truth):
        assert_within_budget(a, b, c)
    for a, b in zip(got, direct("native", SPECS[1], *args, relu)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n, n_in, n_out, classes", [(0, 4, 3, 2), (5, 0, 3, 2), (5, 4, 0, 2)])
def test_direct_update_of_nothing(backend, n, n_in, n_out, classes):
    args = direct_case((n,), n_in, n_out, classes, torch.float32)
    w, b = direct(backend, SPECS[0], *args, None)
    if n == 0:  # the decay acts all the same
        torch.testing.assert_close(w, args[1] * (1 - 0.1 * 0.01))
    want = args[2] * (1 - 0.1 * 0.01) + 0.1 * (args[3] @ args[4]).sum(0)
    torch.testing.assert_close(b, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_direct_update_of_non_contiguous_arguments(backend):
    args = direct_case((6,), 8, 5, 4, torch.float64)
    spread = [torch.stack([t, t.flip(-1)], -1)[..., 0] for t in args]
    tanh = DERIVATIVES["tanh"]
    x, weight, bias, error, matrix, a = spread
    _, step_w, step_b = updates(SPECS[1], weight, bias)
    want = direct_plain(args, tanh)
    with use_backend(backend):
        F.direct_update(x, weight, bias, error, matrix, a, step_w, step_b, derivative=tanh)
    torch.testing.assert_close(weight, want[0])
    torch.testing.assert_close(bias, want[1])


def direct_plain(args, derivative):
    x, weight, bias, error, matrix, a = args
    delta = derivative(error @ matrix, a)
    return (
        weight - 0.1 * (0.01 * weight - delta.t() @ x),
        bias - 0.1 * (0.01 * bias - delta.sum(0)),
    )


def test_direct_update_errors_change_nothing():
    x, weight, bias, error, matrix, a = direct_case((4,), 6, 3, 2, torch.float32)
    _, step_w, step_b = updates(SPECS[1], weight, bias)
    before = weight.clone(), bias.clone()
    good = dict(
        x=x, weight=weight, bias=bias, error=error, matrix=matrix, activation=a,
        weight_update=step_w, bias_update=step_b, derivative=DERIVATIVES["relu"],
    )  # fmt: skip
    bad = [
        ("x", TypeError, {"x": [1.0]}),
        ("x", ValueError, {"x": x[:, :5]}),
        ("weight", TypeError, {"weight": weight.double()}),
        ("bias", ValueError, {"bias": bias[:2]}),
        ("error", ValueError, {"error": error[:3]}),
        ("matrix", ValueError, {"matrix": matrix.t()}),
        ("activation", ValueError, {"activation": None}),
        ("activation", ValueError, {"activation": a[:, :2]}),
        ("derivative", TypeError, {"derivative": "relu"}),
        ("weight_update", ValueError, {"weight_update": step_b}),
        ("bias_update", ValueError, {"bias": None}),
    ]
    for name, kind, change in bad:
        with pytest.raises(kind, match=f"direct_update: {name}"):
            F.direct_update(**(good | change))
        assert torch.equal(weight, before[0]) and torch.equal(bias, before[1])
        assert not step_w.states[0].any() and not step_b.states[0].any()


@pytest.mark.host
def test_direct_opcheck():
    x, weight, bias, error, matrix, a = direct_case((4,), 6, 3, 2, torch.float32)
    _, step_w, step_b = updates(SPECS[1], weight, bias)
    torch.library.opcheck(
        torch.ops.lfp_kernels.direct_update.default,
        (
            x, weight, bias, error, matrix, a, step_w.states, step_b.states, 8, step_w.code,
            step_w.hyper, step_b.code, step_b.hyper,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_products_in_bfloat16(rule, request):
    # CUDA C++ multiplies with matrices that it forms on the way in float32 (docs/gpu.md).
    formed = Matrix(rule.matrix_code) not in (Matrix.WEIGHT, Matrix.GIVEN)
    on_cuda = "cuda" in map(request.config.getoption, ("--simulate", "--device"))
    args = case((40,), 300, 70, torch.float32)
    given = given_for(rule, args[1])
    exact = run("native", *args, rule, matrix=given)
    narrow = run("native", *args, rule, matrix=given, product_dtype=torch.bfloat16)
    for got, want, kept in zip(narrow[:2], exact[:2], (formed and on_cuda, False)):
        error = float((got - want).norm() / want.norm())
        assert got.dtype == torch.float32
        fine = error == 0 if kept else 1e-4 < error < 6e-3
        assert fine, f"relative error {error}, bfloat16 has 2^-9 = 2e-3"
