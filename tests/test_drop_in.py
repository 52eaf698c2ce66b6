"""The drop-in way: composites, context, backward."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as TF
from networks import FunctionalNet, small_resnet, small_vgg
from torch import Tensor, nn

import lfp_kernels
from lfp_kernels import composites, rewards
from lfp_kernels.nn import Step, Sum

EPS = 1e-6


def mlp(*sizes: int, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:]):
        layers += [nn.Linear(a, b, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


def run(model: nn.Module, x: Tensor, y: Tensor, composite: composites.Composite | None = None):
    composite = composite or composites.Epsilon(EPS)
    with composite.context(model):
        out = model(x)
        lfp_kernels.backward(out, rewards.softmax(out, y))
    return out


def test_theorem_one_of_the_paper() -> None:
    """With r = -o * dL/do, LFP-epsilon feedback is -|W| * dL/dW as eps -> 0 (arXiv 2308.12053)."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5)
    ).double()
    x, y = torch.randn(7, 1, 8, 8).double(), torch.randint(0, 5, (7,))
    loss_out = model(x)
    (slope,) = torch.autograd.grad(
        TF.cross_entropy(loss_out, y, reduction="sum"), loss_out, retain_graph=True
    )
    gradients = torch.autograd.grad(loss_out, list(model.parameters()), slope)
    with composites.Epsilon(eps=1e-12).context(model):
        out = model(x)
        lfp_kernels.backward(out, (-out * slope).detach())
    for parameter, gradient in zip(model.parameters(), gradients):
        assert parameter.grad is not None
        torch.testing.assert_close(
            parameter.grad, parameter.detach().abs() * gradient, rtol=1e-7, atol=1e-9
        )


def test_conservation_without_biases() -> None:
    torch.manual_seed(1)
    model = mlp(20, 30, 6, bias=False)
    x = torch.randn(9, 20).double().requires_grad_()
    with composites.Epsilon(eps=1e-12).context(model):
        out = model(x)
        reward = rewards.softmax(out, torch.randint(0, 6, (9,)))
        lfp_kernels.backward(out, reward)
    assert x.grad is not None
    torch.testing.assert_close(-x.grad.sum(1), reward.sum(1), rtol=1e-8, atol=1e-8)


def test_model_comes_back_as_it_was() -> None:
    model = small_resnet()
    attributes = {name: dict(m.__dict__) for name, m in model.named_modules()}
    hooks = {name: len(m._forward_hooks) for name, m in model.named_modules()}
    keys = list(model.state_dict())
    with composites.Epsilon().context(model):
        assert list(model.state_dict()) == keys
    for name, m in model.named_modules():
        assert m.__dict__.keys() == attributes[name].keys(), name
        assert len(m._forward_hooks) == hooks[name]
    assert "forward" not in model.__dict__


def test_an_own_forward_attribute_survives() -> None:
    model = mlp(4, 3)
    plain = model.forward
    model.forward = lambda x: plain(2 * x)  # type: ignore[method-assign]
    mine = model.forward
    with composites.Epsilon().context(model):
        assert model.forward is not mine
    assert model.forward is mine


def test_context_detaches_after_an_error() -> None:
    model = mlp(4, 3)
    with pytest.raises(RuntimeError, match="stop"), composites.Epsilon().context(model):
        raise RuntimeError("stop")
    assert "forward" not in model.__dict__
    composite = composites.Epsilon()
    composite.attach(model)
    composite.detach(model)


def test_outside_the_context_gradients_are_plain() -> None:
    model = mlp(4, 5, 3)
    x, y = torch.randn(6, 4).double(), torch.randint(0, 3, (6,))
    expected = torch.autograd.grad(TF.cross_entropy(model(x), y), list(model.parameters()))
    with composites.Epsilon().context(model):
        model(x)
    actual = torch.autograd.grad(TF.cross_entropy(model(x), y), list(model.parameters()))
    for a, b in zip(actual, expected):
        assert torch.equal(a, b)


