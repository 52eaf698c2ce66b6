"""Padding masks of torch's attention modules in the fused way, and further arguments of forward."""

from __future__ import annotations

import copy

import pytest
import torch
from test_fused_transformer import TOKENS, every, rand, same, transformer
from test_transformer import feedback
from torch import nn

import lfp_kernels
from lfp_kernels import composites, optim

pytestmark = [
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
]
CAUSAL = torch.ones(6, 6, dtype=torch.bool).triu(1)
PADDED = torch.arange(6) >= torch.tensor([6, 4])[:, None]  # True: no key
ADDED = torch.zeros(6, 6, dtype=torch.float64).masked_fill(CAUSAL, -torch.inf)
TEXT = TOKENS.masked_fill(PADDED, 0)
MASKS = {
    "padded": {"padding": PADDED},
    "padded, added": {"padding": rand(2, 6, seed=5)},
    "causal and padded": {"mask": CAUSAL, "padding": PADDED},
    "causal, added, and padded": {"mask": ADDED, "padding": PADDED},
    "causal and padded, added": {"mask": CAUSAL, "padding": rand(2, 6, seed=5)},
    "per head, and padded": {"mask": rand(2 * 2, 6, 6, seed=6), "padding": PADDED},
}
every_mask = pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)


class Attending(nn.Module):
    """nn.MultiheadAttention of itself; masks are arguments of forward."""

    def __init__(self, **options) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table, self.out = nn.Embedding(20, 8), nn.Linear(8, 5)
        self.attend = nn.MultiheadAttention(8, 2, **{"batch_first": True, **options})

    def forward(self, tokens, padding=None, *, mask=None):
        x = self.table(tokens)
        if not self.attend.batch_first:
            x = x.transpose(0, 1)
        y, _ = self.attend(x, x, x, need_weights=False, key_padding_mask=padding, attn_mask=mask)
        return self.out(y if self.attend.batch_first else y.transpose(0, 1))


@every_mask
@every
def test_attention(options, masks):
    for first in (True, False):
        same(Attending(batch_first=first), TOKENS, transformer(options), given=masks)


@every_mask
@pytest.mark.parametrize("mode", ["attnlrp", "plain"])
def test_attention_of_one_sequence(mode, masks):
    composite = composites.Transformer(mode, eps=1e-9)
    masks = {"padding": masks["padding"][1], "mask": masks.get("mask", CAUSAL)[:2]}
    masks["mask"] = masks["mask"] if masks["mask"].dim() == 3 else CAUSAL
    same(Attending(), TOKENS[1], composite, given=masks)


@pytest.mark.parametrize("mode", ["attnlrp", "plain"])
def test_a_sequence_of_padding_alone(mode):
    """Its queries see no key: attention gives 0 there, and nothing becomes NaN."""
    padding = PADDED | torch.tensor([False, True])[:, None]
    found = same(Attending(), TOKENS, composites.Transformer(mode, eps=1e-9),
                 given={"padding": padding})  # fmt: skip
    assert all(f.isfinite().all() for f in found.values())


@pytest.mark.parametrize("mode", ["attnlrp", "plain"])
def test_dropout_beside_padding(mode):
    composite = composites.Transformer(mode, eps=1e-9)
    same(Attending(dropout=0.4), TOKENS, composite, given=MASKS["causal and padded"], seed=3)


class Translator(nn.Module):
    """torch's own encoder and decoder; what is padded is given, or found by a token of its own."""

    def __init__(self, masks=None, **options) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.tokens, self.masks = nn.Embedding(20, 8), masks
        options = {"batch_first": True, "dropout": 0.0, **options}
        layer = nn.TransformerEncoderLayer(8, 2, 12, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8))
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 12, **options), 1)
        self.head = nn.Linear(8, 20)
        for p in self.parameters():
            if p.dim() == 1:
                nn.init.normal_(p, 0.5, 0.4)

    def forward(self, tokens, padding=None, mask=None):
        if padding is None:
            padding = tokens == 0
        hint = {} if mask is None else {"is_causal": True}
        x = self.tokens(tokens)
        memory = self.encoder(x, mask=mask, src_key_padding_mask=padding, **hint)
        y = self.decoder(
            x, memory, tgt_mask=mask, tgt_key_padding_mask=padding,
            memory_key_padding_mask=padding, tgt_is_causal=mask is not None,
        )  # fmt: skip
        return self.head(y)


