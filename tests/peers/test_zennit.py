"""Every LRP rule and composite against zennit, in float64, on the plain PyTorch and the compiled
backend. zennit is the oracle; it is a dependency of ``make test-peers`` alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lfp_kernels as lfp
from lfp_kernels import composites as C
from lfp_kernels import rules as R

pytestmark = pytest.mark.peers
BACKENDS = ("native", "reference")
F64 = torch.float64


def zennit_rules():
    from zennit import rules as Z

    low, high = (torch.tensor(v, dtype=F64) for v in (-4.0, 4.0))
    return {
        "epsilon": (R.Epsilon(1e-3), lambda: Z.Epsilon(1e-3)),
        "zplus": (R.ZPlus(1e-4), lambda: Z.ZPlus(1e-4)),
        "alpha2beta1": (R.AlphaBeta(1e-4, 2.0, 1.0), lambda: Z.AlphaBeta(2.0, 1.0, 1e-4)),
        "alpha1beta0": (R.AlphaBeta(1e-4, 1.0, 0.0), lambda: Z.AlphaBeta(1.0, 0.0, 1e-4)),
        "gamma": (R.Gamma(1e-4, 0.5), lambda: Z.Gamma(0.5, 1e-4)),
        "gamma0": (R.Gamma(1e-4, 0.0), lambda: Z.Gamma(0.0, 1e-4)),
        "wsquare": (R.WSquare(1e-4), lambda: Z.WSquare(1e-4)),
        "flat": (R.Flat(1e-4), lambda: Z.Flat(1e-4)),
        "zbox": (R.ZBox(1e-4, -4.0, 4.0), lambda: Z.ZBox(low, high, 1e-4)),
    }


RULES = (
    "epsilon", "zplus", "alpha2beta1", "alpha1beta0", "gamma", "gamma0", "wsquare", "flat", "zbox",
)  # fmt: skip


def networks():
    torch.manual_seed(1)
    mlp = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 7, bias=False), nn.Linear(7, 5))
    cnn = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, stride=2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 4, 5),
    )  # fmt: skip
    strided = nn.Sequential(
        nn.Conv1d(2, 4, 3, dilation=2, stride=2, padding=2), nn.ReLU(), nn.ConvTranspose1d(4, 3, 3),
        nn.Flatten(), nn.Linear(3 * 8, 5),
    )  # fmt: skip
    return {
        "mlp": (mlp, torch.randn(4, 12, dtype=F64)),
        "cnn": (cnn, torch.randn(4, 3, 12, 12, dtype=F64)),
        "conv1d": (strided, torch.randn(4, 2, 12, dtype=F64)),
    }


WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d)


def by_zennit(model, x, start, rule_of):
    from zennit import rules as Z
    from zennit.core import Composite

    def module_map(ctx, name, module):
        if isinstance(module, WEIGHTED):
            return rule_of()
        return Z.Pass() if isinstance(module, (nn.ReLU, nn.Tanh)) else None

    return run_zennit(Composite(module_map=module_map), model, x, start)


def run_zennit(composite, model, x, start):
    x = x.clone().requires_grad_()
    with composite.context(model) as modified:
        out = modified(x)
        return torch.autograd.grad(out, x, start)[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("network", ["mlp", "cnn", "conv1d"])
@pytest.mark.parametrize("name", RULES)
def test_rule(name, network, backend):
    model, x = networks()[network]
    model = model.to(F64)
    ours, theirs = zennit_rules()[name]
    start = torch.randn(4, 5, dtype=F64)
    want = by_zennit(model, x, start, theirs)
    with lfp.use_backend(backend):
        got = lfp.attribute(model, x, start, C.Composite(ours)).input
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11 * float(want.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["EpsilonPlus", "EpsilonPlusFlat", "Alpha", "AlphaFlat", "Box"])
def test_composite(name, backend):
    from zennit import composites as Z

    low, high = (torch.full((1, 3, 12, 12), v, dtype=F64) for v in (-4.0, 4.0))
    ours, theirs = {
        "EpsilonPlus": (C.EpsilonPlus(), Z.EpsilonPlus()),
        "EpsilonPlusFlat": (C.EpsilonPlus(first="flat"), Z.EpsilonPlusFlat()),
        "Alpha": (C.EpsilonAlpha2Beta1(), Z.EpsilonAlpha2Beta1()),
        "AlphaFlat": (C.EpsilonAlpha2Beta1(first="flat"), Z.EpsilonAlpha2Beta1Flat()),
        "Box": (C.EpsilonGammaBox(-4.0, 4.0), Z.EpsilonGammaBox(low=low, high=high)),
    }[name]
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(6 * 25, 8), nn.ReLU(), nn.Linear(8, 5),
    ).to(F64)  # fmt: skip
    x = torch.randn(3, 3, 12, 12, dtype=F64)
    labels = torch.tensor([0, 4, 2])
    start = torch.zeros(3, 5, dtype=F64).scatter_(1, labels[:, None], 1.0)
    start = start * model(x).detach()
    want = run_zennit(theirs, model, x, start)
    with lfp.use_backend(backend):
        got = lfp.attribute(model, x, labels, ours).input
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11 * float(want.abs().max()))
