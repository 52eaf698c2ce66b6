"""Rules with two signals: against an oracle that adds up single messages, one per connection."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from linear_cases import BACKENDS, DTYPES, SPECS, case, run, updates

from lfp_kernels import functional as F
from lfp_kernels import rules, use_backend
from lfp_kernels.rules import DERIVATIVES, Map, Parts, Signals, stabilize
from lfp_kernels.testing import assert_within_budget, poisoned_empty

SPLIT = {name: cls for name, cls in rules.REGISTRY.items() if cls().split}
RULES = [pytest.param(cls(eps=1e-3), id=name) for name, cls in SPLIT.items()]
ALPHA_BETA = rules.AlphaBeta(eps=1e-3, alpha=2.5, beta=1.5)
GAMMA = rules.Gamma(eps=1e-3, gamma=2.0)


def split_case(rule, batch, n_in, n_out, dtype=torch.float64, bias=True, nonnegative=False):
    """x within what the rule expects of it."""
    x, weight, b, _, reward = case(batch, n_in, n_out, dtype, bias)
    if rule.parts_code == Parts.BOX:
        x = torch.sigmoid(x)
    elif nonnegative:
        x = x.relu()
    z = torch.nn.functional.linear(x, weight, b)
    z = z + torch.where(z < 0, -0.5, 0.5).to(dtype)  # away from the jumps at 0
    return x, weight, b, z, reward


def messages(rule, x, weight, z, bias):
    """Shares [N, O, I + 1] of the reward at each output, the bias the last input; from the rules'
    definitions by contributions (docs/math.md, section 4), not by parts of products."""
    rows, outputs = x.shape[0], weight.shape[0]
    bias = torch.zeros(outputs, dtype=x.dtype) if bias is None else bias
    given = x[:, None, :] * weight
    of_bias = bias.expand(rows, outputs)[..., None]
    if rule.map_code != Map.VALUE:
        square = rule.map_code == Map.SQUARE
        given = (weight * weight if square else torch.ones_like(weight)).expand_as(given)
        of_bias = of_bias * of_bias if square else 0 * of_bias
    elif rule.parts_code == Parts.BOX:
        bound = torch.where(weight > 0, rule.first, rule.second).to(x.dtype)
        given, of_bias = (x[:, None, :] - bound) * weight, 0 * of_bias
    flow = torch.cat([given, of_bias], -1)
    strong, weak = flow.clamp(min=0), flow.clamp(max=0)
    if rule.signals_code == Signals.ALPHA_BETA:
        return rule.first * strong / stabilize(
            strong.sum(-1, True), rule.eps
        ) - rule.second * weak / stabilize(weak.sum(-1, True), rule.eps)
    if rule.signals_code == Signals.GAMMA:
        own = torch.where(z[..., None] > 0, strong, weak)
        raised = flow + rule.first * own
        return raised / stabilize(raised.sum(-1, True), rule.eps)
    return strong / stabilize(strong.sum(-1, True), rule.eps)


def oracle(rule, x, weight, bias, z, reward):
    x, weight, z, reward = (t.double() for t in (x, weight, z, reward))
    bias = None if bias is None else bias.double()
    flow = messages(rule, x, weight, z, bias) * reward[..., None]
    of_bias = None if bias is None else bias.sign() * flow[..., -1].sum(0)
    return flow[..., :-1].sum(1), weight.sign() * flow[..., :-1].sum(0), of_bias


def check(got, same, truth, name="result"):
    """Within the error budget; in float64, whose oracle knows no better, equal but for rounding."""
    if got.dtype == torch.float64:
        return assert_equal_but_for_rounding(got, truth)
    return assert_within_budget(got, same, truth, name)


def assert_equal_but_for_rounding(got, truth):
    scale = float(truth.abs().max()) if truth.numel() else 0.0
    torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-10 * scale)


# ---- the linear layer


@pytest.mark.parametrize("rule", [*RULES, ALPHA_BETA, GAMMA])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_float64_matches_the_oracle(rule, backend, nonnegative, bias):
    args = split_case(rule, (7,), 13, 9, bias=bias, nonnegative=nonnegative)
    want = oracle(rule, *args)
    for promise in {False, nonnegative}:
        for a, b in zip(run(backend, *args, rule, nonnegative=promise), want):
            assert (a is None) == (b is None)
            if b is not None:
                assert_equal_but_for_rounding(a, b)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (6, 8, 5), (5, 700, 23), (40, 33, 290), (300, 31, 33), (13, 530, 65)]
)
@pytest.mark.parametrize("nonnegative", [False, True])
def test_native_is_within_the_error_budget(rule, dtype, shape, nonnegative):
    n, n_in, n_out = shape
    args = split_case(rule, (n,), n_in, n_out, dtype, nonnegative=nonnegative)
    truth = oracle(rule, *args)
    got = run("native", *args, rule, nonnegative=nonnegative)
    same = run("reference", *args, rule)
    for name, a, b, c in zip(("input", "weight", "bias"), got, same, truth):
        check(a, b, c, name)


def test_one_negative_input_is_enough():
    """A block of x without negative values is skipped; one value anywhere must not be."""
    rule = rules.AlphaBeta(eps=1e-3)
    for row, column in ((0, 0), (37, 269), (12, 300), (3, 31)):
        x, weight, bias, z, reward = split_case(rule, (38,), 301, 29, nonnegative=True)
        x[row, column] = -2.0
        args = (x, weight, bias, z, reward)
        for a, b in zip(run("native", *args, rule), oracle(rule, *args)):
            assert_equal_but_for_rounding(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gamma_0_is_epsilon(backend):
    args = split_case(GAMMA, (7,), 13, 9)
    x, weight, bias, _, reward = args
    exact = (x, weight, bias, torch.nn.functional.linear(x, weight, bias), reward)
    epsilon = run(backend, *exact, rules.Epsilon(1e-3))
    for a, b in zip(run(backend, *exact, rules.Gamma(1e-3, 0)), epsilon):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_bias_all_reward_arrives(rule, backend):
    small = type(rule)(eps=1e-12)
    args = split_case(rule, (7,), 13, 9, bias=False)
    got = run(backend, *args, small)
    total = float(args[4].sum())
    assert float(got.input.sum()) == pytest.approx(total, rel=1e-6)
    assert float((got.weight * args[1].sign()).sum()) == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masks(rule, backend):
    args = split_case(rule, (6,), 8, 5)
    full = run(backend, *args, rule)
    for need in itertools.product([True, False], repeat=3):
        got = run(backend, *args, rule, need=need)
        for want, have, wanted in zip(full, got, need):
            assert (have is not None) == wanted
            assert have is None or torch.equal(have, want)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("function", DERIVATIVES)
def test_derivative_of_the_activation_below(rule, function):
    args = split_case(rule, (6,), 40, 5)
    x = args[0]
    slope = {"relu": (x > 0).double(), "tanh": 1 - x * x, "sigmoid": x * (1 - x)}[function]
    for backend in BACKENDS:
        plain = run(backend, *args, rule).input
        got = run(backend, *args, rule, below=DERIVATIVES[function]).input
        torch.testing.assert_close(got, plain * slope, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{type(s).__name__}-{s.state_names[0]}")
def test_update_is_redistribute_then_optimizer(rule, dtype, spec):
    args = split_case(rule, (6,), 300, 40, dtype)
    found = {}
    for backend, cast in (("native", dtype), ("reference", dtype), ("truth", torch.float64)):
        x, weight, bias, z, reward = (t.to(cast, copy=True) for t in args)
        bound, _, _ = updates(spec, weight, bias)
        for _ in range(2):
            steps = [bound.update_of(t, bound.param_groups[0]) for t in (weight, bias)]
            with use_backend("reference" if backend == "truth" else backend):
                r_in = F.linear_redistribute_update(x, weight, bias, z, reward, *steps, rule)
            bound.count_step([weight, bias])
        found[backend] = r_in, weight, bias, *steps[0].states, *steps[1].states
    for k, (a, b, c) in enumerate(zip(*found.values())):
        if k < 3:
            check(a, b, c, ("input of the old weight", "weight", "bias")[k])
        else:
            limit = 16 * torch.finfo(dtype).eps * float(c.abs().max())
            assert float((a.double() - b.double()).abs().max()) <= limit


@pytest.mark.parametrize("rule", RULES)
def test_update_without_bias_or_input(rule):
    x, weight, bias, z, reward = split_case(rule, (6,), 30, 20)
    before, w = bias.clone(), weight.clone()
    _, step, _ = updates(SPECS[0], w, bias)
    with use_backend("native"):
        found = F.linear_redistribute_update(
            x, w, bias, z, reward, step, rule=rule, need_input=False
        )
    fb = oracle(rule, x, weight, bias, z, reward)[1]  # which counts the bias all the same
    assert found is None and torch.equal(bias, before)
    assert_equal_but_for_rounding(w, weight - 0.1 * (0.01 * weight - fb))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n, n_in, n_out", [(0, 4, 3), (5, 0, 3), (5, 4, 0), (0, 0, 0)])
def test_empty(rule, n, n_in, n_out):
    x, weight, bias, z, reward = args = split_case(rule, (n,), n_in, n_out, torch.float32)
    with poisoned_empty():
        got = run("native", *args, rule)
    assert got.input.shape == x.shape and (got.input == 0).all()
    assert got.weight.shape == weight.shape
    assert n > 0 or ((got.weight == 0).all() and (got.bias == 0).all())
    _, step_w, step_b = updates(SPECS[0], weight, bias)
    before = weight.clone()
    F.linear_redistribute_update(x, weight, bias, z, reward, step_w, step_b, rule)
    if n == 0:  # nothing arrived; the decay acts all the same
        torch.testing.assert_close(weight, before * (1 - 0.1 * 0.01))


@pytest.mark.parametrize("rule", RULES)
def test_memory_layouts_and_unwritten_memory(rule):
    args = split_case(rule, (6,), 70, 23, torch.float32)
    want = run("native", *args, rule)
    spread = [torch.stack([t, t.flip(-1)], -1)[..., 0] for t in args]
    assert not any(t.is_contiguous() for t in spread)
    with poisoned_empty():
        poisoned = run("native", *args, rule)
    for got in (run("native", *spread, rule), poisoned):
        for a, b in zip(got, want):
            assert torch.equal(a, b)


@pytest.mark.parametrize("rule", RULES)
def test_bits_do_not_depend_on_the_threads(rule):
    args = split_case(rule, (70,), 700, 329, torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            found.append(run("native", *args, rule))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_nan(backend):
    for rule in (rules.ZPlus(1e-3), ALPHA_BETA, GAMMA):
        x, weight, bias, z, reward = split_case(rule, (3,), 8, 5)
        x[1, 2] = torch.nan
        got = run(backend, x, weight, bias, z, reward, rule)
        assert got.input[1].isnan().all() and not got.input[0].isnan().any()


_PEAK = """if True:
    import sys, torch
    from bench.memory import rise_of_resident_set
    from lfp_kernels import functional as F, optim, rules, use_backend
    from lfp_kernels.optim import BoundOptimizer
    def run(n, size, rule):
        x, w, z = torch.rand(n, size), torch.randn(size, size), torch.randn(n, size)
        bound = BoundOptimizer(optim.SGD(1e-6), [w])
        step = bound.update_of(w, bound.param_groups[0])
        call = lambda: F.linear_redistribute_update(x, w, None, z, z, step, rule=rule)
        return rise_of_resident_set(call) / 2**20
    rule = rules.REGISTRY[sys.argv[1]]()
    with use_backend(sys.argv[2]):
        run(2, 64, rule)
        print(run(16, 3072, rule))
"""


def peak_of(rule: str, backend: str) -> float:
    """MiB that one update of a 36 MiB weight takes besides its arguments."""
    command = [sys.executable, "-c", _PEAK, rule, backend]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.host
def test_no_part_of_the_weight_is_stored():
    peaks = {rule: peak_of(rule, "native") for rule in ("zplus", "alpha_beta", "zbox")}
    assert max(peaks.values()) < 12, peaks
    assert peak_of("alpha_beta", "reference") > 72  # what the measurement would see
