"""Spiking networks: drop-in and fused, against a walk step by step and layer by layer."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spiking_cases import RESET_IDS, RESETS, cnn, mlp
from torch import nn

import lfp_kernels
from lfp_kernels import composites, functional, optim, rewards, use_backend
from lfp_kernels.nn import IF, LIF, Spiking

EPS = 1e-6


def by_steps(net: Spiking, x, reward_of, eps=EPS):
    """(spikes, feedback by parameter, input reward): one product per layer and step."""
    layers = [m for _, m in net.layers()]
    steps, static = net.time(x)
    inputs = [x if static else x[t] for t in range(steps)]
    walk = []  # per layer: (inputs per step, membranes, first spikes...)
    values = inputs
    for layer in layers:
        before = values
        if isinstance(layer, LIF):
            found = layer.scan(torch.stack(before))
            values = list(found.spikes.unpack(x.dtype))
            walk.append((layer, before, found))
        else:
            values = [layer(v) for v in before]
            walk.append((layer, before, None))
    out = torch.stack(values)
    arrived = list(reward_of(out))
    feedback = {}
    for layer, before, found in reversed(walk):
        if found is not None:
            back = functional.lif_feedback(
                torch.stack(arrived), found.membrane, found.spikes, layer.decay, layer.threshold,
                eps=eps, reset=layer.reset, reset_delay=layer.reset_delay, need_parameters=True,
            )  # fmt: skip
            for parameter, value in ((layer.beta, back.beta), (layer.threshold, back.threshold)):
                feedback[id(parameter)] = value
            arrived = list(back.signal)
            continue
        below = []
        for v, s in zip(before, arrived):
            v = v.detach().requires_grad_()
            parameters = list(layer.parameters())
            with torch.enable_grad():
                grads = torch.autograd.grad(layer(v), [v, *parameters], s)
            weighted = isinstance(layer, (nn.Linear, nn.Conv2d))
            below.append(v.detach() * grads[0] if weighted else grads[0])
            for parameter, g in zip(parameters, grads[1:]):
                value = parameter.detach().abs() * g
                feedback[id(parameter)] = feedback.get(id(parameter), 0) + value
        arrived = below
    total = sum(arrived) if static else torch.stack(arrived)
    return out, feedback, total


def drop_in(net, x, reward_of, composite=None):
    x = x.detach().clone().requires_grad_()
    for p in net.parameters():
        p.grad = None
    with (composite or composites.Epsilon(EPS)).context(net):
        out = net(x)
        lfp_kernels.backward(out, reward_of(out))
    return out.detach(), [None if p.grad is None else -p.grad for p in net.parameters()], -x.grad


def fused(net, x, reward_of):
    """Feedback as the change of the parameters under a step of length 1."""
    net = copy.deepcopy(net)
    before = [p.detach().clone() for p in net.parameters()]
    step = lfp_kernels.fuse(
        net, composites.Epsilon(EPS), reward=lambda out, y: reward_of(out), optimizer=optim.SGD(1.0)
    )
    out = step(x, None).out
    return out, [p.detach() - b for p, b in zip(net.parameters(), before)]


def network(make, kind, double=True, **options):
    net = Spiking(make(kind), **options)
    return net.double() if double else net


def batch(make, steps=None, n=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(5)
    shape = (n, 12) if make is mlp else (n, 2, 10, 10)
    shape = shape if steps is None else (steps, *shape)
    return torch.rand(shape, generator=g, dtype=torch.float64).to(dtype)


def rate(out):
    return rewards.snn_rate(out, torch.arange(out.shape[1]) % out.shape[2])


def close(found, expected, **tolerance):
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize("kind", RESETS, ids=RESET_IDS)
@pytest.mark.parametrize("sequence", [False, True], ids=["static", "sequence"])
@pytest.mark.parametrize("chunk", [None, 1, 4, 9], ids=str)
@pytest.mark.parametrize("backend", [None, "reference"], ids=str)
def test_both_ways_are_the_walk_by_steps(backend, chunk, sequence, kind, make):
    steps = 9
    net = network(make, kind, steps=steps, chunk=chunk)
    x = batch(make, steps if sequence else None)
    spikes, feedback, input_reward = by_steps(net, x, rate)
    assert 0 < float(spikes.mean()) < 1
    expected = [feedback[id(p)] for p in net.parameters()]
    with use_backend(backend):
        out, found, of_input = drop_in(net, x, rate)
        assert torch.equal(out, spikes)
        close(found, expected)
        torch.testing.assert_close(of_input, input_reward)
        out, found = fused(net, x, rate)
    assert torch.equal(out, spikes)
    close(found, expected)


@pytest.mark.parametrize("make", [mlp, cnn])
def test_events_and_dense_products_agree(make, monkeypatch):
    """The same spikes through both kinds of products, whatever the density."""
    from lfp_kernels.fused import neurons

    net, x = network(make, RESETS[0], steps=10), batch(make)
    found = []
    for density in (0.0, 1.1):
        monkeypatch.setattr(neurons, "DENSITY", density)
        found.append(drop_in(net, x, rate))
    (a, one, first), (b, two, second) = found
    assert torch.equal(a, b)
    close([*one, first], [*two, second])


def test_events_are_used():
    """A sparse layer runs without a dense product of its spikes."""
    net = network(mlp, RESETS[0], steps=10)
    with torch.no_grad():
        net.module[0].bias.fill_(-0.6)
    with torch.profiler.profile() as profile:
        fused(net, batch(mlp), rate)
    names = {event.key for event in profile.key_averages()}
    assert "lfp_kernels::spike_linear_forward" in names
    assert "lfp_kernels::spike_linear_redistribute" in names


@pytest.mark.parametrize("name", sorted(rewards.REGISTRY))
def test_every_reward(name):
    net = network(mlp, RESETS[0], steps=6)
    reward = rewards.get(name)
    step = lfp_kernels.fuse(net, composites.Epsilon(), reward=name, optimizer=optim.SGD(1e-3))
    x = batch(mlp)
    values = name in ("regression", "mse", "binary_sigmoid")
    y = torch.rand(6, 3, 5, dtype=torch.float64).round() if values else torch.tensor([0, 4, 2])
    result = step(x, y)
    assert result.out.shape == result.reward.shape == (6, 3, 5)
    assert torch.equal(result.reward, reward(result.out, y)) and result.reward.isfinite().all()


def test_learned_decay_and_threshold():
    net = network(lambda k: mlp(k, learn_beta=True, learn_threshold=True), RESETS[0], steps=9)
    x = batch(mlp)
    _, feedback, _ = by_steps(net, x, rate)
    expected = [feedback[id(p)] for p in net.parameters()]
    assert any(n.endswith("beta") for n, _ in net.named_parameters()) and len(expected) == 8
    close(drop_in(net, x, rate)[1], expected)
    close(fused(net, x, rate)[1], expected)


def test_decay_per_channel():
    torch.manual_seed(0)
    beta, limit = torch.rand(6), torch.rand(6) + 0.1
    chain = nn.Sequential(
        nn.Conv2d(2, 6, 3), LIF(beta, limit, learn_beta=True), nn.Flatten(), nn.Linear(384, 4), IF()
    )
    net = Spiking(chain, steps=5).double()
    x = batch(cnn)
    _, feedback, _ = by_steps(net, x, rate)
    close(drop_in(net, x, rate)[1], [feedback[id(p)] for p in net.parameters()])


def test_a_frozen_layer_gets_nothing():
    net = network(mlp, RESETS[0], steps=7)
    whole = drop_in(net, batch(mlp), rate)[1]
    net.module[0].requires_grad_(False)
    part = drop_in(net, batch(mlp), rate)[1]
    assert part[0] is None and part[1] is None
    close(part[2:], whole[2:])
    before = net.module[0].weight.clone()
    step = lfp_kernels.fuse(net, composites.Epsilon(), reward="snn_rate", optimizer=optim.SGD(0.1))
    step(batch(mlp), torch.tensor([0, 1, 2]))
    assert torch.equal(net.module[0].weight, before)


class Readout(nn.Module):
    """A spiking network between ordinary layers; its logits are spike counts."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Linear(12, 12)
        self.snn = Spiking(mlp(), steps=6)

    def forward(self, x):
        return self.snn(torch.relu(self.front(x))).sum(0)


