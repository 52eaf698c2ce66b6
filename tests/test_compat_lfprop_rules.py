"""Rules and layer maps of lfp_kernels.compat.lfprop, against their formulas in autograd."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from compat_lfprop_cases import RELATIVE, feedback, propagate, relative, small, snapshot, stab
from golden_networks import load
from torch import Tensor, nn

import lfp_kernels
from lfp_kernels.compat.lfprop.model import activations
from lfp_kernels.compat.lfprop.propagation import propagator_lxt as lxt


@pytest.fixture(autouse=True, params=["native", "reference"])
def _backend(request: pytest.FixtureRequest) -> Any:
    with lfp_kernels.use_backend(request.param):
        yield


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(5, 4), (6, 5)),
    "conv": (nn.Conv2d(2, 3, 3, padding=1), (3, 2, 5, 4)),
    "norm": (nn.BatchNorm2d(3), (4, 3, 3, 2)),
}


@pytest.fixture(params=LAYERS)
def one_layer(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """model, x, z with its graph to x and the parameters, reward at z"""
    layer, shape = LAYERS[request.param]
    model = small(copy.deepcopy(layer))
    x = torch.randn(shape).double().requires_grad_()
    z = copy.deepcopy(model)(x) if request.param == "norm" else model(x)
    if request.param == "norm":  # in training mode, where running statistics move
        z = TF.batch_norm(x, None, None, model[0].weight, model[0].bias, training=True)
    return model, x, z, torch.randn_like(z)


def product(z: Tensor, of: Tensor, signal: Tensor) -> Tensor:
    return torch.autograd.grad(z, of, signal.detach(), retain_graph=True)[0]


EPS = 1e-2


@pytest.mark.parametrize("oja", [False, True])
def test_hebbian_composite(one_layer: Any, oja: bool) -> None:
    model, x, z, r = one_layer
    composite = lxt.LFPHebbianEpsilonComposite(epsilon=EPS, use_oja=oja)
    _, found = propagate(composite, model, x, r)
    assert relative(found, x.detach() * product(z, x, r / stab(z, EPS))) < RELATIVE
    for key, value in feedback(model).items():
        w = model.get_parameter(key)
        expected = product(z, w, r * z)
        if oja:
            expected -= w.detach() * product(z, w, z**3) / product(z, w, z)
        assert relative(value, w.detach().abs() * expected) < 1e-8, key


@pytest.mark.parametrize("hebbian", [False, True])
@pytest.mark.parametrize(("positive", "negative"), [(True, False), (False, True), (True, True)])
def test_reversed_rewards(one_layer: Any, positive: bool, negative: bool, hebbian: bool) -> None:
    model, x, z, r = one_layer
    rule = lxt.RuleGenerator(
        lxt.LFPEpsilon, epsilon=EPS, reverse_pos=positive, reverse_neg=negative, hebbian=hebbian
    )
    composite = lxt.ParameterizableComposite({nn.Module: rule})
    composite.layer_map = {type(model[0]): rule}
    _, found = propagate(composite, model, x, r)
    turned = torch.where(((z > 0) & positive) | ((z < 0) & negative), -r, r)
    assert relative(found, x.detach() * product(z, x, turned / stab(z, EPS))) < RELATIVE
    signal = turned * z if hebbian else turned / stab(z, EPS)
    for key, value in feedback(model).items():
        w = model.get_parameter(key)
        assert relative(value, w.detach().abs() * product(z, w, signal)) < RELATIVE, key


def gamma_oracle(layer: nn.Module, x: Tensor, z: Tensor, r: Tensor, gamma: float) -> Tensor:
    """Four branches, as in the definition: contributions of z's sign count 1 + gamma."""

    def branch(part: Tensor, raise_positive: bool, bias: bool) -> tuple[Tensor, Tensor]:
        modified = copy.deepcopy(layer)
        for parameter in modified.parameters():
            raised = parameter.data.clamp(min=0) if raise_positive else parameter.data.clamp(max=0)
            parameter.data += gamma * raised
        if not bias:
            nn.init.zeros_(modified.bias)
        part = part.detach().requires_grad_()
        return part, modified(part)

    up, down = x.clamp(min=0), x.clamp(max=0)
    total = torch.zeros_like(x)
    for sign, pairs in (
        (z > 0, [branch(up, True, True), branch(down, False, False)]),
        (z < 0, [branch(up, False, True), branch(down, True, False)]),
    ):
        s = torch.where(sign, r / stab(pairs[0][1] + pairs[1][1], EPS), 0.0).detach()
        for part, out in pairs:
            total += part.detach() * torch.autograd.grad(out, part, s)[0]
    return total


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_gamma_composite_is_the_gamma_rule(kind: str) -> None:
    layer, shape = LAYERS[kind]
    model = small(copy.deepcopy(layer))
    x = torch.randn(shape).double().requires_grad_()
    z = model(x)
    r = torch.randn_like(z)
    composite = lxt.LFPGammaComposite(epsilon=EPS, gamma=0.5)
    _, plain = propagate(lxt.LFPEpsilonComposite(EPS), model, x, 3 * r)
    _, found = propagate(composite, model, x, r)
    _, thrice = propagate(composite, model, x, 3 * r)
    assert relative(found, gamma_oracle(model[0], x.detach(), z.detach(), r, 0.5)) < RELATIVE
    assert relative(thrice, 3 * found) < RELATIVE  # lfprop's does not depend on the reward
    assert relative(thrice, plain) > 0.01
    for key, value in feedback(model).items():  # by epsilon
        w = model.get_parameter(key)
        expected = w.detach().abs() * product(z, w, 3 * r / stab(z, EPS))
        assert relative(value, expected) < RELATIVE, key


