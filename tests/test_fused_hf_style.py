"""GPT-2 and BERT written in the way of Hugging Face, fused: the numbers of the drop-in way."""

from __future__ import annotations

import math

import pytest
import torch
from test_fused_addmm import Conv1D
from test_fused_transformer import TOKENS, every, same, transformer
from test_transformer import feedback
from torch import nn

import lfp_kernels
from lfp_kernels import composites, optim, rewards

WIDTH, HEADS, LENGTH = 8, 2, 10
SHOWN = (torch.arange(6) < torch.tensor([6, 4])[:, None]).long()  # 1: a token, 0: padding


def shaken(model):
    """Vectors at 0 or 1 would hide errors."""
    for p in model.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, 0.6, 0.3)


class NewGELU(nn.Module):
    def forward(self, x):
        inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
        return 0.5 * x * (1.0 + torch.tanh(inner))


class GPT2Attention(nn.Module):
    def __init__(self):
        super().__init__()
        shown = torch.tril(torch.ones(LENGTH, LENGTH, dtype=torch.bool))
        self.register_buffer("bias", shown.view(1, 1, LENGTH, LENGTH), persistent=False)
        self.width = WIDTH // HEADS
        self.c_attn, self.c_proj = Conv1D(WIDTH, 3 * WIDTH), Conv1D(WIDTH, WIDTH)
        self.attn_dropout, self.resid_dropout = nn.Dropout(0.1), nn.Dropout(0.1)

    def split_heads(self, tensor):
        shape = tensor.size()[:-1] + (HEADS, self.width)  # noqa: RUF005
        return tensor.view(shape).permute(0, 2, 1, 3)

    def merge_heads(self, tensor):
        tensor = tensor.permute(0, 2, 1, 3).contiguous()
        return tensor.view(tensor.size()[:-2] + (HEADS * self.width,))  # noqa: RUF005

    def attend(self, query, key, value, attention_mask):
        weights = torch.matmul(query, key.transpose(-1, -2))
        weights = weights / torch.full(
            [], value.size(-1) ** 0.5, dtype=weights.dtype, device=weights.device
        )
        query_length, key_length = query.size(-2), key.size(-2)
        causal = self.bias[:, :, key_length - query_length : key_length, :key_length]
        lowest = torch.finfo(weights.dtype).min
        lowest = torch.full([], lowest, dtype=weights.dtype, device=weights.device)
        weights = torch.where(causal, weights.to(weights.dtype), lowest)
        if attention_mask is not None:
            weights = weights + attention_mask
        weights = nn.functional.softmax(weights, dim=-1)
        weights = self.attn_dropout(weights.type(value.dtype))
        return torch.matmul(weights, value), weights

    def forward(self, hidden_states, attention_mask=None):
        query, key, value = self.c_attn(hidden_states).split(WIDTH, dim=2)
        query, key, value = (self.split_heads(t) for t in (query, key, value))
        output, _ = self.attend(query, key, value, attention_mask)
        return self.resid_dropout(self.c_proj(self.merge_heads(output)))


