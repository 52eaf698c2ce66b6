"""Loads, stores and atomics. Every access outside local and param space goes by the checker."""

from __future__ import annotations

from . import types
from .emitter import Emitter, UnsupportedOperand, line_of
from .forms import form
from .parser import Instruction

_CACHE = "[.ca|.cg|.cs|.cv|.lu|.nc|.cg.nc|.ca.nc|.cs.nc]"
_EVICT = (
    "[.L1::evict_normal|.L1::evict_unchanged|.L1::evict_first|.L1::evict_last|.L1::no_allocate]"
    "[.L2::evict_normal|.L2::evict_first|.L2::evict_last][.L2::cache_hint]"
    "[.L2::64B|.L2::128B|.L2::256B]"
)
_VECTOR = "[.v2|.v4|.v8]"
_TYPES = "(.b8|.b16|.b32|.b64|.b128|.u8|.u16|.u32|.u64|.s8|.s16|.s32|.s64|.f32|.f64)"
_GENERIC_OR_GLOBAL = "[.global|.shared|.shared::cta]"


def space_of(ins: Instruction) -> str:
    """The C++ name of the state space; generic when the instruction names none."""
    for modifier in ins.mods:
        name = modifier.split("::")[0]
        if name in ("global", "shared", "local", "param", "const"):
            return {"const": "Global"}.get(name, name.capitalize())
    return "Generic"


def _flags(ins: Instruction, *always: str) -> str:
    flags = list(always)
    if ins.has("volatile", "relaxed", "acquire", "release", "acq_rel"):
        flags.append("Strong")
    if ins.has("acquire", "acq_rel"):
        flags.append("Acquire")
    if ins.has("release", "acq_rel"):
        flags.append("Release")
    if ins.has("cta"):
        flags.append("BlockScope")
    return " | ".join(f"sim::{flag}" for flag in flags)


def _pointer(
    e: Emitter, ins: Instruction, operand: str, size: int, flags: str, value: str = ""
) -> str:
    """C++ that yields the checked pointer, null when the checker refused the access."""
    tail = f", {value}" if value else ""
    space = f"sim::Space::{space_of(ins)}"
    return f"sim::access({space}, {e.address(operand)}, {size}, {flags}, {line_of(ins)}{tail})"


@form(f"ld[.weak][.global|.shared|.shared::cta|.local|.const]{_CACHE}{_EVICT}{_VECTOR}{_TYPES}")
@form(f"ld(.relaxed|.acquire){{scope}}{_GENERIC_OR_GLOBAL}{_EVICT}{_VECTOR}{_TYPES}")
@form(f"ld.volatile[.global|.shared|.shared::cta|.local]{_VECTOR}{_TYPES}")
def load(e: Emitter, ins: Instruction) -> str:
    registers = e.vector(ins.args[0])
    width = types.size(ins.type)
    pointer = _pointer(e, ins, ins.args[1], width * len(registers), _flags(ins, "Load"))
    return f"if (const char* p = {pointer}) {{ {_unpack(e, ins, registers)} }}"


@form(f"ld(.param|.param::entry){_VECTOR}{_TYPES}")
def load_param(e: Emitter, ins: Instruction) -> str:
    registers = e.vector(ins.args[0])
    address = f"sim::param_base + ({e.address(ins.args[1])})"
    return f"{{ const char* p = {address}; {_unpack(e, ins, registers)} }}"


def _unpack(e: Emitter, ins: Instruction, registers: list[str]) -> str:
    """Assigns registers from p; signed types are extended to a wider register by the assignment."""
    width = types.size(ins.type)
    ctype = types.value(ins.type) if types.is_signed(ins.type) else types.storage(ins.type)
    return " ".join(
        f"{e.register(register)} = peek<{ctype}>(p + {i * width});"
        for i, register in enumerate(registers)
        if register != "_"
    )


@form(f"st[.weak][.global|.shared|.shared::cta|.local][.wb|.cg|.cs|.wt]{_EVICT}{_VECTOR}{_TYPES}")
@form(f"st(.relaxed|.release){{scope}}{_GENERIC_OR_GLOBAL}{_EVICT}{_VECTOR}{_TYPES}")
@form(f"st.volatile[.global|.shared|.shared::cta|.local]{_VECTOR}{_TYPES}")
def store(e: Emitter, ins: Instruction) -> str:
    values = e.vector(ins.args[1])
    array = e.array(types.storage(ins.type), "t", values)
    flags = _flags(ins, "Store")
    pointer = _pointer(e, ins, ins.args[0], types.size(ins.type) * len(values), flags, "t")
    return f"{{ {array} if (char* p = {pointer}) memcpy(p, t, sizeof t); }}"


