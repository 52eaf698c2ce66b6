"""Functions of activations in the fused way: each by the rule of the drop-in way, or refused."""

from __future__ import annotations

import math
import operator

import pytest
import torch
import torch.nn.functional as TF
from test_fused_transformer import EPS, every, rand, same, transformer
from torch import nn

import lfp_kernels
from lfp_kernels import composites, optim


class Calls(nn.Module):
    """Linear layers around a function of two of their outputs; ``w``, ``row`` are parameters,
    ``c`` is a buffer, and so is the mask."""

    def __init__(self, function) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.out = nn.Linear(6, 5)
        self.w, self.row = nn.Parameter(rand(6)), nn.Parameter(rand(1, 1, 6))
        self.table = nn.Parameter(rand(1, 9, 6))
        self.register_buffer("c", rand(6, seed=7))
        self.register_buffer("mask", torch.ones(9, 9).tril()[None])
        self.function, self.sum = function, lfp_kernels.nn.Sum()

    def forward(self, x):
        return self.out(self.function(self, self.a(x), self.b(x)))


def rotated(a):
    half = a.shape[-1] // 2
    return torch.cat((-a[..., half:], a[..., :half]), dim=-1)


def cut(a, b):
    t = a.shape[1]
    return a[:, : t - 1] + b[:, 1:t]


def chunked(a):
    u, v = a.chunk(2, dim=-1)
    return torch.cat((u * TF.gelu(v), u.relu() * v), -1)


def added_in_place(m, a, b):
    c = a * 1.5
    same_as_c = c
    c += b
    c += m.w
    c += m.c
    d = b * 2.0
    d += m.table[:, :1]
    d += 1.5
    return same_as_c.add_(a) + c + d


def parts_in_place(m, c):
    c += m.table[:, : c.shape[1]]
    c += m.row.expand(c.shape[0], -1, -1)
    return c.add_(m.table[:, 1:2])


def gelu(x):
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


def overwritten(a, b):
    first = a[:, :1]
    a += b
    return a + first


