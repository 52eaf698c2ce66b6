"""attribute(): relevance of inputs, layers and weights; zennit and captum are compared with in
tests/peers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lfp_kernels as lfp
from lfp_kernels import composites as C
from lfp_kernels import rules as R
from lfp_kernels.testing import linear_oracle

F64 = torch.float64
RULES = [
    R.Epsilon(), R.Zero(), R.ZPlus(), R.AlphaBeta(), R.Gamma(), R.WSquare(), R.Flat(),
    R.ZBox(low=-5.0, high=5.0),
]  # fmt: skip


def network(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=bias), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(4 * 9, 48, bias), nn.ReLU(inplace=True), nn.Linear(48, 5, bias),
    ).to(F64)  # fmt: skip


def batch():
    return torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0), dtype=F64)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_relevance_is_conserved_without_biases(rule, backend):
    """Layer by layer, per sample; and a layer's weights carry what leaves it."""
    model, x = network(bias=False), batch()
    with lfp.use_backend(backend):
        got = lfp.attribute(model, x, 2, C.Composite(rule), layers=["0", "4"], weights=True)
    total = got.start.sum(1)
    for part in (got.layers["4"], got.layers["0"], got.input):
        torch.testing.assert_close(part.flatten(1).sum(1), total, rtol=1e-3, atol=1e-5)
    for name in ("6.weight", "4.weight", "0.weight"):
        torch.testing.assert_close(got.weights[name].sum(), total.sum(), rtol=1e-3, atol=1e-5)


def test_weight_relevance_is_message_by_message():
    x = torch.randn(4, 3, dtype=F64)
    model = nn.Sequential(nn.Linear(3, 5)).to(F64)
    got = lfp.attribute(model, x, None, C.Epsilon(1e-3), weights=True)
    weight, bias = model[0].weight.detach(), model[0].bias.detach()
    z = x @ weight.t() + bias
    r_in, w_fb, b_fb = linear_oracle(x, weight, bias, z, got.start, 1e-3)
    torch.testing.assert_close(got.input, r_in)
    torch.testing.assert_close(got.weights["0.weight"], w_fb * weight.sign())
    torch.testing.assert_close(got.weights["0.bias"], b_fb * bias.sign())
    # What does not reach the input is absorbed by the bias and by the stabilizer.
    assert float(got.weights["0.weight"].sum()) == pytest.approx(float(got.input.sum()))


def test_targets():
    model, x = network(), batch()
    out = model(x).detach()
    labels = torch.tensor([1, 0, 4])
    for target, want in (
        (None, out.argmax(1)),
        (3, torch.tensor([3, 3, 3])),
        (labels, labels),
        (labels.int(), labels),
    ):
        got = lfp.attribute(model, x, target)
        assert torch.equal(got.start, nn.functional.one_hot(want, 5) * out)
        assert torch.equal(got.output, out)
    start = torch.randn(3, 5, dtype=F64)
    assert torch.equal(lfp.attribute(model, x, start).start, start)


def test_the_model_stays_as_it_was():
    model, x = network(), batch()
    model[4].weight.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    state, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    lfp.attribute(model, x, layers=["0"], weights=True)
    with pytest.raises(ValueError):
        lfp.attribute(model, x, 7)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values()))
    assert flags == [p.requires_grad for p in model.parameters()]
    assert hooks == [len(m._forward_hooks) for m in model.modules()]
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert not x.requires_grad


def test_composites_choose_by_type_name_predicate_and_first():
    model = network()
    composite = C.Composite(
        R.Epsilon(),
        layers=[
            (C.FIRST, R.Flat()),
            ("6", R.Gamma()),
            (lambda name, m: getattr(m, "out_features", 0) == 48, R.ZPlus()),
            (nn.Linear, R.WSquare()),
        ],
    )
    composite.check(model)
    chosen = {n: composite.rule_of(n, m).name for n, m in model.named_modules() if n in "046"}
    del chosen[""]
    assert chosen == {"0": "flat", "4": "zplus", "6": "gamma"}
    plus = C.EpsilonPlus(first=R.ZBox(low=-1.0, high=1.0))
    plus.check(model)
    assert plus.rule_of("0", model[0]).name == "zbox" and plus.rule_of("6", model[6]) == R.Epsilon()
    assert plus.function_rule == R.Epsilon()


def test_bad_input():
    model, x = network(), batch()
    for call, message in (
        (lambda: lfp.attribute(model, x.int()), r"x: expected a floating-point tensor, got torch"),
        (lambda: lfp.attribute(model, x, "cat"), r"target: expected a class, labels \[N\]"),
        (lambda: lfp.attribute(model, x, torch.ones(2).long()), r"integer labels of shape \(3,\)"),
        (lambda: lfp.attribute(model, x, 5), r"target: expected classes in \[0, 5\)"),
        (lambda: lfp.attribute(model, x, layers=["9"]), r"no module is named '9'; there are: 0, 1"),
        (lambda: lfp.attribute(model, x, composite=R.Epsilon()), r"composite: expected e.g."),
        (
            lambda: C.Composite(R.Flat(), layers=[("7", R.Flat())]).check(model),
            r"no module is named '7'; the layers with a rule are: 0, 4, 6",
        ),
        (lambda: C.EpsilonPlus(first="box"), r"first: expected one of \('flat', 'wsquare'\)"),
        (lambda: R.AlphaBeta(alpha=2.0, beta=2.0), r"expected alpha - beta = 1, got 2.0 - 2.0"),
        (lambda: R.ZBox(low=1.0, high=0.0), r"expected low < high"),
        (lambda: R.Gamma(gamma=-0.1), r"gamma: expected a finite number >= 0, got -0.1"),
        (lambda: R.Separate(input=R.Hebbian()), r"Hebbian is a rule of weights"),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=message):
            call()
