"""Calls of transformers, in the forms that models write them: what each hands on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as TF
from test_transformer import EPS, close, feedback, rand, stab
from torch import nn

from lfp_kernels import composites

MODES = pytest.mark.parametrize("mode", ["attnlrp", "plain"])


class Calls(nn.Module):
    """A function of two linear layers' outputs; the parameters beside them have both signs."""

    def __init__(self, function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.w, self.table = nn.Parameter(rand(6)), nn.Parameter(rand(1, 9, 6))
        self.function = function

    def forward(self, x):
        return self.function(self, self.a(x), self.b(x))


def found_of(function, **options):
    composite = composites.Transformer(eps=EPS, **options)
    return feedback(Calls(function).double(), composite, rand(2, 4, 6))


def expected_of_layer(layer, r):
    """LFP-epsilon of a layer without bias whose output got the reward r."""
    x = rand(2, 4, 6)
    weight = layer.weight.detach()
    return weight.abs() * torch.einsum("nto,nti->oi", r / stab(x @ weight.T), x)


@pytest.mark.parametrize("norms", ["attnlrp", "epsilon"])
def test_rms_norm_without_weight_covers_all_its_dimensions(norms):
    found = found_of(lambda m, a, b: TF.rms_norm(a, (4, 6), eps=1e-3), norms=norms)
    weight = torch.ones(4, 6, dtype=torch.float64)
    expected = found_of(lambda m, a, b: TF.rms_norm(a, (4, 6), weight, eps=1e-3), norms=norms)
    close(found, expected)


def in_place(a, b):
    a += b
    return a.add_(b)


@MODES
def test_gradient_sums_in_place_are_those_out_of_place(mode):
    options = {"mode": mode, "residual": "gradient"}
    found = found_of(lambda m, a, b: in_place(a, b), **options)
    close(found, found_of(lambda m, a, b: a + b + b, **options))
    model = Calls(None).double()
    torch.testing.assert_close(found["a.weight"], expected_of_layer(model.a, rand(2, 4, 6, seed=3)))
    found = found_of(lambda m, a, b: torch.zeros_like(a).add_(a, alpha=2) + b, **options)
    close(found, found_of(lambda m, a, b: torch.add(b, a, alpha=2), **options))
    with pytest.raises(ValueError, match="on a view"):
        found_of(lambda m, a, b: a[:, :1].add_(b[:, :1]), **options)


@MODES
def test_learned_masks_are_refused_by_name(mode):
    def attend(m, a, b):
        return TF.scaled_dot_product_attention(a, b, b, attn_mask=m.table[:, :4, :4])

    with pytest.raises(ValueError, match="dot_product_attention: attn_mask: .*requires_grad"):
        found_of(attend, mode=mode)
    layer = nn.MultiheadAttention(6, 2, batch_first=True).double()
    for name in ("attn_mask", "key_padding_mask"):
        mask = nn.Parameter(rand(4, 4) if name == "attn_mask" else rand(2, 4))
        call = {"need_weights": False, name: mask}
        with pytest.raises(ValueError, match=f"multi_head_attention: {name}: .*requires_grad"):
            found_of(lambda m, a, b, call=call: layer(a, b, b, **call)[0], mode=mode)
        call[name] = mask.detach()
        assert found_of(lambda m, a, b, call=call: layer(a, b, b, **call)[0], mode=mode)


@MODES
def test_dtype_of_softmax_by_position(mode):
    model = Calls(lambda m, a, b: torch.softmax(a.float(), -1, torch.float64))
    with composites.Transformer(mode).context(model.double()):
        assert model(rand(2, 4, 6)).dtype == torch.float64
    found = found_of(lambda m, a, b: torch.softmax(a.float(), -1, torch.float64), mode=mode)
    close(found, found_of(lambda m, a, b: a.float().softmax(-1, dtype=torch.float64), mode=mode))


def added_in_place(value, a):
    c = a * 1.0
    c += value
    return c.add_(value[..., :1])


# How a model uses a parameter [1, 4, 6] beside activations [2, 4, 6].
USES = {
    "added": lambda m, w, a: a + w + (w + a),
    "part added": lambda m, w, a: a + w[:, :1] + w[:, 1, 2:3],
    "added in place": lambda m, w, a: added_in_place(w, a),
    "part added in place": lambda m, w, a: added_in_place(w[:, 1:2], a),
    "expanded, in place": lambda m, w, a: added_in_place(w.expand(2, -1, -1), a),
    "subtracted": lambda m, w, a: (a - w) - w[:, :1],
    "negated": lambda m, w, a: a + (-w),
    "less an activation": lambda m, w, a: w - a,
    "scaled": lambda m, w, a: a + 2 * w + w / 3,
    "expanded token": lambda m, w, a: torch.cat((w.expand(2, -1, -1), a), 1),
    "token": lambda m, w, a: torch.cat([w, a[:1]], 1) + w[:, :1],
    "stacked": lambda m, w, a: torch.stack([w[0], a[0]]),
    "picked rows": lambda m, w, a: a + w[:, [0, 2, 2, 1]],
    "copied": lambda m, w, a: a + w.transpose(1, 2).reshape(1, 4, 6) + w.clone(),
    "converted": lambda m, w, a: a + w.float().double() + w.to(a.dtype),
    "chosen": lambda m, w, a: torch.where(a > 0, a, w) + w.masked_fill(a[:1] > 0, 0.0),
    "activated": lambda m, w, a: a + torch.tanh(w),
    "reduced": lambda m, w, a: a + w.mean(1, keepdim=True) + w.sum(1, keepdim=True),
    "softmax": lambda m, w, a: a + w.softmax(-1),
    "normed": lambda m, w, a: a + TF.layer_norm(w, (6,)) + TF.rms_norm(w, (4, 6), eps=1e-5),
    "layer": lambda m, w, a: a + m.b(w),
    "queries": lambda m, w, a: TF.scaled_dot_product_attention(w.expand(2, -1, -1), a, a),
    "key, value": lambda m, w, a: TF.scaled_dot_product_attention(query=a[:1], key=w, value=w),
}  # fmt: skip
PRODUCTS = {
    "product": lambda m, w, a: a * w + 0.5 * a,
    "product with a part": lambda m, w, a: w[:, :1] * a,
    "matrix product": lambda m, w, a: a @ w.transpose(1, 2),
    "einsum": lambda m, w, a: torch.einsum("nti,nsi->nts", a[:1], w),
}  # fmt: skip
SUMS = pytest.mark.parametrize("residual", ["epsilon", "gradient"])


class Using(Calls):
    """``w``: a parameter, or an activation with its values."""

    def __init__(self, use, parameter) -> None:
        super().__init__(lambda m, a, b: use(m, m.value, a))
        value = rand(1, 4, 6, seed=4)
        self.value = nn.Parameter(value) if parameter else value.requires_grad_()


def of_the_value(use, composite):
    """What arrives at an activation, and the feedback of a parameter in its place."""
    found = []
    for parameter in (False, True):
        model = Using(use, parameter).double()
        feedback(model, composite, rand(2, 4, 6))
        found.append(-model.value.grad)
    return found


@pytest.mark.parametrize("name", [*USES, *PRODUCTS])
@SUMS
@MODES
def test_feedback_of_a_parameter_is_signed_relevance(mode, residual, name):
    composite = composites.Transformer(mode, eps=EPS, residual=residual)
    relevance, found = of_the_value({**USES, **PRODUCTS}[name], composite)
    if name in PRODUCTS and mode == "attnlrp":
        relevance = 2 * relevance  # an activation gets half, a parameter leaves all to each
    assert relevance.abs().sum() > 0
    torch.testing.assert_close(found, rand(1, 4, 6, seed=4).sign() * relevance)


@MODES
def test_feedback_of_positions_is_the_formula(mode):
    """The whole reward by gradient sums, the contributed share by epsilon."""
    position, r = Using(None, True).value.detach(), rand(2, 4, 6, seed=3)
    for use in ("added in place", "added"):
        function = {"added": lambda m, w, a: a + w, "added in place": lambda m, w, a: plus(a, w)}
        composite = composites.Transformer(mode, eps=EPS, residual="gradient")
        found = of_the_value(function[use], composite)[1]
        torch.testing.assert_close(found, position.sign() * r.sum(0, keepdim=True))
        composite = composites.Transformer(mode, eps=EPS)
        found = of_the_value(function[use], composite)[1]
        a = rand(2, 4, 6) @ Calls(None).double().a.weight.detach().T
        share = (r / stab(a + position)).sum(0, keepdim=True)
        torch.testing.assert_close(found, position.abs() * share)


def plus(a, w):
    a += w
    return a


BASE = (
    "added", "part added", "added in place", "part added in place", "expanded, in place",
    "expanded token", "token", "stacked", "picked rows", "copied", "activated", "reduced", "layer",
)  # fmt: skip


@pytest.mark.parametrize("name", BASE)
def test_of_other_composites_too(name):
    relevance, found = of_the_value(USES[name], composites.Epsilon(EPS))
    assert relevance.abs().sum() > 0
    torch.testing.assert_close(found, rand(1, 4, 6, seed=4).sign() * relevance)


def test_gradients_are_not_signed():
    """Where products of layers alone differ from backpropagation, nothing is relevance."""
    use = USES["part added in place"]
    relevance, found = of_the_value(use, composites.FeedbackAlignment())
    torch.testing.assert_close(found, relevance)


# Weights of layers that forward computes of parameters, each with the same values.
COMPUTED = {
    "negated": lambda w: torch.neg(-w),
    "scaled": lambda w: (w * 4) / 4,
    "joined": lambda w: torch.cat([w[:2], w[2:]]),
    "copied": lambda w: w.t().contiguous().t().clone(),
    "converted": lambda w: w.float().double(),
    "masked": lambda w: w * torch.ones(6, 6, dtype=w.dtype),
    "filled": lambda w: w.masked_fill(torch.zeros(6, 6, dtype=torch.bool), 0.0),
    "a part": lambda w: w.view(2, 3, 6).flatten(0, 1),
}
LAYERS = {
    "linear": lambda m, a, w: TF.linear(a, w, w[0].clone()),
    "addmm": lambda m, a, w: torch.addmm(w[0], a[0], w),
    "norm": lambda m, a, w: TF.layer_norm(a, (6,), w[0], w[1]),
    "embedding": lambda m, a, w: TF.embedding(torch.tensor([[1, 5, 5], [0, 2, 3]]), w) + a[:, :3],
    "convolution": lambda m, a, w: TF.conv1d(a.transpose(1, 2), w[..., None]),
}


@pytest.mark.parametrize("how", COMPUTED)
@pytest.mark.parametrize("layer", LAYERS)
@MODES
def test_weights_that_forward_computes(mode, layer, how):
    """They get what the weight itself would: the layer's sign is not applied twice."""
    composite = composites.Transformer(mode, eps=EPS)
    expected = found_of_weight(LAYERS[layer], lambda w: w, composite)
    found = found_of_weight(LAYERS[layer], COMPUTED[how], composite)
    loose = {"rtol": 1e-4, "atol": 1e-4} if how == "converted" else {}  # float32 between
    torch.testing.assert_close(found, expected, **loose)


def found_of_weight(layer, how, composite):
    model = Calls(lambda m, a, b: layer(m, a, how(m.weight))).double()
    model.weight = nn.Parameter(rand(6, 6, seed=8))
    return feedback(model, composite, rand(2, 4, 6))["weight"]


@pytest.mark.parametrize("how", ["joined", "copied", "a part", "scaled"])
def test_computed_weights_of_other_composites(how):
    composite = composites.Epsilon(EPS)
    expected = found_of_weight(LAYERS["linear"], lambda w: w, composite)
    torch.testing.assert_close(
        found_of_weight(LAYERS["linear"], COMPUTED[how], composite), expected
    )


@pytest.mark.filterwarnings("ignore:.*has no rule")
@MODES
def test_parameters_of_calls_without_a_rule(mode):
    composite = composites.Transformer(mode, eps=EPS, default="gradient")
    relevance, found = of_the_value(lambda m, w, a: a + torch.exp(w), composite)
    torch.testing.assert_close(found, rand(1, 4, 6, seed=4).sign() * relevance)


@pytest.mark.parametrize(
    "composite",
    [composites.Epsilon(EPS), *(composites.Transformer(m, EPS) for m in ("attnlrp", "plain"))],
    ids=["epsilon", "attnlrp", "plain"],
)
def test_alpha_of_a_sum_is_a_product(composite):
    x = rand(2, 4, 6)
    written = [
        lambda m, a, b: torch.add(a, b, alpha=-2.0),
        lambda m, a, b: a.add(b, alpha=-2.0),
        lambda m, a, b: a + -2.0 * b,
    ]
    *found, expected = (feedback(Calls(f).double(), composite, x) for f in written)
    for one in found:
        close(one, expected)
    assert (expected["b.weight"] != 0).any()


@pytest.mark.parametrize("power", [lambda a: a**3, lambda a: torch.pow(a, 3), lambda a: a.pow(3)])
@MODES
def test_powers(mode, power):
    """What the product with itself hands on: all, or the gradient."""
    found = found_of(lambda m, a, b: power(a), mode=mode)
    if mode == "plain":
        close(found, found_of(lambda m, a, b: a * a * a, mode=mode))
        square = found_of(lambda m, a, b: a.square(), mode=mode)
        close(square, found_of(lambda m, a, b: a * a, mode=mode))
    else:
        expected = expected_of_layer(Calls(None).double().a, rand(2, 4, 6, seed=3))
        torch.testing.assert_close(found["a.weight"], expected)


@pytest.mark.parametrize("power", [lambda a: a**-1, lambda a: a.relu() ** a, lambda a: 2**a])
@MODES
def test_powers_without_a_rule(mode, power):
    with pytest.raises(ValueError, match="pow.* has no rule"):
        found_of(lambda m, a, b: power(a), mode=mode)
