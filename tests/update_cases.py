"""One update of a layer by a backend, and how far its results may be from the oracle's."""

from __future__ import annotations

import torch
from torch import Tensor

import lfp_kernels
from lfp_kernels import functional as F
from lfp_kernels import optim

SPECS = {
    "sgd": optim.SGD(lr=0.1, weight_decay=0.01),
    "momentum": optim.SGD(lr=0.1, momentum=0.9, nesterov=True),
    "adamw": optim.AdamW(lr=0.01),
}


def update(
    spec: optim.SGD | optim.AdamW, x: Tensor, weight: Tensor, z: Tensor, backend: str,
    need_input: bool = True, product_dtype: torch.dtype | None = None,
):  # fmt: skip
    """Weight, input reward and states after one update from states that are not zero."""
    weight = weight.clone()
    bound = optim.BoundOptimizer(spec, [weight])
    step = bound.update_of(weight, bound.param_groups[0])
    for state in step.states:
        state.copy_(weight.square() + 0.1)
    with lfp_kernels.use_backend(backend):
        input_reward = F.linear_redistribute_update(
            x, weight, None, z, z.cos(), step, need_input=need_input, product_dtype=product_dtype
        )
    return [weight, *([input_reward] if need_input else []), *step.states]


def layer(n: int, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and output of a layer; outputs away from 0, where the signal is not smooth."""
    torch.manual_seed(n)
    x, weight, z = torch.randn(n, columns), torch.randn(rows, columns), torch.randn(n, rows)
    return x, weight, z + z.sign()


def check_update(
    n: int, rows: int, columns: int, name: str, need_input: bool,
    dtype: torch.dtype = torch.float32, product: torch.dtype | None = None,
) -> None:  # fmt: skip
    x, weight, z = (t.to(dtype) for t in layer(n, rows, columns))
    spec = SPECS[name]
    product = None if product == dtype else product
    oracle = update(spec, x.double(), weight.double(), z.double(), "reference", need_input)
    same = update(spec, x, weight, z, "reference", need_input, product)
    actual = update(spec, x, weight, z, "native", need_input, product)
    check(actual, same, oracle, torch.finfo(product or dtype).eps)


def check(actual: list[Tensor], same: list[Tensor], oracle: list[Tensor], eps: float) -> None:
    """No further from the oracle than twice the reference in the same type."""
    assert len(actual) == len(oracle)
    for a, s, o in zip(actual, same, oracle):
        assert torch.isfinite(a).all()
        error = float((s.double() - o).abs().max())
        assert float((a.double() - o).abs().max()) <= 2 * (error + eps * float(o.abs().max()))