def test_inside_a_model():
    torch.manual_seed(0)
    model, x = Readout().double(), batch(mlp)
    with torch.no_grad():
        model.front.bias.add_(1)

    def reward_of(out):
        return rewards.softmax(out, torch.tensor([0, 1, 2]))

    _, found, of_input = drop_in(model, x, reward_of)
    assert of_input.abs().sum() > 0 and all(f.abs().sum() > 0 for f in found[:2])
    inner = torch.relu(model.front(x)).detach()
    _, feedback, _ = by_steps(model.snn, inner, lambda s: _of_count(s, reward_of))
    close(found[2:], [feedback[id(p)] for p in model.snn.parameters()])


def _of_count(spikes, reward_of):
    """What the sum over steps hands down: each step its share, by the epsilon rule."""
    count = spikes.sum(0)
    sign = torch.where(count < 0, -1.0, 1.0)
    return spikes * (reward_of(count) / (count + EPS * sign))


def test_fused_with_layers_around():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), Spiking(mlp(), steps=6)).double()
    with torch.no_grad():
        model[0].bias.add_(1)
    x = batch(mlp)
    _, expected, _ = drop_in(model, x, rate)
    _, found = fused(model, x, rate)
    assert expected[0].abs().sum() > 0
    close(found, expected)


def test_batch_norm_and_average_pool_inside():
    torch.manual_seed(0)
    chain = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), LIF(0.9, 0.5), nn.AvgPool2d(2), nn.Conv2d(4, 3, 2),
        nn.BatchNorm2d(3), LIF(0.9, 0.3), nn.Flatten(), nn.Linear(27, 4), LIF(0.9, 0.2),
    )  # fmt: skip
    with torch.no_grad():
        chain[1].bias.fill_(0.2), chain[5].bias.fill_(0.1)
    net = Spiking(chain, steps=5).double()
    x = batch(cnn)
    state = copy.deepcopy(net.state_dict())
    out, one, _ = drop_in(net, x, rate)
    moved = copy.deepcopy(net.state_dict())
    assert int(moved["module.1.num_batches_tracked"]) == 1
    assert not torch.equal(moved["module.5.running_mean"], state["module.5.running_mean"])
    net.load_state_dict(state)
    same, two = fused(net, x, rate)
    assert torch.equal(out, same) and all(f.abs().sum() > 0 for f in one[2::4])
    close(one, two)
    chunked = Spiking(chain, steps=5, chunk=2).double()
    with pytest.raises(ValueError, match=r"chunk: layer .*BatchNorm.* chunk=None, or .* eval"):
        drop_in(chunked, x, rate)
    chunked.eval(), net.eval()
    close(drop_in(chunked, x, rate)[1], drop_in(net, x, rate)[1])


