"""Embeddings: the feedback of a table, and one optimizer step of the rows in use."""

from __future__ import annotations

import pytest
import torch
from optim_cases import DTYPES, SPECS, each_spec, plan

from lfp_kernels import composites, optim, use_backend
from lfp_kernels import functional as F
from lfp_kernels.testing import assert_within_budget, poisoned_empty

EPS = 1e-2
BACKENDS = ("native", "reference")


def case(rows, width, shape, dtype, seed=0):
    """(weight, tokens, reward); small weights beside large ones, and both zeros."""
    g = torch.Generator().manual_seed(seed + rows + width)
    weight = torch.randn(rows, width, generator=g, dtype=torch.float64)
    weight[:, ::3] *= EPS
    if weight.numel():
        weight.view(-1)[:2] = torch.tensor([0.0, -0.0])[: weight.numel()]
    tokens = torch.randint(0, max(rows, 1), shape, generator=g)
    reward = torch.randn(*shape, width, generator=g, dtype=torch.float64)
    return weight.to(dtype), tokens, reward.to(dtype)


def oracle(weight, tokens, reward, padding=None):
    """Use by use, in float64."""
    weight, reward = weight.double(), reward.double()
    total = torch.zeros_like(weight)
    each = reward.reshape(tokens.numel(), weight.shape[1])
    for token, r in zip(tokens.flatten().tolist(), each):
        if token != padding:
            w = weight[token]
            total[token] += w.abs() * r / torch.where(w < 0, w - EPS, w + EPS)
    return total


# rows, width, shape of the tokens: one use and many; widths that fill 16 bytes and do not; more
# rows than one digit of the sort holds.
CASES = {
    "one": (1, 1, (1,)),
    "ragged": (5, 7, (3, 4)),
    "often": (3, 8, (700,)),
    "one row": (4, 3, (4400,)),
    "wide": (9, 264, (40,)),
    "rare": (5000, 16, (2, 9)),
    "no tokens": (4, 8, (0,)),
    "no tokens, shaped": (4, 8, (2, 0)),
    "no width": (4, 0, (3,)),
    "scalar": (6, 5, ()),
}


def close_to(found, reference, truth, dtype, name):
    if dtype == torch.float64:
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
    else:
        assert_within_budget(found, reference, truth, name)


def tokens_of(name, tokens):
    return torch.full_like(tokens, 2) if name == "one row" else tokens


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_feedback(name, dtype):
    weight, tokens, reward = case(*CASES[name], dtype)
    tokens = tokens_of(name, tokens)
    for padding in (None, int(tokens.flatten()[-1]) if tokens.numel() else 0):
        found = {}
        for backend in BACKENDS:
            with use_backend(backend), poisoned_empty():
                found[backend] = F.embedding_redistribute(
                    weight, tokens, reward, padding=padding, eps=EPS
                )
        truth = oracle(weight, tokens, reward, padding)
        for backend in BACKENDS:
            assert found[backend].shape == weight.shape
            close_to(found[backend], found["reference"], truth, dtype, backend)
        again = F.embedding_redistribute(weight, tokens, reward, padding=padding, eps=EPS)
        assert torch.equal(again, found["native"])
        used = torch.zeros(len(weight), dtype=torch.bool)
        used[tokens.flatten()] = True
        if padding is not None:
            used[padding] = False
        assert not found["native"][~used].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_spec
def test_update(spec, dtype):
    """Rows in use move as a table of these rows alone; the others stand still, to the bit."""
    for name in ("ragged", "often", "rare", "wide", "no tokens", "no width"):
        weight, tokens, reward = case(*CASES[name], dtype)
        found = {}
        for backend in (*BACKENDS, "truth"):
            kind = torch.float64 if backend == "truth" else dtype
            table = weight.to(kind, copy=True)
            (update,) = plan(spec, [table])
            for k, state in enumerate(update.states):
                state.copy_(torch.rand(state.shape, generator=torch.Generator().manual_seed(k)))
            before = [t.clone() for t in (table, *update.states)]
            if backend == "truth":
                rows = tokens.unique()
                feedback = oracle(table, tokens, reward)[rows]
                part = update._replace(states=[s[rows] for s in update.states])
                moved = table[rows]
                with use_backend("reference"):
                    F.optimizer_update([moved], [feedback], [part])
                table[rows] = moved
                for state, changed in zip(update.states, part.states):
                    state[rows] = changed
            else:
                with use_backend(backend):
                    F.embedding_redistribute_update(table, tokens, reward.to(kind), update, eps=EPS)
            found[backend] = [table, *update.states]
            used = torch.zeros(len(weight), dtype=torch.bool)
            used[tokens.flatten()] = True
            for t, old in zip(found[backend], before):
                assert torch.equal(t[~used], old[~used]), name
                assert not t.numel() or torch.equal(t, old) == (not used.any())
        for tensors in zip(*(found[k] for k in ("native", "reference", "truth"))):
            close_to(*tensors, dtype, name)


