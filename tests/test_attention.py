"""Attention and relevance through it: backends against the formulas and the float64 oracle."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as TF

from lfp_kernels import functional as F
from lfp_kernels import use_backend
from lfp_kernels.testing import assert_within_budget, poisoned_empty

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("reference", "native")
MODES = ("plain", "attnlrp")
EPS = 1e-6


@dataclass
class Case:
    """Batch, heads of queries and of keys, queries, keys, widths, mask, causal, dropout."""

    sizes: tuple[int, int, int, int, int, int, int]
    mask: str = ""
    causal: bool = False
    dropout: float = 0.0

    @property
    def name(self) -> str:
        words = ["x".join(map(str, self.sizes)), self.mask, "causal" * self.causal]
        return "-".join(w for w in (*words, f"drop{self.dropout}" * (self.dropout > 0)) if w)

    @property
    def options(self):
        return {"causal": self.causal, "dropout": self.dropout, "seed": 11}

    def tensors(self, dtype):
        """q, k, v, reward, mask. Values around 1: outputs stay away from the stabilizer."""
        b, h, kv, queries, keys, e, f = self.sizes
        g = torch.Generator().manual_seed(sum(self.sizes))

        def draw(*shape, around=0.0):
            return (around + torch.randn(shape, generator=g)).to(dtype)

        q, k = draw(b, h, queries, e), draw(b, kv, keys, e)
        v, reward = 0.5 * draw(b, kv, keys, f, around=2.0), draw(b, h, queries, f)
        masks = {
            "": None,
            "added": draw(b, 1, queries, keys),
            "row": torch.rand(keys, generator=g) > 0.2,
            "bool": torch.rand(b, h, queries, keys, generator=g) > 0.3,
        }
        mask = masks[self.mask]
        if self.mask == "bool" and queries > 1:
            mask[:, :, 1] = False  # a query without a key
        return q, k, v, reward, mask


CASES = (
    Case((1, 1, 1, 1, 1, 1, 1)),
    Case((2, 3, 3, 19, 21, 8, 5)),
    Case((2, 4, 2, 19, 21, 8, 5), "bool"),
    Case((1, 4, 1, 33, 40, 16, 16), "added", causal=True),
    Case((2, 2, 2, 65, 129, 24, 40), "row", dropout=0.3),
    Case((1, 2, 2, 127, 127, 64, 64), causal=True),
    Case((1, 2, 1, 70, 30, 33, 17), causal=True, dropout=0.5),
    Case((1, 1, 1, 300, 200, 20, 12), causal=True),
    Case((2, 2, 1, 0, 5, 4, 4)),
    Case((1, 2, 1, 5, 0, 4, 4)),
    Case((0, 2, 1, 5, 3, 4, 4)),
)
ids = [c.name for c in CASES]


def both(case, given, mode, eps=EPS):
    """(out, lse, rewards of q, k, v)."""
    q, k, v, reward, mask = given
    out, lse = F.attention(q, k, v, mask, **case.options)
    found = F.attention_redistribute(
        q, k, v, out, reward, mask, lse=lse, mode=mode, eps=eps, **case.options
    )
    return out, lse, *found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_against_the_oracle(case, dtype, mode):
    given = case.tensors(dtype)
    wide = [t if t is None or t.dtype == torch.bool else t.double() for t in given]
    with use_backend("reference"):
        truth, same = both(case, wide, mode), both(case, given, mode)
    with use_backend("native"), poisoned_empty():
        found = both(case, given, mode)
    for name, *results in zip(("out", "lse", "q", "k", "v"), found, same, truth):
        if dtype == torch.float64:  # the oracle is no closer to the truth
            torch.testing.assert_close(results[0], results[2], rtol=1e-10, atol=1e-12)
        else:
            assert_within_budget(*results, name)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["", "bool", "added", "row"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_the_formulas(backend, kind, causal):
    eps, case = 1e-10, Case((2, 3, 3, 19, 21, 8, 5), kind, causal)
    q, k, v, r, mask = case.tensors(torch.float64)
    logits = q @ k.transpose(-1, -2) / math.sqrt(8)
    hidden = torch.ones(19, 21).triu(1).bool() if causal else torch.zeros(19, 21).bool()
    if kind in ("bool", "row"):
        hidden = hidden | ~mask
    shown = logits + (mask if kind == "added" else 0)
    p = shown.masked_fill(hidden, -math.inf).softmax(-1).nan_to_num(0.0)

    def stab(z):
        return z + torch.where(z < 0, -eps, eps)

    out = p @ v
    s = r / (2 * stab(out))
    of_p = p * (s @ v.transpose(-1, -2))
    of_z = (logits * (of_p - p * of_p.sum(-1, keepdim=True))).masked_fill(hidden, 0.0)
    sz = of_z / (2 * stab(logits)) / math.sqrt(8)
    expected = (q * (sz @ k), k * (sz.transpose(-1, -2) @ q), v * (p.transpose(-1, -2) @ s))
    with use_backend(backend):
        o, _, *found = both(case, (q, k, v, r, mask), "attnlrp", eps)
        alone = F.attention_redistribute(q, k, v, o, r, mask, causal=causal, eps=eps)
    torch.testing.assert_close(o, out)
    for a, b, c in zip(found, expected, alone):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(c, a)  # lse is computed again where it is not given
    # the values take half of what the outputs got; what the logits explain is halved by q and k
    seen = (~hidden).any(-1, keepdim=True).expand(out.shape)
    torch.testing.assert_close(found[2].sum(), r[seen].sum() / 2, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0].sum() + found[1].sum(), of_z.sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [c for c in CASES if not c.dropout and c.sizes[4]], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_plain_is_the_gradient(backend, case):
    q, k, v, r, mask = case.tensors(torch.float64)
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.expand(*q.shape[:3], k.shape[2]).clone()
        mask[..., 0] = True  # torch's own output of a query without a key is NaN or 0
    options = {"enable_gqa": True, "is_causal": case.causal and mask is None}
    full = mask
    if case.causal and mask is not None:  # torch takes one of them
        full = mask.masked_fill(torch.ones(q.shape[2], k.shape[2]).triu(1).bool(), -math.inf)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    expected = TF.scaled_dot_product_attention(*leaves, attn_mask=full, **options)
    with use_backend(backend):
        out, _, *found = both(case, (q, k, v, r, mask), "plain")
    torch.testing.assert_close(out, expected.detach())
    if out.numel():
        for a, b in zip(found, torch.autograd.grad(expected, leaves, r)):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_masks_of_the_least_number(backend, dtype):
    """Hugging Face's eager masks add finfo.min; a query of padding sees nothing else."""
    q, k, v, r, _ = Case((1, 2, 2, 6, 7, 8, 4)).tensors(dtype)
    mask = torch.zeros(6, 7, dtype=dtype)
    mask[1], mask[3:, 2:5] = torch.finfo(dtype).min, torch.finfo(dtype).min
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    expected = TF.scaled_dot_product_attention(*leaves, attn_mask=mask)
    with use_backend(backend):
        out, lse = F.attention(q, k, v, mask)
    torch.testing.assert_close(out[:, :, [0, *range(2, 6)]], expected[:, :, [0, *range(2, 6)]])
    # the one difference: among hidden keys the logits still tell, where finfo.min swallows them
    p = (q[:, :, 1:2] @ k.mT / math.sqrt(8)).softmax(-1)
    torch.testing.assert_close(out[:, :, 1:2], p @ v, rtol=2e-3, atol=2e-3)
    r = r.clone()
    r[:, :, 1] = 0
    with use_backend(backend):
        found = F.attention_redistribute(q, k, v, out, r, mask, lse=lse, mode="plain")
    for a, b in zip(found, torch.autograd.grad(expected, leaves, r)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_and_layout(backend):
    """Heads as a projection leaves them, a transposed last dimension, rewards of any strides."""
    qkv = torch.randn(2, 9, 3, 2, 6, dtype=torch.float64) + 1
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    r = torch.randn(6, 9, 2, 2, dtype=torch.float64).permute(3, 2, 1, 0)
    case = Case((2, 2, 2, 9, 9, 6, 6), causal=True)
    with use_backend(backend):
        found = both(case, (q, k, v, r, None), "attnlrp")
        plain = [t.contiguous() for t in (q, k, v, r)]
        odd = [t.mT.contiguous().mT for t in (q, k, v, r)]
        for given in (plain, odd):
            for a, b in zip(found, both(case, (*given, None), "attnlrp")):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for t in (found[0], *found[2:]):
        assert t.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (2,), (2, 3, 4)], ids=str)