@pytest.mark.parametrize("way", ["drop-in", "fused"])
def test_noise_in_training_only(way):
    x = batch(mlp)
    net = Spiking(mlp(), steps=8, noise=0.3).double()
    quiet = Spiking(net.module, steps=8)

    def run(n):
        torch.manual_seed(3)
        return drop_in(n, x, rate)[:2] if way == "drop-in" else fused(n, x, rate)

    out, found = run(net)
    again, same = run(net)
    assert torch.equal(out, again)
    close(found, same, rtol=0, atol=0)
    assert not torch.equal(out, run(quiet)[0])
    chunked = Spiking(net.module, steps=8, noise=0.3, chunk=3).double()
    out_chunked, in_chunks = run(chunked)
    assert torch.equal(out, out_chunked)
    close(in_chunks, found)
    net.eval(), quiet.eval()
    assert torch.equal(run(net)[0], run(quiet)[0])


def test_noise_reaches_the_weights_and_not_the_rewards():
    """W.fb uses the noisy input; the reward that goes on multiplies the clean one."""
    torch.manual_seed(0)
    net = Spiking(nn.Sequential(nn.Linear(6, 4), LIF(0.9, 0.4)), steps=7, noise=0.5).double()
    x = torch.rand(2, 6, dtype=torch.float64)
    x[:, 2] = 0
    torch.manual_seed(11)
    _, found, of_input = drop_in(net, x, rate)
    assert (of_input[:, 2] == 0).all() and (of_input[:, 0] != 0).all()
    assert (found[0][:, 2] != 0).any()  # noise alone has fed it


