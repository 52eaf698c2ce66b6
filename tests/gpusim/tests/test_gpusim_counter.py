"""The counter against traffic worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from .. import DeviceArray, counting, load
from .harness import kernel

pytestmark = pytest.mark.gpusim

N = 64


def count(body: str, *, shared: str = "", grid: int = 1, size: int = 4096):
    x = DeviceArray(np.zeros(size, np.uint32), name="x")
    y = DeviceArray(np.zeros(size, np.uint32), name="y")
    with counting() as counts:
        load(kernel(body, shared=shared)).launch(grid, N, [x, y])
    return counts.launches[0]


def test_coalesced_copy() -> None:
    launch = count(
        "mul.wide.u32 %q1, tid, 4; add.u64 %q2, x, %q1; add.u64 %q3, y, %q1;"
        "ld.global.u32 %r1, [%q2]; st.global.u32 [%q3], %r1;"
    )
    load_x = launch["x"].load
    assert (load_x.bytes, load_x.unique_bytes) == (256, 256)
    assert (load_x.requests, load_x.sectors, load_x.ideal_sectors) == (2, 8, 8)
    assert launch["y"].store.bytes == 256 and launch["y"].load.bytes == 0
    assert launch.bytes == launch.unique_bytes == 512


def test_strided_load_touches_more_sectors() -> None:
    launch = count("mul.wide.u32 %q1, tid, 64; add.u64 %q2, x, %q1; ld.global.u32 %r1, [%q2];")
    load_x = launch["x"].load
    assert (load_x.bytes, load_x.sectors, load_x.ideal_sectors) == (256, 64, 8)


def test_every_block_reads_the_same() -> None:
    body = "mul.wide.u32 %q1, tid, 4; add.u64 %q2, x, %q1; ld.global.u32 %r1, [%q2];"
    load_x = count(body, grid=5)["x"].load
    assert (load_x.bytes, load_x.unique_bytes, load_x.requests) == (5 * 256, 256, 10)


def test_requests_of_a_loop_are_told_apart() -> None:
    body = """
mov.u32 %r2, 0; mul.wide.u32 %q1, tid, 4; add.u64 %q2, x, %q1;
AGAIN: ld.global.u32 %r1, [%q2]; add.u64 %q2, %q2, 256; add.u32 %r2, %r2, 1;
setp.lt.u32 %p1, %r2, 8; @%p1 bra AGAIN;
"""
    load_x = count(body)["x"].load
    assert (load_x.bytes, load_x.requests, load_x.sectors) == (2048, 16, 64)


def test_broadcast_and_vectors() -> None:
    body = "ld.global.u32 %r1, [x]; mul.wide.u32 %q1, tid, 16; add.u64 %q2, y, %q1;"
    launch = count(body + "st.global.v4.u32 [%q2], {%r1, %r1, %r1, %r1};")
    assert (launch["x"].load.sectors, launch["x"].load.unique_bytes) == (2, 4)
    assert (launch["y"].store.bytes, launch["y"].store.sectors) == (1024, 32)


def test_atomics_count_apart() -> None:
    launch = count("red.global.add.u32 [y], 1;")
    assert launch["y"].atomic.bytes == 256 and launch["y"].store.bytes == 0


# Stride in words between the lanes, and the wavefronts of a request of 32 lanes.
@pytest.mark.parametrize(("stride", "waves"), [(1, 1), (2, 2), (4, 4), (32, 32), (33, 1), (0, 1)])
def test_bank_conflicts(stride: int, waves: int) -> None:
    body = (
        f"mul.lo.u32 %r1, lane, {4 * stride}; mov.u32 %r2, tile; add.u32 %r3, %r2, %r1;"
        "setp.ge.u32 %p1, tid, 32; @%p1 exit; setp.eq.u32 %p2, tid, 0;"
        "atom.shared.exch.b32 %r4, [%r3], 0;"
    )
    zero = "st.shared.u32 [%r3], 0; bar.warp.sync 0xffffffff; ld.shared.u32 %r4, [%r3];"
    body = body.replace("atom.shared.exch.b32 %r4, [%r3], 0;", zero)
    shared = count(body, shared=".shared .align 16 .b8 tile[8192];").shared
    assert shared.requests == 2 and shared.wavefronts == 2 * waves
    assert shared.bank_conflicts == 2 * (waves - 1)
    assert shared.load_bytes == shared.store_bytes == 128


def test_wide_shared_accesses_take_several_wavefronts() -> None:
    body = (
        "mul.lo.u32 %r1, tid, 16; mov.u32 %r2, tile; add.u32 %r3, %r2, %r1;"
        "st.shared.v4.u32 [%r3], {tid, tid, tid, tid};"
    )
    shared = count(body, shared=".shared .align 16 .b8 tile[1024];").shared
    assert (shared.requests, shared.wavefronts, shared.bank_conflicts) == (2, 8, 0)


def test_nothing_is_counted_outside() -> None:
    with counting() as counts:
        pass
    assert counts.launches == []
