"""Logic, shifts and bit fields."""

from __future__ import annotations

from . import types
from .emitter import Emitter
from .forms import form
from .parser import Instruction


@form("(and|or|xor)(.pred|.b16|.b32|.b64)")
def logic(e: Emitter, ins: Instruction) -> str:
    operator = {"and": "&", "or": "|", "xor": "^"}[ins.opcode.split(".")[0]]
    a, b = (f"({types.storage(ins.type)}){e.raw(x)}" for x in ins.args[1:])
    return e.assign(ins.args[0], ins.type, f"{a} {operator} {b}")


@form("not(.pred|.b16|.b32|.b64)")
def invert(e: Emitter, ins: Instruction) -> str:
    operator = "!" if ins.type == "pred" else "~"
    return e.assign(ins.args[0], ins.type, f"{operator}{e.raw(ins.args[1])}")


@form("cnot{b}")
def logical_not(e: Emitter, ins: Instruction) -> str:
    return e.assign(ins.args[0], ins.type, f"({types.storage(ins.type)}){e.raw(ins.args[1])} == 0")


@form("shl{b}", "shr(.b16|.b32|.b64|.u16|.u32|.u64|.s16|.s32|.s64)")
def shift(e: Emitter, ins: Instruction) -> str:
    """Amounts at or above the width are clamped, which C++ leaves undefined."""
    name = "shift_left" if ins.opcode.startswith("shl") else "shift_right"
    amount = f"(uint32_t){e.raw(ins.args[2])}"
    call = f"{name}<{types.value(ins.type)}>({e.value(ins.args[1], ins.type)}, {amount})"
    return e.assign(ins.args[0], ins.type, call)


@form("shf(.l|.r)(.wrap|.clamp).b32")
def funnel_shift(e: Emitter, ins: Instruction) -> str:
    left, wrap = ("true" if ins.has(m) else "false" for m in ("l", "wrap"))
    return e.assign(ins.args[0], "b32", f"funnel_shift<{left}, {wrap}>({e.raws(ins.args[1:])})")


@form("bfe(.u32|.u64|.s32|.s64)")
def extract_field(e: Emitter, ins: Instruction) -> str:
    value = e.value(ins.args[1], ins.type)
    return e.assign(ins.args[0], ins.type, f"extract_field({value}, {e.raws(ins.args[2:])})")


@form("bfi(.b32|.b64)")
def insert_field(e: Emitter, ins: Instruction) -> str:
    call = f"insert_field<{types.storage(ins.type)}>({e.raws(ins.args[1:])})"
    return e.assign(ins.args[0], ins.type, call)


@form("bfind[.shiftamt](.u32|.u64|.s32|.s64)")
def find_leading(e: Emitter, ins: Instruction) -> str:
    amount = "true" if ins.has("shiftamt") else "false"
    call = f"find_leading({e.value(ins.args[1], ins.type)}, {amount})"
    return e.assign(ins.args[0], "u32", call)


@form("popc(.b32|.b64)", "clz(.b32|.b64)")
def count_bits(e: Emitter, ins: Instruction) -> str:
    name = "std::popcount" if ins.opcode.startswith("popc") else "std::countl_zero"
    return e.assign(ins.args[0], "u32", f"(uint32_t){name}({e.value(ins.args[1], ins.type)})")


@form("brev(.b32|.b64)")
def reverse_bits(e: Emitter, ins: Instruction) -> str:
    return e.assign(ins.args[0], ins.type, f"reverse_bits({e.value(ins.args[1], ins.type)})")


@form("prmt.b32[.f4e|.b4e|.rc8|.ecl|.ecr|.rc16]")
def permute_bytes(e: Emitter, ins: Instruction) -> str:
    mode = ins.pick("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")
    name = f"permute_{mode}" if mode else "permute_bytes"
    return e.assign(ins.args[0], "b32", f"{name}({e.raws(ins.args[1:])})")


@form("lop3.b32")
def three_input_logic(e: Emitter, ins: Instruction) -> str:
    return e.assign(ins.args[0], "b32", f"three_input_logic({e.raws(ins.args[1:])})")


@form("bmsk(.clamp|.wrap).b32")
def bit_mask(e: Emitter, ins: Instruction) -> str:
    wrap = "true" if ins.has("wrap") else "false"
    return e.assign(ins.args[0], "b32", f"bit_mask<{wrap}>({e.raws(ins.args[1:])})")
