"""Inputs, oracles and comparison for the tests of batch normalization."""

from __future__ import annotations

import torch
import torch.nn.functional as TF
from torch import Tensor

from lfp_kernels import functional as F
from lfp_kernels import use_backend
from lfp_kernels.rules import stabilize

BACKENDS = ("native", "reference")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5


def case(
    shape: tuple[int, ...], dtype=torch.float64, affine: bool = True, training: bool = True, seed=0
) -> tuple:
    """x, weight, bias, running_mean, running_var"""
    g = torch.Generator().manual_seed(seed)
    count = shape[1]
    x = torch.randn(shape, generator=g, dtype=torch.float64) * 2 + 1
    weight, bias, mean = (torch.randn(count, generator=g, dtype=torch.float64) for _ in range(3))
    var = torch.rand(count, generator=g, dtype=torch.float64) + 0.5
    made = [t.to(dtype) for t in (x, weight, bias, mean, var)]
    return made[0], *((made[1], made[2]) if affine else (None, None)), made[3], made[4]


def reward_for(x: Tensor, seed: int = 9) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype)


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach().double() for t in tensors]


def torch_forward(x, weight, bias, mean, var, training, momentum=0.1):
    """torch's own batch norm in float64, on copies: out, running_mean, running_var."""
    x, weight, bias = wide(x, weight, bias)
    mean, var = (None if t is None else t.double().clone() for t in (mean, var))
    return TF.batch_norm(x, mean, var, weight, bias, training, momentum, EPS), mean, var


def oracle(x, weight, bias, z, reward, mean, var, training, eps=1e-6, below=None, signal_in=False):
    """Autograd of torch's batch norm in float64, fed with s."""
    x, weight, bias, z, reward, mean, var = wide(x, weight, bias, z, reward, mean, var)
    s = reward if signal_in else reward / stabilize(z, eps)
    leaves = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    out = TF.batch_norm(x, mean, var, weight, bias, training, 0.1, EPS)
    dx, *rest = torch.autograd.grad(out, leaves, s)
    factor = x if below is None else x / stabilize(x, below)
    feedback = [g * p.abs() for g, p in zip(rest, leaves[1:])] or [None, None]
    return (dx * factor).detach(), *(None if f is None else f.detach() for f in feedback)


def forward(backend, *args, training=True, momentum=0.1, relu=False):
    with use_backend(backend):
        return F.batch_norm(*args, training, momentum, EPS, relu=relu)


def run(backend, x, weight, bias, z, reward, mean, invstd, training, *rule, **options):
    with use_backend(backend):
        return F.batch_norm_redistribute(
            x, weight, bias, z, reward, mean, invstd, training, *rule, **options
        )


def close(got, want, scale=1e-12):
    torch.testing.assert_close(
        got, want, rtol=scale, atol=scale * (float(want.abs().max()) if want.numel() else 0)
    )


def layouts(x: Tensor) -> list[Tensor]:
    """x in other places of memory."""
    padded = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)[..., ::2].copy_(x)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    reversed_axes = x.permute(*reversed(range(x.dim()))).contiguous()
    found = [padded, turned, reversed_axes.permute(*reversed(range(x.dim())))]
    if x.dim() == 4:
        found.append(x.contiguous(memory_format=torch.channels_last))
        spread = (
            torch.zeros_like(x).repeat(1, 1, 2, 1).contiguous(memory_format=torch.channels_last)
        )
        found.append(spread[:, :, ::2].copy_(x))
    if x.dim() == 5:
        found.append(x.contiguous(memory_format=torch.channels_last_3d))
    return found
