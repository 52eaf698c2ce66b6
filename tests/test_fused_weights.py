"""nn.MultiheadAttention that is asked for its probabilities (need_weights=True, torch's default):
fused where nothing reads them."""

from __future__ import annotations

import pytest
import torch
from test_fused_transformer import change, close, every, rand, transformer
from test_transformer import feedback
from torch import nn

import lfp_kernels
from lfp_kernels import composites, optim

PADDED = torch.arange(5) >= torch.tensor([5, 3, 4])[:, None]
CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)


class Attending(nn.Module):
    def __init__(self, call, **options) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up, self.out = nn.Linear(6, 8), nn.Linear(8, 5)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.call, self.kept = call, []

    def forward(self, x):
        return self.out(self.call(self, self.up(x)))


def unpacked(m, x):
    y, _ = m.attend(x, x, x)
    return y


def named(m, x):
    y, _probabilities = m.attend(
        x, x, x, key_padding_mask=PADDED, attn_mask=CAUSAL, need_weights=True
    )
    return y


ASKED = {
    "unpacked": unpacked,
    "with masks": named,
    "first": lambda m, x: m.attend(x, x, x, average_attn_weights=False)[0],
    "last but one": lambda m, x: m.attend(query=x, key=x, value=x)[-2],
}


def not_asked(m, x):
    return m.attend(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("name", ASKED)
@every
def test_is_the_drop_in_way_without_weights(options, name):
    """The drop-in way cannot know what is read: there the model says need_weights=False."""
    composite, x = transformer(options), rand(3, 5, 6)

    def reward(out):
        return rand(*out.shape, seed=3)

    def silent(m, x):
        masks = {"key_padding_mask": PADDED, "attn_mask": CAUSAL} if name == "with masks" else {}
        return m.attend(x, x, x, need_weights=False, **masks)[0]

    expected = feedback(Attending(silent).double(), composite, x, reward=reward)
    for clip in ({}, {"clip_norm": 1e30}):
        close(change(Attending(ASKED[name]).double(), composite, x, reward, **clip), expected)


@pytest.mark.parametrize("mode", ["attnlrp", "plain"])
def test_weights_after_some_steps(mode):
    composite, x = composites.Transformer(mode, eps=1e-9), rand(3, 5, 6)
    expected, found = Attending(not_asked).double(), Attending(unpacked).double()

    def reward(out, _=None):
        return rand(*out.shape, seed=3)

    step = lfp_kernels.fuse(found, composite, reward=reward, optimizer=optim.SGD(0.01, 0.9))
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.01, momentum=0.9)
    for _ in range(3):
        step(x, None)
        feedback(expected, composite, x, reward=reward)
        optimizer.step()
    for (name, a), b in zip(found.named_parameters(), expected.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)


def added(m, x):
    y, weights = m.attend(x, x, x)
    return y + weights.sum()


def detached(m, x):
    y, weights = m.attend(x, x, x)
    return y * weights.detach().mean()


def returned(m, x):
    return m.attend(x, x, x)[-1] @ x


@pytest.mark.parametrize("call", [added, detached, returned])
def test_weights_that_are_read_are_refused(call):
    match = r"the probabilities of attention has no stage, at .*test_fused_weights.py:\d+ "
    with pytest.raises(ValueError, match=match):
        lfp_kernels.fuse(Attending(call), composites.Transformer(), optimizer=optim.SGD(1.0))


def test_a_model_that_returns_them_is_refused():
    class Both(Attending):
        def forward(self, x):
            return self.attend(self.up(x), x, x)

    with pytest.raises(ValueError, match="expected one tensor as result"):
        lfp_kernels.fuse(Both(None), composites.Transformer(), optimizer=optim.SGD(1.0))


def stored(m, x):
    y, m.last = m.attend(x, x, x)
    return y


def stored_below(m, x):
    y, m.attend.last = m.attend(x, x, x)
    return y


def collected(m, x):
    y, weights = m.attend(x, x, x)
    m.kept.append(weights)
    return y


@pytest.mark.parametrize(
    ("call", "name"), [(stored, "last"), (stored_below, "attend.last"), (collected, "kept")]
)
def test_weights_that_are_stored_are_refused(call, name):
    model = Attending(call)
    model.last = None
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(ValueError, match=f"forward stores a value in '{name}'"):
        lfp_kernels.fuse(model, composites.Transformer(), optimizer=optim.SGD(1.0))
    assert [dict(vars(module)) for module in model.modules()] == before
