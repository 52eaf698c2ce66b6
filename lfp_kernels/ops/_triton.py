"""What the Triton kernels of all ops share: csrc/rules.h again, as jit functions.

A rule, an optimizer and the chain bits are constexpr codes of a kernel; their parameters are
run-time scalars of type float64, rounded to the arithmetic type inside the kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..optim import ADAMW, SGD_MOMENTUM, SGD_PLAIN, Update
from ..rules import (
    DERIVATIVE_BITS,
    Derivative,
    Gradient,
    InputEpilogue,
    Matrix,
    Prologue,
    Rule,
    WeightEpilogue,
)  # fmt: skip

# The functions of a rule, four bits each of its code (lfp_kernels/rules/base.py).
IDENTITY, ZERO = tl.constexpr(int(Prologue.IDENTITY)), tl.constexpr(int(Prologue.ZERO))
TIMES_OUTPUT = tl.constexpr(int(Prologue.TIMES_OUTPUT))
REVERSE_POSITIVE = tl.constexpr(int(Prologue.REVERSE_POSITIVE))
REVERSE_NEGATIVE = tl.constexpr(int(Prologue.REVERSE_NEGATIVE))
TIMES_INPUT = tl.constexpr(int(InputEpilogue.TIMES_INPUT))
MAGNITUDE = tl.constexpr(int(WeightEpilogue.MAGNITUDE))
WEIGHT, SIGN = tl.constexpr(int(Matrix.WEIGHT)), tl.constexpr(int(Matrix.SIGN))
GIVEN_SIGN = tl.constexpr(int(Matrix.GIVEN_SIGN))
RANDOM_SIGN, NOISY = tl.constexpr(int(Matrix.RANDOM_SIGN)), tl.constexpr(int(Matrix.NOISY))
# What the layer below wants: SIGNAL_OUT of a kernel is 0, 1 for its signal, or a derivative.
RELU, TANH, SIGMOID = (tl.constexpr(DERIVATIVE_BITS[n]) for n in ("relu", "tanh", "sigmoid"))
PLAIN, MOMENTUM, ADAM = tl.constexpr(SGD_PLAIN), tl.constexpr(SGD_MOMENTUM), tl.constexpr(ADAMW)
# In place of an optimizer code: store the finished feedback / the raw sums instead of a step.
FEEDBACK, PARTIAL = tl.constexpr(-1), tl.constexpr(-2)

BLOCK = 1024  # elements of an elementwise program: 8 per thread, two 16-byte accesses in float32
NO_HYPER = [0.0] * 12


def launch(
    kernel: Any, programs: int, like: Tensor, *args: Any, groups: int = 1, **meta: Any
) -> None:
    """Run a kernel on a grid [programs, groups], on the device of ``like`` and its stream."""
    if programs == 0:
        return
    if like.is_cuda and not torch.compiler.is_compiling():
        with torch.cuda.device(like.device):
            kernel[(programs, groups)](*args, **meta)
    else:  # a compiled graph sets the device itself
        kernel[(programs, groups)](*args, **meta)


def registers(most: int) -> dict[str, int]:
    """Meta-parameter of a launch: those a thread may use. Told so, ptxas does not spill a few words
    to fit one more program on a multiprocessor."""
    return {} if torch.version.hip else {"maxnreg": most}


def blocks(count: int, block: int = BLOCK) -> int:
    """Programs of ``block`` elements that cover ``count`` elements."""
    return -(-count // block)


def power_of_2(n: int, least: int = 1, most: int = 1 << 30) -> int:
    """The smallest power of 2 >= n, within [least, most]."""
    return min(max(1 << max(n - 1, 0).bit_length(), least), most)


def arranged_like(like: Tensor, t: Tensor) -> Tensor:
    """``t`` with its elements where the dense tensor ``like`` of the same shape has them."""
    sizes = zip(t.shape, t.stride(), like.stride())
    if t.numel() == 0 or all(n == 1 or a == b for n, a, b in sizes):
        return t
    return torch.empty_like(like, dtype=t.dtype).copy_(t)


def prologue_code(rule: Rule, signal_in: bool) -> int:
    """A reward that is the signal already takes the gradient's prologue: the identity."""
    return Gradient.code if signal_in else rule.code


def below_code(below: Rule | Derivative | None) -> int:
    """SIGNAL_OUT of a kernel."""
    if isinstance(below, Derivative):
        return DERIVATIVE_BITS[below.function]
    return int(below is not None)


def below_eps(below: Rule | Derivative | None) -> float:
    return below.stabilizer if isinstance(below, Rule) else 1.0


@triton.constexpr_function
def accumulate_type(dtype):
    """Arithmetic type: 16-bit values are computed in float32."""
    return tl.float64 if dtype == tl.float64 else tl.float32


# ---- rules (csrc/rules.h)


