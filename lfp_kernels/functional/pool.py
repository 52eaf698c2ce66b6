"""Average, adaptive average and max pools, 1 to 3 spatial dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _validate as check
from .. import ops
from .._no_grad import no_grad
from ..backends import select
from ..ops.pool import output_shape
from ..rules import Epsilon, Rule

_ = ops  # registers the schemas
_EPSILON = Epsilon()
_Size = int | Sequence[int]


@no_grad
def avg_pool(
    x: Tensor,
    kernel_size: _Size,
    stride: _Size | None = None,
    padding: _Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Average pool of x; the arguments are those of ``torch.nn.functional.avg_pool2d``.

    Args:
        x: [N, C, *spatial], or [C, *spatial] with sizes given per dimension; 1 to 3 dimensions.
        kernel_size, stride, padding: an int or one per spatial dimension; stride None = kernel.

    Returns:
        [N, C, *outputs] in x's memory format.
    """
    op = "avg_pool"
    v, kernel, step, pad, _, _ = _window(op, x, kernel_size, stride, padding, 1, ceil_mode)
    _check_divisor(op, divisor_override)
    out = select("pool", x).avg_forward(
        v, kernel, step, pad, bool(ceil_mode), bool(count_include_pad), divisor_override
    )
    return out if v is x else out.squeeze(0)


@no_grad
def avg_pool_redistribute(
    x: Tensor,
    z: Tensor,
    reward: Tensor,
    kernel_size: _Size,
    stride: _Size | None = None,
    padding: _Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    rule: Rule = _EPSILON,
    *,
    below: Rule | None = None,
    signal_in: bool = False,
) -> Tensor:
    """Redistribute the reward at the output of :func:`avg_pool`: the epsilon rule of a layer
    without parameters, ``s = reward / stab(z)``, ``x * (pool transposed)(s)``.

    Args:
        x, kernel_size, ..., divisor_override: as in :func:`avg_pool`.
        z: pool output. reward: reward at z, of its shape.
        rule, below, signal_in: as in ``linear_redistribute``.

    Returns:
        Input reward, shaped like x, in x's memory format.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    op = "avg_pool_redistribute"
    v, kernel, step, pad, _, shape = _window(op, x, kernel_size, stride, padding, 1, ceil_mode)
    _check_divisor(op, divisor_override)
    z = _check_reward(op, x, z, reward, shape if v is x else shape[1:], rule, signal_in)
    if v is not x:
        z, reward = z.unsqueeze(0), reward.unsqueeze(0)
    out = select("pool", x).avg_redistribute(
        v, z, reward, kernel, step, pad, bool(ceil_mode), bool(count_include_pad),
        divisor_override, rule, below, signal_in,
    )  # fmt: skip
    return out if v is x else out.squeeze(0)


@no_grad
def adaptive_avg_pool_redistribute(
    x: Tensor,
    z: Tensor,
    reward: Tensor,
    rule: Rule = _EPSILON,
    *,
    below: Rule | None = None,
    signal_in: bool = False,
) -> Tensor:
    """Redistribute the reward at ``z = adaptive_avg_pool(x)``; z's shape says the output size.

    Args:
        x: [N, C, *spatial] or [C, *spatial], 1 to 3 dimensions. z: the pool's output.
        reward: reward at z, of its shape. rule, below, signal_in: as in ``linear_redistribute``.

    Returns:
        Input reward, shaped like x, in x's memory format.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    op = "adaptive_avg_pool_redistribute"
    check.floating(op, "x", x)
    check.tensor(op, "z", z)
    if not 2 <= x.dim() <= 5 or z.dim() != x.dim() or z.shape[0] != x.shape[0]:
        raise ValueError(
            f"{op}: z: expected the output of an adaptive pool over x of shape {tuple(x.shape)} "
            f"([N, C, *spatial], 1 to 3 dimensions), got {tuple(z.shape)}"
        )
    # Pooling an axis to its own size is the identity, so [C, H, W] reads as [1, C, H, W].
    unbatched = x.dim() == 2 or z.shape[1] != x.shape[1]
    if unbatched and x.dim() == 5:
        raise ValueError(
            f"{op}: z: expected {x.shape[1]} channels like x, got {z.shape[1]} in {tuple(z.shape)}"
        )
    if any(size == 0 for size in (*x.shape[2:], *z.shape[2:])):
        raise ValueError(
            f"{op}: x: expected spatial sizes of at least 1, got {tuple(x.shape)} "
            f"for z of shape {tuple(z.shape)}"
        )
    z = _check_reward(op, x, z, reward, z.shape, rule, signal_in)
    implementation = select("pool", x)
    if not unbatched:
        return implementation.adaptive_avg_redistribute(x, z, reward, rule, below, signal_in)
    return implementation.adaptive_avg_redistribute(
        x.unsqueeze(0), z.unsqueeze(0), reward.unsqueeze(0), rule, below, signal_in
    ).squeeze(0)


