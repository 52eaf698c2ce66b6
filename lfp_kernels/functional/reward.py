"""Initial rewards at the output of a network: checks and the call of the kernels.

``lfp_kernels.rewards`` holds the named functions with their formulas.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _validate as check
from .. import ops
from .._no_grad import no_grad
from ..backends import select
from ..ops.reward.codes import NEURON_TARGET, VALUE_TARGET, Kind

_ = ops  # registers the schemas
_INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})


@no_grad
def reward(
    op: str,
    kind: Kind,
    out: Tensor,
    y: Tensor | None,
    *,
    low: float = 0.0,
    high: float = 1.0,
    sign: bool = False,
    neuron: int | None = None,
) -> Tensor:
    """The reward ``kind`` of ``out`` [..., C]; ``op`` names the caller in error messages.

    Args:
        y: class labels [...] (those of a sequence [T, N, C] may be [N]), or values of the shape of
            ``out`` (binary sigmoid, regression), or None (maximize, minimize).

    Returns:
        Tensor of the shape and dtype of ``out``. A NaN logit gives NaN.

    Raises:
        TypeError, ValueError: an argument does not fit, or a label is out of range. On a GPU the
            labels are not read back (it would stall the device): there a label out of range makes
            its row NaN.
    """
    check.floating(op, "out", out)
    if out.dim() == 0:
        raise ValueError(f"{op}: out: expected shape [N, C], got ()")
    if kind in VALUE_TARGET:
        target = _values(op, out, y)
    elif kind in NEURON_TARGET:
        target = None
        _check_neuron(op, neuron, out.shape[-1])
    else:
        target = _labels(op, _over_time(y, out), out.shape[:-1], out)
    if kind == Kind.BOUNDED_SOFTMAX and not 0 <= low <= high <= 1:
        raise ValueError(f"{op}: low, high: expected 0 <= low <= high <= 1, got {low} and {high}")
    params = [float(low), float(high), float(sign), float(-1 if neuron is None else neuron)]
    return select("reward", out).reward(out, target, kind, params)


@no_grad
def spike_rate_reward(op: str, spikes: Tensor, y: Tensor) -> Tensor:
    """The rate-coded reward of ``spikes`` [T, ..., C] with labels ``y`` [...]."""
    check.floating(op, "spikes", spikes)
    if spikes.dim() < 2:
        raise ValueError(f"{op}: spikes: expected shape [T, N, C], got {tuple(spikes.shape)}")
    labels = _labels(op, y, spikes.shape[1:-1], spikes)
    return select("reward", spikes).spike_rate(spikes, labels)


def _over_time(y: Tensor | None, out: Tensor) -> Tensor | None:
    """Labels [N] of a sequence ``out`` [T, N, C] hold at every step."""
    if isinstance(y, Tensor) and out.dim() > 2 and y.shape == out.shape[1:-1]:
        return y.expand(out.shape[:-1])
    return y


def _labels(op: str, y: Tensor | None, shape: Sequence[int], out: Tensor) -> Tensor:
    y = check.tensor(op, "y", y)
    if y.dtype not in _INTEGERS:
        raise TypeError(
            f"{op}: y: expected class labels of an integer dtype, got {y.dtype}; "
            "convert them with .long(), or one-hot rows with .argmax(-1)"
        )
    check.shape(op, "y", y, shape)
    if y.device != out.device:
        raise ValueError(
            f"{op}: y: expected device {out.device} like the output, got {y.device}; "
            f"move it with .to({str(out.device)!r})"
        )
    labels = y.long()
    # A tracer has no values to look at, and reading them from a GPU would stall it.
    if labels.device.type == "cpu" and labels.numel() and not torch.compiler.is_compiling():
        low, high = (int(v) for v in torch.aminmax(labels))
        if low < 0 or high >= out.shape[-1]:
            raise ValueError(
                f"{op}: y: expected labels in [0, {out.shape[-1]}), got {low if low < 0 else high}"
            )
    return labels


def _values(op: str, out: Tensor, y: Tensor | None) -> Tensor:
    y = check.tensor(op, "y", y)
    if y.device != out.device:
        raise ValueError(
            f"{op}: y: expected device {out.device} like out, got {y.device}; "
            f"move it with .to({str(out.device)!r})"
        )
    if y.shape != out.shape and not (out.shape[-1] == 1 and y.shape == out.shape[:-1]):
        raise ValueError(
            f"{op}: y: expected shape {tuple(out.shape)}"
            + (f" or {tuple(out.shape[:-1])}" if out.shape[-1] == 1 else "")
            + f", got {tuple(y.shape)}"
        )
    return y.to(out.dtype).reshape(out.shape)


def _check_neuron(op: str, neuron: int | None, classes: int) -> None:
    if neuron is None:
        return
    if isinstance(neuron, bool) or not isinstance(neuron, int):
        raise TypeError(f"{op}: neuron: expected an int or None, got {type(neuron).__name__}")
    if not 0 <= neuron < classes:
        raise ValueError(f"{op}: neuron: expected an index in [0, {classes}), got {neuron}")


@no_grad
def loss_reward(op: str, out: Tensor, y: Tensor, values: bool) -> Tensor:
    """Minus the gradient of the mean cross-entropy with labels [...], or, with ``values``, of the
    mean squared error with targets of ``out``'s shape."""
    check.floating(op, "out", out)
    if values:
        return (_values(op, out, y) - out) * (2.0 / max(out.numel(), 1))
    labels = _labels(op, _over_time(y, out), out.shape[:-1], out)
    reward = out.softmax(-1).neg_()
    one = reward.new_ones(()).expand_as(labels)[..., None]
    reward.scatter_add_(-1, labels[..., None], one)
    return reward.mul_(1.0 / max(labels.numel(), 1))
