"""The rules of transformers beside attention: products, embeddings, parameters that no layer owns,
constants in sums."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as TF
from test_transformer import EPS, GPT, TOKENS, close, feedback, rand, stab
from torch import nn

import lfp_kernels
from lfp_kernels import composites


def test_products_of_activations():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.value = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)

        def forward(self, x):
            return TF.silu(self.gate(x)) * self.value(x)

    torch.manual_seed(0)
    model, x = Gate().double(), rand(5, 4)
    half = feedback(model, composites.Transformer(eps=EPS), x)
    rest = feedback(model, composites.Transformer(eps=EPS, gate="identity"), x)
    assert (rest["gate.weight"] == 0).all()
    torch.testing.assert_close(2 * half["value.weight"], rest["value.weight"])
    assert half["gate.weight"].abs().sum() > 0


@pytest.mark.parametrize("equation", ["nij,njk->nik", "nij,nkj->nik", "nij,nij->n"])
def test_einsum_halves(equation):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return torch.einsum(equation, self.one(x), self.two(x))

    torch.manual_seed(0)
    model, x = Model().double(), rand(2, 4, 4)
    x.requires_grad_()
    with composites.Transformer(eps=EPS).context(model):
        out = model(x)
        lfp_kernels.backward(out, out.detach())
    torch.testing.assert_close(-x.grad.sum(), out.detach().sum(), rtol=1e-6, atol=1e-6)


def test_embeddings():
    model = nn.Sequential(nn.Embedding(7, 4, padding_idx=0), nn.Linear(4, 3)).double()
    tokens = torch.tensor([[1, 2, 2, 0]])
    found = feedback(model, composites.Transformer(eps=EPS), tokens)
    table = model[0].weight.detach()
    z = model[1](table[tokens])
    s = rand(*z.shape, seed=3) / stab(z.detach())
    arrived = table[tokens] * (s @ model[1].weight.detach())
    rows = (table[tokens].abs() * arrived / stab(table[tokens]))[0]
    expected = torch.zeros_like(table)
    expected[1], expected[2] = rows[0], rows[1] + rows[2]
    torch.testing.assert_close(found["0.weight"], expected)
    sparse = nn.Sequential(nn.Embedding(7, 4, padding_idx=0, sparse=True), model[1]).double()
    sparse[0].weight.data.copy_(table)
    rows = feedback(sparse, composites.Transformer(eps=EPS), tokens)["0.weight"]
    assert rows.is_sparse and set(rows.coalesce().indices()[0].tolist()) <= {0, 1, 2}
    torch.testing.assert_close(rows.to_dense(), expected)


def test_tied_embeddings_are_summed():
    torch.manual_seed(0)
    apart, tied = GPT().double(), GPT(tied=True).double()
    tied.load_state_dict(apart.state_dict(), strict=False)
    apart.head.weight.data.copy_(apart.tokens.weight)
    tied.tokens.weight.data.copy_(apart.tokens.weight)
    one = feedback(apart, composites.Transformer(eps=EPS), TOKENS)
    two = feedback(tied, composites.Transformer(eps=EPS), TOKENS)
    torch.testing.assert_close(two["tokens.weight"], one["tokens.weight"] + one["head.weight"])


def test_padding_does_not_matter():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    x = rand(1, 5, 8)
    padded = torch.cat([x, rand(1, 2, 8, seed=9)], 1)
    hidden = torch.tensor([[False] * 5 + [True] * 2])

    class Short(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, mask=None):
            return self.layer(x, src_key_padding_mask=mask)[:, :5]

    composite = composites.Transformer(eps=EPS)
    close(feedback(Short(), composite, padded, hidden), feedback(Short(), composite, x))


class Parameters(nn.Module):
    """What models keep outside of layers: a class token, positions, a scale, a projection."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.positions = nn.Parameter(torch.randn(9, 4))
        self.scale = nn.Parameter(torch.randn(4))
        self.matrix = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = self.positions[: x.shape[1]] + x
        return (x * self.scale) @ self.matrix


