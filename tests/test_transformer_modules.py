"""nn.TransformerEncoderLayer and nn.TransformerDecoderLayer: each is the same network written with
linear layers and scaled_dot_product_attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as TF
from test_transformer import EPS, close, feedback, rand
from torch import nn

from lfp_kernels import composites

LENGTH, BATCH, WIDTH = 5, 3, 8
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
PADDED = torch.arange(LENGTH) >= torch.tensor([5, 3, 4])[:, None]  # True: no key
MASKS = {
    "open": {},
    "causal": {"mask": CAUSAL, "is_causal": True},
    "causal, added": {
        "mask": nn.Transformer.generate_square_subsequent_mask(LENGTH).double(), "is_causal": True
    },
    "padded": {"padding": PADDED},
    "padded, added": {"padding": rand(BATCH, LENGTH, seed=5)},
    "causal and padded": {"mask": CAUSAL, "padding": PADDED},
    "causal said, and padded": {"mask": CAUSAL, "padding": PADDED, "is_causal": True},
    "per head": {"mask": rand(BATCH * 2, LENGTH, LENGTH, seed=6)},
}  # fmt: skip

every_mask = pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
MODES = pytest.mark.parametrize("mode", ["attnlrp", "plain"])


def shown(mask=None, padding=None, is_causal=False):
    """The masks of torch's modules as one that is added to the logits [N, heads, L, S]."""
    total = torch.zeros(BATCH, 2, LENGTH, LENGTH, dtype=torch.float64)
    for part in (mask, padding):
        if part is None:
            continue
        if part.dtype == torch.bool:
            part = torch.zeros(part.shape, dtype=torch.float64).masked_fill(part, -torch.inf)
        if part.shape == (BATCH, LENGTH):
            part = part[:, None, None]
        elif part.dim() == 3:
            part = part.view(BATCH, 2, LENGTH, LENGTH)
        total = total + part
    return total


def attend(m, x, memory, mask):
    """Multi-head attention [L, N, E] of two heads."""
    q, k, v = (
        TF.linear(source, weight, bias).unflatten(-1, (2, -1)).permute(1, 2, 0, 3)
        for source, weight, bias in zip(
            (x, memory, memory), m.in_proj_weight.chunk(3), m.in_proj_bias.chunk(3)
        )
    )
    p = m.dropout if m.training else 0.0
    y = TF.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
    return m.out_proj(y.permute(2, 0, 1, 3).flatten(-2))


class Written(nn.Module):
    """The layer written out, length first; of an encoder where there is no memory."""

    def __init__(self, layer, memory=None, masks=(), across=None):
        super().__init__()
        self.layer, self.memory, self.masks, self.across = layer, memory, masks, across

    def blocks(self):
        m = self.layer
        within = shown(**self.masks) if self.masks else None
        across = None if self.across is None else shown(**self.across)

        def feed(x):
            return m.linear2(m.dropout(m.activation(m.linear1(x))))

        yield m.norm1, lambda x: m.dropout1(attend(m.self_attn, x, x, within))
        if self.memory is None:
            yield m.norm2, lambda x: m.dropout2(feed(x))
        else:
            other = self.memory.transpose(0, 1)
            yield m.norm2, lambda x: m.dropout2(attend(m.multihead_attn, x, other, across))
            yield m.norm3, lambda x: m.dropout3(feed(x))

    def forward(self, x):
        x = x.transpose(0, 1)
        for norm, block in self.blocks():
            x = x + block(norm(x)) if self.layer.norm_first else norm(x + block(x))
        return x.transpose(0, 1)


class Module(nn.Module):
    """torch's layer on [N, L, E], whether it takes the batch or the length first."""

    def __init__(self, layer, memory=None, **options):
        super().__init__()
        self.layer, self.memory, self.options = layer, memory, options

    def forward(self, x):
        first = self.layer.self_attn.batch_first
        tensors = (x,) if self.memory is None else (x, self.memory)
        y = self.layer(*(t if first else t.transpose(0, 1) for t in tensors), **self.options)
        return y if first else y.transpose(0, 1)


def layer_of(kind, **options):
    torch.manual_seed(0)
    layer = kind(WIDTH, 2, 12, **{"dropout": 0.0, "batch_first": True, **options}).double()
    for p in layer.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, 0.5, 0.4)
    return layer


def found_of(model, composite, *, train=True, seed=None):
    """Feedback, and what arrives at the input."""
    model.train(train)
    x = rand(BATCH, LENGTH, WIDTH).requires_grad_()
    if seed is not None:
        torch.manual_seed(seed)
    found = feedback(model, composite, x)
    assert all(f.isfinite().all() for f in found.values())
    return {**found, "input": x.grad}


