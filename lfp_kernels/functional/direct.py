"""Direct feedback alignment: the update of one linear layer from the error of the network."""

from __future__ import annotations

from torch import Tensor

from .. import _validate as check
from .. import ops
from .._no_grad import no_grad
from ..backends import select
from ..optim import Update
from ..rules import DERIVATIVES, Derivative

_ = ops  # registers the schemas


@no_grad
def direct_update(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    error: Tensor,
    matrix: Tensor,
    activation: Tensor | None,
    weight_update: Update,
    bias_update: Update | None = None,
    *,
    derivative: Derivative | None = None,
) -> None:
    """Update ``weight``, ``bias`` and the optimizer states in place by direct feedback alignment
    (Nokland 2016; docs/math.md): ``delta = (error D) * f'(a)``, ``feedback = delta^T x``.

    No other layer is involved, and delta exists a tile of outputs at a time. With ``sign(error)``
    for the error it is sDFA, with the one-hot target DRTP.

    Args:
        x: layer input [..., I]. weight: [O, I]. bias: [O] or None.
        error: of the network's output [..., C]; points uphill, as every reward and feedback.
        matrix: D [C, O], fixed.
        activation: a = f(x W^T + b) [..., O]; may be None without ``derivative``.
        weight_update: what :meth:`lfp_kernels.optim.BoundOptimizer.update_of` gives.
        bias_update: of the bias; None leaves it alone.
        derivative: of f, from ``rules.DERIVATIVES``; None for the identity.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing has been changed then.
    """
    op = "direct_update"
    _check(op, x, weight, bias, error, matrix, activation, derivative)
    check.update(op, "weight_update", weight_update, weight)
    if bias_update is not None:
        if bias is None:
            raise ValueError(
                f"{op}: bias_update: expected None for a layer without bias, got an Update"
            )
        check.update(op, "bias_update", bias_update, bias)
    outputs, inputs = weight.shape
    flat = x.reshape(-1, inputs) if inputs else x.new_empty(x.shape[:-1].numel(), 0)
    error = error.reshape(flat.shape[0], matrix.shape[0])
    a = error if activation is None else activation.reshape(flat.shape[0], outputs)
    dense = weight.contiguous()
    dense_bias = None if bias is None else bias.contiguous()
    select("direct", x).direct_update(
        flat, dense, dense_bias, error, matrix, a, weight_update, bias_update, derivative
    )
    if dense is not weight:
        weight.copy_(dense)
    if bias_update is not None and bias is not None and dense_bias is not bias:
        bias.copy_(dense_bias)  # type: ignore[arg-type]


def _check(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    error: Tensor,
    matrix: Tensor,
    activation: Tensor | None,
    derivative: Derivative | None,
) -> None:
    check.floating(op, "x", x)
    check.like(op, "weight", weight, x, "x")
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight: expected shape [O, I], got {tuple(weight.shape)}")
    outputs, inputs = weight.shape
    if x.dim() == 0 or x.shape[-1] != inputs:
        raise ValueError(
            f"{op}: x: expected shape [..., {inputs}] for a weight of shape "
            f"{tuple(weight.shape)}, got {tuple(x.shape)}"
        )
    if bias is not None:
        check.like(op, "bias", bias, x, "x")
        check.shape(op, "bias", bias, (outputs,))
    check.like(op, "matrix", matrix, x, "x")
    if matrix.dim() != 2 or matrix.shape[1] != outputs:
        raise ValueError(f"{op}: matrix: expected shape [C, {outputs}], got {tuple(matrix.shape)}")
    check.like(op, "error", error, x, "x")
    check.shape(op, "error", error, (*x.shape[:-1], matrix.shape[0]))
    if derivative is not None and not isinstance(derivative, Derivative):
        raise TypeError(
            f"{op}: derivative: expected one of rules.DERIVATIVES ({', '.join(DERIVATIVES)}) or "
            f"None, got {derivative!r}"
        )
    if activation is not None:
        check.like(op, "activation", activation, x, "x")
        check.shape(op, "activation", activation, (*x.shape[:-1], outputs))
    elif derivative is not None:
        raise ValueError(
            f"{op}: activation: expected the layer's activation for the derivative of "
            f"{derivative.function}, got None"
        )
