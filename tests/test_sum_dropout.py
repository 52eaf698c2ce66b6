"""Residual sum and dropout: native and reference against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor

from lfp_kernels import functional as F
from lfp_kernels import rules, use_backend
from lfp_kernels.rules import stabilize
from lfp_kernels.testing import assert_conserved, assert_within_budget, poisoned_empty

OPS = torch.ops.lfp_kernels
BACKENDS = ("native", "reference")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def values(shape, dtype=torch.float64, seed=0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


def layouts(x: Tensor) -> list[Tensor]:
    """x, in other places of memory."""
    padded = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)[..., ::2].copy_(x)
    found = [x, padded, x.transpose(0, 1).contiguous().transpose(0, 1)]
    if x.dim() == 4:
        found.append(x.contiguous(memory_format=torch.channels_last))
    return found


def sum_oracle(a: Tensor, b: Tensor, reward: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Autograd of the sum in float64, fed with s, times the operands."""
    a, b, reward = (t.detach().double() for t in (a, b, reward))
    leaves = a.clone().requires_grad_(), b.clone().requires_grad_()
    z = leaves[0] + leaves[1]
    s = reward / stabilize(z.detach(), eps)
    # autograd sums over the copies of a broadcast operand, which is what its reward must be
    ga, gb = torch.autograd.grad(z, leaves, s)
    return a * ga, b * gb


# ---- residual sum


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shapes",
    [
        ((), ()), ((7,), (7,)), ((3, 4, 5, 6), (3, 4, 5, 6)), ((40, 900), (40, 900)),
        ((3, 4, 5), (4, 1)), ((5,), (3, 4, 5)), ((3, 1, 5), (1, 4, 1)), ((), (2, 3)),
        ((0, 3), (0, 3)), ((0, 3), (3,)),
    ],
    ids=str,
)  # fmt: skip
def test_sum(shapes, dtype):
    a, b = values(shapes[0], dtype), values(shapes[1], dtype, 1)
    reward = values(torch.broadcast_shapes(*shapes), dtype, 2)
    # far from cancelling: 1 / eps of one element would drown the errors of all others
    a, b = a.sign() * (a.abs() + 0.5), b.sign() * (b.abs() + 3)
    found = []
    for backend in BACKENDS:
        with use_backend(backend), poisoned_empty():
            found.append(F.sum_redistribute(a, b, reward))
    for got, same, truth, operand in zip(*found, sum_oracle(a, b, reward), (a, b)):
        assert got.shape == operand.shape and got.dtype == dtype
        assert_within_budget(got, same, truth)
    if dtype == torch.float64 and reward.numel():
        for got, truth in zip(found[0], sum_oracle(a, b, reward)):
            torch.testing.assert_close(got, truth, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sum_conserves_up_to_the_stabilizer(backend):
    a, b, reward = (values((4, 3, 5), seed=k) for k in range(3))
    with use_backend(backend):
        ra, rb = F.sum_redistribute(a, b, reward, rules.Epsilon(1e-3))
    z = a + b
    kept = (reward / stabilize(z, 1e-3) * (stabilize(z, 1e-3) - z)).sum()
    assert_conserved(reward, torch.stack([ra, rb]), kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sum_options_and_special_values(backend):
    a = torch.tensor([1.0, -1.0, 0.0, math.inf, math.nan, 2.0], dtype=torch.float64)
    b = torch.tensor([-1.0, -1.0, -0.0, 1.0, 1.0, 2.0], dtype=torch.float64)
    reward = torch.full_like(a, 3)
    with use_backend(backend):
        ra, rb = F.sum_redistribute(a, b, reward, rules.Epsilon(0.25))
        signal = F.sum_redistribute(a, b, reward, signal_in=True)
        plain = F.sum_redistribute(a, b, reward, rules.Gradient())
    want = [12.0, 3 / 2.25, 0.0, math.nan, math.nan, 6 / 4.25]
    expected = torch.tensor(want, dtype=torch.float64)
    torch.testing.assert_close(ra, expected, equal_nan=True)
    want = [-12.0, 3 / 2.25, -0.0, 0.0, math.nan, 6 / 4.25]
    expected = torch.tensor(want, dtype=torch.float64)
    torch.testing.assert_close(rb, expected, equal_nan=True)
    torch.testing.assert_close(signal, (3 * a, 3 * b), equal_nan=True)
    assert torch.equal(plain[0], reward) and torch.equal(plain[1], reward)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 5), (2, 3, 4, 5)], ids=str)
def test_sum_layouts(backend, shape):
    a, b, reward = (values(shape, seed=k) for k in range(3))
    want = F.sum_redistribute(a, b, reward)
    with use_backend(backend):
        for first in layouts(a):
            for second in layouts(b):
                for r in layouts(reward):
                    for got, truth in zip(F.sum_redistribute(first, second, r), want):
                        assert torch.equal(got, truth)
        last = [t.to(memory_format=torch.channels_last) for t in (a, b, reward) if t.dim() == 4]
        for got in F.sum_redistribute(*last) if last else ():
            assert got.is_contiguous(memory_format=torch.channels_last)
        first = F.sum_redistribute(a[:1].expand(shape), b, reward)
        for got, truth in zip(first, F.sum_redistribute(a[:1].expand(shape).clone(), b, reward)):
            assert torch.equal(got, truth)