def encoder_options(mask=None, padding=None, is_causal=False):
    return {"src_mask": mask, "src_key_padding_mask": padding, "is_causal": is_causal}


def decoder_options(within, across):
    names = {"mask": "mask", "padding": "key_padding_mask", "is_causal": "is_causal"}
    return {
        f"{side}_{names[key]}": value
        for side, masks in (("tgt", within), ("memory", across))
        for key, value in masks.items()
    }


@every_mask
@pytest.mark.parametrize("norm_first", [False, True])
@MODES
def test_encoder_layer(mode, norm_first, masks):
    layer = layer_of(nn.TransformerEncoderLayer, norm_first=norm_first, activation="gelu")
    composite = composites.Transformer(mode, eps=EPS)
    expected = found_of(Written(layer, masks=masks), composite)
    for train in (True, False):
        module = Module(layer, **encoder_options(**masks))
        close(found_of(module, composite, train=train), expected)


@every_mask
@pytest.mark.parametrize("norm_first", [False, True])
@MODES
def test_decoder_layer(mode, norm_first, masks):
    """The masks of the target, and at the memory those that do not hide the future."""
    layer = layer_of(nn.TransformerDecoderLayer, norm_first=norm_first)
    memory, across = rand(BATCH, LENGTH, WIDTH, seed=2), MASKS["padded"]
    composite = composites.Transformer(mode, eps=EPS)
    expected = found_of(Written(layer, memory, masks, across), composite)
    for train in (True, False):
        module = Module(layer, memory, **decoder_options(masks, across))
        close(found_of(module, composite, train=train), expected)


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
@MODES
def test_dropout_and_length_first(mode, kind):
    layer = layer_of(kind, dropout=0.4, batch_first=False)
    memory = rand(BATCH, LENGTH, WIDTH, seed=2) if kind is nn.TransformerDecoderLayer else None
    module, written = Module(layer, memory), Written(layer, memory)
    for dropout in ("scaled", "conserving"):
        composite = composites.Transformer(mode, eps=EPS, dropout=dropout)
        found = found_of(module, composite, seed=1)
        close(found, found_of(written, composite, seed=1))
    at_rest = found_of(module, composite, train=False)
    close(at_rest, found_of(written, composite, train=False))
    assert not torch.equal(at_rest["input"], found["input"])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [False, True])
@MODES
def test_no_fast_path_while_attached(mode, padded, monkeypatch):
    """Evaluated and frozen, torch would run a layer as one call that has no rule."""
    layer = layer_of(nn.TransformerEncoderLayer, activation="gelu")
    options = {"src_key_padding_mask": PADDED} if padded else {}
    encoder = nn.TransformerEncoder(layer, 2).double().eval()
    attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True).double().eval()
    x, composite = rand(BATCH, LENGTH, WIDTH), composites.Transformer(mode, eps=EPS)
    called = []
    for name in ("_transformer_encoder_layer_fwd", "_native_multi_head_attention"):
        original = getattr(torch, name)

        def watched(*args, original=original, **kwargs):
            called.append(original)
            return original(*args, **kwargs)

        monkeypatch.setattr(torch, name, watched)
    for model in (encoder, attention):
        model.requires_grad_(False)
    with torch.no_grad():
        encoder(x, **options)
        attention(x, x, x, need_weights=False)
    assert len(called) == 3  # it does so without the composite
    called.clear()
    for grad in (False, True):
        with (
            torch.set_grad_enabled(grad),
            composite.context(encoder),
            composite.context(attention),
        ):
            encoder(x, **options)
            attention(x, x, x, need_weights=False)
    # Behind a layer that learns, what is frozen hands the same reward on.
    behind = Behind(encoder, options)
    found = [feedback(behind.train(train), composite, x) for train in (True, False)]
    close(*found)
    assert set(found[0]) == {"first.weight", "first.bias"}
    assert not called


class Behind(nn.Module):
    def __init__(self, encoder, options):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.encoder = nn.Linear(WIDTH, WIDTH).double(), encoder
        self.options = options

    def forward(self, x):
        return self.encoder(self.first(x), **self.options)


def test_default_attention_weights_are_refused():
    attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True).double()
    x = rand(BATCH, LENGTH, WIDTH)
    with (
        composites.Transformer().context(attention),
        pytest.raises(ValueError, match="need_weights: expected False"),
    ):
        attention(x, x, x)
