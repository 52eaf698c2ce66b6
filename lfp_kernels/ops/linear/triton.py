"""The linear layer in Triton; the equations are those of triton_kernels.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ...optim import Update
from ...rules import Derivative, Matrix, Rule, RuleCall, accumulate_dtype
from .. import _cuda
from .._triton import (
    FEEDBACK,
    NO_HYPER,
    PARTIAL,
    below_code,
    below_eps,
    blocks,
    finish,
    launch,
    power_of_2,
    prologue_code,
    registers,
    states_of,
)
from .._triton_product import (
    feedback_mode,
    finish_forward,
    finish_input,
    forward_mode,
    tiles,
)
from .triton_kernels import forward_kernel, input_kernel, one_pass_kernel, weight_kernel
from .triton_split import redistribute_split

_PROGRAMS = 256  # of the one-pass kernel
_PART = 128  # outputs of one of them, at least
_SMALL = 32  # rows up to which one program holds the whole batch


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    outputs, inputs = weight.shape
    z = x.new_empty(*x.shape[:-1], outputs)
    if z.numel() == 0:
        return z
    rows, mode = z.numel() // outputs, forward_mode(x.dtype, _cuda.linear_in_tf32(x))
    x = x.reshape(rows, inputs)
    bias = None if bias is None else bias.contiguous()
    tile = tiles(rows, outputs, inputs, mode, product=("linear forward", x.dtype))
    split = tile.splits > 1
    target = z
    if split:
        target = z.new_empty((tile.splits, *z.shape), dtype=accumulate_dtype(z.dtype))
    launch(
        forward_kernel, tile.programs(rows, outputs), x, x, weight, x if bias is None else bias,
        target, rows, inputs, outputs, tile.part(inputs), *x.stride(), *weight.stride(),
        BIAS=bias is not None and not split, RELU=relu and not split, SPLIT=split, MODE=mode,
        **tile.options(),
    )  # fmt: skip
    if split:
        finish_forward(target, bias, z, relu, outputs, 1)
    return z


def _heavy(x: Tensor, mode: str) -> bool:
    """Float32 operands as large as tensor cores want them, which exceed the registers of sm_100 and
    the shared memory of sm_86, 89 and 120."""
    return x.dtype == torch.float32 and mode in ("tf32", "bf16")


def _input_reward(
    x: Tensor, weight: Tensor, z: Tensor, reward: Tensor, call: RuleCall, mode: str
) -> Tensor:
    rule, below, given = call.rule, call.below, call.matrix
    code = rule.code
    if rule.matrix_code == Matrix.GIVEN and given is not None:  # the weight of this product
        weight, code = given, code - (Matrix.GIVEN << 4)
    elif rule.matrix_code != Matrix.WEIGHT:
        weight = weight.contiguous()
        given = weight if given is None else given.contiguous()
    out = x.new_empty(x.shape)
    (rows, inputs), outputs = x.shape, weight.shape[0]
    name = ("linear input", x.dtype)
    tile = tiles(rows, inputs, outputs, mode, heavy=_heavy(x, mode), product=name)
    split = tile.splits > 1
    target = out
    if split:
        target = x.new_empty((tile.splits, *x.shape), dtype=accumulate_dtype(x.dtype))
    if out.numel():
        launch(
            input_kernel, tile.programs(rows, inputs), x, x, weight,
            weight if given is None else given, reward, z, target, rows, inputs, outputs,
            tile.part(outputs), rule.random_seed, *x.stride(), *weight.stride(), *reward.stride(),
            *z.stride(), rule.stabilizer, below_eps(below), rule.first,
            PROLOGUE=prologue_code(rule, call.signal_in), RULE=code, SIGNAL_OUT=below_code(below),
            SPLIT=split, MODE=mode, **tile.options(),
        )  # fmt: skip
        if split:
            finish_input(target, x.contiguous(), out, rule, below)
    return out


def _weight(
    x: Tensor, weight: Tensor, z: Tensor, reward: Tensor, rule: Rule, signal_in: bool, mode: str,
    update: Update | None, need: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None, int]:  # fmt: skip
    """(weight feedback, raw sums of the bias [parts, O], parts); with ``update`` w moves instead.

    Args:
        need: whether of the weight, of the bias.
    """
    (rows, inputs), outputs = x.shape, weight.shape[0]
    columns = inputs if need[0] else 0  # the bias alone is a product without columns
    acc = accumulate_dtype(x.dtype)
    heavy = _heavy(x, mode) or (update is not None and len(update.states) > 0)
    name = ("linear weight", x.dtype)
    tile = tiles(outputs, columns, rows, mode, heavy=heavy, product=name)
    out = weight.new_empty(weight.shape) if need[0] and update is None else None
    target = weight if out is None else out
    code, hyper = FEEDBACK.value, NO_HYPER
    if tile.splits > 1:
        target, code = weight.new_empty((tile.splits, outputs, columns), dtype=acc), PARTIAL.value
    elif update is not None:
        code, hyper = update.code, update.hyper
    sums = weight.new_empty((tile.splits, outputs), dtype=acc) if need[1] else None
    if outputs:
        launch(
            weight_kernel, tile.programs(outputs, columns), x, x, weight, reward, z, target,
            *states_of(update, weight), target if sums is None else sums, rows, columns, outputs,
            tile.part(rows), *x.stride(), *reward.stride(), *z.stride(), rule.stabilizer, *hyper,
            PROLOGUE=prologue_code(rule, signal_in), RULE=rule.code, OPTIMIZER=code,
            BIAS=need[1], MODE=mode, **tile.options(),
        )  # fmt: skip
        if tile.splits > 1 and need[0]:
            finish(target, weight, rule.code, update, out, tile.splits)
    return out, sums, tile.splits


def _one_pass(
    x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, reward: Tensor,
    weight_update: Update, bias_update: Update | None, rule: Rule, below: Rule | Derivative | None,
    signal_in: bool, mode: str,
) -> Tensor:  # fmt: skip
    (rows, inputs), outputs = x.shape, weight.shape[0]
    out, acc = x.new_empty(x.shape), accumulate_dtype(x.dtype)
    # Exact products hold their operands in registers, others of float32 tensors those that they
    # convert: more than 16 outputs at a time, or 32 rows in 8 warps, would spill some.
    m, n, k = power_of_2(rows, 16), power_of_2(inputs, 16, 64), 16
    held = mode == "ieee" or _heavy(x, mode)
    warps = 16 if held and m > 16 and not torch.version.hip else 8
    strips = blocks(inputs, n)
    parts = max(1, min(_PROGRAMS // strips, blocks(outputs, _PART)))
    part = blocks(outputs, parts * k) * k
    parts = blocks(outputs, part)
    partial = x.new_empty((parts, rows, inputs), dtype=acc)
    of_bias = bias is not None and bias_update is not None
    sums = x.new_empty(outputs, dtype=acc) if of_bias else None
    launch(
        one_pass_kernel, strips * parts, x, x, weight, reward, z,
        *states_of(weight_update, weight), partial, partial if sums is None else sums, rows, inputs,
        outputs, part, *x.stride(), *reward.stride(), *z.stride(), rule.stabilizer,
        *weight_update.hyper, PROLOGUE=prologue_code(rule, signal_in), RULE=rule.code,
        OPTIMIZER=weight_update.code, BIAS=of_bias, MODE=mode, M=m, N=n, K=k,
        num_warps=warps, num_stages=2, **registers(128),
    )  # fmt: skip
    finish_input(partial, x.contiguous(), out, rule, below)
    if bias is not None and sums is not None:
        finish(sums, bias, rule.code, bias_update, None)
    return out


def redistribute(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    reward: Tensor,
    call: RuleCall,
    need: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    rule, signal_in, product_dtype = call.rule, call.signal_in, call.product_dtype
    if rule.split:
        return redistribute_split(x, weight, bias, z, reward, call, need)
    mode = feedback_mode(_cuda.product_dtype(product_dtype, _cuda.linear_in_tf32(x)))
    input_reward = weight_feedback = bias_feedback = None
    if need[0]:
        input_reward = _input_reward(x, weight, z, reward, call, mode)
    of_bias = need[2] and bias is not None
    if need[1] or of_bias:
        weight_feedback, sums, parts = _weight(
            x, weight.contiguous(), z, reward, rule, signal_in, mode, None, (need[1], of_bias)
        )
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
    weight_update: Update,
    bias_update: Update | None,
    call: RuleCall,
    need_input: bool,
) -> Tensor | None:
    rule, below, signal_in, product_dtype = (
        call.rule, call.below, call.signal_in, call.product_dtype
    )  # fmt: skip
    if rule.split:
        need = (need_input, True, bias is not None and bias_update is not None)
        return redistribute_split(
            x, weight, bias, z, reward, call, need, weight_update, bias_update
        )[0]
    mode = feedback_mode(_cuda.product_dtype(product_dtype, _cuda.linear_in_tf32(x)))
    shared = need_input and rule.matrix_code == Matrix.WEIGHT  # W is in both products
    if shared and x.shape[0] <= _SMALL and mode != "fp64" and x.numel() and weight.numel():
        return _one_pass(
            x, weight, bias, z, reward, weight_update, bias_update, rule, below, signal_in, mode
        )
    input_reward = None
    if need_input:  # reads W before any tile of it changes
        input_reward = _input_reward(x, weight, z, reward, call, mode)
    of_bias = bias is not None and bias_update is not None
    _, sums, parts = _weight(
        x, weight, z, reward, rule, signal_in, mode, weight_update, (True, of_bias)
    )
    if bias is not None and sums is not None:
        finish(sums, bias, rule.code, bias_update, None, parts)
    return input_reward