@triton.jit
def divide(a, b):
    """a / b, correctly rounded."""
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def square_root(v):
    if v.dtype == tl.float64:
        return tl.sqrt(v)
    else:
        return tl.sqrt_rn(v)


@triton.jit
def stabilize(z, eps):
    """z + eps * sgn(z) with sgn = +1 at both zeros; NaN and inf stay what they are."""
    return z + tl.where(z < 0, -eps, eps)


@triton.jit
def prologue(r, z, eps, RULE: tl.constexpr):
    KIND: tl.constexpr = RULE & 15
    if KIND == IDENTITY:
        return r
    elif KIND == ZERO:
        return tl.where(z == 0, 0.0, divide(r, tl.where(z == 0, 1.0, z)))
    elif KIND == TIMES_OUTPUT:
        return r * z
    else:
        if KIND == REVERSE_POSITIVE:
            r = tl.where(z > 0, -r, r)
        elif KIND == REVERSE_NEGATIVE:
            r = tl.where(z < 0, -r, r)
        return divide(r, stabilize(z, eps))


@triton.jit
def load(pointer, mask):
    """Values in their arithmetic type, 0 where the mask is off; None: no mask."""
    acc: tl.constexpr = accumulate_type(pointer.dtype.element_ty)
    if mask is None:
        return tl.load(pointer).to(acc)
    else:
        return tl.load(pointer, mask=mask, other=0.0).to(acc)


@triton.jit
def store(pointer, value, mask):
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def sum_of_parts(raw_ptr, offset, count, parts, mask):
    """raw[parts, count] at ``offset``, added up in the order of the parts"""
    total = load(raw_ptr + offset, mask)
    for part in range(1, parts):
        total += load(raw_ptr + tl.cast(part, tl.int64) * count + offset, mask)
    return total


@triton.jit
def load_signal(r_pointer, z_pointer, mask, eps, RULE: tl.constexpr):
    """s = prologue(r, z), 0 where the mask is off; z is read where the rule needs it."""
    r = load(r_pointer, mask)
    if (RULE & 15) == IDENTITY:
        return r
    else:
        return prologue(r, load(z_pointer, mask), eps.to(r.dtype), RULE)


@triton.jit
def input_epilogue(g, x, below, RULE: tl.constexpr, SIGNAL_OUT: tl.constexpr):
    """r_in from g = s M; with SIGNAL_OUT the signal x / stab(x) * g that the layer below takes, or
    r_in times the derivative of the activation below."""
    if SIGNAL_OUT == 1:
        return divide(g * x, stabilize(x, below))
    else:
        if ((RULE >> 8) & 15) == TIMES_INPUT:
            g = g * x
        if SIGNAL_OUT == RELU:
            g = tl.where(x > 0, g, 0.0)
        elif SIGNAL_OUT == TANH:
            g = g * (1 - x * x)
        elif SIGNAL_OUT == SIGMOID:
            g = g * (x * (1 - x))
        return g


@triton.jit
def weight_epilogue(f, w, RULE: tl.constexpr):
    if ((RULE >> 12) & 15) == MAGNITUDE:
        return f * tl.abs(w)
    else:
        return f


@triton.jit
def uniform(index, seed):
    """The draw in [0, 1), float32, of element ``index`` (int64): csrc/philox.h."""
    block = index >> 2
    zero = tl.zeros_like(block).to(tl.uint32)
    low, high = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(seed, low, high, zero, zero)
    first, second = tl.where((index & 1) == 0, a, b), tl.where((index & 1) == 0, c, d)
    word = tl.where((index & 2) == 0, first, second)
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def made_matrix(w, given_pointer, mask, index, a, seed, RULE: tl.constexpr):
    """M of the input product from the weight, the given matrix, and draws by ``index``."""
    acc: tl.constexpr = accumulate_type(given_pointer.dtype.element_ty)
    KIND: tl.constexpr = (RULE >> 4) & 15
    w = w.to(acc)
    sign = tl.where(w > 0, 1.0, tl.where(w < 0, -1.0, w)).to(acc)
    if KIND == SIGN:
        return a.to(acc) * sign
    elif KIND == GIVEN_SIGN:
        return tl.abs(load(given_pointer, mask)) * sign
    elif KIND == RANDOM_SIGN:
        return a.to(acc) * uniform(index, seed).to(acc) * sign
    else:
        tl.static_assert(KIND == NOISY)
        return load(given_pointer, mask) + a.to(acc) * (uniform(index, seed).to(acc) - 0.5)


# ---- optimizers (csrc/rules.h)