@no_grad
def max_pool(
    x: Tensor,
    kernel_size: _Size,
    stride: _Size | None = None,
    padding: _Size = 0,
    dilation: _Size = 1,
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """Max pool of x; the arguments are those of ``torch.nn.functional.max_pool2d``.

    Returns:
        (out [N, C, *outputs] in x's memory format, indices of the winners). The first largest
        value of a window wins. The indices are shaped like out; what they hold is between this
        function and :func:`max_pool_redistribute`.
    """
    v, *window, _ = _window("max_pool", x, kernel_size, stride, padding, dilation, ceil_mode)
    out, indices = select("pool", x).max_forward(v, *window, bool(ceil_mode))
    return (out, indices) if v is x else (out.squeeze(0), indices.squeeze(0))


@no_grad
def adaptive_max_pool(x: Tensor, output_size: _Size) -> tuple[Tensor, Tensor]:
    """Adaptive max pool of x [N, C, *spatial] to ``output_size``, an int or one per dimension.

    Returns:
        (out, indices) as :func:`max_pool` does.
    """
    op = "adaptive_max_pool"
    check.floating(op, "x", x)
    if not 3 <= x.dim() <= 5:
        raise ValueError(f"{op}: x: expected shape [N, C, *spatial], got {tuple(x.shape)}")
    size = _per_dimension(op, "output_size", output_size, x.dim() - 2, 1)
    pools = {3: F.adaptive_max_pool1d, 4: F.adaptive_max_pool2d, 5: F.adaptive_max_pool3d}
    return pools[x.dim()](x, size, return_indices=True)


@no_grad
def max_pool_redistribute(
    reward: Tensor,
    indices: Tensor,
    input_shape: Sequence[int],
    *,
    like: Tensor | None = None,
) -> Tensor:
    """The winner of each window takes its reward; a winner of several windows takes their sum.

    A signal may stand in for the reward: what wins has the value of the pool's output, so
    ``reward / stab(out)`` at the output is the winner's signal at the input.

    Args:
        reward: reward at the output of :func:`max_pool`. indices: what that returned.
        input_shape: shape of the pool's input.
        like: a tensor whose memory format the result takes; None keeps that of the pool's output.

    Returns:
        Reward at the input, of shape ``input_shape``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, device or shape.
        RuntimeError: the indices do not belong to an input of that shape.
    """
    op = "max_pool_redistribute"
    check.floating(op, "reward", reward)
    check.tensor(op, "indices", indices)
    shape = tuple(input_shape)
    if indices.dtype not in (torch.uint8, torch.int32, torch.int64):
        raise TypeError(f"{op}: indices: expected what max_pool returned, got {indices.dtype}")
    if indices.device != reward.device:
        raise ValueError(
            f"{op}: indices: expected device {reward.device} like reward, got {indices.device}"
        )
    check.shape(op, "indices", indices, reward.shape)
    unbatched = len(shape) == 2 or (len(shape) < 5 and shape[1:2] != tuple(reward.shape[1:2]))
    lead = 1 if unbatched else 2
    if (
        not 2 <= len(shape) <= 5
        or reward.dim() != len(shape)
        or shape[:lead] != tuple(reward.shape[:lead])
    ):
        raise ValueError(
            f"{op}: input_shape: expected the shape of the input of a pool whose output is "
            f"{tuple(reward.shape)}, got {shape}"
        )
    if like is not None:
        check.shape(op, "like", check.tensor(op, "like", like), shape)
    implementation = select("pool", reward)
    if unbatched:
        out = implementation.max_redistribute(
            reward.unsqueeze(0), indices.unsqueeze(0), (1, *shape)
        ).squeeze(0)
    else:
        out = implementation.max_redistribute(reward, indices, shape)
    if like is not None and out.stride() != like.stride():
        return torch.empty_like(like, dtype=out.dtype).copy_(out)
    return out


def _per_dimension(op: str, name: str, value: Any, count: int, least: int) -> tuple[int, ...]:
    sizes = (value,) * count if isinstance(value, int) else tuple(value)
    if len(sizes) != count or not all(isinstance(v, int) and v >= least for v in sizes):
        raise ValueError(
            f"{op}: {name}: expected an int >= {least} or {count} of them, one per spatial "
            f"dimension, got {value!r}"
        )
    return sizes


def _window(
    op: str,
    x: Tensor,
    kernel_size: _Size,
    stride: _Size | None,
    padding: _Size,
    dilation: _Size,
    ceil_mode: bool,
) -> tuple[Tensor, tuple, tuple, tuple, tuple, tuple]:
    """x with a batch axis; kernel, stride, padding, dilation per dimension; shape of the output."""
    check.floating(op, "x", x)
    count = x.dim() - 2 if isinstance(kernel_size, int) else len(kernel_size)
    v = x.unsqueeze(0) if x.dim() == count + 1 else x
    if not 1 <= count <= 3 or v.dim() != count + 2:
        raise ValueError(
            f"{op}: x: expected shape [N, C, *spatial] with as many spatial dimensions (1 to 3) as "
            f"kernel_size has, got {tuple(x.shape)} and kernel_size={kernel_size!r}"
        )
    kernel = _per_dimension(op, "kernel_size", kernel_size, count, 1)
    empty = stride is None or stride == [] or stride == ()
    step = kernel if empty else _per_dimension(op, "stride", stride, count, 1)
    pad = _per_dimension(op, "padding", padding, count, 0)
    spread = _per_dimension(op, "dilation", dilation, count, 1)
    if any(2 * p > k for p, k in zip(pad, kernel)):
        raise ValueError(
            f"{op}: padding: expected at most half of kernel_size {kernel}, got {padding!r}"
        )
    shape = output_shape(v, kernel, step, pad, spread, ceil_mode)
    if min(v.shape[2:]) < 1 or min(shape[2:]) < 1:
        raise ValueError(
            f"{op}: x: expected spatial sizes that hold a window, got {tuple(x.shape)} for "
            f"kernel_size={kernel_size!r}; use a smaller kernel or larger padding"
        )
    return v, kernel, step, pad, spread, shape


def _check_divisor(op: str, value: int | None) -> None:
    if value is not None and (not isinstance(value, int) or value == 0):
        raise ValueError(
            f"{op}: divisor_override: expected an int other than 0 or None, got {value!r}"
        )


def _check_reward(
    op: str, x: Tensor, z: Tensor, reward: Tensor, shape: Sequence[int], rule: Rule, signal_in: bool
) -> Tensor:
    """z, or the reward in its place where z is not read."""
    check.plain_rule(op, rule)
    check.like(op, "reward", reward, x, "x")
    check.shape(op, "reward", reward, shape)
    if signal_in:
        return reward
    check.like(op, "z", z, x, "x")
    check.shape(op, "z", z, shape)
    return z