@every_mask
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("mode", ["attnlrp", "plain"])
def test_encoder_and_decoder(mode, norm_first, masks):
    composite = composites.Transformer(mode, eps=1e-9)
    same(Translator(norm_first=norm_first), TEXT, composite, given=masks)


@every
def test_padding_found_by_forward(options):
    composite = transformer(options)
    found = same(Translator(), TEXT, composite)
    given = same(Translator(), TEXT, composite, given={"padding": TEXT == 0})
    for name in found:
        torch.testing.assert_close(found[name], given[name])
    resting = same(Translator().eval(), TEXT, composite)
    for name in found:
        torch.testing.assert_close(resting[name], found[name])
    none = same(Translator(), TEXT, composite, given={"padding": TEXT == 99})
    assert not torch.allclose(none["head.weight"], given["head.weight"])


class Whole(nn.Module):
    """nn.Transformer between two tables and a head; the target comes with the batch."""

    def __init__(self, **options) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.source, self.target = nn.Embedding(20, 8), nn.Embedding(20, 8)
        sizes = {"d_model": 8, "nhead": 2, "dim_feedforward": 12, "dropout": 0.0}
        self.both = nn.Transformer(
            num_encoder_layers=1, num_decoder_layers=2, batch_first=True, **sizes, **options
        )
        self.head = nn.Linear(8, 20)

    def forward(self, tokens, target):
        padding = tokens == 0
        y = self.both(
            self.source(tokens), self.target(target), tgt_mask=CAUSAL[1:, 1:], tgt_is_causal=True,
            src_key_padding_mask=padding, memory_key_padding_mask=padding,
        )  # fmt: skip
        return self.head(y)


@pytest.mark.parametrize("norm_first", [False, True])
@every
def test_transformer_of_two_sequences(options, norm_first):
    given = {"target": TEXT[:, 1:]}
    same(Whole(norm_first=norm_first), TEXT, transformer(options), given=given)


@pytest.mark.parametrize("mode", ["attnlrp", "plain"])
def test_weights_after_some_steps(mode):
    """Masks that differ from step to step, and steps without one in between."""
    composite = composites.Transformer(mode, eps=1e-9)
    expected, found = Attending().double(), Attending().double()
    batches = [
        {"padding": PADDED, "mask": CAUSAL}, {}, {"padding": ~PADDED.flip(0, 1)},
        {"padding": PADDED},
    ]  # fmt: skip

    def reward(out, _=None):
        return rand(*out.shape, seed=3)

    step = lfp_kernels.fuse(found, composite, reward=reward, optimizer=optim.AdamW(0.01))
    optimizer = torch.optim.AdamW(expected.parameters(), lr=0.01, weight_decay=0.01)
    for given in batches:
        out = step(TOKENS, None, **given).out
        feedback(expected, composite, TOKENS, reward=reward, given=given)
        optimizer.step()
    for (name, a), b in zip(found.named_parameters(), expected.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)
    assert out.shape == (2, 6, 5)


