"""The nested-autograd reference against closed forms and against lfprop's stored results."""

from __future__ import annotations

import copy

import golden_networks
import pytest
import torch
from torch import Tensor, nn

from lfp_kernels.nested import NestedReference, softmax_reward
from lfp_kernels.nn import Sum

EPS = 1e-6


def stabilized(z: Tensor) -> Tensor:
    return torch.where(z < 0, z - EPS, z + EPS)


def run(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    nested = NestedReference(model, eps=EPS)
    with nested.context():
        return nested.redistribute(x, y)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


def test_two_linear_layers_equal_the_closed_form() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 4)).double()
    x, y = torch.randn(5, 7).double(), torch.randint(4, (5,))
    out, input_reward = run(model, x, y)

    with torch.no_grad():
        w1, b1, w2, b2 = model.parameters()
        z1 = x @ w1.t() + b1
        a1 = z1.clamp(min=0)
        z2 = a1 @ w2.t() + b2
        r2 = z2 * (torch.eye(4).double()[y] - z2.softmax(1))
        s2 = r2 / stabilized(z2)
        r1 = a1 * (s2 @ w2)
        s1 = r1 / stabilized(z1)
        close(out, z2)
        close(input_reward, x * (s1 @ w1))
        for parameter, expected in (
            (w1, w1.abs() * (s1.t() @ x)),
            (b1, b1.abs() * s1.sum(0)),
            (w2, w2.abs() * (s2.t() @ a1)),
            (b2, b2.abs() * s2.sum(0)),
        ):
            close(parameter.feedback, expected)


def test_batch_norm_equals_the_closed_form() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x, y = torch.randn(9, 4).double(), torch.randint(4, (9,))
    out, input_reward = run(nn.Sequential(norm), x, y)

    with torch.no_grad():
        inverse = (x.var(0, unbiased=False) + norm.eps).rsqrt()
        xhat = (x - x.mean(0)) * inverse
        s = softmax_reward(out, y) / stabilized(norm.weight * xhat + norm.bias)
        dx = norm.weight * inverse * (s - s.mean(0) - xhat * (s * xhat).mean(0))
        close(input_reward, x * dx)
        close(norm.weight.feedback, norm.weight.abs() * (s * xhat).sum(0))
        close(norm.bias.feedback, norm.bias.abs() * s.sum(0))
        close(norm.running_mean, 0.1 * x.mean(0))  # moved once
    assert norm.num_batches_tracked == 1


def test_sum_and_average_pool_equal_the_closed_form() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool, self.sum = nn.AvgPool1d(2), Sum()

        def forward(self, x: Tensor) -> Tensor:
            pooled = self.pool(x.unsqueeze(1)).squeeze(1)
            return self.sum(pooled, pooled.square())

    torch.manual_seed(0)
    x, y = torch.randn(3, 8).double(), torch.randint(4, (3,))
    out, input_reward = run(Net(), x, y)

    a = x.view(3, 4, 2).mean(2)
    s = softmax_reward(out, y) / stabilized(a + a**2)
    # square() has no rule here: the plain gradient 2a acts on its reward
    reward = a * s + 2 * a * (a**2 * s)
    share = (reward / stabilized(a)).repeat_interleave(2, 1) / 2
    close(input_reward, x * share)


@pytest.mark.parametrize("name", golden_networks.NETWORKS)
def test_stored_results_of_lfprop(name: str) -> None:
    golden = golden_networks.load(name)
    nested = NestedReference(golden.model, eps=golden.eps)
    with nested.context():
        out, input_reward = nested.redistribute(golden.x, golden.y)

    def matches(actual: Tensor, expected: Tensor) -> None:
        scale = expected.abs().max().item() or 1.0
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * scale)

    matches(out, golden.out)
    matches(input_reward, golden.input_reward)
    for key, parameter in golden.model.named_parameters():
        matches(parameter.feedback, golden.feedback[key])
    for key, buffer in golden.model.named_buffers():
        matches(buffer.double(), golden.buffers_after[key].double())


def test_step_follows_the_feedback_uphill() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)).double()
    before = copy.deepcopy(model)
    x, y = torch.randn(4, 6).double(), torch.randint(3, (4,))
    nested = NestedReference(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with nested.context():
        nested.step(x, y, optimizer)
    run(before, x, y)
    for new, old in zip(model.parameters(), before.parameters()):
        close(new, old + 0.1 * old.feedback)


def test_a_weight_used_twice_sums_its_feedback_and_frozen_ones_get_none() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4).double()
    twin = copy.deepcopy(layer)
    x, y = torch.randn(5, 4).double(), torch.randint(4, (5,))
    run(nn.Sequential(layer, nn.ReLU(), layer), x, y)
    run(nn.Sequential(twin, nn.ReLU(), copy_of := copy.deepcopy(twin)), x, y)
    close(layer.weight.feedback, twin.weight.feedback + copy_of.weight.feedback)

    layer.bias.requires_grad_(False)
    run(nn.Sequential(layer), x, y)
    assert layer.bias.feedback is None and layer.weight.feedback is not None


def test_the_model_comes_back_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(RuntimeError, match="stop"), NestedReference(model).context():
        raise RuntimeError("stop")
    assert [dict(vars(module)) for module in model.modules()] == before

    nested = NestedReference(model)
    with nested.context(), pytest.raises(ValueError, match="forward"), nested.context():
        pass
    with pytest.raises(ValueError, match="eps"):
        NestedReference(model, eps=0.0)
