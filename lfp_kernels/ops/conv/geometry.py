"""What a convolution is besides its parameters, and the shapes that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class ConvGeometry(NamedTuple):
    """Stride, padding (zeros, both sides), dilation: one int per spatial dimension.

    ``transposed`` and ``output_padding`` as in torch.nn.ConvTranspose1-3d. :meth:`make` fills in
    defaults and resolves ``padding="same"``.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    groups: int = 1

    @classmethod
    def make(
        cls,
        kernel_size: Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        transposed: bool = False,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
    ) -> ConvGeometry:
        """From the arguments of torch.nn.Conv1-3d; one int stands for all spatial dimensions.

        Args:
            kernel_size: spatial shape of the kernel.
            padding: ints, "valid", or "same" (stride 1 and an even ``dilation * (kernel - 1)``).

        Raises:
            TypeError, ValueError: an argument has the wrong type, length or value.
        """
        n = len(kernel_size)
        strides = _ints("stride", stride, n)
        dilations = _ints("dilation", dilation, n)
        if isinstance(padding, str):
            pads = resolve_padding(padding, kernel_size, strides, dilations)
        else:
            pads = _ints("padding", padding, n)
        extra = _ints("output_padding", output_padding, n)
        return cls(strides, pads, dilations, transposed, extra, groups)

    @classmethod
    def of(cls, module: Any) -> ConvGeometry:
        """Of a torch.nn.Conv1-3d or ConvTranspose1-3d module with zero padding.

        Raises:
            ValueError: the module pads with something else than zeros.
        """
        if module.padding_mode != "zeros":
            raise ValueError(
                f"ConvGeometry: padding_mode: expected 'zeros', got {module.padding_mode!r}; "
                "pad with torch.nn.functional.pad before a convolution without padding"
            )
        return cls.make(
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            module.transposed,
            module.output_padding,
            module.groups,
        )


def _ints(name: str, value: int | Sequence[int], n: int) -> tuple[int, ...]:
    values = (value,) * n if isinstance(value, int) else tuple(value)
    if len(values) == 1:
        values *= n
    if len(values) != n or not all(isinstance(v, int) for v in values):
        raise ValueError(f"ConvGeometry: {name}: expected an int or {n} ints, got {value!r}")
    return values


def resolve_padding(
    padding: str, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """ "valid" and "same" as ints.

    Raises:
        ValueError: "same" with a stride, or where it would pad one side more than the other.
    """
    if padding == "valid":
        return (0,) * len(kernel_size)
    if padding != "same":
        raise ValueError(
            f"ConvGeometry: padding: expected ints, 'same' or 'valid', got {padding!r}"
        )
    if any(s != 1 for s in stride):
        raise ValueError(
            f"ConvGeometry: padding: 'same' needs stride 1, got stride {tuple(stride)}; "
            "give the padding in numbers"
        )
    totals = [d * (k - 1) for d, k in zip(dilation, kernel_size)]
    if any(total % 2 for total in totals):
        raise ValueError(
            f"ConvGeometry: padding: 'same' pads one side more than the other for kernel size "
            f"{tuple(kernel_size)} and dilation {tuple(dilation)}, expected even "
            "dilation * (kernel - 1); use an odd kernel, or torch.nn.functional.pad before a "
            "convolution without padding"
        )
    return tuple(total // 2 for total in totals)


def out_channels(weight_shape: Sequence[int], geometry: ConvGeometry) -> int:
    """Channels of z: the kernel is [O, C/groups, ...], transposed [C, O/groups, ...]."""
    return weight_shape[1] * geometry.groups if geometry.transposed else weight_shape[0]


def output_shape(
    x_shape: Sequence[int], weight_shape: Sequence[int], geometry: ConvGeometry
) -> tuple[int, ...]:
    """[N, O, *spatial] of the convolution of x [N, C, *spatial]."""
    spatial = []
    for k, (size, kernel) in enumerate(zip(x_shape[2:], weight_shape[2:])):
        stride, pad = geometry.stride[k], geometry.padding[k]
        reach = geometry.dilation[k] * (kernel - 1)
        if geometry.transposed:
            size = (size - 1) * stride - 2 * pad + reach + geometry.output_padding[k] + 1
        else:
            size = (size + 2 * pad - reach - 1) // stride + 1
        spatial.append(size)
    return (x_shape[0], out_channels(weight_shape, geometry), *spatial)
