"""The rules that captum has, against captum, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lfp_kernels as lfp
from lfp_kernels import composites as C
from lfp_kernels import rules as R

pytestmark = pytest.mark.peers
F64 = torch.float64


class Cnn(nn.Module):
    """captum knows no nn.Flatten."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3)
        self.relu1, self.relu2, self.pool = nn.ReLU(), nn.ReLU(), nn.MaxPool2d(2)
        self.last = nn.Linear(8 * 16, 5)

    def forward(self, x):
        x = self.pool(self.relu1(self.first(x)))
        return self.last(self.relu2(self.second(x)).flatten(1))


def networks():
    torch.manual_seed(1)
    mlp = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5))
    # captum's alpha1-beta0 forms no branch of negative inputs: it agrees with z+ where x >= 0.
    return {
        "mlp": (mlp.to(F64), torch.rand(4, 12, dtype=F64)),
        "cnn": (Cnn().to(F64), torch.rand(4, 3, 12, 12, dtype=F64)),
    }


def by_captum(model, x, labels, make):
    from captum.attr import LRP

    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.rule = make()
    try:
        return LRP(model).attribute(x, target=labels)
    finally:
        for module in model.modules():
            if hasattr(module, "rule"):
                del module.rule


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_epsilon(network, backend):
    from captum.attr._utils.lrp_rules import EpsilonRule

    model, x = networks()[network]
    labels = torch.tensor([0, 4, 2, 1])
    want = by_captum(model, x, labels, lambda: EpsilonRule(epsilon=1e-9))
    with lfp.use_backend(backend):
        got = lfp.attribute(model, x, labels, C.Epsilon(1e-9)).input
    torch.testing.assert_close(
        got, want.detach(), rtol=1e-6, atol=1e-6 * float(want.detach().abs().max())
    )


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_alpha1_beta0_is_zplus_without_bias(network, backend):
    from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule

    model, x = networks()[network]
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:  # captum keeps the whole bias in the denominator, zennit's z+ its b+
                p.abs_()
    labels = torch.tensor([0, 4, 2, 1])
    want = by_captum(model, x, labels, Alpha1_Beta0_Rule)
    with lfp.use_backend(backend):
        got = lfp.attribute(model, x, labels, C.Composite(R.ZPlus(1e-9))).input
    torch.testing.assert_close(
        got, want.detach(), rtol=1e-6, atol=1e-6 * float(want.detach().abs().max())
    )
