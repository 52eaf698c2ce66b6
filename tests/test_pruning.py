"""Pruning by magnitude and relevance."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lfp_kernels as lfp
from lfp_kernels import composites as C
from lfp_kernels import optim


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 20), nn.ReLU(),
        nn.Linear(20, 3),
    )  # fmt: skip


def data(n=2):
    g = torch.Generator().manual_seed(1)
    return [
        (torch.rand(8, 1, 6, 6, generator=g), torch.randint(3, (8,), generator=g)) for _ in range(n)
    ]


def weights(net):
    return {n: p.detach() for n, p in net.named_parameters() if p.dim() > 1}


@pytest.mark.parametrize("amount", [0.0, 0.3, 0.9, 1.0])
def test_global_magnitude_removes_the_smallest(amount):
    net = model()
    before = {n: w.clone() for n, w in weights(net).items()}
    keys = list(net.state_dict())
    found = lfp.prune(net, amount)
    everything = torch.cat([w.abs().flatten() for w in before.values()])
    count = round(amount * everything.numel())
    assert round(found.total * everything.numel()) == count
    if 0 < count < everything.numel():
        limit = everything.sort().values[count - 1]
        for n, w in weights(net).items():
            assert torch.equal(w == 0, before[n].abs() <= limit)
            assert torch.equal(w[w != 0], before[n][w != 0])
            assert torch.equal(found.masks[n] == 0, w == 0)
    assert list(net.state_dict()) == keys and all(type(p) is nn.Parameter for p in net.parameters())


def test_layer_scope_removes_the_share_of_each_layer():
    found = lfp.prune(model(), 0.5, scope="layer")
    assert set(found.sparsity) == {"0.weight", "3.weight", "5.weight"}
    assert all(abs(s - 0.5) < 0.02 for s in found.sparsity.values())


def test_relevance_keeps_what_relevance_flowed_through():
    """A unit whose outgoing weights are zero carries none; its large incoming weights go first."""
    net = model()
    with torch.no_grad():
        net[3].weight[:5] *= 100
        net[5].weight[:, :5] = 0
    by_size = lfp.prune(model(), 0.2)
    found = lfp.prune(net, 0.3, by="relevance", data=data())
    assert found.masks["3.weight"][:5].sum() == 0 and found.masks["3.weight"][5:].mean() > 0.8
    assert by_size.masks["3.weight"][:5].mean() > 0.5


def test_a_pruned_network_stays_pruned_under_lfp():
    net = model()
    found = lfp.prune(net, 0.7)
    step = lfp.fuse(net, C.Epsilon(), optimizer=optim.SGD(0.01, momentum=0.9))
    for x, y in data(3):
        step(x, y)
    for n, w in weights(net).items():
        assert torch.equal(w == 0, found.masks[n] == 0)


def test_bad_input_prunes_nothing():
    net = model()
    before = {n: w.clone() for n, w in weights(net).items()}
    for options, message in (
        ({"amount": 1.5}, r"prune: amount: expected a share in \[0, 1\], got 1.5"),
        ({"amount": 0.5, "by": "size"}, r"prune: by: expected one of .*got 'size'"),
        ({"amount": 0.5, "scope": "all"}, r"prune: scope: expected one of .*got 'all'"),
        ({"amount": 0.5, "by": "relevance"}, r"prune: data: expected batches"),
        ({"amount": 0.5, "by": "relevance", "data": []}, r"prune: data: expected at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            lfp.prune(net, **options)
    with pytest.raises(ValueError, match="expected a linear or convolutional layer"):
        lfp.prune(nn.ReLU(), 0.5)
    for n, w in weights(net).items():
        assert torch.equal(w, before[n])
