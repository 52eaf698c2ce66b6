"""Transformers as people write them, in the fused way: the numbers of the drop-in way.

PYTEST_DONT_REWRITE: the models' asserts stay asserts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from test_fused_transformer import every, rand, same, transformer
from torch import nn

import lfp_kernels
from lfp_kernels import composites, optim

TOKENS = torch.tensor([[1, 5, 5, 9, 0, 3], [2, 4, 6, 8, 10, 12]])


@dataclass
class Config:
    block_size: int = 8
    vocab_size: int = 20
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 8
    dropout: float = 0.0
    bias: bool = True


class LayerNorm(nn.Module):
    """As in nanoGPT: torch's, with an optional bias."""

    def __init__(self, ndim, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, input):
        return F.layer_norm(input, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.n_embd, self.dropout = config.n_head, config.n_embd, config.dropout
        self.register_buffer(
            "bias",
            torch.tril(torch.ones(config.block_size, config.block_size)).view(
                1, 1, config.block_size, config.block_size
            ),
        )

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        att = F.softmax(att, dim=-1)
        att = self.attn_dropout(att)
        y = att @ v
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """nanoGPT's, without its loss."""

    def __init__(self, config):
        super().__init__()
        torch.manual_seed(0)
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                "ln_f": LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        shaken(self)

    def forward(self, idx):
        device = idx.device
        _, t = idx.size()
        assert t <= self.config.block_size, (
            f"Cannot forward sequence of length {t}, block size is only {self.config.block_size}"
        )
        pos = torch.arange(0, t, dtype=torch.long, device=device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


def shaken(model):
    """Vectors at 0 or 1 would hide errors."""
    for p in model.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, 0.6, 0.3)


class ViT(nn.Module):
    """Patches, class token, learned positions, LayerScale; the class token or the mean is read."""

    def __init__(self, pool, dropout=0.0):
        super().__init__()
        torch.manual_seed(1)
        self.patches = nn.Conv2d(3, 8, 2, stride=2)
        self.cls_token = nn.Parameter(0.5 * torch.randn(1, 1, 8))
        self.pos_embed = nn.Parameter(0.5 * torch.randn(1, 10, 8))
        self.blocks = nn.ModuleList([ViTBlock(8, 2, dropout) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(8, eps=1e-6), nn.Linear(8, 5)
        self.pool, self.pos_drop = pool, nn.Dropout(dropout)
        shaken(self)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = self.pos_drop(x + self.pos_embed[:, : x.shape[1]])
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x[:, 0] if self.pool == "token" else x[:, 1:].mean(dim=1))


class ViTBlock(nn.Module):
    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)
        self.fc1, self.fc2, self.act = nn.Linear(dim, 16), nn.Linear(16, dim), nn.GELU()
        self.gamma1, self.gamma2 = (nn.Parameter(torch.ones(dim)) for _ in range(2))
        self.attn_drop = nn.Dropout(dropout)

    def attend(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q * self.scale) @ k.transpose(-2, -1)
        attn = self.attn_drop(attn.softmax(dim=-1))
        return self.proj((attn @ v).transpose(1, 2).reshape(B, N, C))

    def forward(self, x):
        x = x + self.gamma1 * self.attend(self.norm1(x))
        return x + self.fc2(self.act(self.fc1(self.norm2(x)))) * self.gamma2


def rotate_half(x):
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def repeat_kv(x, n_rep):
    batch, heads, length, width = x.shape
    x = x[:, :, None, :, :].expand(batch, heads, n_rep, length, width)
    return x.reshape(batch, heads * n_rep, length, width)


class LlamaRMSNorm(nn.Module):
    """Written out; composites.Transformer knows it by its name."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class LlamaBlock(nn.Module):
    """RMS norms, rotary embeddings, grouped heads, SwiGLU."""

    def __init__(self, dim=8, heads=4, kv_heads=2, eager=True):
        super().__init__()
        self.heads, self.kv_heads, self.width, self.eager = heads, kv_heads, dim // heads, eager
        self.input_norm, self.post_norm = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)
        linear = lambda i, o: nn.Linear(i, o, bias=False)  # noqa: E731
        self.q_proj, self.o_proj = linear(dim, dim), linear(dim, dim)
        self.k_proj, self.v_proj = (linear(dim, kv_heads * self.width) for _ in range(2))
        self.gate_proj, self.up_proj, self.down_proj = (
            linear(dim, 12), linear(dim, 12), linear(12, dim)
        )  # fmt: skip

    def attend(self, x, cos, sin):
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.heads, self.width).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.kv_heads, self.width).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.kv_heads, self.width).transpose(1, 2)
        q = (q * cos) + (rotate_half(q) * sin)
        k = (k * cos) + (rotate_half(k) * sin)
        if self.eager:
            k, v = (repeat_kv(t, self.heads // self.kv_heads) for t in (k, v))
            logits = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(self.width)
            mask = torch.full((length, length), float("-inf"), dtype=x.dtype).triu(1)
            p = nn.functional.softmax(logits + mask[None, None], dim=-1, dtype=torch.float64)
            y = torch.matmul(p.to(q.dtype), v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).contiguous().view(batch, length, -1))

    def forward(self, x, cos, sin):
        x = x + self.attend(self.input_norm(x), cos, sin)
        h = self.post_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Llama(nn.Module):
    def __init__(self, eager=True):
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Embedding(20, 8)
        self.layers = nn.ModuleList([LlamaBlock(eager=eager) for _ in range(2)])
        self.norm, self.head = LlamaRMSNorm(8), nn.Linear(8, 20, bias=False)
        angles = torch.outer(torch.arange(10), 10000.0 ** -(torch.arange(0, 2, 2) / 2))
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        shaken(self)

    def forward(self, tokens):
        t = tokens.shape[1]
        if t > 10:
            raise ValueError(f"{t} tokens are too many")
        x = self.embed(tokens)
        cos, sin = self.cos[:t], self.sin[:t]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(self.norm(x))


@pytest.mark.parametrize("bias", [False, True])
@every
def test_gpt(options, bias):
    same(GPT(Config(bias=bias)), TOKENS, transformer(options))


def test_gpt_checks_its_length():
    step = lfp_kernels.fuse(GPT(Config()), composites.Transformer(), optimizer=optim.SGD(0.1))
    with pytest.raises(AssertionError, match="check of the model"):
        step(torch.zeros(2, 9, dtype=torch.int64), torch.zeros(2, 9, dtype=torch.int64))


@pytest.mark.parametrize("pool", ["token", "mean"])
@every
def test_vit(options, pool):
    same(ViT(pool), rand(2, 3, 6, 6), transformer(options))


@pytest.mark.parametrize("eager", [False, True])
@every
def test_llama(options, eager):
    same(Llama(eager), TOKENS, transformer(options))


@pytest.mark.parametrize("dropout", ["scaled", "conserving"])
def test_dropout(dropout):
    composite = composites.Transformer(eps=1e-9, dropout=dropout)
    same(GPT(Config(dropout=0.3)), TOKENS, composite, seed=4)
    same(ViT("token", dropout=0.3), rand(2, 3, 6, 6), composite, seed=4)


@pytest.mark.parametrize("make", [lambda: GPT(Config(n_embd=16)), Llama])
@pytest.mark.parametrize("mode", ["plain", "attnlrp"])
def test_trains(mode, make):
    step = lfp_kernels.fuse(
        make(), composites.Transformer(mode, norms="epsilon"),
        reward="softmax", optimizer=optim.AdamW(1e-2, clip_norm=1.0),
    )  # fmt: skip
    tokens = (torch.arange(6).repeat(8, 1) + torch.arange(8)[:, None]) % 20
    x, y = tokens[:, :-1], tokens[:, 1:]
    losses = [float(F.cross_entropy(step(x, y).out.flatten(0, 1), y.flatten())) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]
