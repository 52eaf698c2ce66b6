"""Rewards, losses and networks of lfp_kernels.compat.lfprop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from compat_lfprop_cases import RELATIVE, feedback, propagate, relative
from torch import nn

import lfp_kernels
from lfp_kernels.compat.lfprop.model import activations, model_definitions, models
from lfp_kernels.compat.lfprop.propagation import propagator_lxt as lxt
from lfp_kernels.compat.lfprop.rewards import reward_functions
from lfp_kernels.compat.lfprop.rewards.rewards import LOSS_MAP, REWARD_MAP, get_reward

STORED_REWARDS = np.load(Path(__file__).parent / "golden" / "rewards.npz")
REWARDS = {
    "softmax": reward_functions.SoftmaxLossReward("cpu"),
    "sigmoid": reward_functions.SigmoidLossReward("cpu"),
    "maximize": reward_functions.MaximizeSingleNeuron("cpu"),
    "minimize": reward_functions.MinimizeSingleNeuron("cpu"),
    "correct": reward_functions.CorrectclassificationReward("cpu"),
    "misclassification": reward_functions.MisclassificationReward("cpu"),
    "bounded_0.1_0.6": reward_functions.BoundedSoftmaxReward("cpu", 0.1, 0.6),
    "bounded_sign_0.1_0.6": reward_functions.BoundedSoftmaxReward(
        device="cpu", lower_bound=0.1, higher_bound=0.6, logit_sign_only=True
    ),
    "binary_sigmoid": reward_functions.BinarySigmoidLossReward("cpu"),
    "snn_rate": reward_functions.SnnCorrectClassRewardSpikesRateCoded("cpu"),
}


@pytest.mark.parametrize("name", REWARDS)
def test_stored_rewards(name: str) -> None:
    arguments = {"binary_sigmoid": ("ob", "yb"), "snn_rate": ("spikes", "y")}.get(name, ("o", "y"))
    logits, labels = (torch.from_numpy(STORED_REWARDS[key]) for key in arguments)
    expected = torch.from_numpy(STORED_REWARDS[f"r/{name}"]).to(logits.dtype)
    found = REWARDS[name](logits.requires_grad_(logits.is_floating_point()), labels)
    assert not found.requires_grad and found.dtype == logits.dtype
    assert float((found - expected).abs().max()) < 1e-6


def test_every_stored_reward_is_compared() -> None:
    assert {key[2:] for key in STORED_REWARDS.files if key.startswith("r/")} == REWARDS.keys()


def test_correct_classification_rewards_a_tied_label() -> None:
    logits = torch.tensor([[-1.0, -1.0, -2.0], [3.0, 4.0, 4.0]])
    found = REWARDS["correct"](logits, torch.tensor([1, 0]))
    assert torch.equal(found, torch.tensor([[0.0, -1.0, 0.0], [0.0, 0.0, 0.0]]))


def test_get_reward() -> None:
    for name in ("softmaxlossreward", "boundedsoftmaxreward", "correct-class-spikes-ratecoded"):
        assert type(get_reward(name, "cpu")) is REWARD_MAP[name]
    assert get_reward("boundedsoftmaxreward", "cpu", higher_bound=0.5).higher_bound == 0.5
    for name in LOSS_MAP:
        assert isinstance(get_reward(name, "cpu"), nn.Module)
    with pytest.raises(ValueError, match="expected one of correct-class, .*, got 'hinge'"):
        get_reward("hinge", "cpu")


def test_losses() -> None:
    torch.manual_seed(0)
    logits, y = torch.randn(6, 4).double().requires_grad_(), torch.randint(4, (6,))
    loss = get_reward("custom-ce-loss", "cpu", lower_bound=0.1, higher_bound=0.6)(logits, y)
    (gradient,) = torch.autograd.grad(loss, logits)
    p = logits.detach().softmax(1)
    inside = (p >= 0.1) & (p <= 0.6)
    log_p = torch.where(p > 0.6, 0.0, torch.where(p < 0.1, -99999.99999, p.log()))
    assert relative(loss.detach(), TF.nll_loss(log_p, y)) < RELATIVE
    assert torch.equal(gradient != 0, inside & (gradient != 0)) and (gradient != 0).any()
    spikes = torch.randint(2, (5, 6, 4)).double()
    steps = torch.stack([TF.cross_entropy(s, y) for s in spikes])
    found = get_reward("snnratecodedloss", "cpu")(spikes, y)
    assert relative(found, steps.mean()) < RELATIVE
    targets = torch.randint(2, (6,))
    found = get_reward("bce-loss", "cpu")(logits.detach()[:, :1], targets)
    other = TF.binary_cross_entropy_with_logits(logits.detach()[:, 0], targets.double())
    assert relative(found, other) < RELATIVE


SIZES = {
    "lenet": (1, 28, 48686), "cifar-vgglike": (3, 32, 5851338),
    "cifar-vgglike-bn": (3, 32, 5853066), "dense-only": (12, 1, 172170),
    "toydata-dense": (2, 1, 794),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_models(name: str) -> None:
    channels, side, parameters = SIZES[name]
    model = models.get_model(name, "cpu", n_channels=channels, n_outputs=10)
    assert sum(p.numel() for p in model.parameters()) == parameters
    x = torch.randn(2, channels, side, side)
    inputs, labels, out = model.forward_fn((x, [0, 1]), model, "cpu")
    assert inputs.requires_grad and out.shape == (2, 10) and labels.tolist() == [0, 1]
    assert not any(isinstance(m, nn.Sequential) for m in models.list_layers(model))


def test_the_initial_law_is_torch_own_in_the_order_of_the_layers() -> None:
    torch.manual_seed(7)
    model = model_definitions.LeNet(3, 10)
    torch.manual_seed(7)
    layers = [
        nn.Conv2d(3, 16, 5), nn.Conv2d(16, 16, 5),
        nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10),
    ]  # fmt: skip
    names = ("features.0", "features.3", "classifier.0", "classifier.3", "classifier.6")
    state = {f"{n}.{k}": v for n, m in zip(names, layers) for k, v in m.state_dict().items()}
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_get_model_options() -> None:
    model = models.get_model("lenet", "cpu", n_channels=1, activation="step", init_func="negative")
    assert any(isinstance(m, activations.Step) for m in model.modules())
    assert all((p <= 0).all() for p in model.parameters())
    with pytest.raises(ValueError, match=r"expected one of lenet, .*torchvision, take it from"):
        models.get_model("resnet18", "cpu")
    with pytest.raises(ValueError, match="activation: expected one of relu"):
        models.get_model("lenet", "cpu", activation="maxout")


def test_the_fused_way_gives_the_same_feedback() -> None:
    torch.manual_seed(0)
    model = model_definitions.LeNet(1, 10).double().eval()  # without dropout
    x, y = torch.randn(4, 1, 28, 28).double(), torch.randint(10, (4,))
    reward = reward_functions.SoftmaxLossReward("cpu")
    propagate(lxt.LFPEpsilonComposite(), model, x, lambda o: reward(o, y))
    expected, before = feedback(model), {k: p.detach().clone() for k, p in model.named_parameters()}
    lfp_kernels.fuse(
        model, lfp_kernels.composites.Epsilon(), reward="softmax",
        optimizer=lfp_kernels.optim.SGD(lr=1.0),
    )(x, y)  # fmt: skip
    for key, parameter in model.named_parameters():
        assert relative(parameter.detach() - before[key], expected[key]) < 1e-7, key


def test_the_loop_of_lfprop_trains() -> None:
    torch.manual_seed(0)
    model = models.get_model("toydata-dense", "cpu", n_channels=2, n_outputs=2)
    x = torch.randn(256, 2)
    y = (x[:, 0] * x[:, 1] > 0).long()  # not linearly separable
    reward_func = get_reward("softmaxlossreward", "cpu")
    composite = lxt.LFPEpsilonComposite()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(300):
        propagate(composite, model, x, lambda out: reward_func(out, y))
        for parameter in model.parameters():
            parameter.grad = -parameter.feedback
        nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()
    assert (model(x).argmax(1) == y).double().mean() > 0.9
