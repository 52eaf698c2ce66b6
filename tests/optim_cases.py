"""Parameters, settings and torch twins for the tests of the optimizers."""

from __future__ import annotations

import pytest
import torch

from lfp_kernels import optim
from lfp_kernels.optim import BoundOptimizer

BACKENDS = ("native", "reference")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((3, 4), (5,), (), (2, 3, 2, 2), (0, 3), (7000,), (40000,))
SPECS = {
    "sgd": optim.SGD(0.1),
    "sgd-decay": optim.SGD(0.1, weight_decay=0.05),
    "momentum": optim.SGD(0.1, momentum=0.9),
    "momentum-decay": optim.SGD(0.1, momentum=0.9, weight_decay=0.05),
    "nesterov": optim.SGD(0.1, momentum=0.8, weight_decay=0.05, nesterov=True),
    "adamw": optim.AdamW(0.01),
    "adamw-betas": optim.AdamW(0.01, betas=(0.7, 0.95), eps=1e-3, weight_decay=0.2),
}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def torch_twin(spec, params):
    """The torch optimizer with the same settings."""
    options = {k: v for k, v in vars(spec).items() if k != "clip_norm"}
    kind = torch.optim.SGD if isinstance(spec, optim.SGD) else torch.optim.AdamW
    return kind(params, **options)


def parameters(dtype=torch.float64, shapes=SHAPES, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=g, dtype=torch.float64).to(dtype))
        for shape in shapes
    ]


def set_grads(params, seed):
    g = torch.Generator().manual_seed(seed)
    for param in params:
        grad = torch.randn(param.shape, generator=g, dtype=torch.float64)
        param.grad = grad.to(param.dtype)


def assert_same(ours, theirs, rtol=1e-12):
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


def plan(spec, params):
    """The updates of one step from a fresh optimizer."""
    bound = BoundOptimizer(spec, params)
    return [bound.update_of(p, bound.param_groups[0]) for p in params]
