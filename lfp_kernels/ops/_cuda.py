"""What the kernels of a GPU want to know besides the tensors, shared by the ops' native modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TF32 = torch.float16  # the code of TF32 as a product type (csrc/cuda/product_types.cuh)


def is_gpu(x: Tensor) -> bool:
    """Whether the kernels of a GPU run on x."""
    return x.is_cuda


def linear_in_tf32(x: Tensor) -> bool:
    """Whether torch's switch lets matrix products of such tensors round to TF32.

    ``torch.set_float32_matmul_precision``, ``torch.backends.cuda.matmul.allow_tf32`` and every
    ``fp32_precision`` show in the one value that is read here; the two older ones raise when they
    are read after the newer one was set. torch.compile compiles again when it changes.
    """
    if x.dtype != torch.float32 or not is_gpu(x):
        return False
    return _matmul_precision() in ("tf32", "bf16")


def conv_in_tf32(x: Tensor) -> bool:
    """The same of convolutions, which the switch of cuDNN can keep exact. That one is on by
    default: alone it does not speak for the user. What torch.compile made keeps the value of
    cuDNN's switch that it found."""
    return linear_in_tf32(x) and _conv_precision() == "tf32"


# torch.compile cannot trace how torch reads its switches, and takes them as constants. Of that for
# matrix products it keeps watch itself.


@torch.compiler.assume_constant_result
def _matmul_precision() -> str:
    return torch.backends.cuda.matmul.fp32_precision


@torch.compiler.assume_constant_result
def _conv_precision() -> str:
    cudnn: Any = torch.backends.cudnn  # torch's annotations leave its parts out
    return cudnn.conv.fp32_precision


def product_dtype(asked: torch.dtype, in_tf32: bool) -> torch.dtype:
    """The product type of a call whose tensors may use TF32 (``in_tf32``)."""
    return TF32 if in_tf32 and asked == torch.float32 else asked