def test_state_is_never_left_over():
    net, x = network(mlp, RESETS[0], steps=6), batch(mlp)
    first = net(x)
    assert torch.equal(net(x), first) and torch.equal(drop_in(net, x, rate)[0], first)
    whole = Spiking(net.module, steps=12)(x)
    one, state = net.stream(x)
    two, _ = net.stream(x, state)
    assert torch.equal(torch.cat([one, two]), whole)
    with pytest.raises(ValueError, match="state: expected one tensor per LIF layer"):
        net.stream(x, state[:1])


def test_backward_twice_and_linear_in_the_reward():
    net, x = network(cnn, RESETS[0], steps=5, chunk=2), batch(cnn)
    parameters = list(net.parameters())
    with composites.Epsilon().context(net):
        out = net(x)
        reward = rate(out)
        one = torch.autograd.grad(out, parameters, -reward, retain_graph=True)
        two = torch.autograd.grad(out, parameters, -2 * reward)
    close([2 * f for f in one], two)


@pytest.mark.parametrize("steps", [1, 1000])
def test_few_and_many_steps(steps):
    net = network(mlp, RESETS[0], steps=steps, chunk=None if steps == 1 else 64)
    x = batch(mlp)
    out, found, _ = drop_in(net, x, rate)
    _, feedback, _ = by_steps(net, x, rate)
    close(found, [feedback[id(p)] for p in net.parameters()], rtol=1e-6, atol=1e-6)
    assert out.shape == (steps, 3, 5)


def test_an_empty_batch():
    net = network(mlp, RESETS[0], steps=4)
    out, found, of_input = drop_in(net, batch(mlp, n=0), rate)
    assert out.shape == (4, 0, 5) and of_input.shape == (0, 12)
    assert all((f == 0).all() for f in found)
    assert fused(net, batch(mlp, n=0), rate)[0].shape == (4, 0, 5)


@pytest.mark.parametrize("make", [mlp, cnn])
def test_the_same_bits_twice(make):
    net, x = network(make, RESETS[0], double=False, steps=9), batch(make, dtype=torch.float32)
    a, b = drop_in(net, x, rate), drop_in(net, x, rate)
    assert all(torch.equal(s, t) for s, t in zip(a[1], b[1])) and torch.equal(a[2], b[2])


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 20), st.integers(1, 5), st.integers(1, 4), st.floats(0, 1),
    st.sampled_from(RESETS), st.one_of(st.none(), st.integers(1, 20)),
)  # fmt: skip
def test_any_network(steps, hidden, n, beta, kind, chunk):
    torch.manual_seed(steps + 10 * hidden)
    name, delay = kind
    chain = nn.Sequential(
        nn.Linear(3, hidden), LIF(beta, 0.4, name, delay), nn.Linear(hidden, 2), LIF(beta, 0.3)
    )
    net = Spiking(chain, steps=steps, chunk=chunk).double()
    x = torch.rand(n, 3, dtype=torch.float64) * 2
    spikes, feedback, total = by_steps(net, x, rate)
    out, found, of_input = drop_in(net, x, rate)
    assert torch.equal(out, spikes)
    close([*found, of_input], [*(feedback[id(p)] for p in net.parameters()), total])