# ---- dropout


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.25, 0.5, 1.0])
def test_dropout_is_that_of_torch(backend, dtype, p):
    x = values((64, 33), dtype)
    torch.manual_seed(3)
    want = TF.dropout(x, p, training=True)
    torch.manual_seed(3)
    with use_backend(backend), poisoned_empty():
        out, mask = F.dropout(x, p)
    assert mask.dtype == torch.bool and mask.shape == x.shape
    tol = {"rtol": torch.finfo(dtype).eps, "atol": 0}  # torch multiplies by the rounded factor
    torch.testing.assert_close(out, want, **tol)
    assert torch.equal(mask, want != 0)
    again, other = (F.dropout(x, p, generator=torch.Generator().manual_seed(k)) for k in (5, 6))
    twin = F.dropout(x, p, generator=torch.Generator().manual_seed(5))
    assert torch.equal(again[0], twin[0]) and torch.equal(again[1], twin[1])
    assert torch.equal(again[1], other[1]) == (p in (0.0, 1.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("conserving", [False, True])
@pytest.mark.parametrize("shape", [(), (0, 3), (31,), (2, 3, 4, 5), (70, 600)], ids=str)
def test_dropout_redistribute(dtype, conserving, shape):
    reward, p = values(shape, dtype), 0.3
    mask = values(shape, seed=1) > 0.5
    truth = reward.double() * mask * (1.0 if conserving else 1 / (1 - p))
    found = []
    for backend in BACKENDS:
        with use_backend(backend), poisoned_empty():
            found.append(F.dropout_redistribute(reward, mask, p, conserving=conserving))
    assert_within_budget(found[0], found[1], truth)
    assert not conserving or torch.equal(found[0], reward * mask)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("conserving", [False, True])
def test_what_the_mask_drops_is_zero_and_nothing_else(backend, conserving):
    reward = torch.tensor([math.nan, math.inf, 1.0, math.nan, math.inf, 1.0])
    mask = torch.tensor([True, True, True, False, False, False])
    with use_backend(backend):
        got = F.dropout_redistribute(reward, mask, 0.5, conserving=conserving)
        all_dropped = F.dropout_redistribute(reward, torch.zeros_like(mask), 1.0)
    factor = 1.0 if conserving else 2.0
    want = torch.tensor([math.nan, math.inf, factor, 0.0, 0.0, 0.0])
    torch.testing.assert_close(got, want, equal_nan=True)
    assert not all_dropped.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_layouts(backend):
    reward = values((2, 3, 4, 6))
    mask = values((2, 3, 4, 6), seed=1) > 0
    want = F.dropout_redistribute(reward, mask, 0.5)
    with use_backend(backend):
        for r in layouts(reward):
            for m in layouts(mask):
                assert torch.equal(F.dropout_redistribute(r, m, 0.5), want)
        last = reward.to(memory_format=torch.channels_last)
        out, kept = F.dropout(last, 0.5)
        assert F.dropout_redistribute(last, kept, 0.5).stride() == last.stride() == out.stride()


# ---- torch machinery, errors


def test_reruns_have_the_same_bits():
    a, b, reward = (values((300, 411), torch.float32, k) for k in range(3))
    first, second = (F.sum_redistribute(a, b, reward) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.operators
def test_opcheck():
    a, b, r = (values((2, 3, 4, 5), torch.float32, k) for k in range(3))
    tail = 0, [1e-6, 1.0, 0.0, 0.0, 0.0], 0
    torch.library.opcheck(OPS.sum_redistribute.default, (a, b, r, *tail))
    torch.library.opcheck(OPS.dropout_redistribute.default, (r, a > 0, 2.0))
    quick = ("test_schema", "test_faketensor")
    for x in layouts(r):
        torch.library.opcheck(OPS.sum_redistribute.default, (a, b, x, *tail), test_utils=quick)
        torch.library.opcheck(OPS.dropout_redistribute.default, (x, a > 0, 2.0), test_utils=quick)


def test_compiles_without_graph_breaks_and_builds_no_graph():
    a, b, r = (values((4, 5), torch.float32, k).requires_grad_() for k in range(3))

    def layer(a, b, r):
        first, second = F.sum_redistribute(a, b, r * 2)
        return F.dropout_redistribute(first, a > 0, 0.5) + second

    plain = layer(a, b, r)
    assert not plain.requires_grad
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a.detach(), b.detach(), r.detach()), plain)


def test_errors_name_the_argument():
    a, mask = values((3, 4)), values((3, 4)) > 0

    def refused(error, match, call):
        with pytest.raises(error, match=match):
            call()

    refused(
        TypeError, "sum_redistribute: reward: .*int64", lambda: F.sum_redistribute(a, a, a.long())
    )
    refused(
        TypeError, "sum_redistribute: b: expected torch.float64",
        lambda: F.sum_redistribute(a, a.float(), a),
    )  # fmt: skip
    refused(
        ValueError, r"sum_redistribute: b: .*broadcasts.*\(3, 4\), got \(3,\)",
        lambda: F.sum_redistribute(a, a[:, 0], a),
    )  # fmt: skip
    refused(
        ValueError, r"sum_redistribute: reward: expected shape \(3, 4\), got \(4,\)",
        lambda: F.sum_redistribute(a, a[0], a[0]),
    )  # fmt: skip
    refused(
        TypeError, "sum_redistribute: rule: expected one of",
        lambda: F.sum_redistribute(a, a, a, 1e-6),
    )  # fmt: skip
    refused(TypeError, "dropout: x: .*bool", lambda: F.dropout(mask, 0.5))
    for p in (-0.1, 1.1, math.nan):
        refused(ValueError, "dropout: p: expected a probability", lambda p=p: F.dropout(a, p))
    refused(TypeError, "dropout: p: expected a number", lambda: F.dropout(a, None))
    refused(
        TypeError, "dropout_redistribute: mask: expected torch.bool, got torch.float64",
        lambda: F.dropout_redistribute(a, a, 0.5),
    )  # fmt: skip
    refused(
        ValueError, r"dropout_redistribute: mask: expected shape \(3, 4\)",
        lambda: F.dropout_redistribute(a, mask[0], 0.5),
    )  # fmt: skip
