"""Transformers in the fused way: the same numbers as the drop-in way, without autograd's walk."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as TF
from test_transformer import GPT, TOKENS, feedback, rand
from torch import nn

import lfp_kernels
from lfp_kernels import composites, optim, rewards

EPS = 1e-9
LABELS = torch.tensor([[0, 3, 7, 1, 19, 2], [5, 5, 5, 0, 0, 1]])


def softmax(out):
    return rewards.softmax(out, LABELS[:, : out.shape[1]])


def change(model, composite, x, reward, *, given=None, **options):
    """What a fused step of length 1 does to the parameters."""
    model = copy.deepcopy(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step = lfp_kernels.fuse(
        model, composite, reward=lambda out, y: reward(out), optimizer=optim.SGD(1.0, **options)
    )
    step(x, None, **(given or {}))
    return {n: p.detach() - before[n] for n, p in model.named_parameters()}


def close(a, b):
    for name in b:
        scale = float(b[name].abs().max())
        torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-9 * max(scale, 1e-3))


def same(model, x, composite, *, seed=None, given=None):
    """The fused step and the drop-in way change the parameters alike, clipped or not. ``given``:
    further arguments of forward."""
    model = model.double()

    def reward_of(out):
        return rand(*out.shape, seed=3)

    def seeded():
        if seed is not None:
            torch.manual_seed(seed)

    seeded()
    expected = feedback(model, composite, x, reward=reward_of, given=given)
    assert expected
    for options in ({}, {"clip_norm": 1e30}):
        seeded()
        found = change(model, composite, x, reward_of, given=given, **options)
        close(found, expected)
        assert all((found[name] == 0).all() for name in found.keys() - expected.keys())
    return expected


COMPOSITES = {
    "attnlrp": {},
    "identity": {"gate": "identity"},
    "gradient sums": {"residual": "gradient"},
    "epsilon norms": {"norms": "epsilon"},
    "plain": {"mode": "plain"},
    "plain, gradient sums": {"mode": "plain", "residual": "gradient", "norms": "attnlrp"},
}
every = pytest.mark.parametrize("options", COMPOSITES.values(), ids=COMPOSITES)


def transformer(options):
    return composites.Transformer(eps=EPS, **options)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", ["plain", "attnlrp"])
def test_is_the_drop_in_way(mode, tied):
    model, composite = GPT(tied=tied).double(), composites.Transformer(mode, eps=EPS)
    expected = feedback(model, composite, TOKENS, reward=softmax)
    close(change(model, composite, TOKENS, softmax), expected)
    close(change(model, composite, TOKENS, softmax, clip_norm=1e9), expected)


@pytest.mark.parametrize("mode", ["plain", "attnlrp"])
def test_tensors_taken_apart(mode):
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.norm, self.linear = nn.RMSNorm(6), nn.Linear(6, 12)
            self.out = nn.Linear(8, 5)

        def forward(self, x):
            a, b, _ = self.linear(self.norm(x)).chunk(3, dim=-1)
            c, d = torch.split(a, 2, -1)
            e, f = b.view(x.shape[0], 2, 2).unbind(1)
            return self.out(torch.cat([c, d, e, f], -1))

    model, x = Small().double(), rand(4, 6)
    composite = composites.Transformer(mode, eps=EPS)
    r = rand(4, 5, seed=3)
    expected = feedback(model, composite, x, reward=lambda out: r)
    close(change(model, composite, x, lambda out: r), expected)
    assert (expected["linear.weight"][8:] == 0).all()  # the part that nobody reads


def test_trains():
    model = GPT()
    step = lfp_kernels.fuse(
        model, composites.Transformer("plain"), reward="softmax", optimizer=optim.AdamW(3e-3)
    )
    tokens = torch.arange(6).repeat(8, 1) + torch.arange(8)[:, None]
    losses = [
        float(TF.cross_entropy(step(tokens[:, :-1], tokens[:, 1:]).out.flatten(0, 1),
                               tokens[:, 1:].flatten()))
        for _ in range(60)
    ]  # fmt: skip
    assert losses[-1] < 0.5 * losses[0]


class Masked(nn.Module):
    """Grouped heads with a mask that is a buffer, or made of the sizes."""

    def __init__(self, made: bool, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.q, self.kv, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 5)
        self.register_buffer("mask", rand(4, 4) > -1)
        self.made, self.dropout = made, dropout

    def forward(self, x):
        n, t, _ = x.shape
        q = self.q(x).view(n, t, 4, 2).transpose(1, 2)
        k, v = self.kv(x).view(n, t, 2, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
        mask = self.mask if not self.made else torch.arange(t, device=x.device) + 1 < t
        y = TF.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=True, dropout_p=self.dropout
        )
        return self.out(y.transpose(1, 2).reshape(n, t, 8))


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("mode", ["plain", "attnlrp"])
def test_masks_and_grouped_heads(mode, made):
    model, x, r = Masked(made).double(), rand(3, 4, 6), rand(3, 4, 5, seed=3)
    composite = composites.Transformer(mode, eps=EPS)
    expected = feedback(model, composite, x, reward=lambda out: r)
    close(change(model, composite, x, lambda out: r), expected)


def test_dropout_of_attention():
    model, x, r = Masked(False, 0.5).double(), rand(3, 4, 6), rand(3, 4, 5, seed=3)
    composite = composites.Transformer(eps=EPS)
    torch.manual_seed(4)
    expected = feedback(model, composite, x, reward=lambda out: r)
    torch.manual_seed(4)
    close(change(model, composite, x, lambda out: r), expected)
    other = change(model, composite, x, lambda out: r)
    assert not torch.equal(other["out.weight"], expected["out.weight"])


@every
def test_whole_models(options):
    for eager in (False, True):
        same(GPT(eager=eager), TOKENS, transformer(options))


class Attending(nn.Module):
    """nn.MultiheadAttention, of itself or across; its mask is a buffer."""

    def __init__(self, kind, mask=None, **options) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.up, self.other = nn.Linear(6, 8), nn.Linear(6, options.get("kdim") or 8)
        self.value = nn.Linear(6, options.get("vdim") or 8)
        self.attend = nn.MultiheadAttention(8, 4, **options)
        self.out = nn.Linear(8, 5)
        self.kind = kind
        self.register_buffer("mask", mask)

    def forward(self, x):
        q, k, v = self.up(x), self.other(x), self.value(x)
        if self.kind == "self":
            k = v = q
        elif self.kind == "cross":
            v = k
        y, _ = self.attend(
            q, k, v, need_weights=False, attn_mask=self.mask,
            is_causal=self.kind == "self" and self.mask is None,
        )  # fmt: skip
        return self.out(y)


HIDDEN = torch.ones(4, 4, dtype=torch.bool).triu(1)
ATTENTION = {
    "self": (("self",), {"batch_first": True}),
    "self, length first": (("self", None), {"bias": False}),
    "cross": (("cross", HIDDEN), {"batch_first": True}),
    "cross, length first": (("cross", rand(3, 3)), {}),
    "three": (("three", rand(3 * 4, 4, 4)), {"batch_first": True}),
    "widths of their own": (("three",), {"kdim": 6, "vdim": 4, "batch_first": True}),
    "dropout": (("self",), {"dropout": 0.4, "batch_first": True}),
}


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("mode", ["plain", "attnlrp"])
def test_multihead_attention(mode, name):
    args, options = ATTENTION[name]
    composite = composites.Transformer(mode, eps=EPS)
    same(Attending(*args, **options), rand(3, 4, 6), composite, seed=5)
    if name in ("self", "self, length first"):
        same(Attending(*args, **options), rand(4, 6), composite, seed=5)


def test_one_product_projects_what_has_one_origin():
    step = lfp_kernels.fuse(
        Attending("self", batch_first=True), composites.Transformer(), optimizer=optim.SGD(1.0)
    )
    assert repr(step).count("attend.in_proj") == 1
    step = lfp_kernels.fuse(Attending("cross"), composites.Transformer(), optimizer=optim.SGD(1.0))
    assert repr(step).count("attend.in_proj") == 2


class Translator(nn.Module):
    """torch's own encoder and decoder."""

    def __init__(self, *, masked=False, **options) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.tokens = nn.Embedding(20, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, **options)
        self.encoder = nn.TransformerEncoder(
            layer, 2, norm=nn.LayerNorm(8), enable_nested_tensor=False
        )
        layer = nn.TransformerDecoderLayer(8, 2, 12, **options)
        self.decoder = nn.TransformerDecoder(layer, 1)
        self.head = nn.Linear(8, 20)
        self.register_buffer("mask", HIDDEN.new_ones(9, 9).triu(1) if masked else None)

    def forward(self, tokens):
        mask, t = self.mask, tokens.shape[1]
        if mask is not None:
            mask = mask[:t, :t]
        memory = self.encoder(self.tokens(tokens), mask=mask)
        return self.head(self.decoder(self.tokens(tokens), memory, tgt_mask=mask))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@every
