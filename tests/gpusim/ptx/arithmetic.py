"""Integer and floating-point arithmetic on scalars."""

from __future__ import annotations

from . import types
from .emitter import Emitter
from .forms import form
from .parser import Instruction

_OPERATORS = {"add": "+", "sub": "-", "and": "&", "or": "|", "xor": "^"}


def _name(ins: Instruction) -> str:
    return ins.opcode.split(".")[0]


# ---- integers


@form("(add|sub){int}")
def add_int(e: Emitter, ins: Instruction) -> str:
    # In unsigned arithmetic, where wrapping is defined.
    a, b = (f"({types.storage(ins.type)}){e.raw(x)}" for x in ins.args[1:])
    return e.assign(ins.args[0], ins.type, f"{a} {_OPERATORS[_name(ins)]} {b}")


@form("(add|sub).sat.s32")
def add_saturating(e: Emitter, ins: Instruction) -> str:
    a, b = (e.value(x, "s32") for x in ins.args[1:])
    total = f"(int64_t){a} {_OPERATORS[_name(ins)]} (int64_t){b}"
    return e.assign(ins.args[0], "s32", f"clamp_to<int32_t>({total})")


@form("add.cc(.u32|.s32|.u64|.s64)", "addc[.cc](.u32|.s32|.u64|.s64)")
@form("sub.cc(.u32|.s32|.u64|.s64)", "subc[.cc](.u32|.s32|.u64|.s64)")
@form("mad(.lo|.hi).cc(.u32|.u64)", "madc(.lo|.hi)[.cc](.u32|.u64)")
def add_with_carry(e: Emitter, ins: Instruction) -> str:
    """The carry flag is a variable of the thread; subtraction keeps the borrow in it."""
    name, width = _name(ins), types.bits(ins.type)
    unsigned = f"u{width}"
    wide = types.wide(unsigned)
    operands = [f"({wide})({types.storage(unsigned)}){e.raw(x)}" for x in ins.args[1:]]
    if name.startswith("mad"):
        shift = width if ins.has("hi") else 0
        product = f"({wide})({types.storage(unsigned)})(({operands[0]} * {operands[1]}) >> {shift})"
        operands = [product, operands[2]]
    sign = "-" if name.startswith("sub") else "+"
    carry_in = f" {sign} carry" if name.endswith("c") else ""
    keep = f"carry = (uint32_t)(t >> {width}) & 1;" if ins.has("cc") else ""
    total = f"{operands[0]} {sign} {operands[1]}{carry_in}"
    assign = e.assign(ins.args[0], unsigned, f"({types.storage(unsigned)})t")
    return f"{{ {wide} t = {total}; {assign} {keep} }}"


@form("(mul|mad)(.lo|.hi){int}", "(mul|mad).wide(.u16|.s16|.u32|.s32)")
def multiply(e: Emitter, ins: Instruction) -> str:
    a, b = (f"({types.wide(ins.type)}){e.value(x, ins.type)}" for x in ins.args[1:3])
    shift = f" >> {types.bits(ins.type)}" if ins.has("hi") else ""
    result = f"u{types.bits(ins.type) * (2 if ins.has('wide') else 1)}"
    storage = types.storage(result)
    product = f"({storage})(({a} * {b}){shift})"
    addend = f" + ({storage}){e.raw(ins.args[3])}" if _name(ins) == "mad" else ""
    return e.assign(ins.args[0], result, product + addend)


@form("mad.hi.sat.s32")
def multiply_saturating(e: Emitter, ins: Instruction) -> str:
    a, b, c = (f"(int64_t){e.value(x, 's32')}" for x in ins.args[1:])
    return e.assign(ins.args[0], "s32", f"clamp_to<int32_t>((({a} * {b}) >> 32) + {c})")


@form("(mul24|mad24)(.lo|.hi)(.u32|.s32)")
def multiply24(e: Emitter, ins: Instruction) -> str:
    a, b = (f"low24({e.value(x, ins.type)})" for x in ins.args[1:3])
    product = f"(uint32_t)(({a} * {b}) >> {16 if ins.has('hi') else 0})"
    addend = f" + (uint32_t){e.raw(ins.args[3])}" if _name(ins) == "mad24" else ""
    return e.assign(ins.args[0], "u32", product + addend)


@form("(div|rem){int}")
def divide_int(e: Emitter, ins: Instruction) -> str:
    call = f"{_name(ins)}_int<{types.value(ins.type)}>({e.values(ins.args[1:], ins.type)})"
    return e.assign(ins.args[0], ins.type, call)


@form("(min|max){int}")
def minimum_int(e: Emitter, ins: Instruction) -> str:
    call = f"std::{_name(ins)}<{types.value(ins.type)}>({e.values(ins.args[1:], ins.type)})"
    return e.assign(ins.args[0], ins.type, call)


@form("(neg|abs){s}")
def negate_int(e: Emitter, ins: Instruction) -> str:
    call = f"{_name(ins)}_int<{types.value(ins.type)}>({e.value(ins.args[1], ins.type)})"
    return e.assign(ins.args[0], ins.type, call)