FUNCTIONS = {
    "sums": lambda m, a, b: a + b + torch.add(a, b).add(a),
    "sums in place": lambda m, a, b: added_in_place(m, a, b),
    "module": lambda m, a, b: m.sum(a, b),
    "product": lambda m, a, b: a * b,
    "product with itself": lambda m, a, b: torch.mul(a, a),
    "powers": lambda m, a, b: a**2 + torch.pow(b, 3.0) * m.w.pow(exponent=2) + a.square(),
    "written GELU": lambda m, a, b: gelu(a) + b,
    "broadcast product": lambda m, a, b: a.mul(b[..., :1]),
    "gate": lambda m, a, b: TF.silu(a) * b,
    "gate on the right": lambda m, a, b: b * TF.gelu(a),
    "two gates": lambda m, a, b: torch.sigmoid(a) * b.tanh(),
    "scaled gate": lambda m, a, b: torch.sigmoid(a) * (b * 2),
    "chunked gate": lambda m, a, b: chunked(a) + b,
    "layer scale": lambda m, a, b: a + m.w * b,
    "a number": lambda m, a, b: 0.5 * a * 3 - b / 2,
    "sizes": lambda m, a, b: a / math.sqrt(a.size(-1)) + b * a.shape[1] ** -0.5,
    "constants": lambda m, a, b: a * m.c + b / m.c + m.c,
    "numbers added": lambda m, a, b: (a + 1.5) * (2 + b),
    "difference": lambda m, a, b: a - b + torch.sub(-a, b) - m.c + (m.c - b) - 2.5,
    "parameters added": lambda m, a, b: a + m.w + (m.row + b),
    "parameters subtracted": lambda m, a, b: (a - m.w) + (m.row - b),
    "parts in place": lambda m, a, b: parts_in_place(m, a * 1.5) + b,
    "parameters negated": lambda m, a, b: (-m.w) + a + (-m.row) * b - m.table[:, 1:5],
    "parameters scaled": lambda m, a, b: a + 2 * m.w + m.row / 3 + m.w * m.c - m.table[:, :1] * 0.5,
    "parameters mixed in": lambda m, a, b: torch.cat([m.table, a[:1], m.row * b[:1]], 1),
    "stacked parameters": lambda m, a, b: torch.stack([m.table[0, :4], a[0], m.table[0, 2:6]]),
    "rows of a table": lambda m, a, b: a + m.table[:, [0, 2, 2, 7]] * b + m.table.clone()[:, :4],
    "parameters chosen": lambda m, a, b: (
        torch.where(m.c > 0, a, m.w) + m.row.masked_fill(m.c > 0, 0.0) + b
    ),
    "functions of parameters": lambda m, a, b: (
        a * torch.sigmoid(m.w) + b * m.row.softmax(-1) + m.table.mean(1, keepdim=True)
        + TF.layer_norm(m.row, (6,)) + TF.dropout(m.w, 0.0)
    ),
    "a layer of parameters": lambda m, a, b: m.b(m.table[:, :4]) + TF.linear(m.row, m.a.weight) + a,
    "learned queries": lambda m, a, b: TF.scaled_dot_product_attention(
        m.table.expand(2, -1, -1), a, b
    ),
    "learned memory": lambda m, a, b: TF.scaled_dot_product_attention(a[:1], m.table, m.table),
    "part of a table": lambda m, a, b: a + m.table[:, : a.shape[1]] + b * m.table[:, 1:2],
    "first": lambda m, a, b: a[:, 0] + b[:, -1],
    "slices": lambda m, a, b: a[..., ::2].repeat(1, 1, 2) + b[:, :, [0, 2, 2, 1, 0, 5]],
    "cut by sizes": lambda m, a, b: cut(a, b),
    "rotary": lambda m, a, b: rotated(a) * m.c + b * torch.cos(m.c),
    "class token": lambda m, a, b: torch.cat((m.row.expand(a.shape[0], -1, -1), a, b), dim=1),
    "repeated token": lambda m, a, b: torch.cat([m.row.repeat(a.size(0), 1, 1), a - b], 1),
    "mean": lambda m, a, b: a.mean(1) + torch.mean(b, dim=(1,), keepdim=True)[:, 0],
    "sum": lambda m, a, b: a.sum((0, 1)) + b.sum(-2, keepdim=True),
    "softmax": lambda m, a, b: torch.softmax(a, dim=-1) + TF.softmax(b, dim=1),
    "softmax by position": lambda m, a, b: torch.softmax(a.float(), -1, torch.float64) * b,
    "masked": lambda m, a, b: a.masked_fill(m.c > 0, 0.0) + torch.where(m.c > 0, a, b),
    "parts of parameters": lambda m, a, b: (
        a + m.table.to(a.dtype).narrow(1, 1, 4) - m.row.type_as(b)[0]
        + m.table.select(1, -1).double()
        + m.table.transpose(0, 1)[:4].swapaxes(0, 1) * b + m.w.reshape(1, 6).t().movedim(0, 1)
    ),
    "transposed": lambda m, a, b: (a.mT @ b).mH + (m.table[0].T @ m.table[0] + m.table[0, :6].H),
    "last part": lambda m, a, b: a.chunk(chunks=3, dim=-1)[-1].repeat(1, 1, 3) + b,
    "converted": lambda m, a, b: a.float().double() + b.to(a) + a.clone(),
    "constants of forward": lambda m, a, b: a * torch.arange(6) + torch.ones(6, dtype=a.dtype),
    "stacked": lambda m, a, b: torch.stack((a[..., 0::2], b[..., 1::2]), dim=-1).flatten(-2),
    "flipped": lambda m, a, b: a.flip(1) + b.roll(1, 2),
    "expanded": lambda m, a, b: a.unsqueeze(1).expand(-1, 2, -1, -1)[:, 1] + a[:, :1].expand_as(b),
    "matrices": lambda m, a, b: torch.bmm(a, b.transpose(1, 2)) @ a + a.matmul(m.table[0, :6]),
    "einsum": lambda m, a, b: (
        torch.einsum("nti,nsi->nts", a, b) @ torch.einsum("nsi,i->nsi", b, m.w)
    ),
    "ellipsis": lambda m, a, b: torch.einsum("...i,i", a, m.w).unsqueeze(-1) + b,
    "detached": lambda m, a, b: a.detach() * b + (a - b.detach()) / m.c,
    "vector": lambda m, a, b: a * torch.matmul(b, m.w).unsqueeze(-1),
    "eager attention": lambda m, a, b: (
        (a @ b.transpose(-2, -1) / math.sqrt(a.size(-1)))
        .masked_fill(m.mask[:, : a.shape[1], : a.shape[1]] == 0, -math.inf)
        .softmax(-1) @ b
    ),
    "made masks": lambda m, a, b: attend(m, a, b),
    "lowest numbers": lambda m, a, b: lowest(a, b),
}  # fmt: skip


def attend(m, a, b):
    t = a.size(1)
    logits = torch.matmul(a, b.transpose(1, 2)) * a.size(-1) ** -0.5
    shown = torch.tril(torch.ones(t, t, device=a.device)).view(1, t, t)
    logits = torch.where(shown.bool(), logits, torch.finfo(torch.float64).min)
    logits = logits + torch.full((t, t), -math.inf).triu(1).double()
    p = TF.dropout(nn.functional.softmax(logits, dim=-1), 0.3, m.training)
    return torch.matmul(p, a + b)


