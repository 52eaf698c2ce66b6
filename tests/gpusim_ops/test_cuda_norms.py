"""Norms, softmax and embeddings in CUDA C++: traffic, and a token that is no row of the table."""

from __future__ import annotations

import pytest
import torch
from gpusim import counting

from lfp_kernels import functional as F

pytestmark = pytest.mark.gpusim


def counted(call) -> int:
    """Bytes that threads ask for."""
    with counting() as counts:
        call()
    return sum(launch.bytes for launch in counts.launches)


def sectors(call) -> int:
    """Bytes of the sectors that warps ask for: what all lanes read alike counts once."""
    with counting() as counts:
        call()
    buffers = [b for launch in counts.launches for b in launch.buffers]
    return 32 * sum(b.load.sectors + b.store.sectors for b in buffers)


def size(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [256, 2048])
def test_rows_are_read_once(columns, dtype):
    """x and the reward once, the result once; besides the partial sums for weight and bias."""
    rows = 512
    x, r = (torch.randn(rows, columns).to(dtype) for _ in range(2))
    weight = torch.randn(columns).to(dtype)
    parts = rows // (16 if columns <= 512 else 4)
    sums = 2 * 2 * 4 * parts * columns
    loads_of_weight = rows * size(weight)
    least = size(x, r, x) + sums
    moved = counted(lambda: F.norm_redistribute(x, weight, None, r)) - loads_of_weight
    assert 0.99 < moved / least < 1.05
    p = x.softmax(1)
    moved = counted(lambda: F.softmax_redistribute(x, p, r))
    assert 0.99 < moved / size(x, p, r, x) < 1.05


@pytest.mark.parametrize("often", [False, True], ids=["rare", "often"])
def test_uses_are_read_once(often):
    """The rewards once, and of rows with many uses a sum per window; the table's rows once."""
    weight, tokens = torch.randn(500, 256), torch.randint(0, 500, (640,))
    if often:
        tokens.fill_(7)
    reward = torch.randn(640, 256)
    rows = len(tokens.unique())
    least = size(reward) + 2 * rows * 256 * 4
    moved = sectors(lambda: F.embedding_redistribute(weight, tokens, reward))
    assert 0.99 < moved / least < 1.3  # besides, every warp reads the places of the uses


@pytest.mark.parametrize("bad", [-1, -(2**40), 6, 2**40])
def test_bad_token_stops_the_kernel(bad):
    """As torch's own kernels do: nothing is read or written out of bounds, no value is awaited."""
    tokens = torch.arange(70) % 6
    tokens[33] = bad
    with pytest.raises(RuntimeError, match="trap"):
        torch.ops.lfp_kernels.embedding_redistribute(
            torch.randn(6, 8), tokens, torch.randn(70, 8), 3, 1e-6
        )
