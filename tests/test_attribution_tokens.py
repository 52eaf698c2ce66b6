"""attribute() of tokens, models that return objects, and the page of coloured text."""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as TF
from torch import nn

import lfp_kernels as lfp
from lfp_kernels import composites as C
from lfp_kernels.attribution import tokens_html

EPS = 1e-12
TOKENS = torch.tensor([[1, 5, 5, 9, 0, 3], [2, 4, 6, 8, 10, 12]])


class GPT(nn.Module):
    """One block; positions are looked up before the tokens are."""

    def __init__(self, sparse=False):
        super().__init__()
        torch.manual_seed(0)
        self.positions = nn.Embedding(10, 8)
        self.tokens = nn.Embedding(20, 8, sparse=sparse)
        self.norm = nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.head = nn.Linear(8, 20)

    def forward(self, tokens, inputs=None, as_object=False):
        at = torch.arange(tokens.shape[1])[None].expand(tokens.shape)
        x = (self.tokens(tokens) if inputs is None else inputs) + self.positions(at)
        q, k, v = (
            t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1)
        )
        y = TF.scaled_dot_product_attention(q, k, v, is_causal=True)
        logits = self.head(x + self.out(y.transpose(1, 2).flatten(-2)))
        return types.SimpleNamespace(logits=logits) if as_object else logits[:, -1]


def gpt(**options):
    return GPT(**options).double().eval()


