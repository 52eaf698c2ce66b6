"""Comparison and selection."""

from __future__ import annotations

from . import types
from .emitter import Emitter
from .forms import form
from .parser import Instruction

_OPERATORS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_UNSIGNED = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
_BOOLEANS = {"and": "&", "or": "|", "xor": "^"}


def _condition(e: Emitter, ins: Instruction, comparison: str, a: str, b: str) -> str:
    """C++ condition for one comparison; on floats NaN makes ordered comparisons false."""
    if ins.has("ftz"):
        a, b = f"flush({a})", f"flush({b})"
    if types.is_float(ins.type) or ins.type in ("f16x2", "bf16x2"):
        return f"compare_{comparison}({a}, {b})"
    return f"({a} {(_OPERATORS | _UNSIGNED)[comparison]} {b})"


@form("setp{compare}[{bool}]{int}", "setp(.lo|.ls|.hi|.hs)[{bool}]{u}", "setp(.eq|.ne)[{bool}]{b}")
@form("setp{compare_float}[{bool}][.ftz].f32", "setp{compare_float}[{bool}].f64")
@form("setp{compare_float}[{bool}][.ftz].f16", "setp{compare_float}[{bool}].bf16")
def set_predicate(e: Emitter, ins: Instruction) -> str:
    a, b = (e.value(x, ins.type) for x in ins.args[1:3])
    condition = _condition(e, ins, ins.mods[0], a, b)
    inverse = f"!{condition}"
    if boolean := ins.pick(*_BOOLEANS):
        extra = e.raw(ins.args[3])
        condition = f"({condition} {_BOOLEANS[boolean]} {extra})"
        inverse = f"({inverse} {_BOOLEANS[boolean]} {extra})"
    first, *second = ins.args[0].split("|")
    code = f"bool t = {condition}, f = {inverse}; (void)f;"
    code += e.assign(first, "pred", "t")
    if second:
        code += e.assign(second[0], "pred", "f")
    return f"{{ {code} }}"


@form("setp{compare_float}[{bool}][.ftz].f16x2", "setp{compare_float}[{bool}].bf16x2")
def set_predicate_pair(e: Emitter, ins: Instruction) -> str:
    """Two predicates: of the low and of the high halves."""
    half = types.value(ins.type[:-2])
    code = ""
    for shift, dest in zip((0, 16), ins.args[0].split("|"), strict=False):
        a, b = (f"from_bits<{half}>((uint16_t)({e.raw(x)} >> {shift}))" for x in ins.args[1:3])
        condition = _condition(e, ins, ins.mods[0], a, b)
        if boolean := ins.pick(*_BOOLEANS):
            condition = f"({condition} {_BOOLEANS[boolean]} {e.raw(ins.args[3])})"
        code += e.assign(dest, "pred", condition)
    return f"{{ {code} }}"


@form("set{compare}(.u32|.s32){int}", "set(.eq|.ne)(.u32|.s32){b}")
@form("set{compare_float}[.ftz](.u32|.s32|.f32)(.f32|.f16)", "set{compare_float}(.u32|.s32).f64")
def set_value(e: Emitter, ins: Instruction) -> str:
    """All ones or zero; 1.0f or 0.0f for an f32 result."""
    a, b = (e.value(x, ins.type) for x in ins.args[1:3])
    condition = _condition(e, ins, ins.mods[0], a, b)
    true = "0x3f800000u" if ins.mods[-2] == "f32" else "~0u"
    return e.assign(ins.args[0], "u32", f"{condition} ? {true} : 0u")


@form("selp(.b16|.b32|.b64|.u16|.u32|.u64|.s16|.s32|.s64|.f32|.f64)")
def select(e: Emitter, ins: Instruction) -> str:
    a, b, predicate = (e.raw(x) for x in ins.args[1:])
    storage = types.storage(ins.type)
    return e.assign(
        ins.args[0], f"u{types.bits(ins.type)}", f"{predicate} ? ({storage}){a} : ({storage}){b}"
    )


@form("slct(.b32|.u32|.s32|.f32|.b64|.u64|.s64|.f64).s32")
@form("slct[.ftz](.b32|.u32|.s32|.f32|.b64|.u64|.s64|.f64).f32")
def select_by_sign(e: Emitter, ins: Instruction) -> str:
    a, b = (f"({types.storage(ins.mods[-2])}){e.raw(x)}" for x in ins.args[1:3])
    sign = e.value(ins.args[3], ins.type)
    return e.assign(ins.args[0], f"u{types.bits(ins.mods[-2])}", f"({sign} >= 0) ? {a} : {b}")


@form("testp(.finite|.infinite|.number|.notanumber|.normal|.subnormal)(.f32|.f64)")
def classify(e: Emitter, ins: Instruction) -> str:
    return e.assign(ins.args[0], "pred", f"is_{ins.mods[0]}({e.value(ins.args[1], ins.type)})")