def test_transformer_modules(options, norm_first, masked):
    model = Translator(
        norm_first=norm_first, masked=masked, batch_first=True, dropout=0.0, activation="gelu"
    )
    same(model, TOKENS, transformer(options))


def test_dropout_of_transformer_modules():
    # Length first: with batch_first torch draws the same numbers for other elements.
    model = Translator(dropout=0.3)
    same(model, TOKENS, composites.Transformer(eps=EPS), seed=8)
    same(model.eval(), TOKENS, composites.Transformer(eps=EPS))
    same(model.train(), TOKENS, composites.Transformer(eps=EPS, dropout="conserving"), seed=8)


class Normed(nn.Module):
    def __init__(self, *norms) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.linear, self.norms = nn.Linear(6, 6), nn.Sequential(*norms)
        self.weight, self.bias = nn.Parameter(rand(6) + 2), nn.Parameter(rand(6))
        self.out = nn.Linear(6, 5)
        for p in self.norms.parameters():
            nn.init.normal_(p, 1.0, 0.5)

    def forward(self, x):
        x = self.norms(self.linear(x))
        x = TF.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)
        x = TF.rms_norm(x, (6,)) + TF.layer_norm(x, [6], eps=1e-3)
        return self.out(TF.group_norm(x, 2) + TF.rms_norm(x, (6,), self.weight, eps=1e-4))


