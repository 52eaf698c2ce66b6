"""Planted bugs: each class of fault is found, and the same kernel without the bug is accepted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from .. import DeviceArray, SimError, load, shuffled, time_limit
from .harness import kernel

pytestmark = pytest.mark.gpusim

N = 64
TILE = ".shared .align 16 .b8 tile[1024]; .shared .align 8 .b64 full;"
POINTERS = (
    "mul.wide.u32 %q1, tid, 4; add.u64 %q2, x, %q1; add.u64 %q3, y, %q1; "
    "mul.lo.u32 %r1, tid, 4; mov.u32 %r2, tile; add.u32 %r3, %r2, %r1; xor.b32 %r4, %r3, 4; "
    "setp.eq.u32 %p0, tid, 0; setp.ne.u32 %p3, tid, 0; "
)
WAIT = "WAIT: mbarrier.try_wait.parity.shared.b64 %p1, [full], 0; @!%p1 bra WAIT; "


@dataclass
class Fault:
    """`good` is accepted, and `bad` is reported with a text that contains `report`."""

    report: str
    bad: str
    good: str | None = None
    grid: int = 1


CP_ASYNC = (
    "mul.wide.u32 %q4, tid, 4; cp.async.ca.shared.global [%r3], [%q2], 4; cp.async.commit_group; "
)
SHARED_READ = "ld.shared.u32 %r5, [%r4]; st.global.u32 [%q3], %r5;"
INIT = "@%p0 mbarrier.init.shared.b64 [full], 1; bar.sync 0; @!%p0 bra AFTER; "
BULK = (
    "mbarrier.arrive.expect_tx.shared.b64 _, [full], 256; "
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [tile], [x], 256, [full]; "
    "AFTER: "
)
STORE_TILE = "st.shared.u32 [%r3], tid; "
LAST_BLOCK = (  # every block adds its part; the one that comes last sums the parts
    "@%p3 exit; mul.wide.u32 %q4, block, 4; add.u64 %q5, y, %q4; st.global.u32 [%q5+64], block; "
    "{fence} atom.global.add.u32 %r5, [y], 1; setp.ne.u32 %p1, %r5, 3; @%p1 exit; "
    "ld.global.u32 %r6, [y+64]; ld.global.u32 %r7, [y+68]; add.u32 %r6, %r6, %r7; "
    "st.global.u32 [y+128], %r6;"
)

FAULTS = {
    "out of bounds load": Fault(
        "out of bounds: load of 4 bytes at 0 bytes past the end of x",
        "ld.global.u32 %r5, [%q2+4]; st.global.u32 [%q3], %r5;",
        "ld.global.u32 %r5, [%q2]; st.global.u32 [%q3], %r5;",
    ),
    "out of bounds store": Fault(
        "out of bounds: store of 4 bytes at 4 bytes before y",
        "st.global.u32 [%q3+-4], tid;",
        "st.global.u32 [%q3], tid;",
    ),
    "out of bounds vector": Fault(
        "out of bounds",
        "@%p0 ld.global.v4.u32 {%r5, %r6, %r7, %r8}, [x+256];",
        "@%p0 ld.global.v4.u32 {%r5, %r6, %r7, %r8}, [x+240];",
    ),
    "out of bounds shared": Fault(
        "out of bounds: store of 4 bytes at shared memory+1032 of 1032",
        "@%p0 st.shared.u32 [%r3+1032], tid;",
        "@%p0 st.shared.u32 [%r3+1020], tid;",
    ),
    "out of bounds atomic": Fault("out of bounds: atomic", "red.global.add.u32 [%q3+4], 1;"),
    "null pointer": Fault("no buffer near", "mov.u64 %q4, 0; ld.global.u32 %r5, [%q4];"),
    "shared address as global": Fault(
        "out of bounds", "cvt.u64.u32 %q4, %r3; cvta.shared.u64 %q5, %q4; st.global.u32 [%q5], 0;"
    ),
    "misaligned": Fault(
        "misaligned: load of 16 bytes",
        "@%p0 ld.global.v4.u32 {%r5, %r6, %r7, %r8}, [x+8];",
        "@%p0 ld.global.v4.u32 {%r5, %r6, %r7, %r8}, [x+16];",
    ),
    "misaligned shared": Fault("misaligned: store of 8 bytes", "@%p0 st.shared.u64 [%r3+4], %q1;"),
    "misaligned cp.async": Fault(
        "misaligned: cp.async", "@%p0 cp.async.cg.shared.global [%r3+8], [x], 16;"
    ),
    "uninitialised shared": Fault(
        "uninitialised: shared memory read",
        "setp.eq.u32 %p1, tid, 5; @!%p1 st.shared.u32 [%r3], tid; bar.sync 0; " + SHARED_READ,
        STORE_TILE + "bar.sync 0; " + SHARED_READ,
    ),
    "uninitialised global": Fault(
        "uninitialised: global memory read: 4 bytes at z",
        "ld.global.u32 %r5, [z]; st.global.u32 [%q3], %r5;",
        "@%p3 exit; st.global.u32 [z], 1; ld.global.u32 %r5, [z];",
    ),
    "atomic on uninitialised memory": Fault(
        "uninitialised: global memory read", "red.global.add.u32 [z], 1;"
    ),
    "missing barrier after write": Fault(
        "race: ",
        "st.shared.u32 [%r4], 0; bar.sync 0; st.shared.u32 [%r3], tid; " + SHARED_READ,
        STORE_TILE + "bar.sync 0; " + SHARED_READ,
    ),
    "missing barrier before overwrite": Fault(
        "race: ",
        STORE_TILE + "bar.sync 0; ld.shared.u32 %r5, [%r4]; st.shared.u32 [%r3], 7;",
        STORE_TILE + "bar.sync 0; ld.shared.u32 %r5, [%r4]; bar.sync 0; st.shared.u32 [%r3], 7;",
    ),
    "write race in a block": Fault(
        "race: write after write",
        "st.global.u32 [y], tid;",
        "@%p0 st.global.u32 [y], tid;",
    ),
    "warp barrier does not order other warps": Fault(
        "race: ",
        STORE_TILE + "bar.warp.sync 0xffffffff; xor.b32 %r4, %r3, 128; ld.shared.u32 %r5, [%r4];",
        STORE_TILE + "bar.warp.sync 0xffffffff; ld.shared.u32 %r5, [%r4];",
    ),
    "shuffle does not order memory": Fault(
        "race: read after write",
        STORE_TILE + "shfl.sync.idx.b32 %r6, %r1, 0, 31, 0xffffffff; ld.shared.u32 %r5, [%r4];",
    ),
    "non-atomic accumulation in a block": Fault(
        "race",
        "ld.global.u32 %r5, [y]; add.u32 %r5, %r5, 1; st.global.u32 [y], %r5;",
        "red.global.add.u32 [y], 1;",
    ),
    "atomic and plain access": Fault(
        "race: ", "red.global.add.u32 [y], 1; ld.global.u32 %r5, [y];"
    ),
    "race between blocks": Fault(
        "race: read after write",
        "@%p3 exit; ld.global.u32 %r5, [y]; add.u32 %r5, %r5, 1; st.global.u32 [y], %r5;",
        "@%p3 exit; red.global.add.u32 [y], 1;",
        grid=4,
    ),
    "block scope is too narrow": Fault(
        "race",
        "@%p3 exit; red.relaxed.cta.global.add.u32 [y], 1;",
        "@%p3 exit; red.relaxed.gpu.global.add.u32 [y], 1;",
        grid=4,
    ),
    "missing fence between blocks": Fault(
        "race: read after write",
        LAST_BLOCK.format(fence=""),
        LAST_BLOCK.format(fence="membar.gl;"),
        grid=4,
    ),
    "write after the fence": Fault(
        "race: read after write",
        LAST_BLOCK.format(fence="membar.gl; st.global.u32 [%q5+64], 7;"),
        LAST_BLOCK.format(fence="st.global.u32 [%q5+64], 7; membar.gl;"),
        grid=4,
    ),
    "fence of the block only": Fault(
        "race: read after write", LAST_BLOCK.format(fence="membar.cta;"), grid=4
    ),
    "thread misses the barrier": Fault(
        "divergent barrier",
        "@%p0 bra SKIP; bar.sync 0; bra END; SKIP: bar.sync 1; END:",
        "bar.sync 0;",
    ),
    "barrier that others never reach": Fault(
        "deadlock: threads wait at a barrier",
        "setp.lt.u32 %p1, tid, 32; @%p1 bar.sync 1, 64;",
        "bar.sync 1, 64;",
    ),
    "divergent barrier": Fault(
        "divergent barrier: lanes of one warp wait at different barriers",
        "@%p0 bra OTHER;\nbar.sync 0;\nbra END;\nOTHER: bar.sync 0;\nEND:",
        # Threads that have exited do not count.
        "@%p0 exit; bar.sync 0;",
    ),
    "warp collective without all its lanes": Fault(
        "deadlock: threads wait at a warp collective",
        "setp.lt.u32 %p1, lane, 16; mov.u32 %r6, 0; @!%p1 bra SKIP; "
        "shfl.sync.idx.b32 %r6, %r1, 0, 31, 0xffffffff; bra END; SKIP: bar.sync 0; END:",
        "shfl.sync.idx.b32 %r6, %r1, 0, 31, 0xffffffff;",
    ),
    "lane outside its own mask": Fault(
        "divergent warp", "shfl.sync.idx.b32 %r6, %r1, 0, 31, 0xffff;"
    ),
    "missing cp.async wait": Fault(
        "uninitialised: asynchronous copy not waited for",
        CP_ASYNC + "bar.sync 0; " + SHARED_READ,
        CP_ASYNC + "cp.async.wait_group 0; bar.sync 0; " + SHARED_READ,
    ),
    "cp.async wait too shallow": Fault(
        "uninitialised: asynchronous copy not waited for",
        CP_ASYNC + "cp.async.wait_group 1; bar.sync 0; " + SHARED_READ,
    ),
    "cp.async over a buffer in use": Fault(
        "race: ",
        STORE_TILE + "bar.sync 0; " + SHARED_READ + CP_ASYNC + "cp.async.wait_all;",
        STORE_TILE
        + "bar.sync 0; "
        + SHARED_READ
        + "bar.sync 0; "
        + CP_ASYNC
        + "cp.async.wait_all;",
    ),
    "two cp.async in flight to one buffer": Fault(
        "race: write into an asynchronous copy in flight",
        CP_ASYNC + CP_ASYNC.replace("[%q2]", "[x]") + "cp.async.wait_all;",
        CP_ASYNC + "cp.async.wait_all; " + CP_ASYNC.replace("[%q2]", "[x]") + "cp.async.wait_all;",
    ),
    "missing mbarrier wait": Fault(
        "uninitialised: ",
        INIT + BULK + SHARED_READ,
        INIT + BULK + WAIT + SHARED_READ,
    ),
    "mbarrier not initialised": Fault(
        "uninitialised: mbarrier", "mbarrier.arrive.shared.b64 _, [full];"
    ),
    "mbarrier used before its initialisation is visible": Fault(
        "race",
        "@%p0 mbarrier.init.shared.b64 [full], 64; mbarrier.arrive.shared.b64 _, [full]; " + WAIT,
        "@%p0 mbarrier.init.shared.b64 [full], 64; bar.sync 0; "
        "mbarrier.arrive.shared.b64 _, [full]; " + WAIT,
    ),
    "mbarrier that never completes": Fault(
        "deadlock: threads wait at an mbarrier",
        "@%p0 mbarrier.init.shared.b64 [full], 65; bar.sync 0; "
        "mbarrier.arrive.shared.b64 _, [full]; " + WAIT,
    ),
    "too many arrivals": Fault(
        "invalid mbarrier",
        "@%p0 mbarrier.init.shared.b64 [full], 1; bar.sync 0; "
        "@%p0 mbarrier.arrive.shared.b64 _, [full], 2;",
    ),
    "bulk store not waited for": Fault(
        "missing wait: the block ended while a bulk store",
        STORE_TILE + "bar.sync 0; @%p3 exit; "
        "cp.async.bulk.global.shared::cta.bulk_group [y], [tile], 256; cp.async.bulk.commit_group;",
        STORE_TILE + "bar.sync 0; @%p3 exit; "
        "cp.async.bulk.global.shared::cta.bulk_group [y], [tile], 256; cp.async.bulk.commit_group; "
        "cp.async.bulk.wait_group.read 0;",
    ),
    "trap": Fault("trap", "trap;"),
}


def program(body: str) -> str:
    lines = (POINTERS + body).replace("; ", ";\n")  # findings tell instructions apart by line
    return kernel(lines, "x y z", shared=TILE)


def run(body: str, grid: int, order: int = 0) -> None:
    x = DeviceArray(np.arange(N, dtype=np.uint32), name="x")
    y = DeviceArray(np.zeros(N, np.uint32), name="y")
    z = DeviceArray(shape=1, dtype=np.uint32, name="z")
    with shuffled(order):
        load(program(body)).launch(grid, N, [x, y, z])


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(name: str) -> None:
    fault = FAULTS[name]
    with pytest.raises(SimError) as error:
        run(fault.bad, fault.grid)
    assert fault.report in str(error.value)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("name", [n for n, f in FAULTS.items() if f.good])
def test_correct_kernel_is_accepted(name: str, order: int) -> None:
    run(FAULTS[name].good, FAULTS[name].grid, order)


def test_report_names_kernel_thread_and_line() -> None:
    fault = FAULTS["out of bounds load"]
    with pytest.raises(
        SimError, match=r"kernel test block \(0,0,0\) thread \(63,0,0\) at PTX line \d+"
    ):
        run(fault.bad, 1)


def test_report_names_the_source_line() -> None:
    ptx = program("\n.loc 1 17 3\nst.global.u32 [%q3+256], tid;").replace(
        ".visible .entry", '.file 1 "dir/kernel.cu"\n.visible .entry'
    )
    y = DeviceArray(np.zeros(N, np.uint32))
    with pytest.raises(SimError, match=r"at kernel\.cu:17 \(PTX line"):
        load(ptx).launch(1, N, [y, y, y])


def test_both_sides_of_a_race_are_named() -> None:
    with pytest.raises(SimError, match=r"not ordered after block 0 thread \d+ at PTX line \d+"):
        run(FAULTS["write race in a block"].bad, 1)


def test_report_names_the_seed() -> None:
    """So that a finding in shuffled order can be reproduced."""
    with pytest.raises(SimError, match=r"GPUSIM_SEED=5, launch 1 since it was set"):
        run("trap;", 1, order=5)


def test_error_ends_the_launch_only() -> None:
    """The next launch starts afresh."""
    for _ in range(2):
        with pytest.raises(SimError, match="trap"):
            run("trap;", 1)
        run("st.global.u32 [%q3], tid;", 1)


def test_endless_loop_times_out() -> None:
    time_limit(0.2)
    try:
        with pytest.raises(SimError, match="timeout"):
            run("mov.u32 %r5, 0; AGAIN: add.u32 %r5, %r5, 1; bra AGAIN;", 1)
    finally:
        time_limit(120)


def test_wait_for_another_block_is_reported() -> None:
    """Block 0 waits for block 1, which starts after it."""
    body = (
        "@%p3 exit; setp.ne.u32 %p1, block, 0; @%p1 bra SET; "
        "SPIN: ld.acquire.gpu.global.u32 %r5, [y]; setp.eq.u32 %p2, %r5, 0; @%p2 bra SPIN; exit; "
        "SET: st.release.gpu.global.u32 [y], 1;"
    )
    with pytest.raises(SimError, match="deadlock"):
        run(body, 2)


@pytest.mark.parametrize(
    ("grid", "block", "report"),
    [
        (1, 2048, "block of 2048 threads"),
        ((1, 70000), 1, "grid too large"),
        (0, 32, "empty grid"),
        (1, 65, "launch bounds allow 64"),
    ],
)
def test_invalid_configuration(grid, block, report: str) -> None:
    ptx = program("").replace(")\n{", ") .maxntid 64\n{", 1)
    y = DeviceArray(np.zeros(N, np.uint32))
    with pytest.raises(SimError, match=report):
        load(ptx if block == 65 else program("")).launch(grid, block, [y, y, y])


def test_uninitialised_local_memory_is_nan() -> None:
    """It has no shadow: reading it shows in the results."""
    ptx = kernel(
        "mov.u64 %q1, stack; ld.local.u32 %r1, [%q1+4]; st.global.u32 [y], %r1;",
        shared=".local .align 8 .b8 stack[16];",
    )
    y = DeviceArray(np.zeros(1, np.uint32))
    load(ptx).launch(1, 1, [None, y])
    assert y.array[0] == 0xFFFFFFFF


def test_local_memory_bounds() -> None:
    ptx = kernel(
        "mov.u64 %q1, stack; st.local.u32 [%q1+8], tid; ld.local.u32 %r1, [%q1+16];",
        shared=".local .align 8 .b8 stack[16];",
    )
    with pytest.raises(SimError, match="out of bounds: load outside local memory"):
        load(ptx).launch(1, 32, [None, None])


PROGRAMS = [program(body) for f in FAULTS.values() for body in (f.bad, f.good) if body]
