"""Tensor-core instructions and the matrix loads that feed them."""

from __future__ import annotations

import re

from .emitter import Emitter, UnsupportedOperand, line_of
from .forms import form
from .memory import space_of
from .parser import Instruction

_ELEMENTS = {"f16": "Half", "bf16": "Bfloat", "tf32": "Tf32"}


@form("ldmatrix.sync.aligned.m8n8(.x1|.x2|.x4)[.trans][.shared|.shared::cta].b16")
def load_matrix(e: Emitter, ins: Instruction) -> str:
    registers = e.vector(ins.args[0])
    transposed = "true" if ins.has("trans") else "false"
    call = (
        f"uint32_t t[{len(registers)}]; sim::load_matrix(t, {len(registers)}, {transposed}, "
        f"{_shared(e, ins, ins.args[1])}, {line_of(ins)});"
    )
    return f"{{ {call} {e.scatter('t', registers)} }}"


@form("stmatrix.sync.aligned.m8n8(.x1|.x2|.x4)[.trans][.shared|.shared::cta].b16")
def store_matrix(e: Emitter, ins: Instruction) -> str:
    registers = e.vector(ins.args[1])
    transposed = "true" if ins.has("trans") else "false"
    array = e.array("uint32_t", "t", registers)
    address = _shared(e, ins, ins.args[0])
    call = f"sim::store_matrix(t, {len(registers)}, {transposed}, {address}, {line_of(ins)});"
    return f"{{ {array} {call} }}"


def _shared(e: Emitter, ins: Instruction, operand: str) -> str:
    if ins.has("shared", "shared::cta"):
        return e.shared_address(operand)
    return f"(uint32_t)({e.address(operand)} - (uint64_t)sim::shared_base)"