@pytest.mark.parametrize("norms", ["attnlrp", "epsilon"])
def test_norms(norms):
    kinds = (
        nn.GroupNorm(2, 4), nn.GroupNorm(4, 4, affine=False), nn.LayerNorm((4, 6)),
        nn.RMSNorm(6, eps=1e-3), nn.LayerNorm(6, bias=False), nn.RMSNorm((4, 6)),
    )  # fmt: skip
    for kind in kinds:
        same(Normed(kind), rand(3, 4, 6), composites.Transformer(eps=EPS, norms=norms))
    # Of several dimensions, without a weight: the shape of x says what is covered.
    for norm in (nn.LayerNorm, nn.RMSNorm):
        alone = nn.Sequential(nn.Linear(6, 6), norm((4, 6), elementwise_affine=False))
        same(alone, rand(3, 4, 6), composites.Transformer(eps=EPS, norms=norms))


class Tables(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        torch.manual_seed(10)
        self.table = nn.Embedding(20, 6, **options)
        self.out = nn.Linear(6, 20)

    def forward(self, tokens):
        return self.out(self.table(tokens))


@pytest.mark.parametrize("padding", [None, 5, -1])
@pytest.mark.parametrize("sparse", [False, True])
def test_embeddings(sparse, padding):
    model, composite = Tables(sparse=sparse, padding_idx=padding).double(), composites.Transformer()
    expected = feedback(model, composite, TOKENS, reward=softmax)
    expected = {name: f.to_dense() for name, f in expected.items()}
    close(change(model, composite, TOKENS, softmax), expected)
    close(change(model, composite, TOKENS, softmax, clip_norm=1e9), expected)


@pytest.mark.parametrize("optimizer", [optim.SGD(0.1, weight_decay=0.1), optim.AdamW(0.1)])
def test_sparse_tables_move_used_rows_alone(optimizer):
    dense, sparse = Tables().double(), Tables(sparse=True).double()
    composite = composites.Transformer()
    before = dense.table.weight.detach().clone()
    for model in (dense, sparse):
        step = lfp_kernels.fuse(
            model, composite, reward=lambda out, y: softmax(out), optimizer=optimizer
        )
        step(TOKENS, None)
    used = TOKENS.flatten().unique()
    torch.testing.assert_close(sparse.table.weight[used], dense.table.weight[used])
    rest = [row for row in range(20) if row not in used]
    assert torch.equal(sparse.table.weight[rest], before[rest])
    assert not torch.equal(dense.table.weight[rest], before[rest])


def test_arguments_with_defaults_and_checks_of_sizes():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 5)

        def forward(self, x, labels=None, scale=2.0):
            steps = x.shape[1]
            if steps > 4 or x.size(-1) != 6:
                raise ValueError(f"{steps} are too many")
            y = self.linear(x * scale)
            return y if labels is None else (y, labels)

    same(Model(), rand(2, 4, 6), composites.Transformer(eps=EPS))
    with pytest.raises(AssertionError, match="check of the model"):
        change(Model().double(), composites.Transformer(), rand(2, 5, 6), lambda out: out)


def test_what_has_no_stage_is_named():
    norm = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with pytest.raises(ValueError, match="LayerNorm.* has parameters and no rule"):
        lfp_kernels.fuse(norm, composites.Epsilon(), optimizer=optim.SGD(1.0))
