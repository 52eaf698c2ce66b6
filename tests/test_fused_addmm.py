"""torch.addmm and torch.baddbmm in the fused way: the numbers of the drop-in way."""

from __future__ import annotations

import pytest
import torch
from test_fused_functions import Calls
from test_fused_transformer import TOKENS, change, every, rand, same, transformer
from test_transformer import feedback
from torch import nn

import lfp_kernels
from lfp_kernels import composites, optim


class Conv1D(nn.Module):
    """A linear layer whose weight is kept as [I, O], as in GPT-2."""

    def __init__(self, into: int, out: int, written: str = "addmm") -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(rand(into, out, seed=out)), nn.Parameter(rand(out))
        self.written = written

    def forward(self, x):
        rows = x.view(-1, x.size(-1))
        if self.written == "addmm":
            y = torch.addmm(self.bias, rows, self.weight)
        elif self.written == "method":
            y = self.bias.addmm(mat1=rows, mat2=self.weight)
        else:
            y = nn.functional.linear(rows, self.weight.t(), self.bias)
        return y.view(x.size()[:-1] + (self.weight.shape[1],))  # noqa: RUF005 (traceable)


class Net(nn.Module):
    """Two such layers around a ReLU, behind a table."""

    def __init__(self, written: str = "addmm") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 6)
        self.up, self.down = Conv1D(6, 9, written), Conv1D(9, 5, written)

    def forward(self, tokens):
        return self.down(self.up(self.table(tokens)).relu())


@pytest.mark.parametrize("written", ["addmm", "method"])
@every
def test_weights_kept_as_inputs_by_outputs(options, written):
    composite = transformer(options)
    found = same(Net(written), TOKENS, composite)
    assert found["up.weight"].shape == (6, 9)
    # The layer that torch's Linear would be.
    expected = feedback(Net("linear").double(), composite, TOKENS)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("frozen", ["up.weight", "up.bias", "table", "down"])
def test_frozen(frozen):
    model = Net()
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    for mode in ("attnlrp", "plain"):
        same(model, TOKENS, composites.Transformer(mode, eps=1e-9))


def test_other_products():
    model = Net().float()
    composite = composites.Transformer(eps=1e-6, feedback_dtype=torch.bfloat16)
    r = rand(2, 6, 5, seed=3).float()
    expected = feedback(model, composite, TOKENS, reward=lambda out: r)
    found = change(model, composite, TOKENS, lambda out: r)
    exact = feedback(model, composites.Transformer(eps=1e-6), TOKENS, reward=lambda out: r)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected["down.weight"], exact["down.weight"], rtol=1e-4, atol=1e-4)


class Square(nn.Linear):
    """Known as a linear layer, so that every rule may be chosen for it."""

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


@pytest.mark.parametrize("rule", ["gamma", "zplus", "reverse_pos", "zero", "flat"])
def test_other_rules(rule):
    composite = composites.Transformer(eps=1e-9, layers=[(Square, rule)])
    torch.manual_seed(0)
    same(nn.Sequential(Square(6, 6), nn.ReLU(), Square(6, 6)), rand(4, 6), composite)


def trained(step_of, model, steps=4):
    torch.manual_seed(0)
    step = step_of(model)
    for _ in range(steps):
        step(TOKENS)
    return model


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("mode", ["attnlrp", "plain"])
def test_weights_after_some_steps(mode, clip):
    composite = composites.Transformer(mode, eps=1e-9)

    def reward(out, _=None):
        return rand(*out.shape, seed=3)

    def drop_in(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)

        def step(tokens):
            feedback(model, composite, tokens, reward=reward)
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()

        return step

    def fused(model):
        step = lfp_kernels.fuse(
            model, composite, reward=reward,
            optimizer=optim.AdamW(0.01, weight_decay=0.1, clip_norm=clip),
        )  # fmt: skip
        return lambda tokens: step(tokens, None)

    expected, found = (trained(make, Net().double()) for make in (drop_in, fused))
    for (name, a), b in zip(found.named_parameters(), expected.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)


def test_shared_with_a_linear_layer():
    class Tied(Net):
        def forward(self, tokens):
            h = self.up(self.table(tokens))
            return nn.functional.linear(h, self.up.weight)  # [I, O] of the way back

    for mode in ("attnlrp", "plain"):
        same(Tied(), TOKENS, composites.Transformer(mode, eps=1e-9))


FUNCTIONS = {
    "of two activations": lambda m, a, b: torch.baddbmm(m.table[:, :4, :4], a, b.mT) @ a,
    "of activations": lambda m, a, b: torch.baddbmm(a[..., :4], a, b.mT) @ b,
    "on a constant": lambda m, a, b: torch.baddbmm(m.mask[:, :4, :4].to(a.dtype), a, b.mT) @ b,
    "method": lambda m, a, b: a.baddbmm(batch1=a @ b.mT, batch2=b),
    "a parameter each": lambda m, a, b: torch.baddbmm(
        m.row, a, m.table[:, :6].expand(a.shape[0], -1, -1)
    ) + b,
    "on itself": lambda m, a, b: torch.bmm(a, b.mT).baddbmm(a, b.mT) @ b,
    "one constant": lambda m, a, b: torch.baddbmm(
        a, b, m.c.expand(6, 6).unsqueeze(0).repeat(a.shape[0], 1, 1)
    ),
    "frozen rows": lambda m, a, b: torch.baddbmm(b.detach(), a.detach() @ b.detach().mT, b) + a,
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
@every
def test_products_on_top_of_a_sum(options, name):
    same(Calls(FUNCTIONS[name]), rand(2, 4, 6), transformer(options))


REFUSED = {
    "addmm with beta other than 1": lambda m, a, b: torch.addmm(m.w, a[0], m.a.weight, beta=0.5),
    "addmm with alpha other than 1": lambda m, a, b: m.w.addmm(a[0], m.a.weight, alpha=2),
    "addmm whose mat2 is no parameter": lambda m, a, b: torch.addmm(m.w, a[0], b[0].t()),
    "addmm whose input is no vector": lambda m, a, b: torch.addmm(b[0], a[0], m.a.weight),
    "baddbmm with beta other than 1": lambda m, a, b: torch.baddbmm(a, b, b, beta=0),
    "baddbmm with alpha other than 1": lambda m, a, b: a.baddbmm(b, b, alpha=a.shape[1]),
    "baddbmm of two constants": lambda m, a, b: a.baddbmm(b.detach(), b.detach()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"fuse: {name}.* at .*test_fused_addmm.py:\d+ "):
        lfp_kernels.fuse(Calls(REFUSED[name]), composites.Transformer(), optimizer=optim.SGD(1.0))