def test_wrong_masks_change_nothing():
    model = Attending().double()
    step = lfp_kernels.fuse(model, composites.Transformer(), optimizer=optim.SGD(1.0))
    y = torch.zeros(2, 6, dtype=torch.int64)
    wrong = [
        ({"padding": PADDED[:, :5]}, r"attend: key_padding_mask: expected shape \(2, 6\), got .*5"),
        ({"padding": PADDED[:1]}, r"key_padding_mask: expected shape \(2, 6\), got \(1, 6\)"),
        ({"padding": PADDED.long()}, "key_padding_mask: expected a bool .* got torch.int64"),
        ({"mask": CAUSAL[:5]}, r"attn_mask: expected shape \(6, 6\) or \(4, 6, 6\), got \(5, 6\)"),
        ({"mask": ADDED[None]}, r"attn_mask: expected shape .*, got \(1, 6, 6\)"),
        ({"padding": ADDED[:2].float()}, "padding: expected torch.float64 like the parameters"),
        ({"padding": None}, "padding: expected a torch.Tensor, got NoneType"),
        ({"paddings": PADDED}, r"paddings: expected an argument of .* \(padding, mask\)"),
    ]
    before = copy.deepcopy(model.state_dict())
    for given, message in wrong:
        with pytest.raises((TypeError, ValueError), match=message):
            step(TOKENS, y, **given)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    step(TOKENS, y, padding=PADDED)
    assert not torch.equal(model.out.weight, before["out.weight"])


@pytest.mark.parametrize("given", [{"padding": PADDED[:, :5]}, {"mask": CAUSAL[:5]}])
def test_wrong_masks_of_the_drop_in_way(given):
    model, composite = Attending().double(), composites.Transformer()
    with pytest.raises(ValueError, match="multi_head_attention: .*_mask: expected shape"):
        feedback(model, composite, TOKENS, given=given)


@pytest.mark.parametrize("name", ["key_padding_mask", "attn_mask"])
def test_learned_masks_are_refused(name):
    class Learned(Attending):
        def __init__(self):
            super().__init__()
            self.learned = nn.Parameter(torch.zeros(6, 6))

        def forward(self, tokens):
            x = self.table(tokens)
            return self.attend(x, x, x, need_weights=False, **{name: self.learned})[0]

    with pytest.raises(ValueError, match=r"learned mask\) has no stage, at .*test_fused_masks.py"):
        lfp_kernels.fuse(Learned(), composites.Transformer(), optimizer=optim.SGD(1.0))


def test_causal_by_a_flag_and_padded():
    """Without a mask of its own the flag alone says it, in both ways."""

    class Flagged(Attending):
        def forward(self, tokens, padding, mask=None):
            x = self.table(tokens)
            options = {"attn_mask": mask, "key_padding_mask": padding, "need_weights": False}
            return self.out(self.attend(x, x, x, is_causal=mask is None, **options)[0])

    composite = composites.Transformer(eps=1e-9)
    found = same(Flagged(), TOKENS, composite, given={"padding": PADDED})
    expected = same(Flagged(), TOKENS, composite, given={"padding": PADDED, "mask": CAUSAL})
    for name in found:
        torch.testing.assert_close(found[name], expected[name])


class Two(nn.Module):
    """A second tensor that has no default, of any kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.a, self.b, self.out = nn.Linear(6, 6), nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, x, memory, scale=None, *, unread=None):
        y = self.a(x) + self.b(memory)
        return self.out(y if scale is None else y * scale)


@pytest.mark.parametrize("further", [{}, {"scale": rand(6)}, {"scale": rand(6), "unread": rand(1)}])
@every
def test_several_arguments(options, further):
    given = {"memory": rand(3, 4), **further}
    same(Two(), rand(3, 6), transformer(options), given=given)
    same(Two(), rand(3, 6), composites.Epsilon(1e-9), given={"memory": rand(3, 4)})


def test_an_argument_without_default_must_be_given():
    step = lfp_kernels.fuse(Two(), composites.Epsilon(), optimizer=optim.SGD(1.0))
    with pytest.raises(TypeError, match=r"memory: .* has no default.*step\(x, y, memory=...\)"):
        step(torch.ones(3, 6), torch.zeros(3, dtype=torch.int64))
