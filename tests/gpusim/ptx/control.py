"""Branches, barriers and fences."""

from __future__ import annotations

from .emitter import Emitter, UnsupportedOperand, line_of
from .forms import form
from .parser import Instruction


@form("bra[.uni]")
def branch(e: Emitter, ins: Instruction) -> str:
    return f"goto L_{e.identifier(ins.args[0])};"


@form("brx.idx[.uni]")
def branch_indexed(e: Emitter, ins: Instruction) -> str:
    targets = e.entry.branch_targets.get(ins.args[1])
    if targets is None:
        raise UnsupportedOperand(f"branch table {ins.args[1]}")
    cases = " ".join(f"case {i}: goto L_{e.identifier(t)};" for i, t in enumerate(targets))
    return f"switch ((uint32_t){e.raw(ins.args[0])}) {{ {cases} }}"


@form("ret[.uni]", "exit")
def leave(e: Emitter, ins: Instruction) -> str:
    return "return;"


@form("trap")
def trap(e: Emitter, ins: Instruction) -> str:
    return f"sim::trap({line_of(ins)});"


@form("nanosleep.u32")
def sleep(e: Emitter, ins: Instruction) -> str:
    return f"sim::poll({line_of(ins)});"


@form("bar[.cta].sync", "barrier[.cta].sync[.aligned]")
def barrier(e: Emitter, ins: Instruction) -> str:
    count = e.raw(ins.args[1]) if len(ins.args) > 1 else "0"
    aligned = "true" if ins.opcode.startswith("bar.") or ins.has("aligned") else "false"
    return f"sim::barrier({e.raw(ins.args[0])}, {count}, {aligned}, {line_of(ins)});"


@form("bar[.cta].arrive", "barrier[.cta].arrive[.aligned]")
def barrier_arrive(e: Emitter, ins: Instruction) -> str:
    return f"sim::barrier_arrive({e.raws(ins.args[:2])}, {line_of(ins)});"


@form("bar[.cta].red(.and|.or).pred", "barrier[.cta].red[.aligned](.and|.or).pred")
@form("bar[.cta].red.popc.u32", "barrier[.cta].red[.aligned].popc.u32")
def barrier_reduce(e: Emitter, ins: Instruction) -> str:
    operation = {"and": "And", "or": "Or", "popc": "Count"}[ins.pick("and", "or", "popc") or ""]
    count = e.raw(ins.args[2]) if len(ins.args) > 3 else "0"
    call = (
        f"sim::barrier_reduce({e.raw(ins.args[-1])}, sim::BarrierOp::{operation}, "
        f"{e.raw(ins.args[1])}, {count}, {line_of(ins)})"
    )
    return e.assign(ins.args[0], ins.type, call)


@form("bar.warp.sync")
def warp_barrier(e: Emitter, ins: Instruction) -> str:
    return f"sim::warp_barrier((uint32_t){e.raw(ins.args[0])}, {line_of(ins)});"


@form("membar(.cta|.gl|.sys)", "fence[.sc|.acq_rel](.cta|.gpu|.sys)")
def fence(e: Emitter, ins: Instruction) -> str:
    return f"sim::fence({'true' if ins.has('cta') else 'false'});"


@form("fence.proxy.async[.global|.shared::cta|.shared::cluster]", "fence.proxy.alias")
@form("fence.mbarrier_init.release.cluster", "fence(.acquire|.release|.acq_rel|.sc).cluster")
@form("griddepcontrol(.wait|.launch_dependents)")
@form("setmaxnreg(.inc|.dec).sync.aligned.u32")
def no_effect(e: Emitter, ins: Instruction) -> str:
    """Ordering between proxies, clusters and grids, and register budgets, are not modelled."""
    return "/* not modelled: no effect on values */;"
