"""Pools: average, adaptive average and max, in one to three dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor

from .. import _validate as check
from .. import ops
from ..backends import select
from ..rules import Epsilon, Rule

_ = ops  # registers the schemas
_EPSILON = Epsilon()


@torch.no_grad()
def avg_pool(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] | None = None,
    padding: Sequence[int] = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Average pool of x [N, C, *spatial] (or [C, *spatial]); arguments as F.avg_pool{1,2,3}d."""
    dims = len(kernel_size)
    check.floating("avg_pool", "x", x)
    _check_dims("avg_pool", x, dims)
    arguments: list[Any] = [kernel_size, stride, padding, ceil_mode, count_include_pad]
    if dims > 1:
        arguments.append(divisor_override)
    return getattr(TF, f"avg_pool{dims}d")(x, *arguments)


@torch.no_grad()
def avg_pool_redistribute(
    x: Tensor,
    z: Tensor,
    reward: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] | None = None,
    padding: Sequence[int] = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    rule: Rule = _EPSILON,
    *,
    below: Rule | None = None,
    signal_in: bool = False,
) -> Tensor:
    """Input reward of ``z = avg_pool(x)``: ``s = prologue(r, z)``, ``r_in = x * (pool^T s)``.

    Args:
        x: [N, C, *spatial]. z, reward: output of the pool and the reward at it, of one shape.
        below, signal_in: see :func:`linear_redistribute`.

    Returns:
        [N, C, *spatial] in x's memory format.
    """
    op = "avg_pool_redistribute"
    dims = len(kernel_size)
    _check(op, x, z, reward, rule, dims)
    kernel, step = tuple(kernel_size), tuple(stride or kernel_size)
    pad = tuple(padding)[:dims]
    shape, planes = x.shape, _as_planes
    if dims == 1:
        kernel, step, pad = (1, *kernel), (1, *step), (0, *pad)
    found = select("pool", x).avg_pool_redistribute(
        planes(x, dims), planes(z, dims), planes(reward, dims), kernel, step, pad, ceil_mode,
        count_include_pad, divisor_override, rule, below, signal_in,
    )  # fmt: skip
    return found.view(shape) if found.shape != shape else found


@torch.no_grad()
def adaptive_avg_pool_redistribute(
    x: Tensor,
    z: Tensor,
    reward: Tensor,
    rule: Rule = _EPSILON,
    *,
    below: Rule | None = None,
    signal_in: bool = False,
) -> Tensor:
    """Input reward of ``z = adaptive_avg_pool(x)``, 1-d to 3-d by x's dimensions [N, C, *spatial].

    Arguments and result as :func:`avg_pool_redistribute`; the output size is z's.
    """
    op = "adaptive_avg_pool_redistribute"
    check.floating(op, "x", x)
    dims = x.dim() - 2
    _check(op, x, z, reward, rule, dims)
    found = select("pool", x).adaptive_avg_pool_redistribute(
        _as_planes(x, dims), _as_planes(z, dims), _as_planes(reward, dims), rule, below, signal_in
    )
    return found.view(x.shape) if found.shape != x.shape else found


@torch.no_grad()
def max_pool(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] | None = None,
    padding: Sequence[int] | None = None,
    dilation: Sequence[int] | None = None,
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """Max pool of x [N, C, *spatial]; arguments as F.max_pool{1,2,3}d.

    Returns:
        (z, winner): winner holds the flat index in its plane of each maximum, the first on ties;
        its integer type is the backend's own and :func:`max_pool_redistribute` takes any.
    """
    dims = len(kernel_size)
    check.floating("max_pool", "x", x)
    if x.dim() != dims + 2:
        raise ValueError(
            f"max_pool: x: expected [N, C, {dims} spatial sizes], got shape {tuple(x.shape)}; "
            "add a missing batch dimension with x.unsqueeze(0)"
        )
    kernel = tuple(kernel_size)
    step = kernel if not stride else tuple(stride)
    pad = (0,) * dims if padding is None else tuple(padding)
    spread = (1,) * dims if dilation is None else tuple(dilation)
    for k, p, s, size in zip(kernel, pad, step, x.shape[-dims:]):
        if k < 1 or s < 1 or not 0 <= 2 * p <= k:
            raise ValueError(
                f"max_pool: expected kernel_size >= 1, stride >= 1 and padding at most half the "
                f"kernel, got kernel_size {kernel}, stride {step}, padding {pad}"
            )
    for k, p, d, size in zip(kernel, pad, spread, x.shape[-dims:]):
        if size + 2 * p < d * (k - 1) + 1:
            raise ValueError(
                f"max_pool: x: expected at least the window {kernel} (dilation {spread}, padding "
                f"{pad}) in shape {tuple(x.shape)}"
            )
    if dims == 1:
        kernel, step, pad, spread = (1, *kernel), (1, *step), (0, *pad), (1, *spread)
    z, winner = select("pool", x).max_pool(
        _as_planes(x, dims), kernel, step, pad, spread, ceil_mode
    )
    return (z.squeeze(2), winner.squeeze(2)) if dims == 1 else (z, winner)


@torch.no_grad()
def max_pool_redistribute(reward: Tensor, winner: Tensor, input_shape: Sequence[int]) -> Tensor:
    """Input reward of a max pool: each reward goes whole to the element that won its window.

    Args:
        reward: [N, C, *pooled]. winner: from :func:`max_pool`, same shape.
        input_shape: shape of the pool's input, [N, C, *spatial].

    Returns:
        [N, C, *spatial]; overlapping windows add up.
    """
    op = "max_pool_redistribute"
    check.floating(op, "reward", reward)
    check.tensor(op, "winner", winner)
    check.shape(op, "winner", winner, reward.shape)
    shape = tuple(input_shape)
    if len(shape) != reward.dim() or shape[:2] != reward.shape[:2]:
        raise ValueError(
            f"{op}: input_shape: expected {reward.dim()} sizes that begin with "
            f"{tuple(reward.shape[:2])}, got {shape}"
        )
    if len(shape) == 3:
        found = select("pool", reward).max_pool_redistribute(
            reward.unsqueeze(2), winner.unsqueeze(2), (*shape[:2], 1, shape[2])
        )
        return found.squeeze(2)
    return select("pool", reward).max_pool_redistribute(reward, winner, shape)


def _as_planes(x: Tensor, dims: int) -> Tensor:
    """[N, C, L] as [N, C, 1, L]; a missing batch dimension added."""
    if x.dim() == dims + 1:
        x = x.unsqueeze(0)
    return x.unsqueeze(2) if dims == 1 else x


def _check_dims(op: str, x: Tensor, dims: int) -> None:
    if x.dim() not in (dims + 1, dims + 2):
        raise ValueError(
            f"{op}: x: expected [N, C, {dims} spatial sizes] or the same without N, "
            f"got shape {tuple(x.shape)}"
        )


def _check(op: str, x: Tensor, z: Tensor, reward: Tensor, rule: Rule, dims: int) -> None:
    check.floating(op, "x", x)
    _check_dims(op, x, dims)
    check.rule(op, rule)
    check.like(op, "reward", reward, x, "x")
    check.like(op, "z", z, x, "x")
    check.shape(op, "reward", reward, z.shape)
    if z.dim() != x.dim() or z.shape[: x.dim() - dims] != x.shape[: x.dim() - dims]:
        raise ValueError(
            f"{op}: z: expected the leading sizes of x, {tuple(x.shape[: x.dim() - dims])}, "
            f"got shape {tuple(z.shape)}"
        )
