"""From the reward at a model's output back to its parameters."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def backward(out: Tensor, reward: Tensor) -> None:
    """Redistribute ``reward`` from ``out`` back through the attached model that made it.

    Adds ``-feedback`` to the ``.grad`` of every trainable parameter (so that optimizers, which
    descend, reinforce what was rewarded), and ``-input_reward`` to the ``.grad`` of inputs that
    require grad. Feedback is summed over the batch, and linear in the reward.

    Args:
        out: output of a forward run inside ``composite.context(model)``.
        reward: same shape, dtype and device as ``out``; finite.

    Raises:
        TypeError, ValueError: wrong type, shape, dtype, device, a NaN or infinite reward, or an
            ``out`` that no attached model produced. No ``.grad`` has changed then.
    """
    for name, value in (("out", out), ("reward", reward)):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"backward: {name}: expected a torch.Tensor, got {type(value).__name__}"
            )
    if reward.shape != out.shape:
        raise ValueError(
            f"backward: reward: expected shape {tuple(out.shape)} like out, "
            f"got {tuple(reward.shape)}"
        )
    if reward.dtype != out.dtype or reward.device != out.device:
        raise ValueError(
            f"backward: reward: expected {out.dtype} on {out.device} like out, "
            f"got {reward.dtype} on {reward.device}"
        )
    check_finite("backward", reward)
    if not _made_by_rules(out):
        raise ValueError(
            "backward: out: expected the output of a model that ran inside "
            "composite.context(model), got a tensor that no rule takes part in"
        )
    torch.autograd.backward(out, -reward.detach())


def check_finite(op: str, reward: Tensor) -> None:
    """NaN and inf would reach every weight. Not checked on CUDA, where looking costs a sync."""
    if reward.device.type != "cpu" or math.isfinite(reward.sum()):  # NaN and inf survive a sum
        return
    if not bool(torch.isfinite(reward).all()):
        bad = (~torch.isfinite(reward)).nonzero()[0].tolist()
        raise ValueError(
            f"{op}: reward: expected finite values, got {reward[tuple(bad)].item()} at index "
            f"{tuple(bad)}; lower the learning rate or check the model's output"
        )


def _made_by_rules(out: Tensor) -> bool:
    """True when a function of :mod:`lfp_kernels.autograd` is in the graph behind ``out``."""
    seen: set[Any] = set()
    stack = [out.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if getattr(node, "uphill", False):
            raise ValueError(
                "backward: out: comes from a composite of lfp_kernels.compat.lfprop; use "
                "lfp_kernels.compat.lfprop.backward, or torch.autograd.grad as with lfprop"
            )
        if "RewardBackward" in type(node).__name__:
            return True
        seen.add(node)
        stack.extend(parent for parent, _ in node.next_functions)
    return False
