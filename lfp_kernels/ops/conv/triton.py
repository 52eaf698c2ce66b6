"""Convolution in Triton, 1 to 3 dimensions, transposed or not.

The products are those of triton_kernels.py; this module says which operand is which and launches.
"""

from __future__ import annotations

from torch import Tensor

from ...optim import Update
from ...rules import Gradient, Matrix, Rule, RuleCall, accumulate_dtype
from .. import _cuda
from .._triton import (
    FEEDBACK,
    NO_HYPER,
    PARTIAL,
    arranged_like,
    below_code,
    below_eps,
    blocks,
    finish,
    launch,
    prologue_code,
    states_of,
)
from .._triton_product import (
    Tiles,
    feedback_mode,
    finish_forward,
    finish_input,
    forward_mode,
    tiles,
)
from .._triton_volume import axes, strides
from .geometry import ConvGeometry, output_shape
from .layout import empty, strided_channels_last
from .triton_kernels import product_kernel, weight_kernel
from .triton_launch import is_long, window, with_warps
from .triton_split import redistribute_split


def _shallow(tile: Tiles, mode: str) -> Tiles:
    """Of TF32, float32 values and their places would not fit the registers by 32."""
    return tile._replace(k=min(tile.k, 16)) if mode == "tf32" else tile


def _product(
    src: Tensor, z: Tensor, weight: Tensor, out: Tensor, extra: Tensor, geometry: ConvGeometry,
    scatter: bool, mode: str, last: bool, eps: float, below: float, meta: dict,
    given: Tensor | None = None, a: float = 0.0, seed: int = 0,
) -> Tensor | None:  # fmt: skip
    """``out`` [N, ., *spatial] = a gather or scatter of ``src``, through the epilogue of ``meta``.

    Args:
        given, a, seed: what a kernel that is made from ``weight`` needs besides it.

    Returns:
        None, or partial sums [parts, *out in the order of its memory] that wait for the epilogue.
    """
    groups, taps = geometry.groups, weight.shape[2:].numel()
    first, second = weight.shape[0] // groups, weight.shape[1]
    inputs, outputs = (first, second) if scatter else (second, first)
    w_strides = (second * taps, taps) if scatter else (taps, second * taps)
    rows = out.shape[0] * out.shape[2:].numel()
    thin = inputs <= 4 and outputs <= 4  # depthwise: a tensor core would multiply zeros
    flat = inputs < 16 or thin or mode == "fp64"
    depth = inputs * taps if flat else inputs
    name = (f"conv {meta['EPILOGUE']}", src.dtype)
    tile = tiles(rows, outputs, depth, mode, groups, thin, heavy=True, product=name)
    tile = _shallow(tile, mode)
    # a place of W and one of its draw, or values before and after they are rounded
    held = 2 if given is not None or seed or a or mode == "tf32" else 1
    tile = with_warps(tile, tile.m * tile.k * held)
    steps = blocks(inputs * taps, tile.k) if flat else blocks(inputs, tile.k) * taps
    target = out
    if tile.splits > 1:
        target = out.new_empty((tile.splits, out.numel()), dtype=accumulate_dtype(out.dtype))
        meta = {**meta, "EPILOGUE": "partial"}
    launch(
        product_kernel, tile.programs(rows, outputs), out, src, z, weight,
        weight if given is None else given, extra, target, rows, inputs, outputs,
        blocks(steps, tile.splits), seed, *w_strides, weight.numel() // groups,
        *axes(out.shape[2:]), *axes(src.shape[2:]), *window(weight, geometry), *strides(src),
        *strides(z), *strides(out), out.numel(), eps, below, a, SCATTER=scatter, LAST=last,
        FLAT=flat, LONG=is_long(out, src, z), MODE=mode, groups=groups, **meta,
        **tile.options(),
    )  # fmt: skip
    return target if tile.splits > 1 else None


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry, relu: bool
) -> Tensor:
    last = strided_channels_last(x) or strided_channels_last(weight)
    z = empty(x, output_shape(x.shape, weight.shape, geometry), last)
    if z.numel() == 0:
        return z
    bias = None if bias is None else bias.contiguous()
    meta = {
        "PROLOGUE": Gradient.code, "EPILOGUE": "forward", "BIAS": bias is not None, "RELU": relu,
        "RULE": Gradient.code, "SIGNAL_OUT": False,
    }  # fmt: skip
    partial = _product(
        x, x, weight.contiguous(), z, x if bias is None else bias, geometry, geometry.transposed,
        forward_mode(x.dtype, _cuda.conv_in_tf32(x)), last, 1.0, 1.0, meta,
    )  # fmt: skip
    if partial is not None:
        inner = 1 if last else z.shape[2:].numel()
        finish_forward(partial, bias, z, relu, z.shape[1], inner)
    return z


def _input_reward(
    x: Tensor, weight: Tensor, z: Tensor, reward: Tensor, geometry: ConvGeometry, call: RuleCall,
    mode: str,
) -> Tensor:  # fmt: skip
    rule, below, given, code = call.rule, call.below, call.matrix, call.rule.code
    given = None if given is None else given.contiguous()
    if rule.matrix_code == Matrix.GIVEN and given is not None:  # the weight of this product
        weight, code = given, code - (Matrix.GIVEN << 4)
    last = strided_channels_last(x) or strided_channels_last(reward)
    out = empty(x, x.shape, last)
    if out.numel() == 0:
        return out
    x = arranged_like(out, x)
    meta = {
        "PROLOGUE": prologue_code(rule, call.signal_in), "EPILOGUE": "input", "BIAS": False,
        "RELU": False, "RULE": code, "SIGNAL_OUT": below_code(below),
    }  # fmt: skip
    partial = _product(
        reward, z, weight, out, x, geometry, not geometry.transposed, mode, last, rule.stabilizer,
        below_eps(below), meta, given, rule.first, rule.random_seed,
    )  # fmt: skip
    if partial is not None:
        finish_input(partial, x, out, rule, below)
    return out