def test_in_place_network_equals_out_of_place_network() -> None:
    """In-place ReLU and += as torchvision writes them: same numbers as the out-of-place network."""
    torch.manual_seed(2)
    one, other = small_resnet(inplace=True), small_resnet(inplace=False)
    other.load_state_dict(one.state_dict())
    x, y = torch.randn(4, 3, 12, 12).double(), torch.randint(0, 5, (4,))
    out = run(one, x, y)
    assert torch.equal(out, run(other, x, y))
    for (name, a), b in zip(one.named_parameters(), other.parameters()):
        assert a.grad is not None and b.grad is not None
        assert torch.equal(a.grad, b.grad), name


@pytest.mark.parametrize("activation", [nn.ReLU6, nn.ELU, nn.SiLU, nn.Hardtanh, nn.LeakyReLU])
def test_in_place_activations_keep_the_layer_output(activation: type[nn.Module]) -> None:
    torch.manual_seed(3)
    grads = []
    for inplace in (True, False):
        torch.manual_seed(4)
        model = nn.Sequential(
            nn.Linear(6, 8), activation(inplace=inplace), nn.Linear(8, 3)
        ).double()
        run(model, torch.linspace(-2, 2, 30).view(5, 6).double(), torch.tensor([0, 1, 2, 0, 1]))
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        assert a is not None and b is not None and torch.equal(a, b)


def test_functional_network_equals_module_network() -> None:
    torch.manual_seed(5)
    model = FunctionalNet().double()
    twin = model.as_modules()
    x, y = torch.randn(4, 1, 10, 10).double(), torch.randint(0, 4, (4,))
    run(model, x, y)
    run(twin, x, y)
    for a, b in zip(model.parameters(), twin.parameters()):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-14)


def test_batch_norm_statistics_move_once() -> None:
    torch.manual_seed(6)
    model = small_vgg()
    twin = copy.deepcopy(model)
    x, y = torch.randn(6, 3, 8, 8).double(), torch.randint(0, 4, (6,))
    twin(x)
    run(model, x, y)
    for (name, a), b in zip(model.named_buffers(), twin.buffers()):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14, msg=name)


def test_a_weight_used_twice_is_summed() -> None:
    torch.manual_seed(7)
    shared = nn.Linear(5, 5).double()
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(5, 3).double())
    x, y = torch.randn(8, 5).double(), torch.randint(0, 3, (8,))
    separate = nn.Sequential(
        copy.deepcopy(shared), nn.ReLU(), copy.deepcopy(shared), copy.deepcopy(model[3])
    )
    run(model, x, y)
    run(separate, x, y)
    assert shared.weight.grad is not None
    total = separate[0].weight.grad + separate[2].weight.grad
    torch.testing.assert_close(shared.weight.grad, total, rtol=1e-13, atol=1e-15)


def test_frozen_parameters_get_nothing() -> None:
    model = mlp(4, 6, 5, 3)
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    run(model, torch.randn(5, 4).double(), torch.randint(0, 3, (5,)))
    assert model[0].weight.grad is None and model[2].bias.grad is None
    assert model[0].bias.grad is not None and model[2].weight.grad is not None


def test_feedback_accumulates_and_is_linear() -> None:
    model = mlp(4, 6, 3)
    x, y = torch.randn(8, 4).double(), torch.randint(0, 3, (8,))
    run(model, x, y)
    whole = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    run(model, x[:3], y[:3])
    run(model, x[3:], y[3:])
    for parameter, total in zip(model.parameters(), whole):
        torch.testing.assert_close(parameter.grad, total, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    lambda p: torch.optim.Adam(p, lr=0.01),
    lambda p: torch.optim.RMSprop(p, lr=0.01),
])  # fmt: skip
def test_any_torch_optimizer_raises_the_reward(make) -> None:
    torch.manual_seed(8)
    model = mlp(10, 32, 3)
    x = torch.randn(60, 10).double()
    y = x[:, :3].argmax(1)
    optimizer = make(model.parameters())
    for _ in range(60):
        optimizer.zero_grad()
        run(model, x, y)
        nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()
    assert float((model(x).argmax(1) == y).double().mean()) > 0.9


def test_step_functions_train() -> None:
    torch.manual_seed(9)
    model = nn.Sequential(nn.Linear(6, 40), Step(), nn.Linear(40, 2)).double()
    x = torch.randn(100, 6).double()
    y = (x[:, 0] > 0).long()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    before = model[0].weight.detach().clone()
    for _ in range(40):
        optimizer.zero_grad()
        run(model, x, y)
        nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()
    assert not torch.equal(before, model[0].weight)
    assert float((model(x).argmax(1) == y).double().mean()) > 0.85


