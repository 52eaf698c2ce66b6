"""Inputs and comparison for the tests of the pools."""

from __future__ import annotations

import torch
from torch import Tensor

BACKENDS = ("native", "reference")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# shape of x; kernel, stride, padding
WINDOWS = [
    ((2, 3, 11), 2, 2, 0),
    ((2, 3, 12), (5,), (2,), (2,)),
    ((2, 3, 8, 8), 2, 2, 0),  # 2 x 2 windows that tile
    ((3, 20, 28, 36), 2, None, 0),
    ((2, 19, 6, 9), (2, 3), (2, 3), 0),  # other windows that tile
    ((2, 3, 9, 7), 2, 2, 0),  # a row and a column left out
    ((2, 5, 9, 11), 3, 2, 1),  # the first pool of a ResNet
    ((2, 17, 7, 40), (1, 3), (1, 1), (0, 1)),
    ((1, 2, 5, 5), (4, 5), (3, 1), (2, 0)),
    ((2, 3, 7, 7), 2, 3, 0),  # gaps between the windows
    ((1, 2, 4, 6, 4), 2, 2, 0),
    ((2, 3, 5, 4, 6), (3, 2, 3), (2, 1, 2), (1, 1, 0)),
]


def values(shape, dtype=torch.float64, seed=0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


def layouts(x: Tensor) -> list[Tensor]:
    """x, in other places of memory."""
    padded = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)[..., ::2].copy_(x)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    found = [x, padded, turned]
    if x.dim() > 3:
        found.append(last(x))
        spread = torch.zeros(*x.shape[:2], 2 * x.shape[2], *x.shape[3:], dtype=x.dtype)
        found.append(last(spread)[:, :, ::2].copy_(x))
    return found


def last(x: Tensor) -> Tensor:
    memory = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=memory[x.dim()])


def is_last(x: Tensor) -> bool:
    return x.dim() > 3 and x.stride(1) == 1


def close(got: Tensor, want: Tensor, scale: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=scale, atol=scale * float(want.abs().max()))
