"""Optimizer updates of many tensors in one call, and the global norm that clips them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _validate as check
from .. import ops
from .._no_grad import no_grad
from ..backends import select, use_backend
from ..optim import Update

_ = ops  # registers the schemas


@no_grad
def optimizer_update(
    params: Sequence[Tensor],
    feedback: Sequence[Tensor],
    updates: Sequence[Update],
    *,
    scale: Tensor | None = None,
) -> None:
    """Move every parameter and its optimizer states one step along its feedback, in place.

    One pass over all tensors together: w, states <- optimizer(w, states, -feedback * scale), the
    arithmetic of ``torch.optim`` (csrc/rules.h). Feedback points uphill.

    Args:
        params: tensors of any shape and floating dtype, on one device, each at most once.
        feedback: one per parameter, of its shape and dtype.
        updates: one per parameter: what :meth:`lfp_kernels.optim.BoundOptimizer.update_of` gives.
        scale: 0-dim float32 or float64 on the device of the parameters: a factor on all feedback
            besides that of the updates, read by the kernel: no value has to come to the host.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing has been changed then.
    """
    op = "optimizer_update"
    params, feedback, updates = list(params), list(feedback), list(updates)
    if not len(params) == len(feedback) == len(updates):
        raise ValueError(
            f"{op}: expected one feedback and one update per parameter, got {len(params)} params, "
            f"{len(feedback)} feedback and {len(updates)} updates"
        )
    if not params:
        return
    for k, (param, fb, update) in enumerate(zip(params, feedback, updates)):
        _check_pair(op, k, param, fb, params[0])
        check.update(op, f"updates[{k}]", update, param)
        lr, step = update.live or (None, None)
        if lr is not None:
            _check_scalar(op, f"updates[{k}].live.lr", lr, param)
        if step is not None:
            _check_scalar(op, f"updates[{k}].live.step", step, param, (torch.float32,))
    if len({id(param) for param in params}) != len(params):
        raise ValueError(
            f"{op}: params: expected every parameter once, got one twice; sum its feedback"
        )
    if scale is not None:
        _check_scalar(op, "scale", scale, params[0])
    dense = [param.contiguous() for param in params]
    _backend(params, updates).update(dense, feedback, updates, scale)
    for param, copy in zip(params, dense):
        if copy is not param:
            param.copy_(copy)


def _backend(params: list[Tensor], updates: list[Update]) -> Any:
    """The reference where the chosen one cannot read rates and counts on the device: neither
    waits for it."""
    chosen = select("update", params[0])
    if all(update.live is None for update in updates):
        return chosen
    takes_live = getattr(chosen, "takes_live", None)
    if takes_live is not None and takes_live(params, updates):
        return chosen
    with use_backend("reference"):
        return select("update", params[0])


_WIDE = (torch.float32, torch.float64)


def _check_scalar(
    op: str, name: str, value: Tensor, like: Tensor, dtypes: tuple[torch.dtype, ...] = _WIDE
) -> None:
    check.floating(op, name, value)
    if value.dim() != 0 or value.dtype not in dtypes:
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{op}: {name}: expected a 0-dim {kinds} tensor, got "
            f"{value.dtype} of shape {tuple(value.shape)}"
        )
    if value.device != like.device:
        raise ValueError(
            f"{op}: {name}: expected device {like.device} like the parameters, got {value.device}"
        )


def _check_pair(op: str, k: int, param: Tensor, fb: Tensor, first: Tensor) -> None:
    check.floating(op, f"params[{k}]", param)
    check.like(op, f"feedback[{k}]", fb, param, f"params[{k}]")
    check.shape(op, f"feedback[{k}]", fb, param.shape)
    if param.device != first.device:
        raise ValueError(
            f"{op}: params[{k}]: expected device {first.device} like params[0], got "
            f"{param.device}; update the parameters of each device in a call of their own"
        )
    if fb.layout != torch.strided:
        raise TypeError(
            f"{op}: feedback[{k}]: expected a strided tensor, got {fb.layout}; use .to_dense()"
        )
    if not param.is_contiguous() and torch._debug_has_internal_overlap(param) == 1:
        raise ValueError(
            f"{op}: params[{k}]: its elements share memory (an expanded tensor?); clone it before "
            "training it"
        )


@no_grad
def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """``sqrt(sum of squares)`` over all elements of all tensors, the norm that ``clip_norm`` uses.

    Accumulated in float64 in a fixed order: the same bits for any number of threads.

    Args:
        tensors: floating tensors of any shapes on one device; dtypes may differ.

    Returns:
        0-dim tensor, float64 if any tensor is float64, else float32; 0 for an empty list.
    """
    op = "global_norm"
    tensors = list(tensors)
    for k, tensor in enumerate(tensors):
        check.floating(op, f"tensors[{k}]", tensor)
        if tensor.device != tensors[0].device:
            raise ValueError(
                f"{op}: tensors[{k}]: expected device {tensors[0].device} like tensors[0], got "
                f"{tensor.device}; move it with .to({str(tensors[0].device)!r})"
            )
    if not tensors:
        return torch.zeros(())
    return select("update", tensors[0]).global_norm(tensors)