def test_any_number_of_leading_dimensions(backend, shape):
    q, k, v, r = (torch.randn(*shape, 5, 4, dtype=torch.float64) for _ in range(4))
    mask = torch.randn(5, 5, dtype=torch.float64)
    expected = TF.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    with use_backend(backend):
        out, lse = F.attention(q, k, v, mask)
        found = F.attention_redistribute(q, k, v, out, r, mask, lse=lse)
    torch.testing.assert_close(out, expected)
    assert lse.shape == (*shape, 5)
    assert [t.shape for t in found] == [t.shape for t in (q, k, v)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout(backend):
    q, k, v, r = (torch.randn(1, 2, 40, 8) for _ in range(4))
    with use_backend(backend):
        first, other = (F.attention(q, k, v, dropout=0.5, seed=s).out for s in (7, 8))
        again = F.attention(q, k, v, dropout=0.5, seed=7).out
        found = F.attention_redistribute(q, k, v, first, r, dropout=0.5, seed=7, eps=1e-9)
        eye = torch.eye(40).expand(1, 2, 40, 40)
        kept = F.attention(torch.zeros(1, 2, 40, 1), torch.zeros(1, 2, 40, 1), eye, dropout=0.25)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.testing.assert_close(found[2].sum(), r.sum() / 2, rtol=1e-4, atol=1e-4)
    survivors = kept.out * 40 * 0.75
    torch.testing.assert_close(survivors, survivors.round())  # 0 or 1
    assert 0.7 < float(survivors.mean()) < 0.8


def test_backends_agree_on_dropout():
    q, k, v = (torch.randn(2, 2, 33, 8, dtype=torch.float64) for _ in range(3))
    found = []
    for backend in BACKENDS:
        with use_backend(backend):
            found.append(F.attention(q, k, v, dropout=0.4, seed=2**40 + 3, causal=True).out)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_the_same_bits_twice(backend, mode):
    case = Case((1, 2, 1, 200, 200, 16, 16), causal=True)
    given = case.tensors(torch.float32)
    with use_backend(backend):
        assert all(map(torch.equal, both(case, given, mode), both(case, given, mode)))


@pytest.mark.host
@pytest.mark.parametrize("sizes", [(1, 2, 1, 600, 600, 16, 16), (3, 8, 8, 70, 70, 8, 8)], ids=str)
def test_bits_do_not_depend_on_threads(sizes):
    case = Case(sizes, causal=True)
    given, threads = case.tensors(torch.float32), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(both(case, given, "attnlrp"))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_a_number_stays(backend):
    case = Case((1, 2, 2, 9, 9, 4, 4))
    given = case.tensors(torch.float32)
    given[1][0, 0, 3] = math.nan
    with use_backend(backend):
        out, lse, of_q, *_ = both(case, given, "plain")
    for t in (out, lse, of_q):
        assert t[0, 0].isnan().all() and t[0, 1].isfinite().all()


@pytest.mark.host
@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_is_linear(backend):
    """Nothing of the size [queries, keys] lives: 8 times the length, 8 times the memory."""

    def highest(length):
        q, k, v, r = (torch.randn(1, 8, length, 16) for _ in range(4))
        with use_backend(backend), torch.profiler.profile(profile_memory=True) as profile:
            out, lse = F.attention(q, k, v, causal=True)
            F.attention_redistribute(q, k, v, out, r, lse=lse, causal=True)
        level = top = 0
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        for event in sorted(events, key=lambda e: e.start_ns()):
            level += event.nbytes()
            top = max(top, level)
        return top

    assert highest(4096) < 10 * highest(512)


@pytest.mark.host
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(dtype):
    q, k, v, r, mask = Case((2, 4, 2, 7, 9, 8, 5), "bool").tensors(dtype)
    ops, options = torch.ops.lfp_kernels, (True, 0.3, 0.25, 3)
    torch.library.opcheck(ops.attention_forward, (q, k, v, mask, *options))
    out, lse = ops.attention_forward(q, k, v, mask, *options)
    call = (q, k, v, out, lse, r, mask, *options, True, EPS)
    torch.library.opcheck(ops.attention_redistribute, call)


def test_errors():
    q, k, v = torch.ones(2, 4, 5, 8), torch.ones(2, 2, 6, 8), torch.ones(2, 2, 6, 3)
    out = torch.ones(2, 4, 5, 3)
    with pytest.raises(ValueError, match=r"k: expected shape \(\*\(2,\), K, S, 8\) like q, got"):
        F.attention(q, k[..., :7], v)
    with pytest.raises(ValueError, match="k: expected a number of heads that divides the 4 of q"):
        F.attention(q, k[:, [0, 1, 1]], v[:, [0, 1, 1]])
    with pytest.raises(ValueError, match=r"v: expected \(2, 2, 6\) in front, got \(2, 2, 5, 3\)"):
        F.attention(q, k, v[:, :, :5])
    with pytest.raises(ValueError, match=r"mask: expected a shape that broadcasts to \(2, 4, 5, 6"):
        F.attention(q, k, v, torch.ones(5, 7).bool())
    with pytest.raises(TypeError, match="mask: expected"):
        F.attention(q, k, v, torch.ones(5, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"dropout: expected a rate in \[0, 1\), got 1"):
        F.attention(q, k, v, dropout=1)
    with pytest.raises(ValueError, match="mode: expected 'attnlrp' or 'plain', got 'lrp'"):
        F.attention_redistribute(q, k, v, out, out, mode="lrp")
    with pytest.raises(ValueError, match="reward: expected shape"):
        F.attention_redistribute(q, k, v, out, out[:1])