def test_gamma_leaves_sums_pools_and_norms_to_epsilon() -> None:
    golden = load("residual")
    composite = lxt.LFPGammaComposite(epsilon=golden.eps, gamma=0.0)  # epsilon everywhere
    _, found = propagate(composite, golden.model, golden.x, golden.reward)
    assert relative(found, golden.input_reward) < 1e-8


def test_layer_map_by_name_and_type() -> None:
    model = small(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2))
    x = torch.randn(5, 4).double()
    composite = lxt.ParameterizableComposite(
        {
            "2": lxt.RuleGenerator(lxt.LFPEpsilon, epsilon=0.5),
            nn.Linear: lxt.RuleGenerator(lxt.LFPEpsilon, epsilon=1e-3),
        }
    )
    _, found = propagate(composite, model, x, torch.ones_like)
    a = model[1](z := model[0](x))
    h = model[2](a)
    out = model[3](h)
    with torch.no_grad():
        r = h * ((1 / stab(out, 1e-3)) @ model[3].weight)
        r = a * ((r / stab(h, 0.5)) @ model[2].weight)
        r = r * (1 - a * a)  # Tanh is not in the map: the plain gradient acts
        r = x * ((r / stab(z, 1e-3)) @ model[0].weight)
    assert relative(found, r) < RELATIVE


def test_functions_outside_mapped_layers_are_left_to_autograd() -> None:
    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + x

    torch.manual_seed(0)
    model, x = Doubling().double(), torch.randn(4, 3).double()
    _, found = propagate(lxt.LFPEpsilonComposite(1e-3), model, x, torch.ones_like)
    s = 1 / stab(model.layer(x), 1e-3)
    assert relative(found, x * (s @ model.layer.weight.detach()) + 1) < RELATIVE


@pytest.mark.parametrize(
    ("activation", "factor"),
    [
        (activations.Step, lambda z: torch.ones_like(z)),
        (activations.NegTanh, lambda z: z.tanh() ** 2 - 1),
        (activations.NegReLU, lambda z: -(z > 0).double()),
        (activations.NegInnerReLU, lambda z: -(z < 0).double()),
        (activations.NegStep, lambda z: torch.zeros_like(z)),
    ],
)
def test_activations(activation: Any, factor: Any) -> None:
    values = {
        "Step": lambda z: (z > 0).double(), "NegStep": lambda z: -(z > 0).double(),
        "NegTanh": lambda z: -z.tanh(), "NegReLU": lambda z: -z.relu(),
        "NegInnerReLU": lambda z: (-z).relu(),
    }  # fmt: skip
    model = small(nn.Linear(4, 3), activation())
    x = torch.randn(7, 4).double()
    z = model[0](x).detach()
    r = torch.randn_like(z)
    out, _ = propagate(lxt.LFPEpsilonComposite(1e-3), model, x, r)
    assert torch.equal(out, values[activation.__name__](z))
    s = factor(z) * r / stab(z, 1e-3)
    w = model[0].weight
    assert relative(w.feedback, w.detach().abs() * (s.t() @ x)) < RELATIVE