def _weight(
    x: Tensor, weight: Tensor, z: Tensor, reward: Tensor, geometry: ConvGeometry, rule: Rule,
    signal_in: bool, mode: str, update: Update | None, need: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None, int]:  # fmt: skip
    """(weight feedback, raw sums of the bias [parts, O], parts); with ``update`` w moves instead.

    Args:
        need: whether of the weight, of the bias.
    """
    out, sums, parts = None, None, 1
    if need[0]:
        out = None if update is not None else weight.new_empty(weight.shape)
        own = need[1] and not geometry.transposed  # the pass sees each signal once
        sums, parts = _weight_product(
            x, weight, z, reward, geometry, rule, signal_in, mode, update, out, True, own
        )
    if need[1] and sums is None:  # a product without columns
        sums, parts = _weight_product(
            x, weight, z, reward, geometry, rule, signal_in, mode, None, None, False, True
        )
    return out, sums, parts


def _weight_product(
    x: Tensor, weight: Tensor, z: Tensor, reward: Tensor, geometry: ConvGeometry, rule: Rule,
    signal_in: bool, mode: str, update: Update | None, out: Tensor | None, columns: bool,
    bias: bool,
) -> tuple[Tensor | None, int]:  # fmt: skip
    """The step of w or its feedback to ``out``; returns (raw bias sums or None, their parts)."""
    groups, taps = geometry.groups, weight.shape[2:].numel()
    small, large, signal = reward, x, "small"
    outputs, inputs = weight.shape[0] // groups, weight.shape[1] if columns else 0
    if not columns:
        outputs = reward.shape[1] // groups
    elif geometry.transposed:
        small, large, signal = x, reward, "large"
    positions = small.shape[0] * small.shape[2:].numel()
    name = ("conv weight", x.dtype)
    tile = tiles(outputs, inputs * taps, positions, mode, groups, heavy=True, product=name)
    tile = _shallow(tile, mode)
    tile = with_warps(tile, (tile.m + tile.n) * tile.k)
    acc, parts = accumulate_dtype(x.dtype), tile.splits
    sums = weight.new_empty((parts, groups * outputs), dtype=acc) if bias else None
    target, code, hyper = weight if out is None else out, FEEDBACK.value, NO_HYPER
    if parts > 1:
        target, code = weight.new_empty((parts, weight.numel()), dtype=acc), PARTIAL.value
    elif update is not None:
        code, hyper = update.code, update.hyper
    launch(
        weight_kernel, tile.programs(outputs, inputs * taps), x, small, large, z, weight, target,
        *states_of(update, weight), target if sums is None else sums, positions, outputs, inputs,
        tile.part(positions), *axes(small.shape[2:]), *axes(large.shape[2:]),
        *window(weight, geometry), *strides(small), *strides(large), *strides(z), weight.numel(),
        rule.stabilizer, *hyper, SIGNAL=signal, PROLOGUE=prologue_code(rule, signal_in),
        RULE=rule.code, OPTIMIZER=code, BIAS=bias,
        LAST=strided_channels_last(x) or strided_channels_last(reward),
        LONG=is_long(small, large, z), MODE=mode, groups=groups, **tile.options(),
    )  # fmt: skip
    if parts > 1 and columns:
        finish(target, weight, rule.code, update, out, parts)
    return sums, parts


def redistribute(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    reward: Tensor,
    geometry: ConvGeometry,
    call: RuleCall,
    need: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    rule, signal_in, product_dtype = call.rule, call.signal_in, call.product_dtype
    if rule.split:
        return redistribute_split(x, weight, bias, z, reward, geometry, call, need)
    mode = feedback_mode(_cuda.product_dtype(product_dtype, _cuda.conv_in_tf32(x)))
    weight = weight.contiguous()
    input_reward = bias_feedback = None
    if need[0]:
        input_reward = _input_reward(x, weight, z, reward, geometry, call, mode)
    weight_feedback, sums, parts = _weight(
        x, weight, z, reward, geometry, rule, signal_in, mode, None,
        (need[1], need[2] and bias is not None),
    )  # fmt: skip
    if bias is not None and sums is not None:
        bias_feedback = bias.new_empty(bias.shape)
        finish(sums, bias.contiguous(), rule.code, None, bias_feedback, parts)
    return input_reward, weight_feedback, bias_feedback


def redistribute_update(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    reward: Tensor,
    geometry: ConvGeometry,
    weight_update: Update,
    bias_update: Update | None,
    call: RuleCall,
    need_input: bool,
) -> Tensor | None:
    rule, signal_in, product_dtype = call.rule, call.signal_in, call.product_dtype
    if rule.split:
        need = (need_input, True, bias is not None and bias_update is not None)
        return redistribute_split(
            x, weight, bias, z, reward, geometry, call, need, weight_update, bias_update
        )[0]
    mode = feedback_mode(_cuda.product_dtype(product_dtype, _cuda.conv_in_tf32(x)))
    input_reward = None
    if need_input:  # reads W before any tile of it changes
        input_reward = _input_reward(x, weight, z, reward, geometry, call, mode)
    of_bias = bias is not None and bias_update is not None
    _, sums, parts = _weight(
        x, weight, z, reward, geometry, rule, signal_in, mode, weight_update, (True, of_bias)
    )
    if bias is not None and sums is not None:
        finish(sums, bias, rule.code, bias_update, None, parts)
    return input_reward
