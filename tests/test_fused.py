"""The fused way: the same numbers as the drop-in way, and what it keeps, frees and refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as TF
from networks import FunctionalNet, batches, lenet, small_resnet, small_vgg
from torch import Tensor, nn

import lfp_kernels
from lfp_kernels import composites, optim, rewards
from lfp_kernels.nn import Step

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "lenet": (lenet, (1, 14, 14), 4),
    "vgg": (small_vgg, (3, 8, 8), 4),
    "resnet": (small_resnet, (3, 12, 12), 5),
    "functional": (lambda: FunctionalNet().double(), (1, 10, 10), 4),
}
OPTIMIZERS = {
    "sgd": (optim.SGD(lr=0.01), lambda p: torch.optim.SGD(p, lr=0.01)),
    "nesterov": (
        optim.SGD(lr=0.01, momentum=0.9, weight_decay=0.01, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.01, nesterov=True),
    ),
    "adamw": (optim.AdamW(lr=0.01), lambda p: torch.optim.AdamW(p, lr=0.01)),
}


def drop_in_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    with composites.Epsilon().context(model):
        out = model(x)
        lfp_kernels.backward(out, rewards.softmax(out, y))
    optimizer.step()


def assert_same(one: nn.Module, other: nn.Module, rtol: float = 1e-9) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_both_ways_give_the_same_numbers(network: str, optimizer: str) -> None:
    torch.manual_seed(0)
    make, shape, classes = NETWORKS[network]
    model = make()
    twin = copy.deepcopy(model)
    spec, torch_optimizer = OPTIMIZERS[optimizer]
    step = lfp_kernels.fuse(model, composites.Epsilon(), optimizer=spec)
    other = torch_optimizer(twin.parameters())
    for x, y in batches(shape, classes):
        step(x, y)
        drop_in_step(twin, other, x, y)
    assert_same(model, twin)


@pytest.mark.parametrize("network", ["lenet", "vgg"])
def test_clip_norm_runs_in_two_phases(network: str) -> None:
    torch.manual_seed(1)
    make, shape, classes = NETWORKS[network]
    model = make()
    twin = copy.deepcopy(model)
    step = lfp_kernels.fuse(
        model, composites.Epsilon(), optimizer=optim.SGD(lr=0.1, momentum=0.9, clip_norm=0.05)
    )
    assert "two phases" in repr(step)
    other = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches(shape, classes):
        step(x, y)
        other.zero_grad()
        with composites.Epsilon().context(twin):
            out = twin(x)
            lfp_kernels.backward(out, rewards.softmax(out, y))
        nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
        other.step()
    assert_same(model, twin)


def test_eval_mode_and_frozen_layers() -> None:
    torch.manual_seed(2)
    model = small_vgg()
    model(torch.randn(8, 3, 8, 8).double())
    model.eval()
    model[0].weight.requires_grad_(False)
    model[5].bias.requires_grad_(False)
    twin = copy.deepcopy(model)
    step = lfp_kernels.fuse(model, composites.Epsilon(), optimizer=optim.SGD(lr=0.01))
    other = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.01)
    for x, y in batches((3, 8, 8), 4):
        step(x, y)
        drop_in_step(twin, other, x, y)
    assert_same(model, twin)
    assert int(model[1].num_batches_tracked) == 1


def test_freezing_between_steps_is_noticed() -> None:
    torch.manual_seed(3)
    model = lenet()
    step = lfp_kernels.fuse(model, composites.Epsilon(), optimizer=optim.SGD(lr=0.1))
    x, y = batches((1, 14, 14), 4, 1)[0]
    step(x, y)
    for p in model[:7].parameters():
        p.requires_grad_(False)
    before = copy.deepcopy(model)
    step(x, y)
    assert torch.equal(model[0].weight, before[0].weight)
    assert not torch.equal(model[9].weight, before[9].weight)


def test_a_weight_used_twice_is_summed() -> None:
    torch.manual_seed(4)
    shared = nn.Linear(5, 5).double()
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(5, 4).double())
    twin = copy.deepcopy(model)
    step = lfp_kernels.fuse(model, composites.Epsilon(), optimizer=optim.SGD(lr=0.1, momentum=0.5))
    other = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.5)
    for x, y in batches((5,), 4):
        step(x, y)
        drop_in_step(twin, other, x, y)
    assert_same(model, twin)


@pytest.mark.parametrize(
    "activation", [nn.Tanh(), nn.SiLU(), nn.ReLU6(inplace=True), Step(), nn.Sigmoid()]
)
def test_other_activations_keep_the_layer_output(activation: nn.Module) -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 9), activation, nn.Linear(9, 4)).double()
    twin = copy.deepcopy(model)
    step = lfp_kernels.fuse(model, composites.Epsilon(), optimizer=optim.SGD(lr=0.01))
    other = torch.optim.SGD(twin.parameters(), lr=0.01)
    for x, y in batches((6,), 4):
        step(x, y)
        drop_in_step(twin, other, x, y)
    assert_same(model, twin)


def test_a_relu_at_the_output_is_not_fused_away() -> None:
    """The reward at the output need not vanish where the ReLU is 0."""
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU()).double()
    twin = copy.deepcopy(model)
    x = torch.randn(5, 6).double()

    def ones(out: Tensor, y: Tensor) -> Tensor:
        return torch.ones_like(out)

    step = lfp_kernels.fuse(model, composites.Epsilon(), reward=ones, optimizer=optim.SGD(lr=0.1))
    step(x, None)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    with composites.Epsilon().context(twin):
        out = twin(x)
        lfp_kernels.backward(out, torch.ones_like(out))
    optimizer.step()
    assert_same(model, twin)


def test_branches_cat_permute_and_residuals() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(6, 5), nn.Linear(6, 3)
            self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            both = torch.cat([self.left(x), TF.relu(self.right(x))], dim=1)
            both = both + self.mix(both)
            swapped = both.view(x.size(0), 2, 4).transpose(1, 2).permute(0, 2, 1)
            return self.head(swapped.reshape(x.shape[0], -1))

    torch.manual_seed(7)
    model = Net().double()
    twin = copy.deepcopy(model)
    step = lfp_kernels.fuse(model, composites.Epsilon(), optimizer=optim.SGD(lr=0.01))
    other = torch.optim.SGD(twin.parameters(), lr=0.01)
    for x, y in batches((6,), 4):
        step(x, y)
        drop_in_step(twin, other, x, y)
    assert_same(model, twin)


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 3)
        self.pad = nn.ZeroPad2d((0, 1, 2, 0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.pad(x)).relu()
        return self.second(nn.functional.pad(x, (1, 0))).flatten(1)


def test_padding() -> None:
    """Zeros in front of a layer take no reward, and what is behind them takes all of its own."""
    torch.manual_seed(0)
    fused = Padded().double()
    dropped = copy.deepcopy(fused)
    x, y = torch.randn(3, 2, 6, 6, dtype=torch.float64), torch.tensor([0, 5, 7])
    lfp_kernels.fuse(fused, composites.Epsilon(), optimizer=optim.SGD(0.01))(x, y)
    optimizer = torch.optim.SGD(dropped.parameters(), 0.01)
    with composites.Epsilon().context(dropped):
        out = dropped(x)
        lfp_kernels.backward(out, rewards.softmax(out, y))
    optimizer.step()
    for p, q in zip(fused.parameters(), dropped.parameters()):
        torch.testing.assert_close(p, q)


def test_conserving_dropout_and_seeded_masks() -> None:
    for mode in composites.DROPOUTS:
        results = []
        for _ in range(2):
            torch.manual_seed(8)
            model = nn.Sequential(
                nn.Linear(6, 20), nn.ReLU(), nn.Dropout(0.5), nn.Linear(20, 4)
            ).double()
            step = lfp_kernels.fuse(
                model, composites.Epsilon(dropout=mode), optimizer=optim.SGD(lr=0.1)
            )
            for x, y in batches((6,), 4):
                step(x, y)
            results.append(model)
        assert_same(*results, rtol=0)


def test_reruns_are_bit_equal() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(9)
        model = small_vgg(torch.float32)
        step = lfp_kernels.fuse(
            model, composites.Epsilon(), optimizer=optim.SGD(lr=0.05, momentum=0.9, clip_norm=3.0)
        )
        for x, y in batches((3, 8, 8), 4, 4):
            step(x.float(), y)
        states.append(model.state_dict())
    for a, b in zip(states[0].values(), states[1].values()):
        assert torch.equal(a, b)


def test_autograd_never_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("autograd ran")

    monkeypatch.setattr(torch.autograd, "backward", refuse)
    monkeypatch.setattr(torch.autograd, "grad", refuse)
    model = small_resnet()
    step = lfp_kernels.fuse(model, composites.Epsilon(), optimizer=optim.SGD(lr=0.01))
    out, reward = step(torch.randn(3, 3, 12, 12).double(), torch.tensor([0, 1, 2]))
    assert out.grad_fn is None and reward.grad_fn is None
    assert all(p.grad is None for p in model.parameters())


def test_values_are_freed_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    step = lfp_kernels.fuse(lenet(), composites.Epsilon(), optimizer=optim.SGD(lr=0.01))
    plan = step._plan
    held: list[int] = []
    original = type(plan.stages[0]).redistribute

    def redistribute(self, run, reward):
        held.append(sum(v is not None for v in run.values))
        return original(self, run, reward)

    monkeypatch.setattr(type(plan.stages[0]), "redistribute", redistribute)
    x, y = batches((1, 14, 14), 4, 1)[0]
    step(x, y)
    # The two convolutions: behind a chained pool only their inputs are left.
    assert held == [2, 1]


def test_schedulers_drive_the_step() -> None:
    torch.manual_seed(10)
    model = lenet()
    twin = copy.deepcopy(model)
    step = lfp_kernels.fuse(model, composites.Epsilon(), optimizer=optim.SGD(lr=0.1, momentum=0.9))
    other = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=5)
        for o in (step.optimizer, other)
    ]
    for x, y in batches((1, 14, 14), 4, 5):
        step(x, y)
        drop_in_step(twin, other, x, y)
        for scheduler in schedulers[: 2 if schedulers[0].last_epoch < 4 else 0]:
            scheduler.step()
    assert_same(model, twin)


def test_state_moves_between_the_two_ways() -> None:
    torch.manual_seed(11)
    model = lenet()
    step = lfp_kernels.fuse(model, composites.Epsilon(), optimizer=optim.SGD(lr=0.1, momentum=0.9))
    data = batches((1, 14, 14), 4, 4)
    for x, y in data[:2]:
        step(x, y)
    twin = copy.deepcopy(model)
    other = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    other.load_state_dict(
        {
            "state": copy.deepcopy(step.state_dict()["state"]),
            "param_groups": other.state_dict()["param_groups"],
        }
    )
    for x, y in data[2:]:
        step(x, y)
        drop_in_step(twin, other, x, y)
    assert_same(model, twin)


def test_feedback_dtype_bfloat16_stays_close() -> None:
    torch.manual_seed(12)
    model = lenet(torch.float32)
    before = copy.deepcopy(model)
    twin = copy.deepcopy(model)
    x, y = batches((1, 14, 14), 4, 1)[0]
    for m, dtype in ((model, torch.bfloat16), (twin, None)):
        step = lfp_kernels.fuse(
            m, composites.Epsilon(), optimizer=optim.SGD(lr=1e-3), feedback_dtype=dtype
        )
        step(x.float(), y)
    for (name, p), q, b in zip(model.named_parameters(), twin.parameters(), before.parameters()):
        assert p.dtype == torch.float32
        moved, expected = (p - b).detach(), (q - b).detach()
        assert float((moved - expected).norm() / expected.norm()) < 0.03, name
        assert not torch.equal(moved, expected), name
