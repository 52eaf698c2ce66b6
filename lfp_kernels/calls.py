"""How torch spells the calls that rules know: argument forms, and lists of functions by kind.

Shared by the drop-in way (caught calls) and the fused way (traced calls).
"""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.nn.functional as TF
from torch import Tensor, nn

from .functional import ConvGeometry
from .functional import step as step_function
from .nn import Step


def tuple_of(dims: int, value: Any) -> tuple[int, ...]:
    """An int or a sequence of ints as ``dims`` ints."""
    if isinstance(value, int):
        return (value,) * dims
    value = tuple(int(v) for v in value)
    return value * dims if len(value) == 1 else value


# (spatial dims, transposed) -> the functions under which torch offers it
CONVS: dict[tuple[int, bool], tuple[Any, ...]] = {
    (1, False): (TF.conv1d, torch.conv1d),
    (2, False): (TF.conv2d, torch.conv2d),
    (3, False): (TF.conv3d, torch.conv3d),
    (1, True): (TF.conv_transpose1d, torch.conv_transpose1d),
    (2, True): (TF.conv_transpose2d, torch.conv_transpose2d),
    (3, True): (TF.conv_transpose3d, torch.conv_transpose3d),
}


def conv_geometry(
    dims: int, transposed: bool, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor, Tensor | None, ConvGeometry]:
    """(x, weight, bias, geometry) of a call to F.conv{1,2,3}d or F.conv_transpose{1,2,3}d."""
    parse = _transposed_geometry if transposed else _plain_geometry
    return parse(dims, *args, **kwargs)


def _plain_geometry(
    dims: int,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    dilation = tuple_of(dims, dilation)
    if isinstance(padding, str):
        padding = resolve_padding(padding, weight.shape[2:], dilation)
    geometry = ConvGeometry(
        tuple_of(dims, stride), tuple_of(dims, padding), dilation, False, (0,) * dims, groups
    )
    return input, weight, bias, geometry


def _transposed_geometry(
    dims: int,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Any:
    geometry = ConvGeometry(
        tuple_of(dims, stride),
        tuple_of(dims, padding),
        tuple_of(dims, dilation),
        True,
        tuple_of(dims, output_padding),
        groups,
    )
    return input, weight, bias, geometry


def resolve_padding(padding: str, kernel: Any, dilation: tuple[int, ...]) -> tuple[int, ...]:
    """ "same" and "valid" as ints; "same" with an even reach would be one-sided and is refused."""
    if padding == "valid":
        return (0,) * len(dilation)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel)]
    if any(r % 2 for r in reach):
        raise ValueError(
            "conv: padding='same': expected an odd kernel size (or even dilation), got kernel "
            f"{tuple(kernel)}, dilation {dilation}; pad explicitly with F.pad and padding=0"
        )
    return tuple(r // 2 for r in reach)


PoolSettings = tuple[
    tuple[int, ...], tuple[int, ...], tuple[int, ...], bool, bool, Optional[int]  # noqa: UP045
]


def pool_settings(
    dims: int,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> PoolSettings:
    """Arguments of functional.avg_pool after x, from those of F.avg_pool{1,2,3}d."""
    kernel = tuple_of(dims, kernel_size)
    step = kernel if stride is None or stride == [] else tuple_of(dims, stride)
    return (
        kernel,
        step,
        tuple_of(dims, padding),
        ceil_mode,
        count_include_pad,
        divisor_override,
    )


def max_pool_settings(
    dims: int,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> tuple:
    """Arguments of functional.max_pool after x, from those of F.max_pool{1,2,3}d."""
    kernel = tuple_of(dims, kernel_size)
    step = kernel if stride is None or stride == [] else tuple_of(dims, stride)
    return kernel, step, tuple_of(dims, padding), tuple_of(dims, dilation), ceil_mode


def _functions(*names: str) -> list[Any]:
    """Every spelling of the named functions: torch.f, F.f, Tensor.f and the in-place f_."""
    found = []
    for name in names:
        for owner in (torch, TF, Tensor):
            for spelling in (name, name + "_"):
                function = getattr(owner, spelling, None)
                if callable(function):
                    found.append(function)
    return found


_ACTIVATION_NAMES = (
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid",
    "tanh", "hardtanh", "hardsigmoid", "hardswish", "softplus", "softsign", "logsigmoid",
    "threshold", "rrelu", "hardshrink", "softshrink", "tanhshrink", "clamp", "clamp_min",
)  # fmt: skip
# Elementwise activations: the reward passes unchanged.
ACTIVATIONS: dict[Any, None] = dict.fromkeys([*_functions(*_ACTIVATION_NAMES), step_function])
ACTIVATION_MODULES: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Softplus, nn.Softsign,
    nn.LogSigmoid, nn.Threshold, nn.RReLU, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, Step,
)  # fmt: skip

_STRUCTURAL_NAMES = (
    "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "permute", "transpose", "t",
    "swapaxes", "swapdims", "movedim", "moveaxis", "squeeze", "unsqueeze", "expand", "expand_as",
    "broadcast_to", "contiguous", "clone", "narrow", "select", "index_select", "cat", "concat",
    "concatenate", "stack", "hstack", "vstack", "chunk", "split", "unbind", "tensor_split", "pad",
    "interpolate", "upsample", "roll", "flip", "repeat", "repeat_interleave", "tile", "to", "float",
    "double", "bfloat16", "half", "type", "type_as", "detach", "unfold", "fold", "pixel_shuffle",
    "pixel_unshuffle", "channel_shuffle", "__getitem__", "gather", "masked_fill", "diagonal",
    "alpha_dropout", "feature_dropout", "identity", "max_pool1d", "max_pool2d", "max_pool3d",
    "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "amax", "maximum",
)  # fmt: skip
_TRANSPOSES = (Tensor.T, Tensor.mT, Tensor.H, Tensor.mH)  # attributes
STRUCTURAL: dict[Any, None] = dict.fromkeys(
    [*_functions(*_STRUCTURAL_NAMES), *(a.__get__ for a in _TRANSPOSES)]  # type: ignore[attr-defined]
)