def test_a_negated_activation_can_be_given_the_identity() -> None:
    model = small(nn.Linear(4, 3), activations.NegStep())
    composite = lxt.LFPEpsilonComposite()
    composite.layer_map[activations.NegStep] = lxt.IdentityRule
    propagate(composite, model, torch.randn(5, 4).double(), torch.ones_like)
    assert model[0].weight.feedback.abs().sum() > 0


def test_layers_without_a_rule_are_named() -> None:
    model = small(nn.Linear(4, 4), nn.LayerNorm(4), nn.PReLU(), nn.Linear(4, 2))
    composite = lxt.LFPEpsilonComposite()
    with pytest.warns(UserWarning, match=r"1 \(LayerNorm\), 2 \(PReLU\): parameters without"):
        composite.register(model)
    composite.remove()
    frozen = model.requires_grad_(False)
    frozen[0].requires_grad_()
    propagate(composite, frozen, torch.randn(3, 4).double(), torch.ones_like)  # no warning


class Thrice(lxt.WrapModule):
    """A rule of a user's own, calling its module as lfprop's do."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.module(x)
        return out.detach() + 3 * (out - out.detach())


def test_rules_of_your_own() -> None:
    model = small(nn.Linear(4, 3))
    layer, x = model[0], torch.randn(5, 4).double()
    before = snapshot(model)
    composite = lxt.ParameterizableComposite({nn.Linear: lxt.RuleGenerator(Thrice)})
    with composite.context(model):
        assert isinstance(model[0], Thrice) and model[0].module is layer
    _, found = propagate(composite, model, x, torch.ones_like)
    assert snapshot(model) == before and model[0] is layer
    assert relative(found, 3 * layer.weight.detach().sum(0).expand(5, 4)) < RELATIVE
    with pytest.raises(ValueError, match="needs a model around it"):
        composite.register(layer)


def test_a_rule_around_a_layer_by_hand() -> None:
    model = small(nn.Linear(4, 3))
    x = torch.randn(5, 4).double().requires_grad_()
    rule = lxt.LFPEpsilon(model[0], epsilon=1e-3)
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    (found,) = torch.autograd.grad(rule(x).sum(), x)
    _, expected = propagate(lxt.LFPEpsilonComposite(1e-3), model, x, torch.ones_like)
    assert relative(found, expected) < RELATIVE and rule.weight is model[0].weight
    assert len(calls) == 2  # hooks run once per call


def test_canonizers_are_applied_and_removed() -> None:
    class Doubles:
        def apply(self, model: nn.Module) -> list[Any]:
            model[0].weight.data *= 2
            self.model = model
            return [self]

        def remove(self) -> None:
            self.model[0].weight.data /= 2

    model = small(nn.Linear(4, 3))
    weight = model[0].weight.detach().clone()
    composite = lxt.ParameterizableComposite({nn.Linear: lxt.LFPEpsilon}, canonizers=[Doubles()])
    with composite.context(model):
        assert torch.equal(model[0].weight, 2 * weight)
    assert torch.equal(model[0].weight, weight)


def test_bad_layer_maps() -> None:
    with pytest.raises(TypeError, match="expected module types or names of children as keys"):
        lxt.ParameterizableComposite({torch.add: lxt.LFPEpsilon})
    with pytest.raises(ValueError, match="zennit_composite: expected None"):
        lxt.ParameterizableComposite({}, zennit_composite=object())
    model = small(nn.Linear(2, 2))
    before = snapshot(model)
    composite = lxt.ParameterizableComposite({nn.Linear: nn.ReLU})
    with pytest.raises(ValueError, match="expected a RuleGenerator or a rule class"):
        composite.register(model)
    assert snapshot(model) == before
    with pytest.raises(ValueError, match="eps: expected a finite number > 0"):
        lxt.LFPEpsilonComposite(epsilon=-1).register(model)
    assert snapshot(model) == before


def test_verbose_names_every_layer(capsys: pytest.CaptureFixture[str]) -> None:
    with lxt.LFPEpsilonComposite().context(small(nn.Linear(2, 2), nn.Dropout()), verbose=True):
        pass
    assert capsys.readouterr().out.splitlines() == ["Sequential: -", "0: LFPEpsilon", "1: -"]