@pytest.mark.parametrize(("mode", "factor"), [("scaled", 4 / 3), ("conserving", 1.0)])
def test_dropout_scales_by_default_and_conserves_on_request(mode: str, factor: float) -> None:
    model = nn.Sequential(nn.ReLU(), nn.Dropout(0.25))
    x = torch.ones(40, 50).double().requires_grad_()
    with composites.Epsilon(dropout=mode).context(model):
        out = model(x)
        reward = torch.randn_like(out)
        lfp_kernels.backward(out, reward)
    kept = out.detach() != 0
    assert 0.2 < 1 - float(kept.double().mean()) < 0.3
    assert x.grad is not None
    torch.testing.assert_close(-x.grad, factor * reward * kept)


def test_sum_module_operator_and_constant() -> None:
    x = torch.tensor([[1.0, 2.0, -3.0]]).double().requires_grad_()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3, bias=False).double()
            self.sum = Sum()

        def forward(self, x: Tensor) -> Tensor:
            return self.sum(self.linear(x), x) + 1.0

    model = Net()
    nn.init.eye_(model.linear.weight)
    with composites.Epsilon(eps=1e-12).context(model):
        out = model(x)
        lfp_kernels.backward(out, torch.ones_like(out))
    assert x.grad is not None  # each entry: 2x / (2x + 1)
    expected = 2 * x.detach() / (2 * x.detach() + 1)
    torch.testing.assert_close(-x.grad, expected, rtol=1e-9, atol=1e-9)


# -- bad input ----------------------------------------------------------------------------------


def test_layers_without_a_rule_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with pytest.raises(ValueError, match=r"layer '1' \(LayerNorm\).*no rule"):
        composites.Epsilon().attach(model)
    assert "forward" not in model.__dict__
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        composite = composites.Epsilon(default="gradient")
        with composite.context(model):
            out = model(torch.randn(2, 4))
            assert composite.left_out(model) == ["torch.nn.functional.layer_norm"]
            lfp_kernels.backward(out, torch.ones_like(out))
    assert "layer_norm" in str(caught[0].message)


def test_functions_without_a_rule_are_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(self.linear(x), -1)

    with (
        pytest.raises(ValueError, match=r"torch\.softmax .* no rule"),
        composites.Epsilon().context(Net()) as model,
    ):
        model(torch.randn(2, 4))


def test_unknown_in_place_operations_are_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).mul_(2)

    with (
        pytest.raises(ValueError, match=r"mul_.*out-of-place"),
        composites.Epsilon().context(Net()) as model,
    ):
        model(torch.randn(2, 4))


def test_attached_twice() -> None:
    model = mlp(4, 3)
    composite = composites.Epsilon()
    composite.attach(model)
    with pytest.raises(ValueError, match="attached already"):
        composites.Epsilon().attach(model)
    composite.detach(model)
    with pytest.raises(ValueError, match="not attached"):
        composite.detach(model)


@pytest.mark.parametrize("eps", [0.0, -1e-6, float("nan"), float("inf")])
def test_eps_must_be_positive(eps: float) -> None:
    with pytest.raises(ValueError, match=r"eps: expected a finite number > 0"):
        composites.Epsilon(eps=eps)


def test_backward_checks_its_arguments() -> None:
    model = mlp(4, 3)
    x = torch.randn(2, 4).double()
    with composites.Epsilon().context(model):
        out = model(x)
    cases = [
        (out, torch.ones(2, 2).double(), ValueError, r"reward: expected shape \(2, 3\)"),
        (out, torch.ones(2, 3), ValueError, "expected torch.float64"),
        (out, [1.0], TypeError, "reward: expected a torch.Tensor"),
        (out, torch.full((2, 3), float("nan")).double(), ValueError, r"nan at index \(0, 0\)"),
        (model(x), torch.ones(2, 3).double(), ValueError, "inside composite.context"),
        (out.detach(), torch.ones(2, 3).double(), ValueError, "inside composite.context"),
    ]
    for target, reward, kind, message in cases:
        with pytest.raises(kind, match=message):
            lfp_kernels.backward(target, reward)
        assert all(p.grad is None for p in model.parameters())