@form("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
@form("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
@form("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32")
@form("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32")
@form("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32")
@form("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32")
@form("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16")
def multiply_accumulate(e: Emitter, ins: Instruction) -> str:
    depth = re.search(r"k(\d+)", ins.opcode).group(1)
    d, a, b, c = (e.vector(x) for x in ins.args[:4])
    half_accumulator = "true" if ins.type == "f16" else "false"
    arrays = " ".join(e.array("uint32_t", n, regs) for n, regs in (("a", a), ("b", b), ("c", c)))
    call = (
        f"uint32_t d[{len(d)}]; sim::mma(d, a, b, c, {depth}, sim::Element::"
        f"{_ELEMENTS[ins.mods[-2]]}, {half_accumulator}, {line_of(ins)});"
    )
    return f"{{ {arrays} {call} {e.scatter('d', d)} }}"


# ---- wmma: the fragment layout is private to hardware, so any layout will do

_SHAPES = "(.m16n16k16|.m32n8k16|.m8n32k16)"
_LAYOUT = "(.row|.col)"
_SPACES = "[.global|.shared|.shared::cta]"


@form(f"wmma.load(.a|.b).sync.aligned{_LAYOUT}{_SHAPES}{_SPACES}(.f16|.bf16)")
@form(f"wmma.load.c.sync.aligned{_LAYOUT}{_SHAPES}{_SPACES}.f32")
def wmma_load(e: Emitter, ins: Instruction) -> str:
    registers = e.vector(ins.args[0])
    rows, columns = _tile(ins, ins.pick("a", "b", "c") or "")
    stride = e.raw(ins.args[2]) if len(ins.args) > 2 else _dense(ins, rows, columns)
    call = (
        f"uint32_t t[{len(registers)}] = {{}}; sim::wmma_load(t, {rows}, {columns}, "
        f"{_is_column(ins)}, {_width(ins)}, sim::Space::{space_of(ins)}, "
        f"{e.address(ins.args[1])}, {stride}, {line_of(ins)});"
    )
    return f"{{ {call} {e.scatter('t', registers)} }}"


@form(f"wmma.store.d.sync.aligned{_LAYOUT}{_SHAPES}{_SPACES}.f32")
def wmma_store(e: Emitter, ins: Instruction) -> str:
    rows, columns = _tile(ins, "c")
    stride = e.raw(ins.args[2]) if len(ins.args) > 2 else _dense(ins, rows, columns)
    array = e.array("uint32_t", "t", e.vector(ins.args[1]))
    call = (
        f"sim::wmma_store(t, {rows}, {columns}, {_is_column(ins)}, "
        f"sim::Space::{space_of(ins)}, {e.address(ins.args[0])}, {stride}, {line_of(ins)});"
    )
    return f"{{ {array} {call} }}"


@form(f"wmma.mma.sync.aligned{_LAYOUT}{_LAYOUT}{_SHAPES}.f32.f32")
@form(f"wmma.mma.sync.aligned{_LAYOUT}{_LAYOUT}{_SHAPES}.f32.bf16.bf16.f32")
def wmma_mma(e: Emitter, ins: Instruction) -> str:
    d, a, b, c = (e.vector(x) for x in ins.args[:4])
    m, n, k = _shape(ins)
    element = "Bfloat" if ins.has("bf16") else "Half"
    arrays = " ".join(e.array("uint32_t", n_, regs) for n_, regs in (("a", a), ("b", b), ("c", c)))
    call = (
        f"uint32_t d[{len(d)}]; sim::wmma_mma(d, a, b, c, {m}, {n}, {k}, "
        f"sim::Element::{element}, {line_of(ins)});"
    )
    return f"{{ {arrays} {call} {e.scatter('d', d)} }}"


def _shape(ins: Instruction) -> tuple[int, int, int]:
    m, n, k = re.search(r"m(\d+)n(\d+)k(\d+)", ins.opcode).groups()
    return int(m), int(n), int(k)


def _tile(ins: Instruction, operand: str) -> tuple[int, int]:
    m, n, k = _shape(ins)
    return {"a": (m, k), "b": (k, n), "c": (m, n)}[operand]


def _is_column(ins: Instruction) -> str:
    return "true" if ins.has("col") else "false"


def _dense(ins: Instruction, rows: int, columns: int) -> str:
    return str(rows if ins.has("col") else columns)


def _width(ins: Instruction) -> int:
    return 4 if ins.type == "f32" else 2


# ---- wgmma (sm_90a)


@form("wgmma.fence.sync.aligned")
def wgmma_fence(e: Emitter, ins: Instruction) -> str:
    return "/* wgmma executes eagerly: nothing to order */;"


@form("wgmma.commit_group.sync.aligned", "wgmma.wait_group.sync.aligned")
def wgmma_group(e: Emitter, ins: Instruction) -> str:
    return "/* wgmma executes eagerly: nothing to wait for */;"


_COLUMNS = "(" + "|".join(f".m64n{n}k16" for n in range(8, 257, 8)) + ")"


@form(f"wgmma.mma_async.sync.aligned{_COLUMNS}.f32.f16.f16")
@form(f"wgmma.mma_async.sync.aligned{_COLUMNS}.f32.bf16.bf16")
@form(f"wgmma.mma_async.sync.aligned{_COLUMNS.replace('k16', 'k8')}.f32.tf32.tf32")
def warpgroup_mma(e: Emitter, ins: Instruction) -> str:
    columns = re.search(r"n(\d+)k", ins.opcode).group(1)
    d = e.vector(ins.args[0])
    in_registers = ins.args[1].startswith("{")
    flags = ins.args[3:]  # scale-d, sign of A, sign of B[, transpose A][, transpose B]
    if any(flag not in ("1", "-1") for flag in flags[1:3]):
        raise UnsupportedOperand("sign operands that are not immediate")
    transposes = flags[3:]
    transpose_b = transposes[-1] if transposes else "0"
    transpose_a = transposes[0] if len(transposes) == 2 else "0"
    a = (
        e.array("uint32_t", "a", e.vector(ins.args[1]))
        if in_registers
        else "uint32_t* a = nullptr;"
    )
    descriptor = "0" if in_registers else e.raw(ins.args[1])
    signs = f"{flags[1]}, {flags[2]}" if len(flags) > 2 else "1, 1"
    call = (
        f"sim::wgmma(d, {columns}, a, {descriptor}, {e.raw(ins.args[2])}, "
        f"sim::Element::{_ELEMENTS[ins.type]}, {e.raw(flags[0])}, {signs}, "
        f"{transpose_a}, {transpose_b}, {line_of(ins)});"
    )
    return f"{{ {a} {e.array('uint32_t', 'd', d)} {call} {e.scatter('d', d)} }}"
