"""Bad input to spiking networks: named before anything runs; plain autograd beside the rules."""

from __future__ import annotations

import pytest
import torch
from spiking_cases import mlp
from torch import nn

import lfp_kernels
from lfp_kernels import composites, optim
from lfp_kernels.nn import LIF, Spiking


def linear_lif(**options):
    return nn.Sequential(nn.Linear(4, 3), LIF(0.9, **options))


class Holds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = linear_lif()

    def forward(self, x):
        return self.inner(x)


BAD = {
    "beta above 1": (lambda: LIF(1.5), r"beta: expected values in \[0, 1\], got 1.5"),
    "beta below 0": (lambda: LIF(-0.1), r"beta: expected values in \[0, 1\]"),
    "beta NaN": (lambda: LIF(float("nan")), r"beta: expected values in \[0, 1\]"),
    "beta type": (lambda: LIF("0.9"), "beta: expected a number or a tensor, got str"),
    "beta shape": (lambda: LIF(torch.ones(2, 2)), r"beta: expected a number or shape \[C\]"),
    "threshold": (lambda: LIF(0.9, 0.0), "threshold: expected positive values"),
    "reset": (lambda: LIF(0.9, reset="soft"), "reset: expected one of .*got 'soft'"),
    "surrogate": (lambda: LIF(0.9, surrogate="relu"), "surrogate: expected one of"),
    "no Sequential": (lambda: Spiking(nn.Linear(2, 2), steps=3), "module: expected an nn.Seq"),
    "no neurons at the end": (
        lambda: Spiking(nn.Sequential(LIF(0.9), nn.Linear(2, 2)), steps=3),
        "ends with LIF neurons, got Linear at its end; add",
    ),
    "nothing": (lambda: Spiking(nn.Sequential(), steps=3), "got nothing at its end"),
    "no steps": (lambda: Spiking(linear_lif(), steps=0), "steps: expected at least one time step"),
    "half steps": (lambda: Spiking(linear_lif(), steps=2.5), "steps: expected at least one"),
    "no chunk": (lambda: Spiking(linear_lif(), steps=3, chunk=0), "chunk: expected at least one"),
    "noise": (lambda: Spiking(linear_lif(), steps=3, noise=-1.0), "noise: expected a standard"),
    "input": (lambda: Spiking(linear_lif(), steps=3, input="video"), "input: expected one of"),
    "static": (lambda: Spiking(linear_lif(), input="static"), "steps: expected the number of"),
    "hidden neurons": (
        lambda: Spiking(nn.Sequential(Holds(), LIF(0.9)), steps=3),
        r"module: module\.0 \(Holds\) holds neurons of its own",
    ),
    "nested": (
        lambda: Spiking(nn.Sequential(Spiking(linear_lif(), steps=2), LIF(0.9)), steps=3),
        r"module\.0 \(Spiking\) holds neurons",
    ),
    "outside": (lambda: LIF(0.9)(torch.ones(2, 3)), "needs time; put the layers into"),
    "mixed lengths": (
        lambda: Spiking(linear_lif(), steps=3)(torch.ones(5, 2, 4)),
        "expected 3 time steps, got a sequence of 5",
    ),
    "no time": (lambda: Spiking(linear_lif())(torch.ones(4)), r"expected shape \[T, N, ...\]"),
    "integer": (lambda: Spiking(linear_lif(), steps=3)(torch.ones(2, 4).long()), "x: expected a"),
    "family": (
        lambda: lfp_kernels.fuse(
            Spiking(linear_lif(), steps=3), composites.FeedbackAlignment(), optimizer=optim.SGD(1)
        ),
        "spiking neurons have no derivative",
    ),
    "LIF alone, fused": (
        lambda: lfp_kernels.fuse(linear_lif(), composites.Epsilon(), optimizer=optim.SGD(1)),
        "LIF outside lfp_kernels.nn.Spiking",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_messages(name):
    call, message = BAD[name]
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        call()


def test_family_under_the_drop_in_way():
    net = Spiking(linear_lif(), steps=3)
    with (
        composites.FeedbackAlignment().context(net),
        pytest.raises(ValueError, match="spiking neurons have no derivative"),
    ):
        net(torch.ones(2, 4))


def test_nothing_is_half_updated():
    net = Spiking(mlp(), steps=4)
    before = [p.detach().clone() for p in net.parameters()]
    step = lfp_kernels.fuse(net, composites.Epsilon(), reward="snn_rate", optimizer=optim.SGD(0.1))
    with pytest.raises(ValueError, match="y: expected labels"):
        step(torch.rand(3, 12), torch.tensor([0, 1, 9]))
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before))


@pytest.mark.parametrize("features", [(1, 2, 2), (4,)])
def test_flatten_in_front(features):
    """Behind a Flatten the number of features tells a sequence from a static input."""
    net = Spiking(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), LIF(0.9)), steps=5)
    assert net.time(torch.ones(5, *features)) == (5, True)
    assert net.time(torch.ones(5, 2, *features)) == (5, False)
    # inside, N is the first dimension
    assert net(torch.rand(5, 2, *features)).shape == (5, 2, 3)


def test_plain_autograd_has_no_gradient_without_a_surrogate():
    x = torch.rand(6, 12)
    for surrogate, moves in ((None, False), ("atan", True), ("fast_sigmoid", True)):
        net = Spiking(mlp(surrogate=surrogate), steps=8)
        out = net(x)
        out.sum().backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters()) == moves
        with torch.no_grad():
            assert torch.equal(net(x), out)


def test_saves_and_copies():
    import copy

    net = Spiking(mlp(learn_beta=True), steps=4)
    other = Spiking(mlp(), steps=4)
    assert "module.1.beta" in net.state_dict() and "module.1.threshold" in other.state_dict()
    again = copy.deepcopy(net)
    x = torch.rand(2, 12)
    assert torch.equal(again(x), net(x)) and "steps=4" in repr(net) and "beta=0.8" in repr(net)
    half = copy.deepcopy(net).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16
