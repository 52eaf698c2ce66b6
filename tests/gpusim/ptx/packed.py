"""Arithmetic on pairs: f16x2, bf16x2 and f32x2."""

from __future__ import annotations

from . import types
from .emitter import Emitter
from .forms import form
from .parser import Instruction

_FUNCTIONS = {
    "add": "add_float",
    "sub": "sub_float",
    "mul": "mul_float",
    "fma": "fma_float",
    "neg": "neg_float",
    "abs": "abs_float",
    "ex2": "ex2_float",
    "tanh": "tanh_float",
}


@form("(add|sub|mul)[.rn][.ftz][.sat].f16x2", "(add|sub|mul)[.rn].bf16x2")
@form("fma.rn[.ftz][.sat|.relu].f16x2", "fma.rn[.relu].bf16x2")
@form("(neg|abs)[.ftz].f16x2", "(neg|abs).bf16x2")
@form("(min|max)[.ftz][.NaN].f16x2", "(min|max)[.NaN].bf16x2")
@form("ex2.approx[.ftz].f16x2", "ex2.approx.ftz.bf16x2", "tanh.approx{half2}")
def halves(e: Emitter, ins: Instruction) -> str:
    name = ins.opcode.split(".")[0]
    half = types.value(ins.type[:-2])
    nan = "true" if ins.has("NaN") else "false"
    function = _FUNCTIONS.get(name, f"{name}_float<{nan}>")
    # ftz on f16 flushes subnormal halves; bf16 forms that carry it flush likewise.
    names = "abc"[: len(ins.args) - 1]
    operands = [f"flush({x})" if ins.has("ftz") else x for x in names]
    call = f"{function}({', '.join(operands)})"
    for modifier, wrapper in (("sat", "saturate"), ("relu", "relu"), ("ftz", "flush")):
        call = f"{wrapper}({call})" if ins.has(modifier) else call
    formals = ", ".join(f"{half} {x}" for x in names)
    arguments = ", ".join(f"(uint32_t){e.raw(x)}" for x in ins.args[1:])
    body = f"[]({formals}) {{ return {call}; }}"
    return e.assign(ins.args[0], "u32", f"on_halves<{half}>({body}, {arguments})")


@form("(add|sub|mul)[{round}][.ftz].f32x2", "fma{round}[.ftz].f32x2")
def floats(e: Emitter, ins: Instruction) -> str:
    """sm_100: two f32 in one 64-bit register."""
    function = _FUNCTIONS[ins.opcode.split(".")[0]]
    directed = {"rz": "FE_TOWARDZERO", "rm": "FE_DOWNWARD", "rp": "FE_UPWARD"}
    mode = directed.get(ins.pick(*directed) or "")
    names = "abc"[: len(ins.args) - 1]
    operands = ", ".join(f"flush({x})" if ins.has("ftz") else x for x in names)
    call = f"directed({mode}, {function}, {operands})" if mode else f"{function}({operands})"
    call = f"flush({call})" if ins.has("ftz") else call
    formals = ", ".join(f"float {x}" for x in names)
    arguments = e.raws(ins.args[1:])
    return e.assign(
        ins.args[0], "u64", f"on_floats([]({formals}) {{ return {call}; }}, {arguments})"
    )
