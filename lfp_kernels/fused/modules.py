"""What modules of torch.nn say about themselves, as stages need it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .. import calls

ADAPTIVE = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
CONV_FORMS: dict[type[nn.Module], tuple[int, bool]] = {
    nn.Conv1d: (1, False),
    nn.Conv2d: (2, False),
    nn.Conv3d: (3, False),
    nn.ConvTranspose1d: (1, True),
    nn.ConvTranspose2d: (2, True),
    nn.ConvTranspose3d: (3, True),
}


def out_of_place(module: Any) -> Callable[[Tensor], Tensor]:
    """The stage below may still read the activation's input."""
    if getattr(module, "inplace", False):
        return lambda x: module(x.clone())
    return module


def flattens_all(module: nn.Module) -> bool:
    return isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)


def conv_form(module: nn.Module) -> tuple[int, bool] | None:
    for kind, form in CONV_FORMS.items():
        if isinstance(module, kind):
            return form
    return None


def dims_of(module: nn.Module) -> int:
    return int(type(module).__name__[-2])


def avg_settings(module: Any) -> calls.PoolSettings:
    return calls.pool_settings(
        dims_of(module),
        module.kernel_size,
        module.stride,
        module.padding,
        module.ceil_mode,
        module.count_include_pad,
        getattr(module, "divisor_override", None),
    )
