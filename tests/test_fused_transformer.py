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


def change(model, composite, x, reward, **options):
    """What a fused step of length 1 does to the parameters."""
    model = copy.deepcopy(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step = lfp_kernels.fuse(
        model, composite, reward=lambda out, y: reward(out), optimizer=optim.SGD(1.0, **options)
    )
    step(x, None)
    return {n: p.detach() - before[n] for n, p in model.named_parameters()}


def close(a, b):
    for name in b:
        scale = float(b[name].abs().max())
        torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-9 * max(scale, 1e-3))


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


def test_what_has_no_stage_is_named():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("mask", torch.ones(3, 3, dtype=torch.bool))

        def forward(self, x):
            z = self.linear(x)
            return TF.scaled_dot_product_attention(z, z, z, attn_mask=self.mask)

    with pytest.raises(ValueError, match=r"attention with a mask.* has no stage.*drop-in way"):
        lfp_kernels.fuse(Masked(), composites.Transformer(), optimizer=optim.SGD(1.0))
    norm = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with pytest.raises(ValueError, match="LayerNorm.* has parameters and no rule"):
        lfp_kernels.fuse(norm, composites.Epsilon(), optimizer=optim.SGD(1.0))