_OPERATIONS = {
    "add": "fetch_add",
    "min": "fetch_min",
    "max": "fetch_max",
    "and": "fetch_and",
    "or": "fetch_or",
    "xor": "fetch_xor",
    "exch": "fetch_exchange",
    "inc": "fetch_increment",
    "dec": "fetch_decrement",
}
_SPACES = "[.global|.shared|.shared::cta]"
# Semantics, scope, space as the manual has it, or the order that Triton writes and ptxas accepts.
_SEMANTICS = (
    f"([.relaxed|.acquire|.release|.acq_rel][.cta|.gpu|.sys]{_SPACES}"
    "|(.global|.shared)(.cta|.gpu|.sys)(.relaxed|.acquire|.release|.acq_rel))"
)
_FLOATS = "(.add(.v2|.v4).f32|(.v2|.v4).f32.add|(.v2|.v4).add.f32)"
_ATOMIC_TYPES = (
    ".add(.u32|.s32|.u64|.f32|.f64)",
    ".add.noftz(.f16|.f16x2|.bf16|.bf16x2)",
    "(.and|.or|.xor)(.b32|.b64)",
    "(.min|.max)(.u32|.s32|.u64|.s64)",
    "(.inc|.dec).u32",
)


@form(*(f"atom{_SEMANTICS}{operation}" for operation in _ATOMIC_TYPES))
@form(f"atom{_SEMANTICS}.exch(.b32|.b64)", f"atom{_SEMANTICS}.cas(.b16|.b32|.b64)")
def atomic(e: Emitter, ins: Instruction) -> str:
    return _read_modify_write(e, ins, ins.args[0], ins.args[1], ins.args[2:])


@form(*(f"red{_SEMANTICS}{operation}" for operation in _ATOMIC_TYPES))
def reduction(e: Emitter, ins: Instruction) -> str:
    return _read_modify_write(e, ins, "_", ins.args[0], ins.args[1:])


def _read_modify_write(
    e: Emitter, ins: Instruction, dest: str, address: str, operands: list[str]
) -> str:
    width, packed = types.size(ins.type), ins.type in ("f16x2", "bf16x2")
    storage = types.storage(ins.type)
    if ins.has("cas"):
        compare, new = (f"({storage}){e.raw(x)}" for x in operands[:2])
        call = f"old == {compare} ? {new} : old"
    elif packed:
        call = f"pair_add<{types.value(ins.type[:-2])}>(old, {e.raw(operands[0])})"
    else:
        operation = next(f for name, f in _OPERATIONS.items() if ins.has(name))
        call = f"{operation}<{types.value(ins.type)}>(old, {e.value(operands[0], ins.type)})"
    pointer = _pointer(e, ins, address, width, _flags(ins, "Atomic"))
    code = f"auto old = peek<{storage}>(p); poke<{storage}>(p, {call});"
    if dest != "_":
        code += f" {e.register(dest)} = old;"
    return f"if (char* p = {pointer}) {{ {code} }}"


@form(f"(atom|red){_SEMANTICS}{_FLOATS}")
def atomic_vector(e: Emitter, ins: Instruction) -> str:
    """sm_90: each element is atomic on its own."""
    is_red = ins.opcode.startswith("red")
    address, values = ins.args[-2:] if is_red else (ins.args[1], ins.args[2])
    elements = e.vector(values)
    if len(elements) not in (2, 4, 8):
        raise UnsupportedOperand("vector length")
    pointer = _pointer(e, ins, address, 4 * len(elements), _flags(ins, "Atomic"))
    code = e.array("uint32_t", "t", elements)
    code += f" uint32_t old[{len(elements)}];"
    keep = "" if is_red else e.scatter("old", e.vector(ins.args[0]))
    loop = (
        f"for (int i = 0; i < {len(elements)}; ++i) {{ old[i] = peek<uint32_t>(p + 4 * i);"
        " poke<uint32_t>(p + 4 * i, fetch_add<float>(old[i], from_bits<float>(t[i]))); }"
    )
    return f"{{ {code} if (char* p = {pointer}) {{ {loop} {keep} }} }}"


@form("prefetch[.global|.local](.L1|.L2|.L2::evict_last|.L2::evict_normal)")
@form("prefetch[.const|.param].tensormap")
def prefetch(e: Emitter, ins: Instruction) -> str:
    return "/* a hint: no effect on values */;"


@form(
    "createpolicy.fractional(.L2::evict_first|.L2::evict_last|.L2::evict_normal)"
    "[.L2::evict_unchanged].b64"
)
def create_policy(e: Emitter, ins: Instruction) -> str:
    return e.assign(ins.args[0], "b64", "0")
