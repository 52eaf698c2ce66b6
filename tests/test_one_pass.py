"""The register-blocked products of large layers at small batches, against the float64 oracle."""

from __future__ import annotations

import pytest
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


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(
    ("n", "rows", "columns"),
    [(1, 1450, 1500), (7, 1537, 1409), (31, 2048, 1024), (32, 1403, 1601), (40, 1025, 2304)],
)
def test_ragged_blocks_match_the_oracle(n: int, rows: int, columns: int, name: str) -> None:
    check_update(n, rows, columns, name, need_input=True)


# Without the input reward, which has a product of its own: a panel of x and a part of one, more
# samples than lines to fetch, more rows of a thread than are packed at once.
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(
    ("n", "rows", "columns"),
    [(47, 700, 523), (49, 1025, 300), (128, 519, 1031), (512, 2100, 130), (500, 1000, 784)],
)
def test_longer_batches_match_the_oracle(n: int, rows: int, columns: int, name: str) -> None:
    check_update(n, rows, columns, name, need_input=False)


# Both products from pairs of bfloat16 numbers: odd batches and outputs leave half a pair, and
# the batch of 1000 is past the longest that the float32 product takes.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(
    ("n", "rows", "columns"),
    [(1, 701, 600), (7, 519, 1031), (128, 1025, 256), (129, 777, 300), (513, 600, 523),
     (1000, 520, 515)],
)  # fmt: skip
def test_bfloat16_products_match_the_oracle(
    n: int, rows: int, columns: int, name: str, dtype: torch.dtype
) -> None:
    check_update(n, rows, columns, name, True, dtype, torch.bfloat16)


# A weight that no cache holds: the input product is ours as well. More rows than are packed at
# once, a part of a block of columns, and the longest batch.
@pytest.mark.parametrize(
    ("n", "rows", "columns"), [(1, 2049, 2048), (33, 1999, 2101), (256, 700, 6001)]
)
def test_input_products_of_large_weights_match_the_oracle(n: int, rows: int, columns: int) -> None:
    check_update(n, rows, columns, "sgd", need_input=True)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "bfloat16 products"])
@pytest.mark.parametrize(("n", "rows", "columns"), [(31, 523, 700), (130, 600, 515)])
def test_stored_feedback_matches_the_oracle(n: int, rows: int, columns: int, kind: str) -> None:
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    product = torch.bfloat16 if kind == "bfloat16 products" else None
    x, weight, z = (t.to(dtype) for t in layer(n, rows, columns))
    bias = weight[:, 0].clone()

    def run(cast: torch.dtype, backend: str, product: torch.dtype | None) -> list[Tensor]:
        with lfp_kernels.use_backend(backend):
            result = F.linear_redistribute(
                *(t.to(cast) for t in (x, weight, bias, z, z.cos())), product_dtype=product
            )
        return [t for t in result if t is not None]

    eps = torch.finfo(product or dtype).eps
    oracle = run(torch.float64, "reference", None)
    check(run(dtype, "native", product), run(dtype, "reference", product), oracle, eps)


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


def test_two_runs_give_the_same_bits() -> None:
    torch.manual_seed(0)
    x, weight, z = torch.randn(16, 2000), torch.randn(1300, 2000), torch.randn(16, 1300)
    runs = [update(SPECS["momentum"], x, weight, z, "native") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))
