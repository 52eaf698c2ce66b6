"""The CPU's own products: from pairs of bfloat16 numbers, of weights that no cache holds, and
feedback that is stored; against the float64 oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from update_cases import SPECS, check, check_update, layer

import lfp_kernels
from lfp_kernels import functional as F


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


# Multiplied in float32, converted while it is packed.
@pytest.mark.parametrize("name", SPECS)
def test_float16_layers_match_the_oracle(name: str) -> None:
    check_update(130, 520, 515, name, True, torch.float16)


# A weight that no cache holds: the input product is ours as well. More rows than are packed at
# once, a part of a block of columns, and the longest batch.
@pytest.mark.parametrize(
    ("n", "rows", "columns"), [(1, 2049, 2048), (33, 1999, 2101), (256, 700, 6001)]
)
def test_input_products_of_large_weights_match_the_oracle(n: int, rows: int, columns: int) -> None:
    check_update(n, rows, columns, "sgd", need_input=True)


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "bfloat16 products"])
@pytest.mark.parametrize(("n", "rows", "columns"), [(31, 523, 700), (130, 600, 515)])
def test_stored_feedback_matches_the_oracle(n: int, rows: int, columns: int, kind: str) -> None:
    product = torch.bfloat16 if kind == "bfloat16 products" else None
    dtype = torch.float32 if product else getattr(torch, kind)
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
