"""lfp_kernels.compat.lfprop: stored results of lfprop 1.0.0, registration and feedback."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from compat_lfprop_cases import RELATIVE, feedback, propagate, relative, small, snapshot, stab
from golden_networks import NETWORKS, load
from torch import Tensor, nn

import lfp_kernels
from lfp_kernels.compat.lfprop import backward
from lfp_kernels.compat.lfprop.model import custom_resnet
from lfp_kernels.compat.lfprop.propagation import propagator_lxt as lxt
from lfp_kernels.compat.lfprop.rewards import reward_functions


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_stored_results(name: str, backend: str) -> None:
    golden = load(name)
    reward = reward_functions.SoftmaxLossReward(device="cpu")
    composite = lxt.LFPEpsilonComposite(epsilon=golden.eps)
    with lfp_kernels.use_backend(backend):
        out, found = propagate(composite, golden.model, golden.x, lambda o: reward(o, golden.y))
    assert relative(out, golden.out) < RELATIVE
    assert relative(found, golden.input_reward) < RELATIVE
    for key, value in feedback(golden.model).items():
        assert relative(value, golden.feedback[key]) < RELATIVE, key
    for parameter in golden.model.parameters():
        assert parameter.grad is None
    for key, buffer in golden.model.named_buffers():
        assert relative(buffer, golden.buffers_after[key]) < RELATIVE, key


@pytest.mark.parametrize("name", NETWORKS)
def test_feedback_without_an_input_that_requires_grad(name: str) -> None:
    golden = load(name)
    with lxt.LFPEpsilonComposite(epsilon=golden.eps).context(golden.model) as model:
        backward(model(golden.x), golden.reward)
    for key, value in feedback(golden.model).items():
        assert relative(value, golden.feedback[key]) < RELATIVE, key
    assert all(p.grad is None for p in golden.model.parameters())


def test_backward_refuses_what_no_composite_made() -> None:
    model = small(nn.Linear(3, 2))
    out = model(torch.randn(4, 3).double())
    with pytest.raises(ValueError, match="expected the output of a model that ran inside"):
        backward(out, torch.ones_like(out))
    with lxt.LFPEpsilonComposite().context(model), pytest.raises(ValueError, match="shape"):
        backward(model(torch.randn(4, 3).double()), torch.ones(4, 3))


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_comes_back_as_it_was(fails: bool) -> None:
    model = copy.deepcopy(load("residual").model).append(nn.ReLU(inplace=True))
    relu = model[-1]
    relu.forward = own = lambda x: x.clamp(min=0)  # type: ignore[method-assign]
    x = load("residual").x
    out = model.eval()(x).detach()
    keys, before = list(model.state_dict()), snapshot(model)
    composite = lxt.LFPEpsilonComposite()
    try:
        with composite.context(model) as inside:
            assert inside is model and list(model.state_dict()) == keys and not relu.inplace
            assert relative(model(x).detach(), out) < RELATIVE
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert snapshot(model) == before and relu.forward is own and relu.inplace
    assert torch.equal(model(x), out)
    (gradient,) = torch.autograd.grad(model(x).sum(), next(model.parameters()))
    assert gradient.abs().sum() > 0


def test_register_and_remove() -> None:
    golden = load("mlp")
    before = snapshot(golden.model)
    composite = lxt.LFPEpsilonComposite(epsilon=golden.eps)
    composite.register(golden.model, dummy_inputs={}, verbose=False)
    with pytest.raises(ValueError, match="this composite is registered already"):
        composite.register(golden.model)
    with pytest.raises(ValueError, match="registered with another composite already"):
        lxt.LFPEpsilonComposite().register(golden.model)
    for _ in range(2):  # what was registered once serves every step; feedback does not add up
        x = golden.x.clone().requires_grad_()
        (found,) = torch.autograd.grad((golden.model(x),), (x,), (golden.reward,))
    assert relative(found, golden.input_reward) < RELATIVE
    for key, value in feedback(golden.model).items():
        assert relative(value, golden.feedback[key]) < RELATIVE, key
    composite.remove()
    assert snapshot(golden.model) == before


def test_no_grad_freezes_the_parameters_meanwhile() -> None:
    golden = load("mlp")
    composite = lxt.LFPEpsilonComposite(epsilon=golden.eps)
    x = golden.x.clone().requires_grad_()
    with composite.context(golden.model, no_grad=True) as model:
        assert not any(p.requires_grad for p in model.parameters())
        (found,) = torch.autograd.grad((model(x),), (x,), (golden.reward,))
    assert relative(found, golden.input_reward) < RELATIVE
    assert all(p.requires_grad and not hasattr(p, "feedback") for p in golden.model.parameters())


def test_evaluation_inside_the_context() -> None:
    golden = load("vgg_bn")
    model = golden.model.eval()
    expected = model(golden.x)
    with torch.no_grad(), lxt.LFPEpsilonComposite().context(model):
        assert relative(model(golden.x), expected.detach()) < RELATIVE


def test_frozen_parameters_get_no_feedback() -> None:
    model = small(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    model[0].weight.requires_grad_(False)
    propagate(lxt.LFPEpsilonComposite(), model, torch.randn(5, 4).double(), torch.sign)
    assert not hasattr(model[0].weight, "feedback")
    assert hasattr(model[0].bias, "feedback") and hasattr(model[2].weight, "feedback")


def test_a_layer_used_twice_adds_its_feedback() -> None:
    shared = nn.Linear(4, 4)
    model = small(shared, nn.ReLU(), shared, nn.Linear(4, 2))
    apart = nn.Sequential(copy.deepcopy(shared), nn.ReLU(), copy.deepcopy(shared), model[3])
    x = torch.randn(6, 4).double()
    propagate(lxt.LFPEpsilonComposite(), apart, x, torch.sign)
    expected = apart[0].weight.feedback + apart[2].weight.feedback
    for _ in range(2):
        propagate(lxt.LFPEpsilonComposite(), model, x, torch.sign)
        assert relative(shared.weight.feedback, expected) < RELATIVE


def test_an_activation_used_twice_is_an_activation_twice() -> None:
    relu = nn.Tanh()
    shared = small(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu, nn.Linear(4, 2))
    apart = small(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(6, 4).double()
    results = [propagate(lxt.LFPEpsilonComposite(), m, x, torch.sign)[1] for m in (shared, apart)]
    assert relative(*results) == 0


def test_the_model_itself_may_be_a_layer() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()
    x = torch.randn(5, 4).double()
    out, found = propagate(lxt.LFPEpsilonComposite(1e-3), layer, x, torch.ones_like)
    s = 1 / stab(out, 1e-3)
    assert relative(found, x * (s @ layer.weight.detach())) < RELATIVE
    assert relative(layer.weight.feedback, layer.weight.detach().abs() * (s.t() @ x)) < RELATIVE


def test_epsilon_zero() -> None:
    model = small(nn.Linear(3, 2))
    model[0].weight.data[0] = 0
    model[0].bias.data[0] = 0  # z = 0 at the first output: lfprop divides by it
    x = torch.randn(4, 3).double()
    out, found = propagate(lxt.LFPEpsilonComposite(epsilon=0), model, x, torch.ones_like)
    assert relative(found, x * (1 / out[:, 1:]) * model[0].weight.detach()[1]) < RELATIVE


def test_a_sum_with_a_constant() -> None:
    class Offset(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sum = custom_resnet.Sum()

        def forward(self, x: Tensor) -> Tensor:
            return self.sum(torch.ones_like(x).detach(), x)

    x = torch.randn(5).double()
    _, found = propagate(lxt.LFPEpsilonComposite(1e-3), Offset(), x, torch.ones_like)
    assert relative(found, x / stab(1 + x, 1e-3)) < RELATIVE


class Overwriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        z += x.detach()
        return self.second(z)


def test_an_overwritten_activation_is_noticed() -> None:
    model = Overwriting().double()
    with pytest.raises(RuntimeError, match="output of Linear was overwritten by an in-place"):
        propagate(lxt.LFPEpsilonComposite(), model, torch.randn(3, 4).double(), torch.sign)
    assert not hasattr(model.first.weight, "feedback")


def test_it_imports_nothing_of_lfprop_s() -> None:
    foreign = ("lfprop", "lxt", "zennit", "torchvision", "transformers", "snntorch")
    names = (
        "propagation.propagator_lxt", "rewards.rewards", "rewards.reward_functions",
        "model.models", "model.activations", "model.custom_resnet",
    )  # fmt: skip
    code = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in foreign)
    code += "".join(f"import lfp_kernels.compat.lfprop.{name}\n" for name in names)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