@form("sad{int}")
def sum_of_absolute_differences(e: Emitter, ins: Instruction) -> str:
    return e.assign(ins.args[0], ins.type, f"sad({e.values(ins.args[1:], ins.type)})")


@form("dp4a(.u32|.s32)(.u32|.s32)")
def dot_product4(e: Emitter, ins: Instruction) -> str:
    a, b, c = (e.raw(x) for x in ins.args[1:])
    bytes_ = ("int8_t" if t[0] == "s" else "uint8_t" for t in ins.mods)
    return e.assign(ins.args[0], "u32", f"dp4a<{', '.join(bytes_)}>({a}, {b}, {c})")


# ---- floats


def _flush(ins: Instruction, expression: str) -> str:
    return f"flush({expression})" if ins.has("ftz") else expression


def _finish(ins: Instruction, expression: str) -> str:
    if ins.has("sat"):
        expression = f"saturate({expression})"
    if ins.has("relu"):
        expression = f"relu({expression})"
    return _flush(ins, expression)


_DIRECTED = {"rz": "FE_TOWARDZERO", "rm": "FE_DOWNWARD", "rp": "FE_UPWARD"}


@form("(add|sub|mul)[{round}][.ftz][.sat].f32", "(add|sub|mul)[{round}].f64")
@form("(fma|mad){round}[.ftz][.sat].f32", "(fma|mad){round}.f64")
@form("div{round}[.ftz].f32", "div{round}.f64", "div(.approx|.full)[.ftz].f32")
@form("sqrt{round}[.ftz].f32", "sqrt{round}.f64", "sqrt.approx[.ftz].f32")
@form("rcp{round}[.ftz].f32", "rcp{round}.f64", "rcp.approx[.ftz].f32", "rcp.approx.ftz.f64")
@form("(add|sub|mul)[.rn][.ftz][.sat].f16", "(add|sub|mul)[.rn].bf16")
@form("fma.rn[.ftz][.sat|.relu].f16", "fma.rn[.relu].bf16")
def float_arithmetic(e: Emitter, ins: Instruction) -> str:
    operands = [_flush(ins, e.value(x, ins.type)) for x in ins.args[1:]]
    mode = _DIRECTED.get(ins.pick("rz", "rm", "rp") or "")
    operation = {"mad": "fma"}.get(_name(ins), _name(ins))
    if mode:
        call = f"directed({mode}, {operation}_float, {', '.join(operands)})"
    else:
        call = f"{operation}_float({', '.join(operands)})"
    return e.assign(ins.args[0], ins.type, _finish(ins, call))


@form("(add|sub)[.rn][.sat].f32{half}", "fma.rn[.sat].f32{half}")
def mixed_precision(e: Emitter, ins: Instruction) -> str:
    """sm_100: the last operand and the result are f32, the others narrower."""
    narrow = [f"(float)widen({e.value(x, ins.type)})" for x in ins.args[1:-1]]
    call = f"{_name(ins)}_float({', '.join(narrow)}, {e.value(ins.args[-1], 'f32')})"
    return e.assign(ins.args[0], "f32", _finish(ins, call))


@form("(min|max)[.ftz][.NaN].f32", "(min|max).f64")
@form("(min|max)[.ftz][.NaN].f16", "(min|max)[.NaN].bf16")
def minimum_float(e: Emitter, ins: Instruction) -> str:
    """Two operands, or three (f32 on sm_100)."""
    nan = "true" if ins.has("NaN") else "false"
    operands = [_flush(ins, e.value(x, ins.type)) for x in ins.args[1:]]
    call = operands[0]
    for operand in operands[1:]:
        call = f"{_name(ins)}_float<{nan}>({call}, {operand})"
    return e.assign(ins.args[0], ins.type, _finish(ins, call))


@form("(neg|abs)[.ftz](.f32|.f16)", "(neg|abs)(.f64|.bf16)")
def negate_float(e: Emitter, ins: Instruction) -> str:
    operand = _flush(ins, e.value(ins.args[1], ins.type))
    return e.assign(ins.args[0], ins.type, f"{_name(ins)}_float({operand})")


@form("(rsqrt|sin|cos|lg2|ex2).approx[.ftz].f32", "tanh.approx.f32", "rsqrt.approx[.ftz].f64")
@form("ex2.approx[.ftz].f16", "ex2.approx.ftz.bf16", "tanh.approx{half}")
def transcendental(e: Emitter, ins: Instruction) -> str:
    """Computed exactly and rounded once; hardware's approximation error is not modelled."""
    operand = _flush(ins, e.value(ins.args[1], ins.type))
    return e.assign(ins.args[0], ins.type, _flush(ins, f"{_name(ins)}_float({operand})"))


@form("copysign(.f32|.f64)")
def copy_sign(e: Emitter, ins: Instruction) -> str:
    sign, magnitude = (e.value(x, ins.type) for x in ins.args[1:])
    return e.assign(ins.args[0], ins.type, f"std::copysign({magnitude}, {sign})")