@pytest.mark.parametrize("name", FUNCTIONS)
@every
def test_functions(options, name):
    same(Calls(FUNCTIONS[name]), rand(2, 4, 6), transformer(options), seed=11)


@pytest.mark.parametrize("frozen", ["w", "row", "table", "a.", "b."])
@pytest.mark.parametrize(
    "name",
    ["layer scale", "parameters added", "parts of parameters", "gate", "class token", "matrices",
     "eager attention", "converted", "expanded", "sums in place", "difference", "parts in place",
     "parameters negated", "parameters mixed in", "functions of parameters", "learned memory"],
)  # fmt: skip
def test_frozen_parameters(name, frozen):
    model = Calls(FUNCTIONS[name])
    for parameter, p in model.named_parameters():
        p.requires_grad_(not parameter.startswith(frozen))
    for mode in ("attnlrp", "plain"):
        same(model, rand(2, 4, 6), composites.Transformer(mode, eps=EPS))


def test_a_step_follows_training_and_frozen_parameters():
    model = Calls(attend).double()
    step = lfp_kernels.fuse(
        model, composites.Transformer(), reward=lambda out, y: out, optimizer=optim.SGD(0.0)
    )
    x = rand(2, 4, 6)
    assert not torch.equal(step(x, None).out, step(x, None).out)
    model.eval()
    assert torch.equal(step(x, None).out, step(x, None).out)
    assert torch.equal(step(x, None).out, model(x))


def lowest(a, b):
    t, least = a.size(1), torch.finfo(a.dtype).min / 2
    logits = a @ b.transpose(1, 2) / torch.tensor(a.size(-1) ** 0.5, dtype=a.dtype)
    hidden = torch.full((t, t), least, dtype=a.dtype, device=a.device).triu(1)
    padded = (torch.arange(t, device=a.device) == 2).to(b.dtype) * least
    logits = (logits + hidden + padded).masked_fill(torch.arange(t) == 3, least)
    return logits.softmax(-1) @ b + torch.eye(t, dtype=a.dtype, device=a.device) @ b


def ungraded(m, a, b):
    with torch.no_grad():
        c = a * 2
    return c + b


REFUSED = {
    "a division by an activation": lambda m, a, b: a / b,
    "a number minus an activation": lambda m, a, b: 1 - a,
    "a power by an activation": lambda m, a, b: a.abs() ** b,
    "a power of a number": lambda m, a, b: 2**a,
    "a negative power": lambda m, a, b: b * torch.pow(a, -1),
    "in place": lambda m, a, b: a.mul_(b),
    "in place on a view": lambda m, a, b: a[:, :1].add_(b[:, :1]) + a,
    "under no_grad": lambda m, a, b: ungraded(m, a, b),
    "three operands": lambda m, a, b: torch.einsum("nti,nti,i->nti", a, b, m.c),
    "in place, other names": lambda m, a, b: overwritten(a, b),
    "scaled in place": lambda m, a, b: operator.imul(a, b),
    "cumulated": lambda m, a, b: a.cumsum(1),
    "scaled sum": lambda m, a, b: torch.add(a, b, alpha=2),
    "largest": lambda m, a, b: a.amax(1),
    "parts of a tuple": lambda m, a, b: torch.cat(a.chunk(3, -1)[1:], -1),
    "computed sizes": lambda m, a, b: torch.cat(a.split(a.shape[-1] // 2, -1), -1),
    "a learned mask": lambda m, a, b: TF.scaled_dot_product_attention(
        a, b, b, attn_mask=m.table[:, 0]
    ),
    "a copied part": lambda m, a, b: a + m.table[:, :4].reshape(4, 6),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    with pytest.raises(ValueError, match=r"has no stage, at .*test_fused_functions.py:\d+ "):
        lfp_kernels.fuse(Calls(REFUSED[name]), composites.Transformer(), optimizer=optim.SGD(1.0))


def test_nothing_is_left_at_the_model():
    model = Calls(lambda m, a, b: a + torch.ones(6) + b)
    before = set(vars(model))
    lfp_kernels.fuse(model, composites.Transformer(), optimizer=optim.SGD(1.0))
    assert set(vars(model)) == before


class Probed(nn.Module):
    """Attention by a learned query, of every sample and of the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(12)
        self.probe, self.up = nn.Parameter(rand(1, 2, 6)), nn.Linear(6, 6)
        self.attend = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        x = self.up(x)
        every, _ = self.attend(self.probe.expand(x.shape[0], -1, -1), x, x, need_weights=False)
        first, _ = self.attend(self.probe, x[:1], x[:1], need_weights=False)
        return every + first


@every
def test_learned_query(options):
    same(Probed(), rand(3, 4, 6), transformer(options))