@each_spec
def test_update_takes_the_padding_row_out_and_has_the_same_bits_twice(spec):
    weight, tokens, reward = case(*CASES["often"], torch.float32)
    found = []
    for _ in range(2):
        table = weight.clone()
        (update,) = plan(spec, [table])
        F.embedding_redistribute_update(table, tokens, reward, update, padding=-2, eps=EPS)
        found.append([table, *update.states])
        assert torch.equal(table[1], weight[1]) and not torch.equal(table[0], weight[0])
        assert all(not s[1].any() for s in update.states)
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.host
def test_same_bits_for_any_number_of_threads():
    threads, found = torch.get_num_threads(), []
    weight, tokens, reward = case(40, 64, (5000,), torch.float32)
    tokens[::3] = 7
    try:
        for count in (threads, 1, 3):
            torch.set_num_threads(count)
            found.append(F.embedding_redistribute(weight, tokens, reward, eps=EPS))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(f, found[0]) for f in found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_contiguous(backend):
    weight, tokens, reward = case(6, 8, (5, 4), torch.float64)
    truth = oracle(weight, tokens, reward)
    wide = torch.zeros(6, 16, dtype=torch.float64)
    placed = [weight.t().contiguous().t(), wide[:, ::2]]
    with use_backend(backend):
        for view in placed:
            view.copy_(weight)
            for t, r in (
                (tokens.t().contiguous().t(), reward.transpose(0, 2).contiguous().transpose(0, 2)),
                (tokens.int(), reward.repeat_interleave(2, 1)[:, ::2]),
            ):
                found = F.embedding_redistribute(view, t, r, eps=EPS)
                torch.testing.assert_close(found, truth)
            (update,) = plan(optim.SGD(0.5), [view])
            F.embedding_redistribute_update(view, tokens, reward, update, eps=EPS)
            torch.testing.assert_close(view, weight + 0.5 * truth)
    assert not wide[:, 1::2].any()


@pytest.mark.parametrize("bad", [-1, 6, 2**40, -(2**40)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_token_out_of_range_changes_nothing(backend, bad):
    weight, tokens, reward = case(6, 8, (5, 4), torch.float32)
    tokens[3, 1] = bad
    (update,) = plan(SPECS["adamw"], [weight])
    before = weight.clone()
    call = (weight, tokens, reward)
    with use_backend(backend):
        with pytest.raises(IndexError, match=rf"tokens: expected .*\[0, 6\), got {bad}"):
            F.embedding_redistribute(*call)
        with pytest.raises(IndexError, match=rf"tokens: expected .*\[0, 6\), got {bad}"):
            F.embedding_redistribute_update(*call, update)
    assert torch.equal(weight, before) and not any(s.any() for s in update.states)


@pytest.mark.host
def test_operator_checks_tokens_itself():
    weight, tokens, reward = case(6, 8, (20,), torch.float32)
    tokens[-1] = 6
    before = weight.clone()
    ops = torch.ops.lfp_kernels
    with pytest.raises(RuntimeError, match=r"\[0, 6\), got 6"):
        ops.embedding_redistribute(weight, tokens, reward, -1, EPS)
    with pytest.raises(RuntimeError, match=r"\[0, 6\), got 6"):
        ops.embedding_redistribute_update(
            weight, tokens, reward, [], -1, EPS, 0, plan(optim.SGD(0.1), [weight])[0].hyper
        )
    assert torch.equal(weight, before)


ERRORS = {
    "weight": (TypeError, lambda w, t, r: (w.long(), t, r), {}),
    "weight: expected shape": (ValueError, lambda w, t, r: (w[0], t, r), {}),
    "tokens: expected int64": (TypeError, lambda w, t, r: (w, t.float(), r), {}),
    "tokens: expected device": (ValueError, lambda w, t, r: (w, t.to("meta"), r), {}),
    "reward: expected shape": (ValueError, lambda w, t, r: (w, t, r[:, :3]), {}),
    "reward: expected torch.float64": (TypeError, lambda w, t, r: (w, t, r.float()), {}),
    "padding: expected": (ValueError, lambda w, t, r: (w, t, r), {"padding": 6}),
}


@pytest.mark.parametrize("text", ERRORS)
def test_errors(text):
    kind, change, options = ERRORS[text]
    arguments = change(*case(6, 8, (5,), torch.float64))
    with pytest.raises(kind, match=f"embedding_redistribute: {text}"):
        F.embedding_redistribute(*arguments, **options)


def test_update_must_fit():
    weight, tokens, reward = case(6, 8, (5,), torch.float64)
    (update,) = plan(SPECS["adamw"], [torch.zeros(6, 7, dtype=torch.float64)])
    with pytest.raises(ValueError, match=r"update.states\[0\]"):
        F.embedding_redistribute_update(weight, tokens, reward, update)


@pytest.mark.operators
def test_opcheck():
    weight, tokens, reward = case(6, 8, (5,), torch.float32)
    ops = torch.ops.lfp_kernels
    torch.library.opcheck(ops.embedding_redistribute, (weight, tokens, reward, -1, EPS))
    (update,) = plan(SPECS["adamw"], [weight])
    call = (weight, tokens, reward, update.states, 2, EPS, update.code, update.hyper)
    torch.library.opcheck(ops.embedding_redistribute_update, call)


@pytest.mark.parametrize("padding", [None, 3])
def test_module(padding):
    """nn.Embedding under a composite; sparse or not."""
    import lfp_kernels

    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        table = torch.nn.Embedding(7, 5, padding_idx=padding, sparse=sparse).double()
        tokens, reward = torch.tensor([[1, 3, 3], [6, 1, 0]]), torch.randn(2, 3, 5).double()
        with composites.Transformer(eps=EPS).context(table):
            lfp_kernels.backward(table(tokens), reward)
        grad = table.weight.grad
        found.append(-(grad.to_dense() if sparse else grad))
        torch.testing.assert_close(found[-1], oracle(table.weight.data, tokens, reward, padding))