@pytest.mark.parametrize("frozen", [False, True])
def test_parameters_outside_of_layers(frozen):
    """They are weights and biases: the activation's reward is whole, their feedback is signed; and
    freezing them changes nothing for the others."""
    model, x = Parameters().double(), rand(2, 5, 4).requires_grad_()
    token, positions, scale, matrix = (p.detach() for p in model.parameters())
    model.positions.requires_grad_(not frozen)
    model.scale.requires_grad_(not frozen)
    x.grad = None
    found = feedback(model, composites.Transformer(eps=EPS), x)
    joined = torch.cat([token.expand(2, -1, -1), x.detach()], 1)
    moved = joined + positions[:6]
    scaled = moved * scale
    s = rand(2, 6, 3, seed=3) / stab(scaled @ matrix)
    expected = {"matrix": matrix.abs() * torch.einsum("nti,nto->io", scaled, s)}
    arrived = scaled * (s @ matrix.t())
    share = arrived / stab(moved)
    expected["token"] = token.abs() * share[:, :1].sum(0, keepdim=True)
    if not frozen:
        expected["scale"] = scale.sign() * arrived.sum((0, 1))
        expected["positions"] = torch.zeros_like(positions)
        expected["positions"][:6] = positions[:6].abs() * share.sum(0)
    close(found, expected)
    torch.testing.assert_close(-x.grad, (joined * share)[:, 1:])


@pytest.mark.parametrize("kind", ["layer", "layer2", "plain", "group", "rms"])
def test_norms_hand_on_what_their_deviation_divides(kind):
    """Against autograd of the norm with its deviation held constant, in the epsilon rule."""
    torch.manual_seed(0)
    module, shape, dims = {
        "layer": (nn.LayerNorm(6), (5, 3, 6), (-1,)),
        "layer2": (nn.LayerNorm((3, 6)), (5, 3, 6), (-2, -1)),
        "plain": (nn.LayerNorm(6, elementwise_affine=False), (5, 3, 6), (-1,)),
        "group": (nn.GroupNorm(2, 4), (3, 4, 5, 2), None),
        "rms": (nn.RMSNorm(6, eps=1e-3), (5, 3, 6), (-1,)),
    }[kind]
    module = module.double()
    for p in module.parameters():
        nn.init.normal_(p)
    x, r = rand(*shape).requires_grad_(), rand(*shape, seed=1)
    with composites.Transformer(eps=EPS).context(module):
        out = module(x)
        lfp_kernels.backward(out, r)
    probe = x.detach().clone().requires_grad_()
    grouped = probe.view(3, 2, -1) if kind == "group" else probe
    over = (-1,) if kind == "group" else dims
    centred = grouped if kind == "rms" else grouped - grouped.mean(over, keepdim=True)
    variance = centred.detach().square().mean(over, keepdim=True)
    z = (centred / (variance + module.eps).sqrt()).view(shape)
    per = (-1, 1, 1) if kind == "group" else shape[-len(dims) :]
    if getattr(module, "weight", None) is not None:
        z = z * module.weight.detach().view(per[-1:] if kind != "layer2" and dims else per)
    bias = getattr(module, "bias", None)
    if bias is not None:
        z = z + bias.detach().view(per[-1:] if kind != "layer2" and dims else per)
    torch.testing.assert_close(out, z)
    (g,) = torch.autograd.grad(z, probe, r / stab(z.detach()))
    torch.testing.assert_close(-x.grad, probe.detach() * g)
    if kind == "rms":
        torch.testing.assert_close(-x.grad, r)
    if bias is None:  # nothing absorbs: all of it arrives
        torch.testing.assert_close(-x.grad.sum(), r.sum(), rtol=1e-5, atol=1e-5)


def test_a_bias_of_positions_written_out_is_the_one_call():
    """A finite mask (ALiBi) takes its share of the logits' relevance both ways."""
    bias = -torch.arange(5.0, dtype=torch.float64).expand(5, 5)

    class Attend(nn.Module):
        def __init__(self, eager):
            super().__init__()
            torch.manual_seed(0)
            self.qkv, self.eager = nn.Linear(6, 18), eager

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            if not self.eager:
                return TF.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            return (bias + q @ k.transpose(-1, -2) / math.sqrt(6)).softmax(-1) @ v

    composite, x = composites.Transformer(eps=EPS), rand(2, 5, 6)
    close(*(feedback(Attend(eager).double(), composite, x) for eager in (False, True)))


def test_norms_are_chosen_apart_from_the_mode():
    model = GPT().double()
    found = {
        (mode, norms): feedback(model, composites.Transformer(mode, eps=EPS, norms=norms), TOKENS)
        for mode in ("attnlrp", "plain")
        for norms in (None, "attnlrp", "epsilon")
    }
    for mode, own, other in (("attnlrp", "attnlrp", "epsilon"), ("plain", "epsilon", "attnlrp")):
        name = "blocks.0.qkv.weight"
        assert torch.equal(found[mode, None][name], found[mode, own][name])
        assert not torch.allclose(found[mode, None][name], found[mode, other][name])
    with pytest.raises(ValueError, match="norms: expected one of .*got 'identity'"):
        composites.Transformer(norms="identity")
