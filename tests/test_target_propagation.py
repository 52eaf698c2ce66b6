"""examples/target_propagation.py: exact local gradients, and what its feedback training converges
to on a linear network."""

from __future__ import annotations

import pytest
import torch

from examples.target_propagation import TargetPropagation, train
from lfp_kernels import metrics


def test_ldrl_turns_q_into_the_transpose():
    """Ernoult 2022: with linear layers the minimum of L-DRL's loss is Q = W^T."""
    torch.manual_seed(0)
    net = TargetPropagation([12, 20, 16, 8], linear=True, seed=1)
    before = [metrics.angle(q, w.t()) for q, w in zip(net.feedback[1:], net.weights[1:])]
    for _ in range(600):
        net.ldrl_feedback(net.forward(torch.randn(64, 12)), 0.05, 0.3)
    for q, w, angle in zip(net.feedback[1:], net.weights[1:], before):
        assert angle > 70
        assert metrics.angle(q, w.t()) < 8
        assert 0.9 < metrics.norm_ratio(w.t(), q) < 1.1


def test_ldrl_step_is_minus_half_the_gradient_of_its_loss():
    torch.manual_seed(0)
    net = TargetPropagation([5, 6, 4, 3], seed=1)
    h = net.forward(torch.randn(7, 5))
    i, sigma = 1, 0.2
    q = net.feedback[i].clone().requires_grad_()
    state = torch.get_rng_state()
    dx, dy = sigma * torch.randn_like(h[i]), sigma * torch.randn_like(h[i + 1])

    def g(u):
        return (u @ q.t()).tanh()

    moved = net.layer(i, h[i] + dx)
    first = -2 * (dx * (g(moved) - g(h[i + 1]))).sum()
    loss = first + (g(h[i + 1] + dy) - g(h[i + 1])).square().sum()
    (gradient,) = torch.autograd.grad(loss, q)
    torch.set_rng_state(state)
    net.ldrl_feedback(h, 0.1, sigma)
    want = q.detach() - 0.1 / (7 * sigma**2) * gradient / 2
    torch.testing.assert_close(net.feedback[i], want)


def test_difference_targets_are_backpropagation_where_q_is_the_transpose():
    """A linear network with Q = W^T: t - h is minus the gradient, and so is every local step."""
    torch.manual_seed(0)
    net = TargetPropagation([5, 6, 4, 3], linear=True, seed=1)
    net.feedback = [w.t().clone() for w in net.weights]
    net.direct = [net.weights[1].t() @ net.weights[2].t(), net.weights[2].t().clone()]
    x = torch.randn(7, 5)
    weights = [w.clone().requires_grad_() for w in net.weights]
    out = x
    for w in weights:
        out = out @ w.t()
    loss = out.square().sum() / 2
    want = [w.detach() - 0.1 / 7 * g for w, g in zip(weights, torch.autograd.grad(loss, weights))]
    start = [w.clone() for w in net.weights]
    for make in (net.targets, net.direct_targets):
        net.weights = [w.clone() for w in start]
        h = net.forward(x)
        net.learn(h, make(h, -h[-1]), 0.1)
        for got, value in zip(net.weights, want):
            torch.testing.assert_close(got, value)


@pytest.mark.parametrize("method", ["dtp", "l-drl", "ddtp"])
def test_learns_the_digits(method):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert train(method, epochs=15) > 0.9
    finally:
        torch.set_num_threads(threads)
