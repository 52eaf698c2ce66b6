"""Whole training steps on the GPU kernels: LeNet and a small batch-norm VGG, several steps, against
the reference. Runs under ``pytest --simulate cuda|triton``."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import lfp_kernels
from lfp_kernels import composites, optim, use_backend

pytestmark = pytest.mark.gpusim
STEPS = 3


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 10),
    )  # fmt: skip


def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((3, 8), (8, 8), (8, 16)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if after != before else []
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.25), nn.Linear(16, 5)]
    return nn.Sequential(*layers)


def wide() -> nn.Module:
    """Channels enough for channels last, where both directions read one copy of W."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 40, 3, stride=2, padding=1), nn.BatchNorm2d(40), nn.ReLU(),
        nn.Conv2d(40, 32, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip


NETWORKS = {
    "lenet": (lenet, (6, 1, 16, 16), 10),
    "vgg": (vgg, (4, 3, 8, 8), 5),
    "wide": (wide, (2, 3, 7, 7), 5),
}
OPTIMIZERS = {
    "momentum": optim.SGD(1e-3, momentum=0.9, weight_decay=1e-3),
    "clipped": optim.SGD(1e-2, momentum=0.9, nesterov=True, clip_norm=0.5),
    "adamw": optim.AdamW(1e-3),
    "capturable": optim.AdamW(torch.tensor(1e-3, dtype=torch.float64), capturable=True),
}


def train(model: nn.Module, backend: str, shape, classes: int, optimizer) -> list[Tensor]:
    """The outputs of each step; the model is trained in place."""
    dtype = next(model.parameters()).dtype
    with use_backend(backend):
        step = lfp_kernels.fuse(model, composites.Epsilon(1e-3), optimizer=optimizer)
        outs = []
        for k in range(STEPS):
            g = torch.Generator().manual_seed(k)
            x = torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
            y = torch.randint(0, classes, shape[:1], generator=g)
            torch.manual_seed(k)  # of dropout
            outs.append(step(x, y).out.clone())
    return outs


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_matches_the_reference(name: str, optimizer: str) -> None:
    make, shape, classes = NETWORKS[name]
    torch.manual_seed(0)
    ours = make().double()
    theirs = copy.deepcopy(ours)
    got = train(ours, "native", shape, classes, OPTIMIZERS[optimizer])
    want = train(theirs, "reference", shape, classes, OPTIMIZERS[optimizer])
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    for (key, a), b in zip(ours.state_dict().items(), theirs.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_step_in_other_dtypes(dtype: torch.dtype) -> None:
    """Within four times what the reference itself loses against float64."""
    make, shape, classes = NETWORKS["lenet"]
    torch.manual_seed(1)
    exact = make().to(dtype).double()
    models = {"native": copy.deepcopy(exact).to(dtype), "reference": copy.deepcopy(exact).to(dtype)}
    sgd = optim.SGD(1.0)  # large enough to move every bfloat16 weight
    start = [p.detach().clone() for p in exact.parameters()]
    truth = train(exact, "reference", shape, classes, sgd)[0]
    outs = {b: train(m, b, shape, classes, sgd)[0] for b, m in models.items()}
    error = {b: float((out.double() - truth).norm()) for b, out in outs.items()}
    scale = torch.finfo(dtype).eps * float(truth.norm())
    assert error["native"] <= 4 * (error["reference"] + scale)
    for p, q in zip(models["native"].parameters(), start):
        assert p.isfinite().all() and not torch.equal(p.double(), q)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_step_waits_for_the_device(monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    """No value of a tensor reaches the host inside a step: on a GPU each would be a wait."""
    make, shape, classes = NETWORKS["vgg"]
    model = make()
    x, y = torch.randn(shape), torch.randint(0, classes, shape[:1])
    with use_backend("native"):
        step = lfp_kernels.fuse(model, composites.Epsilon(), optimizer=OPTIMIZERS[optimizer])
        step(x, y)

        def waits(self: Tensor, *_) -> None:
            if self.numel() == 1 and self is not y:
                raise AssertionError(f"a {self.dtype} value was read by the host")

        # what is looked at for CPU tensors only: labels and the reward's finiteness; and the step
        # counts of AdamW, which live on the host
        monkeypatch.setattr("lfp_kernels.functional.reward.torch.aminmax", lambda _: (0, 0))
        monkeypatch.setattr("lfp_kernels.fused.step.check_finite", lambda *_: None)
        states = () if optimizer == "capturable" else step.optimizer.state.values()
        counts = {id(s["step"]) for s in states if "step" in s}
        for method in ("item", "__float__", "__int__", "__bool__", "tolist", "numpy"):
            original = getattr(Tensor, method)

            def watched(self: Tensor, *args, original=original):
                if id(self) not in counts:
                    waits(self)
                return original(self, *args)

            monkeypatch.setattr(Tensor, method, watched)
        step(x, y)
