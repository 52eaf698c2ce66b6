"""What the tests of lfp_kernels.compat.lfprop share: lfprop's loop and small networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

RELATIVE = 1e-9


def relative(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    error, scale = float((actual - expected).abs().max()), float(expected.abs().max())
    return error / scale if scale else error


def propagate(composite: Any, model: nn.Module, x: Tensor, reward: Any) -> tuple[Tensor, Tensor]:
    """lfprop's loop: (output, input reward); feedback is on the parameters."""
    x = x.detach().clone().requires_grad_()
    with composite.context(model) as modified:
        out = modified(x)
        r = reward(out) if callable(reward) else reward
        (found,) = torch.autograd.grad((out,), (x,), grad_outputs=(r.detach(),))
    return out.detach(), found


def feedback(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.feedback for name, p in model.named_parameters()}  # type: ignore[attr-defined]


def small(*layers: nn.Module, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(*layers).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def snapshot(model: nn.Module) -> list[tuple[int, dict[str, Any]]]:
    """Every module's own attributes, parameters, buffers and children, by identity."""
    found = []
    for module in model.modules():
        own = {**vars(module), **module._parameters, **module._buffers, **module._modules}
        found.append((id(module), {name: id(value) for name, value in own.items()}))
    return found


def stab(z: Tensor, eps: float) -> Tensor:
    return z.detach() + eps * torch.where(z < 0, -1.0, 1.0).to(z.dtype)
