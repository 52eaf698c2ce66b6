"""Initial rewards: golden values of the official package, the formulas, both backends."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfp_kernels import rewards, use_backend
from lfp_kernels.backends import select
from lfp_kernels.ops.reward.codes import Kind
from lfp_kernels.testing import assert_within_budget, poisoned_empty

BACKENDS = ("native", "reference")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
GOLDEN = np.load(Path(__file__).parent / "golden" / "rewards.npz")
BOUNDED = functools.partial(rewards.bounded_softmax, low=0.1, high=0.6)
# name -> (function, how its target looks)
VARIANTS = {
    "softmax": (rewards.softmax, "labels"),
    "sigmoid": (rewards.sigmoid, "labels"),
    "bounded_softmax": (BOUNDED, "labels"),
    "bounded_softmax_sign": (functools.partial(BOUNDED, sign=True), "labels"),
    "correct_classification": (rewards.correct_classification, "labels"),
    "misclassification": (rewards.misclassification, "labels"),
    "maximize": (rewards.maximize, "none"),
    "maximize_one": (functools.partial(rewards.maximize, neuron=2), "none"),
    "minimize": (rewards.minimize, "none"),
    "minimize_one": (functools.partial(rewards.minimize, neuron=0), "none"),
    "binary_sigmoid": (rewards.binary_sigmoid, "bits"),
    "regression": (rewards.regression, "values"),
}
each_variant = pytest.mark.parametrize("name", VARIANTS)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def golden(key):
    return torch.from_numpy(GOLDEN[key])


def case(name, batch=(6,), classes=5, dtype=torch.float64, seed=0):
    """(out, y) for a variant, with well-spread logits."""
    g = torch.Generator().manual_seed(seed)
    out = (3 * torch.randn(*batch, classes, generator=g, dtype=torch.float64)).to(dtype)
    kind = VARIANTS[name][1]
    if kind == "labels":
        return out, torch.randint(0, classes, batch, generator=g)
    if kind == "bits":
        return out, torch.randint(0, 2, out.shape, generator=g)
    if kind == "values":
        return out, torch.randn(out.shape, generator=g, dtype=torch.float64).to(dtype)
    return out, None


def run(backend, name, out, y):
    with use_backend(backend):
        return VARIANTS[name][0](out, y)


def formula(name, out, y):
    """The definitions of docs/math.md, section 5, one number at a time."""
    rows, classes = out.reshape(-1, out.shape[-1]).double(), out.shape[-1]
    targets = None if y is None else y.reshape(rows.shape[0], -1).double()
    result = torch.zeros_like(rows)

    def sigma(v):
        return 1 / (1 + math.exp(-v))

    def sign(v):
        return (v > 0) - (v < 0)

    for n, row in enumerate(rows.tolist()):
        total = sum(math.exp(v) for v in row)
        for k, o in enumerate(row):
            p = math.exp(o) / total
            label = int(targets[n, 0]) if VARIANTS[name][1] == "labels" else None
            hot = 1.0 if k == label else 0.0
            bounded = 1.0 if p > 0.6 else 0.0 if p < 0.1 else p
            target = 0.0 if targets is None else float(targets[n, k % targets.shape[1]])
            result[n, k] = {
                "softmax": o * (hot - p),
                "sigmoid": o * (hot - sigma(o)),
                "bounded_softmax": o * (hot - bounded),
                "bounded_softmax_sign": sign(o) * (hot - bounded),
                "correct_classification": hot * (row.index(max(row)) == k) * sign(o),
                "misclassification": -sign(o) * (label is not None and o > row[label]),
                "maximize": sign(o) * (1 - sigma(o)),
                "maximize_one": (k == 2) * sign(o) * (1 - sigma(o)),
                "minimize": -sign(o) * (1 - sigma(o)),
                "minimize_one": -(k == 0) * sign(o) * (1 - sigma(o)),
                "binary_sigmoid": o * (target - sigma(o)),
                "regression": (target - o) ** 3 * sign(o),
            }[name]
    assert classes == 5
    return result.reshape(out.shape)


# ---- values

GOLDEN_CALLS = {
    "softmax": rewards.softmax,
    "sigmoid": rewards.sigmoid,
    "maximize": rewards.maximize,
    "minimize": rewards.minimize,
    "correct": rewards.correct_classification,
    "misclassification": rewards.misclassification,
    "bounded_0.1_0.6": BOUNDED,
    "bounded_sign_0.1_0.6": functools.partial(BOUNDED, sign=True),
}


@each_backend
@pytest.mark.parametrize("key", [k[2:] for k in GOLDEN.files if k.startswith("r/")])
def test_golden(backend, key):
    with use_backend(backend):
        if key == "snn_rate":
            got = rewards.snn_rate(golden("spikes"), golden("y"))
        elif key == "binary_sigmoid":
            got = rewards.binary_sigmoid(golden("ob"), golden("yb"))
        else:
            got = GOLDEN_CALLS[key](golden("o"), golden("y"))
    torch.testing.assert_close(got, golden(f"r/{key}"), rtol=1e-9, atol=1e-300)


@each_backend
@each_variant
def test_formula(backend, name):
    out, y = case(name, (40,))
    got = run(backend, name, out, y)
    torch.testing.assert_close(got, formula(name, out, y), rtol=1e-12, atol=1e-14)
    assert (got != 0).any()


@each_variant
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [(1,), (300,), (), (2, 3)])
def test_native_is_within_the_error_budget(name, dtype, batch):
    out, y = case(name, batch, dtype=dtype)
    truth = run("reference", name, out.double(), None if y is None else y.to(torch.float64)
                if VARIANTS[name][1] == "values" else y)  # fmt: skip
    got = run("native", name, out, y)
    assert got.dtype == dtype and got.shape == out.shape
    assert_within_budget(got, run("reference", name, out, y), truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps, n, classes", [(1, 1, 1), (7, 9, 5), (8, 300, 11)])
def test_spike_rate_budget(dtype, steps, n, classes):
    g = torch.Generator().manual_seed(steps)
    spikes = torch.randint(0, 2, (steps, n, classes), generator=g).to(dtype)
    y = torch.randint(0, classes, (n,), generator=g)
    both = []
    for backend in BACKENDS:
        with use_backend(backend):
            both.append(rewards.snn_rate(spikes, y))
    truth = torch.zeros(spikes.shape, dtype=torch.float64)
    for i in range(n):
        for k in range(classes):
            s = spikes[:, i, k].double()
            if k == y[i]:
                truth[:, i, k] = 1 - torch.sigmoid(s.sum() - steps // 2)
            else:
                truth[:, i, k] = -s * (1 - torch.sigmoid((1 - s).sum() - steps // 2))
    assert_within_budget(*both, truth)


@each_backend
def test_softmax_is_minus_output_times_loss_gradient(backend):
    """Theorem 1 of arXiv 2308.12053 starts from this reward; no factor 1/N."""
    out, y = case("softmax", (12,))
    out.requires_grad_()
    torch.nn.functional.cross_entropy(out, y, reduction="sum").backward()
    got = run(backend, "softmax", out.detach(), y)
    torch.testing.assert_close(got, -out.detach() * out.grad, rtol=1e-12, atol=1e-14)


@each_backend
def test_large_logits_do_not_overflow(backend):
    for dtype, top in ((torch.float16, 6e4), (torch.float32, 1e38), (torch.float64, 1e308)):
        out = torch.tensor([[top, 0.0, -top], [-top, -top, -top]], dtype=dtype)
        for name in ("softmax", "sigmoid", "bounded_softmax", "correct_classification"):
            got = run(backend, name, out, torch.tensor([0, 1]))
            assert got.isfinite().all(), name
        assert run(backend, "maximize", out, None).isfinite().all()


@each_backend
def test_ties_and_zeros(backend):
    out = torch.tensor([[2.0, 2.0, 1.0], [-1.0, -3.0, -1.0], [0.0, -0.0, -1.0]])
    got = run(backend, "correct_classification", out, torch.tensor([0, 0, 0]))
    assert got.tolist() == [[1, 0, 0], [-1, 0, 0], [0, 0, 0]]
    got = run(backend, "correct_classification", out, torch.tensor([1, 2, 1]))
    assert not got.any()  # only the first of equal logits wins
    got = run(backend, "misclassification", out, torch.tensor([1, 1, 2]))
    assert got.tolist() == [[0, 0, 0], [1, 0, 1], [0, 0, 0]]
    assert not run(backend, "maximize", torch.zeros(2, 3), None).any()


@each_backend
@each_variant
def test_a_nan_logit_gives_a_nan_reward(backend, name):
    out, y = case(name)
    clean = run(backend, name, out, y)
    out[2, 1] = math.nan
    got = run(backend, name, out, y)
    assert got[2, 1].isnan()
    others = torch.arange(6) != 2
    assert torch.equal(got[others], clean[others])


@each_backend
def test_same_bits_twice_and_no_unwritten_element(backend):
    for name in VARIANTS:
        out, y = case(name, (700,), 13, torch.float32)
        first = run(backend, name, out, y)
        with poisoned_empty():
            assert torch.equal(run(backend, name, out, y), first), name
    spikes, y = torch.ones(5, 300, 7), torch.zeros(300, dtype=torch.long)
    with use_backend(backend), poisoned_empty():
        assert not rewards.snn_rate(spikes, y).isnan().any()


# ---- shapes and layouts


@each_backend
@each_variant
def test_non_contiguous_and_empty(backend, name):
    out, y = case(name)
    wide = torch.stack([out, out + 1], -1)[..., 0]
    strided = y if y is None else torch.stack([y, y], -1)[..., 0]
    assert not wide.is_contiguous()
    got = run(backend, name, wide, strided)
    assert torch.equal(got, run(backend, name, out, y)) and got.is_contiguous()
    # expand: stride 0
    got = run(
        backend, name, out[:1].expand(4, 5), None if y is None else y[:1].expand(4, *y.shape[1:])
    )
    assert torch.equal(got[3], run(backend, name, out, y)[0])
    empty, none = case(name, (0,))
    assert run(backend, name, empty, none).shape == (0, 5)


@each_backend
def test_empty_spikes(backend):
    with use_backend(backend):
        for shape in ((0, 3, 2), (4, 0, 2)):
            labels = torch.zeros(shape[1], dtype=torch.long)
            assert rewards.snn_rate(torch.zeros(shape), labels).shape == shape


@each_backend
@pytest.mark.parametrize("kind", [torch.int32, torch.int16, torch.uint8, torch.int8])
def test_any_integer_labels(backend, kind):
    out, y = case("softmax")
    assert torch.equal(run(backend, "softmax", out, y.to(kind)), run(backend, "softmax", out, y))


@each_backend
def test_binary_targets_in_any_form(backend):
    out = torch.randn(6, 1, generator=torch.Generator().manual_seed(1))
    y = torch.tensor([0, 1, 1, 0, 1, 0])
    want = run(backend, "binary_sigmoid", out, y)
    for form in (y.bool(), y.double(), y[:, None], y.to(torch.uint8)):
        assert torch.equal(run(backend, "binary_sigmoid", out, form), want)


def test_no_graph_is_built():
    out, y = case("softmax")
    assert not rewards.softmax(out.requires_grad_(), y).requires_grad


quick = settings(max_examples=30, deadline=None, derandomize=True)


@quick
@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 999))
def test_rows_are_independent(n, classes, seed):
    for name in ("softmax", "correct_classification", "misclassification"):
        g = torch.Generator().manual_seed(seed)
        out = torch.randn(n, classes, generator=g)
        y = torch.randint(0, classes, (n,), generator=g)
        order = torch.randperm(n, generator=g)
        plain = run("native", name, out, y)
        assert torch.equal(run("native", name, out[order], y[order]), plain[order])
        if name == "softmax":  # p sums to 1, so sum r/o = 0
            assert float((plain / out).sum(-1).abs().max()) < 1e-5


# ---- torch machinery


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.operators
def test_opcheck(dtype):
    ops = torch.ops.lfp_kernels
    params = [0.1, 0.6, 1.0, -1.0]
    for name in ("softmax", "bounded_softmax", "regression", "maximize"):
        out, y = case(name, dtype=dtype)
        kind = int(Kind[name.upper()])
        torch.library.opcheck(ops.reward.default, (out, y, kind, params))
    out, y = torch.ones(4, 3, 2, dtype=dtype), torch.zeros(3, dtype=torch.long)
    torch.library.opcheck(ops.reward_spike_rate.default, (out, y))


def test_compiles_without_graph_breaks():
    out, y = case("softmax", dtype=torch.float32)
    compiled = torch.compile(
        lambda o, t: rewards.softmax(o * 2, t) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(out, y), rewards.softmax(out * 2, y) + 1)


@each_backend
def test_an_unchecked_label_out_of_range_makes_its_row_nan(backend):
    """What a GPU or a compiled graph gets, where Python cannot look at the labels."""
    out, _ = case("softmax", (4,))
    bad = torch.tensor([0, 5, -1, 4])
    with use_backend(backend):
        op = select("reward", out)
    got = op.reward(out, bad, Kind.SOFTMAX, [0.0, 1.0, 0.0, -1.0])
    rates = op.spike_rate(out[None], bad)
    for result in (got, rates[0]):
        assert result.isnan().all(-1).tolist() == [False, True, True, False]
        assert not result[[0, 3]].isnan().any()


# ---- losses, for the feedback-alignment family


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_losses_are_minus_their_gradients(dtype):
    out = torch.randn(7, 5, dtype=dtype, requires_grad=True)
    y, t = torch.randint(5, (7,)), torch.randn(7, 5, dtype=dtype)
    for got, loss in (
        (rewards.cross_entropy(out.detach(), y), torch.nn.functional.cross_entropy(out, y)),
        (rewards.mse(out.detach(), t), torch.nn.functional.mse_loss(out, t)),
    ):
        torch.testing.assert_close(got, -torch.autograd.grad(loss, out)[0])
    with pytest.raises(ValueError, match=r"rewards.cross_entropy: y: expected labels in \[0, 5\)"):
        rewards.cross_entropy(out.detach(), y + 5)


# ---- the registry


def test_registry_holds_every_reward():
    assert set(rewards.REGISTRY) == set(rewards.__all__) - {"REGISTRY", "get"}
    for name, function in rewards.REGISTRY.items():
        assert rewards.get(name) is function and function.__doc__


def test_get():
    def mine(out, y):
        return out

    assert rewards.get(mine) is mine and rewards.get(BOUNDED) is BOUNDED
    with pytest.raises(ValueError) as caught:
        rewards.get("softmx")
    assert "softmx" in str(caught.value)
    assert all(name in str(caught.value) for name in rewards.REGISTRY)
    with pytest.raises(TypeError, match="expected a name or a function"):
        rewards.get(3)


def test_codes_are_those_of_the_header():
    header = (Path(__file__).resolve().parents[1] / "csrc" / "rewards.h").read_text()
    for kind in Kind:
        name = "k" + "".join(part.capitalize() for part in kind.name.split("_"))
        assert f"{name} = {kind.value}" in header
