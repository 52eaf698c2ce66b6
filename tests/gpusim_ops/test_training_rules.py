"""Whole training steps by every family of rules on the GPU kernels, against the reference. Runs
under ``pytest --simulate cuda|triton``."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lfp_kernels
from lfp_kernels import composites as C
from lfp_kernels import optim, rules, use_backend

pytestmark = pytest.mark.gpusim
COMPOSITES = {
    "zplus": lambda: C.Composite(rules.ZPlus(1e-3)),
    "alpha-beta": lambda: C.Composite(rules.AlphaBeta(1e-3)),
    "gamma": lambda: C.Composite(rules.Gamma(1e-3), layers=[(C.FIRST, rules.WSquare())]),
    "separate": lambda: C.Composite(
        rules.Separate(input=rules.Gamma(1e-3), weight=rules.Epsilon(1e-3))
    ),
    "fa": lambda: C.FeedbackAlignment(seed=1),
    "usf": C.UniformSignSymmetry,
    "frsf": lambda: C.FixedSignSymmetry(seed=1),
    "brsf": lambda: C.BatchSignSymmetry(seed=1),
    "nfa": lambda: C.NoisyFeedbackAlignment(0.1, seed=1),
    "kp": lambda: C.KolenPollack(seed=1),
    "dfa": lambda: C.DirectFeedbackAlignment(seed=1),
    "tf": C.TargetFeedback,
    "nf": lambda: C.NonlinearFeedback(7),
    "linbp": C.LinBP,
}


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh], ids=lambda a: a.__name__)
@pytest.mark.parametrize("name", COMPOSITES)
def test_an_mlp_trains_as_on_the_reference(name, activation) -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(
        nn.Linear(19, 33), activation(), nn.Linear(33, 16), activation(), nn.Linear(16, 5)
    ).double()
    theirs = copy.deepcopy(ours)
    outs = []
    for model, backend in ((ours, "native"), (theirs, "reference")):
        composite = COMPOSITES[name]()
        reward = "cross_entropy" if composite.plain else "softmax"
        with use_backend(backend):
            step = lfp_kernels.fuse(
                model, composite, reward=reward, optimizer=optim.SGD(0.01, momentum=0.9)
            )
            g = torch.Generator().manual_seed(0)
            outs.append([])
            for _ in range(2):
                x = torch.randn(35, 19, generator=g, dtype=torch.float64)
                outs[-1].append(step(x, torch.randint(5, (35,), generator=g)).out.clone())
    for a, b in zip(*outs):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    for (key, a), b in zip(ours.state_dict().items(), theirs.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")
