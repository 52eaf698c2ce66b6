"""Exchanges between the lanes of a warp."""

from __future__ import annotations

from . import types
from .emitter import Emitter, line_of
from .forms import form
from .parser import Instruction


@form("shfl.sync(.bfly|.up|.down|.idx).b32")
def shuffle(e: Emitter, ins: Instruction) -> str:
    dest, *predicate = ins.args[0].split("|")
    mode = {"bfly": "Butterfly", "up": "Up", "down": "Down", "idx": "Index"}[ins.mods[1]]
    arguments = e.raws(ins.args[1:4])
    mask = f"(uint32_t){e.raw(ins.args[4])}"
    code = (
        f"bool in_range; uint32_t t = sim::shuffle(sim::Shuffle::{mode}, {arguments}, {mask}, "
        f"in_range, {line_of(ins)}); {e.assign(dest, 'u32', 't')}"
    )
    if predicate:
        code += e.assign(predicate[0], "pred", "in_range")
    return f"{{ {code} }}"


@form("vote.sync.ballot.b32", "vote.sync(.any|.all|.uni).pred")
def vote(e: Emitter, ins: Instruction) -> str:
    mask = f"(uint32_t){e.raw(ins.args[2])}"
    ballot = f"sim::ballot({mask}, {e.raw(ins.args[1])}, lanes, {line_of(ins)})"
    result = {"ballot": "t", "any": "t != 0", "all": "t == lanes", "uni": "t == 0 || t == lanes"}
    assign = e.assign(ins.args[0], ins.type, result[ins.mods[1]])
    return f"{{ uint32_t lanes, t = {ballot}; {assign} }}"


@form("activemask.b32")
def active_mask(e: Emitter, ins: Instruction) -> str:
    return e.assign(ins.args[0], "u32", f"sim::active_mask({line_of(ins)})")


@form("elect.sync")
def elect(e: Emitter, ins: Instruction) -> str:
    leader, predicate = ins.args[0].split("|")
    code = f"uint32_t t = sim::elect((uint32_t){e.raw(ins.args[1])}, {line_of(ins)});"
    code += e.assign(leader, "u32", "t") + e.assign(predicate, "pred", "t == sim::lane()")
    return f"{{ {code} }}"


@form("redux.sync(.add|.min|.max)(.u32|.s32)", "redux.sync(.and|.or|.xor).b32")
def reduce_int(e: Emitter, ins: Instruction) -> str:
    operation = ins.mods[1].capitalize()
    value = f"(int64_t){e.value(ins.args[1], ins.type)}"
    mask = f"(uint32_t){e.raw(ins.args[2])}"
    call = f"sim::reduce({value}, {mask}, sim::Reduce::{operation}, {line_of(ins)})"
    return e.assign(ins.args[0], ins.type, call)


@form("redux.sync(.min|.max)[.abs][.NaN].f32")
def reduce_float(e: Emitter, ins: Instruction) -> str:
    value, mask = e.value(ins.args[1], "f32"), f"(uint32_t){e.raw(ins.args[2])}"
    flags = ", ".join("true" if ins.has(m) else "false" for m in ("max", "abs", "NaN"))
    call = f"sim::reduce_float({value}, {mask}, {flags}, {line_of(ins)})"
    return e.assign(ins.args[0], "f32", call)


@form("match.any.sync(.b32|.b64)", "match.all.sync(.b32|.b64)")
def match(e: Emitter, ins: Instruction) -> str:
    dest, *predicate = ins.args[0].split("|")
    every = "true" if ins.has("all") else "false"
    value = f"({types.storage(ins.type)}){e.raw(ins.args[1])}"
    mask = f"(uint32_t){e.raw(ins.args[2])}"
    code = f"uint32_t t = sim::match({value}, {mask}, {every}, {line_of(ins)});"
    code += e.assign(dest, "u32", "t")
    if predicate:
        code += e.assign(predicate[0], "pred", "t != 0")
    return f"{{ {code} }}"
