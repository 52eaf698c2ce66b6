"""Moves and conversions."""

from __future__ import annotations

from . import types
from .emitter import Emitter, UnsupportedOperand
from .forms import form
from .parser import Instruction

_MODES = {
    "rn": "Round::Nearest",
    "rz": "Round::Zero",
    "rm": "Round::Down",
    "rp": "Round::Up",
    "rni": "Round::Nearest",
    "rzi": "Round::Zero",
    "rmi": "Round::Down",
    "rpi": "Round::Up",
}


@form("mov(.pred|.b16|.b32|.b64|.u16|.u32|.u64|.s16|.s32|.s64|.f16|.bf16|.f32|.f64|.b128)")
def move(e: Emitter, ins: Instruction) -> str:
    dest, source = ins.args
    storage = types.storage(ins.type)
    if dest.startswith("{"):  # unpack
        registers = e.vector(dest)
        width = types.bits(ins.type) // len(registers)
        code = f"{storage} t = {e.raw(source)};"
        for i, register in enumerate(registers):
            code += e.assign(register, f"u{width}", f"(uint{width}_t)(t >> {i * width})")
        return f"{{ {code} }}"
    if source.startswith("{"):  # pack
        registers = e.vector(source)
        width = types.bits(ins.type) // len(registers)
        parts = (
            f"(({storage})(uint{width}_t){e.raw(register)} << {i * width})"
            for i, register in enumerate(registers)
        )
        return e.assign(dest, f"b{types.bits(ins.type)}", " | ".join(parts))
    return e.assign(
        dest, f"b{types.bits(ins.type)}" if ins.type != "pred" else "pred", e.raw(source)
    )


@form("cvta[.to](.global|.const|.local|.shared|.shared::cta|.param|.param::entry)(.u32|.u64)")
def convert_address(e: Emitter, ins: Instruction) -> str:
    """Shared and param addresses count from the start of their space; the others are pointers."""
    source = f"(uint64_t){e.raw(ins.args[1])}"
    base = {"shared": "(uint64_t)sim::shared_base", "param": "(uint64_t)sim::param_base"}.get(
        next(m.split("::")[0] for m in ins.mods if m != "to"), "0"
    )
    return e.assign(ins.args[0], ins.type, f"{source} {'-' if ins.has('to') else '+'} {base}")


@form("isspacep(.global|.shared|.shared::cta|.local|.const|.param)")
def is_in_space(e: Emitter, ins: Instruction) -> str:
    space = ins.mods[0].split("::")[0]
    return e.assign(ins.args[0], "pred", f"sim::is_{space}({e.raw(ins.args[1])})")


@form("cvt[.sat]{int_any}{int_any}")
def int_to_int(e: Emitter, ins: Instruction) -> str:
    dest, source = ins.mods[-2:]
    value = e.value(ins.args[1], source)
    convert = f"clamp_to<{types.value(dest)}>({value})" if ins.has("sat") else value
    return e.assign(ins.args[0], dest, f"({types.value(dest)}){convert}")


@form("cvt{round}[.ftz][.sat](.f16|.f32|.f64){int_any}", "cvt{round}.bf16{int}")
def int_to_float(e: Emitter, ins: Instruction) -> str:
    dest, source = ins.mods[-2:]
    call = f"int_to<{types.value(dest)}, {_mode(ins)}>({e.value(ins.args[1], source)})"
    return e.assign(ins.args[0], dest, f"saturate({call})" if ins.has("sat") else call)


@form("cvt{int_round}[.ftz][.sat]{int_any}(.f16|.f32|.f64)", "cvt{int_round}{int}.bf16")
def float_to_int(e: Emitter, ins: Instruction) -> str:
    dest, source = ins.mods[-2:]
    value = e.value(ins.args[1], source)
    value = f"flush({value})" if ins.has("ftz") else value
    nan_is_high = "true" if "f64" in (source,) or dest in ("u64", "s64") else "false"
    call = f"to_int<{types.value(dest)}, {_mode(ins)}, {nan_is_high}>({value})"
    return e.assign(ins.args[0], dest, call)


@form("cvt[.ftz][.sat].f32{half}", "cvt[.sat].f64(.f16|.bf16)", "cvt[.ftz][.sat].f64.f32")
@form("cvt[.ftz][.sat].f32.f32", "cvt[.sat].f64.f64", "cvt[.ftz][.sat].f16.f16")
@form("cvt{int_round}[.ftz][.sat].f32.f32", "cvt{int_round}[.sat].f64.f64")
@form("cvt{int_round}[.ftz][.sat].f16.f16", "cvt{int_round}.bf16.bf16")
@form(
    "cvt{round}[.ftz][.sat].f32.f64", "cvt{round}[.ftz][.sat].f16.f32", "cvt{round}[.sat].f16.f64"
)
@form("cvt(.rn|.rz).relu(.f16|.bf16).f32", "cvt{round}.bf16.f32", "cvt{round}.bf16.f64")
@form("cvt.rn.bf16.f16", "cvt.rn.f16.bf16")
def float_to_float(e: Emitter, ins: Instruction) -> str:
    dest, source = ins.mods[-2:]
    value = f"widen({e.value(ins.args[1], source)})"
    if ins.has("ftz") and "f32" in (source, dest):
        value = f"flush_as<{types.value(source)}>({value})" if source == "f32" else value
    if ins.has("rni", "rzi", "rmi", "rpi"):
        value = f"integral<{_mode(ins)}>({value})"
    mode = _mode(ins) if ins.has("rn", "rz", "rm", "rp") else "Round::Nearest"
    call = f"narrow<{types.value(dest)}, {mode}>({value})"
    for modifier, function in (("sat", "saturate"), ("relu", "relu")):
        call = f"{function}({call})" if ins.has(modifier) else call
    call = f"flush({call})" if ins.has("ftz") and dest == "f32" else call
    return e.assign(ins.args[0], dest, call)


@form("cvt(.rn|.rz)[.relu]{half2}.f32")
def pack_halves(e: Emitter, ins: Instruction) -> str:
    half = types.value(ins.mods[-2][:-2])
    parts = []
    for operand in ins.args[1:3]:
        call = f"narrow<{half}, {_mode(ins)}>({e.value(operand, 'f32')})"
        parts.append(f"to_bits({f'relu({call})' if ins.has('relu') else call})")
    return e.assign(ins.args[0], "u32", f"((uint32_t){parts[0]} << 16) | {parts[1]}")


@form("cvt.rna.tf32.f32", "cvt(.rn|.rz)[.relu].tf32.f32")
def to_tf32(e: Emitter, ins: Instruction) -> str:
    mode = "Round::NearestAway" if ins.has("rna") else _mode(ins)
    value = e.value(ins.args[1], "f32")
    value = f"relu({value})" if ins.has("relu") else value
    return e.assign(ins.args[0], "u32", f"to_tf32<{mode}>({value})")


def _mode(ins: Instruction) -> str:
    for modifier in ins.mods:
        if modifier in _MODES:
            return _MODES[modifier]
    raise UnsupportedOperand("rounding mode")