@pytest.mark.parametrize("mode", ["attnlrp", "plain"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_tokens_are_the_embedding_summed(dtype, mode):
    model, composite = gpt(), C.Transformer(mode, EPS)
    got = lfp.attribute(model, TOKENS.to(dtype), torch.tensor([3, 7]), composite)
    inputs = model.tokens(TOKENS).detach().requires_grad_()
    with composite.context(model):
        out = model(TOKENS, inputs)
    start = TF.one_hot(torch.tensor([3, 7]), 20) * out.detach()
    (want,) = torch.autograd.grad(out, inputs, start)
    assert got.input.shape == TOKENS.shape
    torch.testing.assert_close(got.input, want.sum(-1))
    assert torch.equal(got.output, out.detach()) and torch.equal(got.start, start)


@pytest.mark.parametrize("sparse", [False, True])
def test_with_weights_and_layers(sparse):
    """The rows of the table carry the tokens' relevance; asking for more changes nothing."""
    model, composite = gpt(sparse=sparse), C.Transformer(eps=EPS)
    plain = lfp.attribute(model, TOKENS, 3, composite)
    got = lfp.attribute(model, TOKENS, 3, composite, weights=True, layers=["tokens", "positions"])
    torch.testing.assert_close(got.input, plain.input)
    torch.testing.assert_close(got.layers["tokens"].sum(-1), got.input)
    rows = torch.zeros(20, dtype=torch.float64).index_add(0, TOKENS.flatten(), got.input.flatten())
    torch.testing.assert_close(got.weights["tokens.weight"].sum(1), rows)
    frozen = lfp.attribute(model, TOKENS, 3, composite, layers=["tokens", "positions"])
    for name in ("tokens", "positions"):
        torch.testing.assert_close(frozen.layers[name], got.layers[name])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_tokens_equal_to_the_positions():
    """The first embedding given these numbers counts, and it alone."""
    tokens = torch.arange(6)[None]
    model = gpt()
    found = lfp.attribute(model, tokens, 3, C.Transformer(eps=EPS), layers=["tokens"])
    torch.testing.assert_close(found.input, found.layers["tokens"].sum(-1))


def test_call_chooses_the_output():
    model = gpt()
    want = lfp.attribute(model, TOKENS, 3)
    got = lfp.attribute(
        model, TOKENS, 3, call=lambda m, x: m(tokens=x, as_object=True).logits[:, -1]
    )
    assert torch.equal(got.input, want.input)
    every = lfp.attribute(model, TOKENS, call=lambda m, x: m(x, as_object=True).logits)
    assert every.output.shape == (2, 6, 20) and every.input.shape == (2, 6)
    linear, x = nn.Linear(4, 3), torch.randn(2, 4)
    got = lfp.attribute(linear, x, 1, call=lambda m, x: {"out": m(x)}["out"])
    assert torch.equal(got.input, lfp.attribute(linear, x, 1).input)


def test_later_tokens_have_no_relevance():
    found = lfp.attribute(gpt(), TOKENS, call=lambda m, x: m(x, as_object=True).logits[:, 2])
    assert (found.input[:, 3:] == 0).all() and (found.input[:, :3] != 0).all()


ERRORS = {
    "no embedding": (
        lambda: lfp.attribute(nn.Linear(3, 2), TOKENS),
        TypeError,
        "tokens need a model with an nn.Embedding",
    ),
    "bool": (lambda: lfp.attribute(gpt(), TOKENS > 2), TypeError, "x: expected .*got torch.bool"),
    "changed tokens": (
        lambda: lfp.attribute(gpt(), TOKENS, call=lambda m, x: m(x.flip(1))),
        ValueError,
        r"no nn.Embedding of the model was given these tokens \(2, 6\)",
    ),
    "object": (
        lambda: lfp.attribute(gpt(), TOKENS, call=lambda m, x: m(x, as_object=True)),
        TypeError,
        "expected one tensor .*got SimpleNamespace; choose it by call",
    ),
    "detached": (
        lambda: lfp.attribute(gpt(), TOKENS, call=lambda m, x: m(x).detach()),
        ValueError,
        "depends on x",
    ),
    "scalar": (
        lambda: lfp.attribute(gpt(), TOKENS, call=lambda m, x: m(x).sum()),
        ValueError,
        r"expected an output \[N, C\]",
    ),
    "composite": (
        lambda: lfp.attribute(gpt(), TOKENS, 3, C.Epsilon()),
        ValueError,
        "layer_norm .*has no rule",
    ),
    "length": (lambda: tokens_html(["a"], torch.ones(2)), ValueError, r"shape \(1,\), got \(2,\)"),
    "list": (lambda: tokens_html(["a"], [1.0]), ValueError, "got list"),
    "nan": (lambda: tokens_html(["a", "b"], torch.tensor([1.0, torch.nan])), ValueError, "finite"),
    "inf": (lambda: tokens_html(["a"], torch.tensor([-torch.inf])), ValueError, "finite"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        call()


def test_models_come_back_after_an_error():
    model = gpt()
    before = {name: set(m.__dict__) for name, m in model.named_modules()}
    with pytest.raises(ValueError):
        lfp.attribute(model, TOKENS, call=lambda m, x: m(x.flip(1)))
    assert before == {name: set(m.__dict__) for name, m in model.named_modules()}
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_html(tmp_path):
    tokens = ["<s>", "good & ", "bad", "\n", "none"]
    relevance = torch.tensor([0.5, 2.0, -1.0, 0.25, 0.0])
    page = tokens_html(tokens, relevance, tmp_path / "page.html", title="A <b> title")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
    assert "<title>A &lt;b&gt; title</title>" in page and "<s>" not in page
    for colour, share, value, token in (
        ("220,38,38", 0.1875, "+0.5", "&lt;s&gt;"),
        ("220,38,38", 0.75, "+2", "good &amp; "),  # the largest is the deepest
        ("37,99,235", 0.375, "-1", "bad"),
        ("220,38,38", 0.09375, "+0.25", "\u23ce"),
    ):
        expected = f'background:rgba({colour},{share:.3f})" title="{value}">{token}</span>'
        assert expected in page
    assert "\u23ce</span><br>" in page and "rgba(37,99,235,0.000)" in page
    assert "prefers-color-scheme: dark" in page and "sum +1.75" in page


def test_html_without_relevance():
    page = tokens_html(["a", "b"], torch.zeros(2))
    assert page.count(",0.000)") == 2 and "nan" not in page
    assert "<p" in tokens_html([], torch.zeros(0))
