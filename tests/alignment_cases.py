"""Composites of the feedback-alignment family, small models, and an oracle by autograd."""

from __future__ import annotations

import torch
from torch import nn

from lfp_kernels import composites as C

COMPOSITES = {
    "fa": lambda: C.FeedbackAlignment(seed=1),
    "fa-last": lambda: C.FeedbackAlignment(scope="last", seed=1),
    "usf": lambda: C.UniformSignSymmetry(),
    "frsf": lambda: C.FixedSignSymmetry(seed=2),
    "brsf": lambda: C.BatchSignSymmetry(seed=3),
    "kp": lambda: C.KolenPollack(seed=4),
    "wm": lambda: C.WeightMirror(seed=5),
    "nfa": lambda: C.NoisyFeedbackAlignment(0.1, seed=6),
    "dfa": lambda: C.DirectFeedbackAlignment(seed=7),
    "dfa-broadcast": lambda: C.DirectFeedbackAlignment(conv="broadcast", seed=7),
    "sdfa": lambda: C.DirectFeedbackAlignment("sdfa", seed=8),
    "drtp": lambda: C.DirectFeedbackAlignment("drtp", seed=9),
    "tf": lambda: C.TargetFeedback(0.5, seed=10),
    "nf": lambda: C.NonlinearFeedback(7, seed=11),
    "linbp": lambda: C.LinBP(),
}


def mlp(activation=nn.Tanh, bias=True, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(11, 9, bias), activation(), nn.Linear(9, 8, bias), activation(),
        nn.Linear(8, 5, bias),
    ).to(dtype)  # fmt: skip


def cnn(activation=nn.ReLU, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), activation(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, groups=2), activation(), nn.Flatten(), nn.Linear(6 * 4, 7),
        nn.Sigmoid(), nn.Linear(7, 5),
    ).to(dtype)  # fmt: skip


MODELS = {
    "tanh": lambda: (mlp(), (11,)),
    "relu": lambda: (mlp(nn.ReLU, seed=1), (11,)),
    "no-bias": lambda: (mlp(nn.Sigmoid, bias=False, seed=2), (11,)),
    "gelu": lambda: (mlp(nn.GELU, seed=3), (11,)),
    "cnn": lambda: (cnn(), (2, 8, 8)),
}


def batch(shape, n=6, classes=5, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, generator=g, dtype=dtype), torch.randint(
        classes, (n,), generator=g
    )


class Swapped(torch.autograd.Function):
    """``x W^T + b`` forward, ``delta M`` backward."""

    @staticmethod
    def forward(ctx, x, weight, bias, matrix):
        ctx.save_for_backward(x, matrix)
        ctx.has_bias = bias is not None
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, delta):
        x, matrix = ctx.saved_tensors
        return delta @ matrix, delta.t() @ x, delta.sum(0) if ctx.has_bias else None, None


def oracle_gradients(model, matrices, x, y):
    """Gradients of an MLP whose i-th linear layer sends ``delta M_i`` down; None: the weight."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    layers = [m for m in model if isinstance(m, nn.Linear)]
    out, k = x, 0
    for module in model:
        if isinstance(module, nn.Linear):
            matrix = layers[k].weight.detach() if matrices[k] is None else matrices[k]
            out = Swapped.apply(out, module.weight, module.bias, matrix)
            k += 1
        else:
            out = module(out)
    return torch.autograd.grad(nn.functional.cross_entropy(out, y), parameters, allow_unused=True)
