"""Asynchronous copies: cp.async, mbarriers, bulk copies and TMA."""

from __future__ import annotations

from .emitter import Emitter, UnsupportedOperand, line_of
from .forms import form
from .parser import Instruction, split_operands

_PREFETCH = "[.L2::cache_hint][.L2::64B|.L2::128B|.L2::256B]"
_SHARED = "(.shared|.shared::cta)"


@form(f"cp.async(.ca|.cg){_SHARED}.global{_PREFETCH}")
def copy(e: Emitter, ins: Instruction) -> str:
    """The third operand is the size; a fourth is the bytes to read, or a predicate to read none."""
    size = e.raw(ins.args[2])
    source_size = size
    if len(ins.args) > 3 and not (ins.has("L2::cache_hint") and len(ins.args) == 4):
        extra = e.raw(ins.args[3])
        source_size = f"({extra} ? 0 : {size})" if e.is_predicate(ins.args[3]) else extra
    shared, source = e.shared_address(ins.args[0]), e.address(ins.args[1])
    return f"sim::cp_async({shared}, {source}, {size}, {source_size}, {line_of(ins)});"


@form("cp.async.commit_group")
def commit(e: Emitter, ins: Instruction) -> str:
    return "sim::cp_async_commit();"


@form("cp.async.wait_group", "cp.async.wait_all")
def wait(e: Emitter, ins: Instruction) -> str:
    if ins.has("wait_all"):
        return "sim::cp_async_commit(); sim::cp_async_wait(0);"
    return f"sim::cp_async_wait({e.raw(ins.args[0])});"


# ---- mbarrier

_SEMANTICS = "[.release.cta|.release.cluster|.relaxed.cta]"
_ACQUIRE = "[.acquire.cta|.acquire.cluster|.relaxed.cta]"


@form("mbarrier.init[.shared|.shared::cta].b64")
def mbarrier_init(e: Emitter, ins: Instruction) -> str:
    barrier = _barrier(e, ins, ins.args[0])
    return f"sim::mbarrier_init({barrier}, {e.raw(ins.args[1])}, {line_of(ins)});"


@form("mbarrier.inval[.shared|.shared::cta].b64")
def mbarrier_invalidate(e: Emitter, ins: Instruction) -> str:
    return f"sim::mbarrier_invalidate({_barrier(e, ins, ins.args[0])}, {line_of(ins)});"


@form("mbarrier.expect_tx[.relaxed.cta|.relaxed.cluster][.shared|.shared::cta].b64")
def mbarrier_expect(e: Emitter, ins: Instruction) -> str:
    barrier = _barrier(e, ins, ins.args[0])
    return f"sim::mbarrier_expect({barrier}, {e.raw(ins.args[1])}, {line_of(ins)});"


@form(f"mbarrier.arrive{_SEMANTICS}[.shared|.shared::cta].b64")
@form(f"mbarrier.arrive.expect_tx{_SEMANTICS}[.shared|.shared::cta].b64")
def mbarrier_arrive(e: Emitter, ins: Instruction) -> str:
    dest, operands = "_", ins.args
    if not operands[0].startswith("["):
        dest, operands = operands[0], operands[1:]
    extra = e.raw(operands[1]) if len(operands) > 1 else None
    bytes_ = extra if ins.has("expect_tx") else "0"
    count = "1" if ins.has("expect_tx") or extra is None else extra
    barrier = _barrier(e, ins, operands[0])
    call = f"sim::mbarrier_arrive({barrier}, {count}, {bytes_}, {line_of(ins)})"
    return e.assign(dest, "b64", call)


@form(f"mbarrier(.test_wait|.try_wait)[.parity]{_ACQUIRE}[.shared|.shared::cta].b64")
def mbarrier_wait(e: Emitter, ins: Instruction) -> str:
    """A wait by state compares the phase bit of the token that arrive returned."""
    call = (
        f"sim::mbarrier_test({_barrier(e, ins, ins.args[1])}, {e.raw(ins.args[2])}, {line_of(ins)})"
    )
    return e.assign(ins.args[0], "pred", call)


def _barrier(e: Emitter, ins: Instruction, operand: str) -> str:
    if ins.has("shared", "shared::cta"):
        return e.shared_address(operand)
    return f"(uint32_t)({e.address(operand)} - (uint64_t)sim::shared_base)"


# ---- bulk copies

_HINT = "[.L2::cache_hint]"
_DIMENSIONS = "(.1d|.2d|.3d|.4d|.5d)"


@form(f"cp.async.bulk(.shared::cluster|.shared::cta).global.mbarrier::complete_tx::bytes{_HINT}")
def bulk_load(e: Emitter, ins: Instruction) -> str:
    shared, source = e.shared_address(ins.args[0]), e.address(ins.args[1])
    barrier = e.shared_address(ins.args[3])
    return f"sim::bulk_load({shared}, {source}, {e.raw(ins.args[2])}, {barrier}, {line_of(ins)});"


@form(f"cp.async.bulk.global.shared::cta.bulk_group{_HINT}")
def bulk_store(e: Emitter, ins: Instruction) -> str:
    dest, shared = e.address(ins.args[0]), e.shared_address(ins.args[1])
    return f"sim::bulk_store({dest}, {shared}, {e.raw(ins.args[2])}, {line_of(ins)});"


@form(
    f"cp.async.bulk.tensor{_DIMENSIONS}(.shared::cluster|.shared::cta).global[.tile]"
    f".mbarrier::complete_tx::bytes{_HINT}"
)
def tensor_load(e: Emitter, ins: Instruction) -> str:
    descriptor, coordinates = _tensor(e, ins.args[1])
    shared, barrier = e.shared_address(ins.args[0]), e.shared_address(ins.args[2])
    call = f"sim::tensor_load({shared}, {descriptor}, c, {_rank(ins)}, {barrier}, {line_of(ins)});"
    return f"{{ {coordinates} {call} }}"


@form(f"cp.async.bulk.tensor{_DIMENSIONS}.global.shared::cta[.tile].bulk_group{_HINT}")
def tensor_store(e: Emitter, ins: Instruction) -> str:
    descriptor, coordinates = _tensor(e, ins.args[0])
    shared = e.shared_address(ins.args[1])
    call = f"sim::tensor_store({descriptor}, c, {_rank(ins)}, {shared}, {line_of(ins)});"
    return f"{{ {coordinates} {call} }}"


@form("cp.async.bulk.commit_group")
def bulk_commit(e: Emitter, ins: Instruction) -> str:
    return "sim::bulk_commit();"


@form("cp.async.bulk.wait_group[.read]")
def bulk_wait(e: Emitter, ins: Instruction) -> str:
    return f"sim::bulk_wait({e.raw(ins.args[0])});"


def _rank(ins: Instruction) -> str:
    return (ins.pick("1d", "2d", "3d", "4d", "5d") or "")[0]


def _tensor(e: Emitter, operand: str) -> tuple[str, str]:
    """Descriptor address and the declaration of the coordinates in "[map, {x, y}]"."""
    parts = split_operands(operand.strip()[1:-1])
    if len(parts) != 2:
        raise UnsupportedOperand(f"tensor coordinates {operand}")
    name = parts[0]
    base = "(uint64_t)sim::param_base + " if name in e.entry.params else "(uint64_t)"
    return base + e.raw(name), e.array("int32_t", "c", e.vector(parts[1]))
