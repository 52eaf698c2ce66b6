"""The rules of transformers: each against its formula, whole models both ways of writing them."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
import torch.nn.functional as TF
from torch import nn

import lfp_kernels
from lfp_kernels import composites, use_backend
from lfp_kernels import functional as F
from lfp_kernels.testing import assert_within_budget

EPS = 1e-9
A = importlib.import_module("lfp_kernels.functional.attention")  # the name is a function's too


def rand(*shape, seed=0):
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=g, dtype=torch.float64)


def stab(z, eps=EPS):
    return z + torch.where(z < 0, -eps, eps)


class Block(nn.Module):
    """Pre-norm block with attention written out, or by one call."""

    def __init__(self, width=16, heads=4, eager=False):
        super().__init__()
        self.heads, self.eager = heads, eager
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        n, steps, width = x.shape
        q, k, v = (
            self.qkv(self.norm1(x)).view(n, steps, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        ).unbind(0)
        if self.eager:
            logits = q @ k.transpose(-1, -2) / math.sqrt(width // self.heads)
            mask = torch.full((steps, steps), -math.inf, dtype=x.dtype).triu(1)
            y = torch.softmax(logits + mask, dim=-1) @ v
        else:
            y = TF.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(n, steps, width))
        return x + self.down(TF.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, eager=False, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.positions = nn.Embedding(20, 16), nn.Embedding(10, 16)
        self.blocks = nn.ModuleList([Block(eager=eager) for _ in range(2)])
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 20, bias=False)
        for p in self.parameters():
            if p.dim() == 1:
                nn.init.normal_(p, 0.5, 0.3)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


TOKENS = torch.tensor([[1, 5, 5, 9, 0, 3], [2, 4, 6, 8, 10, 12]])


def feedback(model, composite, *inputs, reward=None, given=None):
    for p in model.parameters():
        p.grad = None
    with composite.context(model):
        out = model(*inputs, **(given or {}))
        r = rand(*out.shape, seed=3) if reward is None else reward(out)
        lfp_kernels.backward(out, r)
    return {n: -p.grad for n, p in model.named_parameters() if p.grad is not None}


def close(a, b, tolerance=1e-7):
    assert a.keys() == b.keys()
    scale = max(float(v.abs().max()) for v in b.values())
    for name in a:
        error = float((a[name] - b[name]).abs().max())
        assert error <= tolerance * scale, (name, error, scale)


def test_softmax_rule():
    x, r = rand(3, 5, 7), rand(3, 5, 7, seed=1)
    x[0, 0, 3] = -math.inf
    p = x.softmax(1)
    found = F.softmax_redistribute(x, p, r, 1)
    expected = x * (r - p * r.sum(1, keepdim=True))
    expected[0, 0, 3] = 0
    torch.testing.assert_close(found, expected)
    assert found.isfinite().all()


def norms():
    torch.manual_seed(0)
    layer, rms, group = nn.LayerNorm(6), nn.RMSNorm(6, eps=1e-3), nn.GroupNorm(2, 4)
    for module in (layer, rms, group):
        for p in module.parameters():
            nn.init.normal_(p)
    return {
        "layer": (layer.double(), (5, 3, 6), {"eps": 1e-5}),
        "rms": (rms.double(), (5, 3, 6), {"centred": False, "eps": 1e-3}),
        "group": (group.double(), (3, 4, 5, 2), {"groups": 2, "eps": 1e-5}),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (5, 31), (400, 256), (0, 4)], ids=str)
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("identity", [True, False])
def test_norms_of_the_backends(identity, centred, shape, dtype):
    tensors = [rand(*shape), rand(shape[1]), rand(shape[1], seed=1), rand(*shape, seed=2)]
    given = [t.to(dtype) for t in tensors]
    truth = [t.double() for t in given]
    options = {"centred": centred, "identity": identity, "eps": 1e-2, "stabilizer": 0.1}
    found = {}
    for backend in ("native", "reference"):
        with use_backend(backend):
            found[backend] = F.norm_redistribute(*given, **options)
    with use_backend("reference"):
        wide = F.norm_redistribute(*truth, **options)
    for a, b, c in zip(found["native"], found["reference"], wide):
        if dtype == torch.float64:  # the reference is the truth
            torch.testing.assert_close(a, c, rtol=1e-10, atol=1e-10)
        else:
            assert_within_budget(a, b, c)
    again = F.norm_redistribute(*given, **options)
    assert all(torch.equal(a, b) for a, b in zip(again, found["native"]))


def test_norm_operator_is_registered_well():
    x, weight = torch.randn(5, 7), torch.randn(7)
    torch.library.opcheck(
        torch.ops.lfp_kernels.norm_redistribute, (x, weight, None, x, True, 1e-5, 1e-6, False)
    )


@pytest.mark.parametrize("name", ["layer", "rms", "group"])
def test_norm_rules(name):
    module, shape, options = norms()[name]
    x, r = rand(*shape).requires_grad_(), rand(*shape, seed=1)
    parameters = list(module.parameters())
    z = module(x)
    expected = torch.autograd.grad(z, [x, *parameters], r / stab(z.detach()))
    bias = getattr(module, "bias", None)
    found = F.norm_redistribute(x.detach(), module.weight, bias, r, stabilizer=EPS, **options)
    torch.testing.assert_close(found.input, x.detach() * expected[0])
    torch.testing.assert_close(found.weight, module.weight.detach().abs() * expected[1])
    if bias is not None:
        torch.testing.assert_close(found.bias, bias.detach().abs() * expected[2])
    same = F.norm_redistribute(
        x.detach(), module.weight, bias, r, stabilizer=EPS, identity=True, **options
    )
    if name == "rms":
        assert torch.equal(same.input, r)
    torch.testing.assert_close(same.weight, found.weight)


@pytest.mark.parametrize("mode", ["attnlrp", "plain"])
def test_written_out_is_the_one_call(mode):
    models = [GPT(eager=eager).double() for eager in (False, True)]
    found = [feedback(m, composites.Transformer(mode, eps=EPS), TOKENS) for m in models]
    close(*found)
    assert all(v.isfinite().all() and v.abs().sum() > 0 for v in found[0].values())


def test_plain_mode_is_the_gradient_between_layers():
    """One block without residual sums and activations: epsilon at layers, gradients elsewhere."""

    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(6, 18, bias=False)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            return TF.scaled_dot_product_attention(q, k, v)

    torch.manual_seed(0)
    model, x = Attend().double(), rand(2, 5, 6)
    r = rand(2, 5, 6, seed=3)
    z = model.qkv(x).detach().requires_grad_()
    (g,) = torch.autograd.grad(TF.scaled_dot_product_attention(*z.chunk(3, -1)), z, r)
    s = (g / stab(z.detach())).flatten(0, 1)
    expected = model.qkv.weight.detach().abs() * (s.t() @ x.flatten(0, 1))
    found = feedback(model, composites.Transformer("plain", eps=EPS), x, reward=lambda out: r)
    torch.testing.assert_close(found["qkv.weight"], expected)


@pytest.mark.parametrize("mode", ["attnlrp", "plain"])
@pytest.mark.parametrize("causal", [False, True])
def test_torch_encoder_layer(causal, mode):
    """nn.MultiheadAttention is linear layers around attention."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    x, steps = rand(3, 5, 8), 5
    mask = nn.Transformer.generate_square_subsequent_mask(steps).double() if causal else None

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            q, k, v = (
                TF.linear(x, w, b).unflatten(-1, (2, 4)).transpose(1, 2)
                for w, b in zip(
                    layer.self_attn.in_proj_weight.chunk(3), layer.self_attn.in_proj_bias.chunk(3)
                )
            )
            y = TF.scaled_dot_product_attention(q, k, v, is_causal=causal)
            x = layer.norm1(x + layer.self_attn.out_proj(y.transpose(1, 2).flatten(-2)))
            return layer.norm2(x + layer.linear2(TF.relu(layer.linear1(x))))

    class Torch(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return layer(x, src_mask=mask)

    composite = composites.Transformer(mode, eps=EPS)
    close(feedback(Torch(), composite, x), feedback(Own(), composite, x))


def test_models_come_back_as_they_were():
    model = GPT().double()
    before = model(TOKENS)
    keys = {name: set(m.__dict__) for name, m in model.named_modules()}
    feedback(model, composites.Transformer(), TOKENS)
    assert keys == {name: set(m.__dict__) for name, m in model.named_modules()}
    assert torch.equal(model(TOKENS), before)


def test_checkpointed_blocks_give_the_same():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(GPT):
        def forward(self, tokens):
            x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return self.head(self.norm(x))

    plain, checked = GPT().double(), Checkpointed().double()
    composite = composites.Transformer(eps=EPS)
    close(feedback(checked, composite, TOKENS), feedback(plain, composite, TOKENS))


def test_learns_a_sequence():
    """A tiny GPT learns to repeat: the loss falls far below chance by LFP alone."""
    torch.manual_seed(0)
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    composite = composites.Transformer("plain", eps=1e-6)
    tokens = torch.arange(6).repeat(8, 1) + torch.randint(0, 14, (8, 1))
    losses = []
    with composite.context(model):
        for _ in range(60):
            optimizer.zero_grad()
            out = model(tokens[:, :-1])
            lfp_kernels.backward(out, lfp_kernels.rewards.softmax(out, tokens[:, 1:]))
            losses.append(float(TF.cross_entropy(out.flatten(0, 1), tokens[:, 1:].flatten())))
            optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


ERRORS = {
    "mode": (lambda: composites.Transformer("lrp"), "mode: expected one of .*got 'lrp'"),
    "gate": (lambda: composites.Transformer(gate="all"), "gate: expected one of"),
    "residual": (lambda: composites.Transformer(residual="half"), "residual: expected one of"),
    "mask": (
        lambda: F.attention(rand(1, 4, 8), rand(1, 5, 8), rand(1, 5, 8), rand(3, 5)),
        r"mask: expected a shape that broadcasts to \(1, 4, 5\), got \(3, 5\)",
    ),
    "keys": (lambda: F.attention(rand(1, 4, 8), rand(1, 5, 7), rand(1, 5, 7)), "k: expected shape"),
    "values": (lambda: F.attention(rand(1, 4, 8), rand(1, 5, 8), rand(1, 6, 8)), "v: expected"),
    "dropout": (
        lambda: F.attention(rand(1, 4, 8), rand(1, 4, 8), rand(1, 4, 8), dropout=1.0),
        "dropout: expected a rate",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_what_has_no_rule_is_named():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return torch.cumsum(self.layer(x), -1)

    with (
        composites.Transformer().context(model := Model()),
        pytest.raises(ValueError, match=r"cumsum .*has no rule"),
    ):
        model(torch.rand(2, 4))
    composite = composites.Transformer(default="gradient")
    with composite.context(model), pytest.warns(UserWarning, match="cumsum has no rule"):
        model(torch.rand(2, 4))