@triton.jit
def optimizer_step(feedback, w, a, b, hyper, OPTIMIZER: tl.constexpr):
    """(w, a, b) after one step along the feedback; ``hyper`` as in lfp_kernels.optim.Update."""
    lr, decay, scale, momentum, nesterov, _, beta2, eps, correction1, correction2, rest1, rest2 = (
        hyper
    )
    dtype: tl.constexpr = w.dtype
    lr, decay, scale = lr.to(dtype), decay.to(dtype), scale.to(dtype)
    if OPTIMIZER == PLAIN:
        w -= lr * (decay * w - feedback * scale)
    elif OPTIMIZER == MOMENTUM:
        momentum = momentum.to(dtype)
        d = decay * w - feedback * scale
        a = momentum * a + d
        w -= lr * tl.where(nesterov != 0, d + momentum * a, a)
    else:
        tl.static_assert(OPTIMIZER == ADAM)
        d = -feedback * scale
        a += rest1.to(dtype) * (d - a)
        b = beta2.to(dtype) * b + rest2.to(dtype) * d * d
        root = square_root(divide(b, correction2.to(dtype))) + eps.to(dtype)
        w -= lr * (decay * w + divide(divide(a, correction1.to(dtype)), root))
    return w, a, b


@triton.jit
def finish_weight(
    raw, w, w_ptr, out_ptr, a_ptr, b_ptr, offset, mask, hyper, RULE: tl.constexpr,
    OPTIMIZER: tl.constexpr,
):  # fmt: skip
    """The weight epilogue of raw sums and the values w at ``offset``, then what OPTIMIZER says.

    FEEDBACK stores to ``out``; an optimizer moves w and its states a, b in place.
    """
    feedback = weight_epilogue(raw, w, RULE)
    if OPTIMIZER == FEEDBACK:
        store(out_ptr + offset, feedback, mask)
    else:
        a = w
        b = w
        if OPTIMIZER != PLAIN:
            a = load(a_ptr + offset, mask)
        if OPTIMIZER == ADAM:
            b = load(b_ptr + offset, mask)
        w, a, b = optimizer_step(feedback, w, a, b, hyper, OPTIMIZER)
        # Tiles smaller than the program are held by several threads: all read before one writes.
        tl.debug_barrier()
        store(w_ptr + offset, w, mask)
        if OPTIMIZER != PLAIN:
            store(a_ptr + offset, a, mask)
        if OPTIMIZER == ADAM:
            store(b_ptr + offset, b, mask)


@triton.jit
def _finish_block(
    raw_ptr, w_ptr, out_ptr, a_ptr, b_ptr, offset, mask, count, parts, hyper, RULE: tl.constexpr,
    OPTIMIZER: tl.constexpr,
):  # fmt: skip
    raw = sum_of_parts(raw_ptr, offset, count, parts, mask)
    w = load(w_ptr + offset, mask)
    finish_weight(raw, w, w_ptr, out_ptr, a_ptr, b_ptr, offset, mask, hyper, RULE, OPTIMIZER)


@triton.jit(do_not_specialize=["parts"])
def finish_kernel(
    raw_ptr, w_ptr, out_ptr, a_ptr, b_ptr, count, parts,
    lr: tl.float64, decay: tl.float64, scale: tl.float64, momentum: tl.float64,
    nesterov: tl.float64, beta1: tl.float64, beta2: tl.float64, eps: tl.float64,
    correction1: tl.float64, correction2: tl.float64, rest1: tl.float64, rest2: tl.float64,
    RULE: tl.constexpr, OPTIMIZER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """feedback or step of w[count] from the sum over raw[parts, count], in this order."""
    hyper = (
        lr, decay, scale, momentum, nesterov, beta1, beta2, eps, correction1, correction2, rest1,
        rest2,
    )  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offset = start + tl.arange(0, BLOCK)
    if start + BLOCK <= count:  # whole blocks need no mask, so their accesses are vectors
        _finish_block(
            raw_ptr, w_ptr, out_ptr, a_ptr, b_ptr, offset, None, count, parts, hyper, RULE,
            OPTIMIZER,
        )  # fmt: skip
    else:
        _finish_block(
            raw_ptr, w_ptr, out_ptr, a_ptr, b_ptr, offset, offset < count, count, parts, hyper,
            RULE, OPTIMIZER,
        )  # fmt: skip


def states_of(update: Update | None, param: Tensor) -> tuple[Tensor, Tensor]:
    """Two state tensors for a kernel, the parameter in the place of missing ones."""
    states = [] if update is None else update.states
    first, second = [*states, param, param][:2]
    return first, second


def finish(
    raw: Tensor, param: Tensor, rule: int, update: Update | None, out: Tensor | None, parts: int = 1
) -> None:
    """Feedback of ``param`` to ``out`` or, with ``update``, its step in place, from the raw sums.

    Args:
        raw: [parts, *param.shape], contiguous. param: contiguous, as are out and the states.
    """
    count = param.numel()
    code = FEEDBACK.value if update is None else update.code
    hyper = NO_HYPER if update is None else update.hyper
    launch(
        finish_kernel, blocks(count), param, raw, param, param if out is None else out,
        *states_of(update, param), count, parts, *hyper, RULE=rule, OPTIMIZER=code, BLOCK=BLOCK,
        num_warps=4,
    )  # fmt: skip