class GPT2Block(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(WIDTH), GPT2Attention(), nn.LayerNorm(WIDTH)
        self.c_fc, self.c_proj = Conv1D(WIDTH, 12), Conv1D(12, WIDTH)
        self.act, self.dropout = act, nn.Dropout(0.1)

    def forward(self, hidden_states, attention_mask=None):
        residual = hidden_states
        hidden_states = self.attn(self.ln_1(hidden_states), attention_mask) + residual
        residual = hidden_states
        hidden_states = self.c_proj(self.act(self.c_fc(self.ln_2(hidden_states))))
        return residual + self.dropout(hidden_states)


class GPT2(nn.Module):
    def __init__(self, act=None):
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.wpe = nn.Embedding(20, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.drop = nn.Dropout(0.1)
        self.h = nn.ModuleList([GPT2Block(act or NewGELU()) for _ in range(2)])
        self.ln_f, self.lm_head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 20, bias=False)
        self.lm_head.weight = self.wte.weight
        shaken(self)

    def forward(self, input_ids, attention_mask=None):
        shape = input_ids.size()
        input_ids = input_ids.view(-1, shape[-1])
        position_ids = torch.arange(0, shape[-1], dtype=torch.long, device=input_ids.device)
        x = self.drop(self.wte(input_ids) + self.wpe(position_ids.unsqueeze(0)))
        if attention_mask is not None:
            attention_mask = attention_mask.view(shape[0], -1)[:, None, None, :].to(dtype=x.dtype)
            attention_mask = (1.0 - attention_mask) * torch.finfo(x.dtype).min
        for block in self.h:
            x = block(x, attention_mask)
        x = self.ln_f(x).view(shape + (x.size(-1),))  # noqa: RUF005
        return self.lm_head(x)


class BertLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.dense, self.up, self.down = (
            nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        )  # fmt: skip
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, eps=1e-12), nn.LayerNorm(WIDTH, eps=1e-12)
        self.dropout, self.act = nn.Dropout(0.1), nn.GELU()

    def heads(self, x):
        x = x.view(x.size()[:-1] + (HEADS, WIDTH // HEADS))  # noqa: RUF005
        return x.permute(0, 2, 1, 3)

    def forward(self, x, attention_mask):
        query, key, value = self.heads(self.query(x)), self.heads(self.key(x)), self.value(x)
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(WIDTH // HEADS)
        if attention_mask is not None:
            scores = scores + attention_mask
        weights = self.dropout(nn.functional.softmax(scores, dim=-1))
        context = torch.matmul(weights, self.heads(value)).permute(0, 2, 1, 3).contiguous()
        context = context.view(context.size()[:-2] + (WIDTH,))  # noqa: RUF005
        x = self.norm1(self.dropout(self.dense(context)) + x)
        return self.norm2(self.dropout(self.down(self.act(self.up(x)))) + x)


class Bert(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.words, self.positions = nn.Embedding(20, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.types, self.norm = nn.Embedding(2, WIDTH), nn.LayerNorm(WIDTH, eps=1e-12)
        self.register_buffer("position_ids", torch.arange(LENGTH).expand((1, -1)))
        self.layers, self.dropout = nn.ModuleList([BertLayer() for _ in range(2)]), nn.Dropout(0.1)
        self.pooler, self.classifier = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        shaken(self)

    @property
    def dtype(self):
        return self.words.weight.dtype

    def extended(self, attention_mask):
        extended = attention_mask[:, None, None, :].to(dtype=self.dtype)
        return (1.0 - extended) * torch.finfo(self.dtype).min

    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        shape = input_ids.size()
        if attention_mask is None:
            attention_mask = torch.ones(shape, device=input_ids.device)
        if token_type_ids is None:
            token_type_ids = torch.zeros(shape, dtype=torch.long, device=input_ids.device)
        x = self.words(input_ids) + self.types(token_type_ids)
        x = self.dropout(self.norm(x + self.positions(self.position_ids[:, : shape[1]])))
        attention_mask = self.extended(attention_mask)
        for layer in self.layers:
            x = layer(x, attention_mask)
        return self.classifier(self.dropout(torch.tanh(self.pooler(x[:, 0]))))


GIVEN = {"alone": {}, "padded": {"attention_mask": SHOWN}}
every_mask = pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)


@every_mask
@every
def test_gpt2(options, given):
    composite = transformer(options)
    found = same(GPT2().eval(), TOKENS, composite, given=given)
    module = same(GPT2(nn.GELU("tanh")).eval(), TOKENS, composite, given=given)
    for name in found:  # the written GELU is a function of one activation, as torch's is
        torch.testing.assert_close(found[name], module[name], rtol=1e-7, atol=1e-7)
    same(GPT2(), TOKENS, composite, given=given, seed=3)


@every_mask
@every
def test_bert(options, given):
    composite, types = transformer(options), {"token_type_ids": TOKENS % 2}
    same(Bert().eval(), TOKENS, composite, given=given)
    same(Bert(), TOKENS, composite, given={**given, **types}, seed=3)


@pytest.mark.parametrize("mode", ["attnlrp", "plain"])
def test_weights_after_some_steps(mode):
    composite = composites.Transformer(mode, eps=1e-9, norms="epsilon")
    expected, found = GPT2().double().eval(), GPT2().double().eval()
    optimizer = torch.optim.AdamW(expected.parameters(), lr=0.01, weight_decay=0.01)
    step = lfp_kernels.fuse(
        found, composite, reward=lambda out, y: rewards.softmax(out, y),
        optimizer=optim.AdamW(0.01, clip_norm=1.0),
    )  # fmt: skip
    labels = TOKENS.roll(-1, 1)
    for given in ({}, {"attention_mask": SHOWN}, {"attention_mask": SHOWN}, {}):
        step(TOKENS, labels, **given)
        feedback(
            expected, composite, TOKENS, reward=lambda out: rewards.softmax(out, labels),
            given=given,
        )  # fmt: skip
        nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        optimizer.step()
    for (name, a), b in zip(found.named_parameters(), expected.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)
