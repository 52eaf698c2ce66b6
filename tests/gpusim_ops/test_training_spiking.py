"""Training steps of spiking networks on the GPU kernels, against the reference: the path that a GPU
takes, packed spikes unpacked for dense products."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lfp_kernels
from lfp_kernels import composites, optim, use_backend
from lfp_kernels.functional import spike_layers
from lfp_kernels.nn import LIF, Spiking

pytestmark = pytest.mark.gpusim


def dense():
    return nn.Sequential(nn.Linear(12, 20), LIF(0.9, 0.5), nn.Linear(20, 5), LIF(0.8, 0.4))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), LIF(0.9, 0.5, "zero"), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(36, 4), LIF(0.9, 0.4, learn_beta=True),
    )  # fmt: skip


@pytest.mark.parametrize("noise", [0.0, 0.1], ids=["quiet", "noisy"])
@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("make, shape", [(dense, (3, 12)), (convolutional, (2, 2, 8, 8))])
def test_training_matches_the_reference(make, shape, chunk, noise, monkeypatch):
    # Tensors of the simulated GPU are CPU tensors: the CPU's own products must not see them.
    monkeypatch.setattr(spike_layers, "_has", lambda spikes, dtype: False)
    monkeypatch.setattr(lfp_kernels.functional, "has_spike_feedback", lambda like: False)
    torch.manual_seed(0)
    ours = Spiking(make(), steps=7, chunk=chunk, noise=noise).double()
    theirs = copy.deepcopy(ours)
    outs = {}
    for backend, model in (("native", ours), ("reference", theirs)):
        with use_backend(backend):
            step = lfp_kernels.fuse(
                model, composites.Epsilon(1e-3), reward="snn_rate",
                optimizer=optim.SGD(1e-2, momentum=0.9),
            )  # fmt: skip
            outs[backend] = []
            for k in range(2):
                torch.manual_seed(k)  # of noise
                x = torch.rand(shape, dtype=torch.float64)
                outs[backend].append(step(x, torch.arange(shape[0])).out)
    for a, b in zip(outs["native"], outs["reference"]):
        assert torch.equal(a, b) and a.any()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
